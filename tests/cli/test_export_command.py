"""The command `export`."""

import pytest
from command_line import SMALL, flowgrain, refused, succeeded
from safetensors.torch import load_file


def weights(folder):
    (file,) = folder.rglob("*.safetensors")
    return load_file(file)


def equal(one, other):
    return one.keys() == other.keys() and all((one[name] == other[name]).all() for name in one)


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_an_export_is_the_same_as_that_of_the_training(directory, kind):
    words = (
        "training.ema_decay=0.5",
        "training.checkpoint_every=1",
        "optimizer.learning_rate=1e-3",
    )
    lora = ("lora.rank=2",) if kind == "lora" else ()
    succeeded("train", "g2rpo", *SMALL, *words, *lora, "--out", "run")
    trained = weights(directory / "run" / "export")
    assert succeeded("export", "run", "--out", "a/b") == (
        "wrote a/b from run/checkpoints/step-000002\n"
    )
    assert equal(weights(directory / "a/b"), trained)
    succeeded("export", "run", "--checkpoint", "1")
    assert not equal(weights(directory / "run/export-1"), trained)
    succeeded("export", "run")
    assert equal(weights(directory / "run/export"), trained)
    assert equal(weights(directory / "run/export"), weights(directory / "a/b"))
    succeeded("evaluate", "run/export", "a/b/", "--steps", "1", "evaluation.num_prompts=2")


def test_the_best_checkpoint(run, directory):
    output = succeeded("export", run, "--checkpoint", "best")
    assert "export-best from" in output
    assert weights(run / "export-best")


def test_what_cannot_be_exported(run, directory):
    assert "not the directory of a run" in refused("export", "nowhere")
    message = refused("export", run, "--checkpoint", "7")
    assert "--checkpoint 7: there is no such checkpoint" in message
    assert message.endswith("Use best, or step 2.\n")
    assert "--checkpoint two" in refused("export", run, "--checkpoint", "two")
    (directory / "full").mkdir()
    (directory / "full" / "mine.txt").write_text("")
    assert "--out full: exists" in refused("export", run, "--out", "full")
    assert (directory / "full" / "mine.txt").exists()
    succeeded("train", "g2rpo", *SMALL, "--out", "new")
    assert "Use step 2." in refused("export", "new", "--checkpoint", "99")
    assert "no checkpoint in new was evaluated" in refused("export", "new", "--checkpoint", "best")
    for file in (directory / "new").glob("checkpoints/*/*.safetensors"):
        file.write_bytes(b"")
    result = flowgrain("export", "new")
    assert result.status == 1
    assert "is damaged" in result.stderr
