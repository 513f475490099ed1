"""Log levels of the model libraries."""

import logging
import warnings
from typing import Any


def quiet_libraries() -> None:
    """Silence the warnings and progress bars of diffusers, transformers, huggingface_hub and torch.

    Most of them concern the loading of models, such as unknown entries of a config.json. It is
    called before models and rewards are loaded, from Python too. A library in which the user has
    switched more messages on is not changed.
    """
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module=r"huggingface_hub\.")
    import diffusers
    import transformers

    libraries: tuple[Any, ...] = (diffusers, transformers)
    for library in libraries:
        if library.logging.get_verbosity() >= logging.WARNING:
            library.logging.set_verbosity_error()
            library.logging.disable_progress_bar()
    torch_log = logging.getLogger("torch")
    if torch_log.level in (logging.NOTSET, logging.WARNING):
        torch_log.setLevel(logging.ERROR)
