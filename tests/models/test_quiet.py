"""Log levels of the model libraries."""

import logging
import os
import subprocess
import sys

import diffusers
import pytest
import transformers
import twins

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


@pytest.mark.slow
def test_nothing_is_printed_from_python(tmp_path):
    """A process of its own, because the libraries are imported once."""
    twins.flux(tmp_path / "flux")
    code = (
        "from flowgrain.training.load import load_model\n"
        "from flowgrain import Trainer, load_config\n"
        "Trainer(load_config('demo'))\n"
        "changes = {'model.path': 'flux', 'model.height': 8, 'model.width': 8}\n"
        "load_model(load_config('flux/g2rpo', changes))\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TRANSFORMERS_VERBOSITY"}
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_the_choice_of_the_user_is_kept():
    level = transformers.logging.get_verbosity()
    try:
        transformers.logging.set_verbosity_info()
        quiet_libraries()
        assert transformers.logging.get_verbosity() == logging.INFO
    finally:
        transformers.logging.set_verbosity(level)
