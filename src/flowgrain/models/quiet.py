"""Log levels of the model libraries."""

import logging
import warnings
from typing import Any


def quiet_libraries() -> None:
    """Silence the warnings and progress bars of diffusers, transformers and torch.

    Most of them concern the loading of models, such as unknown entries of a config.json.
    """
    warnings.filterwarnings("ignore", category=FutureWarning)
    import diffusers
    import transformers

    libraries: tuple[Any, ...] = (diffusers, transformers)
    for library in libraries:
        library.logging.set_verbosity_error()
        library.logging.disable_progress_bar()
    logging.getLogger("torch").setLevel(logging.ERROR)
