"""Cleaning of prompts before tokenization, as in the tokenizers of CLIP, open_clip and HPSv2.

The tokenizers of transformers do not repair broken text. A model that was trained with these
functions needs them. Plain ASCII text without HTML entities has the same tokens with and without
them.
"""

import html

import ftfy


def basic(text: str) -> str:
    """`text` with repaired characters and without HTML entities (`basic_clean` of open_clip).

    ftfy repairs text that was decoded with a wrong encoding, straightens curly quotes and removes
    terminal escapes. HTML entities are replaced twice, because web text is often escaped twice.
    Spaces at both ends are removed.
    """
    return html.unescape(html.unescape(ftfy.fix_text(text))).strip()


def whitespace(text: str) -> str:
    """`basic(text)` with a single space in place of each sequence of white space."""
    return " ".join(basic(text).split())


def lower(text: str) -> str:
    """`whitespace(text)` in lower case.

    The text that open_clip ("lower", its default), OpenAI's clip package and HPSv2 tokenize.
    """
    return whitespace(text).lower()
