"""Helpers to read a page."""

import re
from html.parser import HTMLParser


class Page(HTMLParser):
    """The visible text and the image sources of a page. Raises ValueError for unbalanced tags."""

    VOID = ("meta", "img", "br", "link", "path", "use", "g", "rect")

    def __init__(self, html: str) -> None:
        super().__init__()
        self.words: list[str] = []
        self.sources: list[str] = []
        self.open: list[str] = []
        self.feed(re.sub(r"<svg.*?</svg>", "<b>FIGURE</b>", html, flags=re.DOTALL))
        if self.open:
            raise ValueError(f"not closed: {self.open}")

    def handle_starttag(self, tag, attrs):
        if tag == "img":
            self.sources.append(dict(attrs)["src"])
            assert dict(attrs)["alt"]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if self.open.pop() != tag:
            raise ValueError(f"</{tag}> closes nothing")

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "title"):
            self.words += data.split()

    @property
    def text(self) -> str:
        return " ".join(self.words)
