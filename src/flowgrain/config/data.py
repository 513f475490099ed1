"""The section `data`: prompt files and data sets of images."""

from collections.abc import Sequence

from flowgrain.image_data import DataKind
from flowgrain.settings import Section, Setting


class DataConfig(Section):
    """Prompt files and data sets of images."""

    prompts: str | None = Setting(
        None,
        "File with training prompts: .txt, .json, .jsonl, .csv or .parquet. "
        "Default: the model's bundled prompts.",
        keep=True,
        min_length=1,
        max_length=4096,
    )
    eval_prompts: str | None = Setting(
        None,
        "File with evaluation prompts. Default: the model's bundled prompts, or the last tenth of "
        "data.prompts, which is then not used for training.",
        min_length=1,
        max_length=4096,
    )
    pairs: str | None = Setting(
        None,
        "Data set of preferred and rejected images to train on in place of sampled images: .jsonl, "
        ".json, .csv or .parquet with the columns prompt, image_chosen and image_rejected, or "
        "those of Pick-a-Pic.",
        keep=True,
        min_length=1,
        max_length=4096,
    )
    images: str | None = Setting(
        None,
        "Data set of images to train on in place of sampled images: .jsonl, .json, .csv or "
        ".parquet with the columns prompt and image.",
        keep=True,
        min_length=1,
        max_length=4096,
    )

    @property
    def kind(self) -> DataKind | None:
        """The kind of the data set of images. None: images are sampled."""
        return "pairs" if self.pairs is not None else "images" if self.images is not None else None

    @property
    def image_file(self) -> str | None:
        """The data set of images, if there is one."""
        return self.pairs if self.pairs is not None else self.images

    def check(self, method: str, trains_on: DataKind | None, known: Sequence[str]) -> None:
        """Check that a method can train on the data set.

        Args:
            method: name of the method.
            trains_on: kind of data set that the method can train on.
            known: names of the methods that can train on `kind`.

        Raises:
            ValueError: it cannot, or there are several data sets.
        """
        setting = f"data.{self.kind}={self.image_file}"
        if self.kind is not None and self.kind != trains_on:
            raise ValueError(
                f"{setting}: method {method!r} cannot train on this kind of data. Remove it, or "
                f"use method {' or '.join(known)}."
            )
        if self.pairs is not None and self.images is not None:
            raise ValueError(f"data.images={self.images}: use either data.pairs or data.images.")
        if self.kind is not None and self.prompts is not None:
            raise ValueError(
                f"data.prompts={self.prompts}: the training prompts are those of {setting}. "
                "Remove data.prompts."
            )
