"""The files of the pages: HTML, JavaScript and CSS, without a build step."""

import base64
import hashlib
import re
from functools import cached_property
from pathlib import Path

FOLDER = Path(__file__).parent / "assets"
_TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
_INLINE_SCRIPT = re.compile(r"<script(?![^>]*\bsrc=)[^>]*>(.*?)</script>", re.DOTALL)


class Assets:
    """The files of the pages. Only files that exist when the object is made are served.

    Args:
        folder: the directory with index.html.
    """

    def __init__(self, folder: Path = FOLDER) -> None:
        found = sorted(path for path in folder.rglob("*") if path.suffix in _TYPES)
        self._files = {path.relative_to(folder).as_posix(): path for path in found}

    @property
    def names(self) -> list[str]:
        """Names of all files, relative to the directory."""
        return list(self._files)

    def read(self, name: str) -> tuple[bytes, str] | None:
        """Content and media type of a file. None if there is no such file."""
        path = self._files.get(name)
        return (path.read_bytes(), _TYPES[path.suffix]) if path else None

    def text(self, name: str) -> str:
        """The content of a file as text.

        Raises:
            KeyError: there is no such file.
        """
        return self._files[name].read_text(encoding="utf-8")

    @cached_property
    def script_hashes(self) -> list[str]:
        """Digests of the scripts inside of index.html, for the content security policy."""
        return [
            "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
            for script in _INLINE_SCRIPT.findall(self.text("index.html"))
        ]
