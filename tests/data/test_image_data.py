"""Data sets of images: layouts, the pixels of an image, and the errors of unusable files."""

import hashlib
import io
import json
import tracemalloc

import numpy as np
import pytest
import torch
from PIL import Image

from flowgrain import SettingsError
from flowgrain.data import Prompt
from flowgrain.image_data import ImagePrompt, check_image_files, load_images, read_image_data
from flowgrain.training.state import fingerprint

COLORS = {"red": (255, 0, 0), "blue": (0, 0, 255)}


def png(color, size=(8, 6)):
    file = io.BytesIO()
    Image.new("RGB", size, COLORS[color]).save(file, "PNG")
    return file.getvalue()


def write_rows(path, rows):
    """A data set with `rows`, in the format of the suffix."""
    if path.suffix == ".parquet":
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "images").mkdir()
    for color in COLORS:
        (tmp_path / "images" / f"{color}.png").write_bytes(png(color))
    return tmp_path


PAIR = {"prompt": "a", "image_chosen": "images/red.png", "image_rejected": "images/blue.png"}


def mean_colors(prompt):
    """The main channel of every image."""
    return load_images(prompt, 4, 4).mean((2, 3)).argmax(1).tolist()


@pytest.mark.parametrize("name", ["pairs.jsonl", "pairs.parquet"])
def test_paths_are_relative_to_the_file(folder, name):
    rows = [PAIR, {**PAIR, "prompt": "b", "image_chosen": str(folder / "images" / "blue.png")}]
    data = read_image_data("pairs", write_rows(folder / name, [{**row, "tag": 3} for row in rows]))
    check_image_files(data.prompts)
    assert [prompt.text for prompt in data.prompts] == ["a", "b"]
    assert [mean_colors(prompt) for prompt in data.prompts] == [[0, 2], [2, 2]]
    assert data.prompts[0].fields == {"tag": 3}
    assert data.ties == 0


def test_the_layout_of_pick_a_pic(folder):
    """The preferred image comes first, ties are left out, and images may be structs."""
    first, second = png("red"), png("blue")
    rows = [
        {"caption": caption, "jpg_0": first, "jpg_1": second, "label_0": a, "label_1": b}
        for caption, a, b in (("a", 1.0, 0.0), ("b", 0.5, 0.5), ("c", 0.0, 1.0))
    ]
    data = read_image_data("pairs", write_rows(folder / "a.parquet", rows))
    assert data.ties == 1
    assert [prompt.text for prompt in data.prompts] == ["a", "c"]
    assert [mean_colors(prompt) for prompt in data.prompts] == [[0, 2], [2, 0]]
    assert data.prompts[1].place.endswith("row 3")
    structs = [{"prompt": "a", "image": {"bytes": second, "path": None}}]
    data = read_image_data("images", write_rows(folder / "b.parquet", structs))
    assert mean_colors(data.prompts[0]) == [2]


def test_images_are_cropped_around_the_center(folder):
    pixels = np.zeros((10, 30, 3), dtype=np.uint8)
    pixels[:, 10:20] = 255
    Image.fromarray(pixels).convert("P").save(folder / "wide.png")
    prompt = ImagePrompt("a", {}, (folder / "wide.png",))
    image = load_images(prompt, 10, 10)
    assert image.shape == (1, 3, 10, 10)
    assert image.dtype == torch.float32
    assert (image == 1).all()
    assert load_images(prompt, 5, 15).shape == (1, 3, 5, 15)


BROKEN = [
    ({**PAIR, "image_chosen": "images/green.png"}, r"row 2: there is no file .*images/green\.png"),
    ({**PAIR, "image_chosen": "images"}, r"row 2: .*images cannot be read \(Is a directory\)"),
    ({**PAIR, "image_rejected": "a.jsonl"}, r"row 2: .*a\.jsonl cannot be read \(not a complete"),
    ({**PAIR, "image_rejected": 3}, "row 2: image_rejected is neither a path nor the content"),
    ({**PAIR, "image_rejected": ""}, "row 2: image_rejected is neither a path nor the content"),
    ({**PAIR, "image_rejected": None}, "row 2 has no value in the columns image_chosen, image_rej"),
    ({"prompt": "a", "image": "x.png"}, r"row 2 has no value .*Its columns besides.*: image\.$"),
    ({"prompt": "a"}, "Its columns besides the prompt: none"),
    ({"text": " ", **{k: v for k, v in PAIR.items() if k != "prompt"}}, "line 2 is blank"),
    ({k: v for k, v in PAIR.items() if k != "prompt"}, "line 2 has no `prompt` field"),
    (
        {"prompt": "a", "jpg_0": "x", "jpg_1": "y", "label_0": "1", "label_1": "0"},
        "row 2: label_0 and label_1 are not numbers",
    ),
]


@pytest.mark.parametrize(("row", "message"), BROKEN)
def test_a_broken_row_is_one_line_with_its_number(folder, row, message):
    path = write_rows(folder / "a.jsonl", [PAIR, row])
    with pytest.raises(SettingsError, match=message) as caught:
        check_image_files(read_image_data("pairs", path).prompts)
    assert str(caught.value).startswith(f"data.pairs={path}: ")
    assert "\n" not in str(caught.value)


def test_unusable_files(folder):
    for name, content, message in (
        ("a.txt", "a red cat", r"not a data set\. Use a \.jsonl"),
        ("a.jsonl", "", "the file is empty"),
        ("b.jsonl", "{", "line 1 is not JSON"),
        ("a.parquet", "{}", "not a Parquet file"),
    ):
        (folder / name).write_text(content)
        with pytest.raises(SettingsError, match=message):
            read_image_data("pairs", str(folder / name))
    missing = str(folder / "other" / "missing.jsonl")
    with pytest.raises(SettingsError, match=r"there is no such file\. .* of a data set of images"):
        read_image_data("images", missing)
    ties = [{"prompt": "a", "jpg_0": "x", "jpg_1": "y", "label_0": 0.5, "label_1": 0.5}] * 3
    with pytest.raises(SettingsError, match="all 3 pairs are ties"):
        read_image_data("pairs", write_rows(folder / "ties.jsonl", ties))


def test_a_truncated_image_is_found_when_it_is_loaded(folder):
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "whole.png")
    (folder / "cut.png").write_bytes((folder / "whole.png").read_bytes()[:2000])
    row = {"prompt": "a", "image": "cut.png"}
    data = read_image_data("images", write_rows(folder / "a.jsonl", [row]))
    check_image_files(data.prompts)
    with pytest.raises(
        ValueError, match=r"row 1: .*cut\.png cannot be read \(not a complete image"
    ):
        load_images(data.prompts[0], 8, 8)


def test_other_images_are_another_data_set(folder):
    one, other = (ImagePrompt("a", {}, (image,)) for image in (b"1", b"2"))
    assert fingerprint([one]) != fingerprint([other])
    assert fingerprint([ImagePrompt("a", {}, (folder / "a",))]) != fingerprint([one])
    assert fingerprint([Prompt("a")]) == hashlib.sha256(b"a").hexdigest()
    both = hashlib.sha256(b"a\0a" + b"1\0" + b"2").hexdigest()
    assert fingerprint([one, other]) == both


def test_the_fingerprint_of_a_data_set_does_not_copy_it():
    prompts = [ImagePrompt("a", {}, (bytes(100_000),)) for _ in range(20)]
    tracemalloc.start()
    fingerprint(prompts)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100_000


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_pixels_are_white(folder, mode):
    pixels = np.zeros((8, 8, 4), dtype=np.uint8)
    pixels[:, 4:, 3] = 255  # the left half is transparent black, the right half is black
    image = Image.fromarray(pixels, "RGBA")
    image = image.quantize() if mode == "P" else image.convert(mode)
    image.save(folder / "a.png")
    loaded = load_images(ImagePrompt("a", {}, (folder / "a.png",)), 8, 8)
    assert (loaded[..., :4] == 1).all()
    assert (loaded[..., 4:] == 0).all()


@pytest.mark.parametrize(("kind", "suffix"), [(np.uint16, "png"), (np.float32, "tiff")])
def test_images_with_more_than_8_bits_are_refused(folder, kind, suffix):
    Image.fromarray(np.full((8, 8), 20_000, dtype=kind)).save(folder / f"a.{suffix}")
    path = folder / f"a.{suffix}"
    for image in (path, path.read_bytes()):
        prompt = ImagePrompt("a", {}, (image,), "row 1")
        with pytest.raises(SettingsError, match=r"^row 1: .* has more than 8 bits per channel\."):
            check_image_files([prompt])
