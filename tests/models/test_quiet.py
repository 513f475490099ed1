"""Log levels of the model libraries."""

import logging

import diffusers
import transformers

from flowgrain.models.quiet import quiet_libraries


def test_quiet_libraries():
    levels = [library.logging.get_verbosity() for library in (diffusers, transformers)]
    torch_level = logging.getLogger("torch").level
    try:
        quiet_libraries()
        assert diffusers.logging.get_verbosity() == logging.ERROR
        assert transformers.logging.get_verbosity() == logging.ERROR
        assert not logging.getLogger("torch").isEnabledFor(logging.WARNING)
    finally:
        for library, level in zip((diffusers, transformers), levels, strict=True):
            library.logging.set_verbosity(level)
            library.logging.enable_progress_bar()
        logging.getLogger("torch").setLevel(torch_level)
