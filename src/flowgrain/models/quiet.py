"""Log levels of the model libraries."""

import logging
import warnings


def quiet_libraries() -> None:
    """Silence the warnings and progress bars of diffusers, transformers and torch.

    They are about loading models, such as unknown entries of a config.json.
    """
    warnings.filterwarnings("ignore", category=FutureWarning)
    import diffusers

    diffusers.logging.set_verbosity_error()
    diffusers.logging.disable_progress_bar()
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("torch").setLevel(logging.ERROR)
