"""Votes of the arena: which of two images of a prompt is better.

Votes are lines of arena/votes.jsonl in the directory of the first source. A line is only appended.
Ids depend on the given directories, and a run may be trained again. Therefore a vote contains the
digests of its images, and it counts only while its sources have these images.
"""

import hashlib
import io
import json
import os
import threading
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from flowgrain.records.json_text import parse_json
from flowgrain.settings import SettingsError
from flowgrain.statistics import share_interval
from flowgrain.view.catalog import Catalog, Entry
from flowgrain.view.readable import DAMAGED, Missing, reason
from flowgrain.view.sources import Source, source_of

FILE = ("arena", "votes.jsonl")
MAX_BYTES = 64 * 2**20
"""Size of a file of votes at which no more votes are accepted."""
_OTHER = {"a": "b", "b": "a", "tie": "tie"}
_writing = threading.Lock()


class BadVote(ValueError):
    """A vote is not valid. The message names the value."""


@dataclass(frozen=True)
class Vote:
    """A vote.

    Attributes:
        time: time in ISO format, UTC.
        a: id of the first source.
        b: id of the second source.
        prompt: text of the prompt.
        place: place of the prompt in the sources.
        left: the source that was shown on the left, "a" or "b".
        vote: the better source, "a" or "b", or "tie".
        a_image: SHA-256 of the image of the first source. Empty: not known.
        b_image: SHA-256 of the image of the second source. Empty: not known.
    """

    time: str
    a: str
    b: str
    prompt: str
    place: int
    left: str
    vote: str
    a_image: str = ""
    b_image: str = ""

    def swapped(self) -> "Vote":
        """The same vote with the sources in the other order."""
        return replace(
            self,
            a=self.b,
            b=self.a,
            left=_OTHER[self.left],
            vote=_OTHER[self.vote],
            a_image=self.b_image,
            b_image=self.a_image,
        )


def add(catalog: Catalog, values: Any) -> dict[str, Any]:
    """Append a vote. It is on the disk when this returns.

    Args:
        catalog: the directories.
        values: a, b, place, left and vote of the vote.

    Returns:
        The vote.

    Raises:
        BadVote: a value is wrong, or the sources have different prompts at this place.
        Missing: there is no such source.
        OSError: the file cannot be written.
    """
    if not isinstance(values, Mapping):
        raise BadVote("The vote is not a JSON object.")
    for name, allowed in (("left", ("a", "b")), ("vote", tuple(_OTHER))):
        if values.get(name) not in allowed:
            raise BadVote(f"{name}={values.get(name)!r}: use {', '.join(allowed)}.")
    a, b, place = values.get("a"), values.get("b"), values.get("place")
    if not (isinstance(a, str) and isinstance(b, str)) or a == b:
        raise BadVote(f"a={a!r}, b={b!r}: use the ids of two sources.")
    first, second = source_of(catalog, a), source_of(catalog, b)
    if type(place) is not int or not 0 <= place < min(first.images, second.images):
        raise BadVote(f"place={place!r}: the sources have no image there.")
    prompt = first.prompts[place]
    if second.prompts[place] != prompt:
        raise BadVote(f"place={place}: the sources have different prompts there.")
    now = datetime.now(UTC).isoformat(timespec="seconds")
    digests = first.digest(place), second.digest(place)
    vote = Vote(now, a, b, prompt, place, values["left"], values["vote"], *digests)
    _append(first.entry.file(*FILE), json.dumps(asdict(vote)).encode() + b"\n")
    return asdict(vote)


def _append(path: Path, line: bytes) -> None:
    path.parent.mkdir(exist_ok=True)
    with _writing:
        file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        try:
            size = os.fstat(file).st_size
            if size > MAX_BYTES:
                raise BadVote(f"{path}: has more than {MAX_BYTES:,} bytes. Move it away.")
            complete = size == 0 or os.pread(file, 1, size - 1) == b"\n"
            os.write(file, line if complete else b"\n" + line)  # one write, also for other tabs
            os.fsync(file)
        finally:
            os.close(file)


def read(entry: Entry) -> list[Vote]:
    """The votes in a directory. Damaged lines are left out."""
    path = entry.file(*FILE)
    lines = path.read_bytes().splitlines() if path.is_file() else []
    return [vote for line in lines if (vote := _parse(line)) is not None]


def _parse(line: bytes) -> Vote | None:
    try:
        vote = Vote(**parse_json(line))
    except (ValueError, TypeError):
        return None
    texts = [value for name, value in vars(vote).items() if name != "place"]
    valid = all(isinstance(text, str) for text in texts) and type(vote.place) is int
    return vote if valid and vote.left in ("a", "b") and vote.vote in _OTHER else None


def votes_between(catalog: Catalog, a: str, b: str) -> list[Vote]:
    """The votes on the present images of `a` and `b`, in the order of time, as votes on (a, b).

    Raises:
        Missing: there is no such source.
    """
    sources = {name: source_of(catalog, name) for name in (a, b)}
    entries = dict.fromkeys(source.entry for source in sources.values())
    found = [vote for entry in entries for vote in read(entry)]
    same = [vote for vote in found if (vote.a, vote.b) == (a, b)]
    swapped = [vote.swapped() for vote in found if (vote.a, vote.b) == (b, a)]
    present = [vote for vote in [*same, *swapped] if _is_present(sources, vote)]
    return sorted(present, key=lambda vote: vote.time)


def _is_present(sources: Mapping[str, Source], vote: Vote) -> bool:
    """Whether the sources still have the images of a vote."""
    try:
        for name in (vote.a, vote.b):
            _check(sources[name], vote)
    except (Missing, *DAMAGED):
        return False
    return True


def _check(source: Source, vote: Vote) -> None:
    """Check that a source has the image of a vote.

    Raises:
        Missing: it has no image, or another one, or the vote does not say which.
    """
    if not 0 <= vote.place < source.images or source.prompts[vote.place] != vote.prompt:
        raise Missing(f"{source.id} has no image of {vote.prompt!r} any more")
    digest = vote.a_image if source.id == vote.a else vote.b_image
    if not digest:
        raise Missing("it does not contain the digests of its images")
    if source.digest(vote.place) != digest:
        raise Missing(f"{source.id} has another image of {vote.prompt!r} now")


def tally(catalog: Catalog, a: str, b: str) -> dict[str, Any]:
    """The answer to /api/votes: the votes, and how often `a` wins. A tie counts half."""
    votes = votes_between(catalog, a, b)
    wins_a, wins_b, ties = (sum(vote.vote == kind for vote in votes) for kind in _OTHER)
    return {
        "votes": [asdict(vote) for vote in votes],
        "wins_a": wins_a,
        "wins_b": wins_b,
        "ties": ties,
        "win_rate": asdict(share_interval(wins_a + ties / 2, len(votes))),
    }


def all_votes(catalog: Catalog) -> list[Vote]:
    """The votes in all directories."""
    entries = [*catalog.entries("run"), *catalog.entries("evaluation")]
    return [vote for entry in entries for vote in read(entry)]


def preference_data(
    catalog: Catalog, votes: Iterable[Vote], damaged: list[str]
) -> Iterator[tuple[str, bytes]]:
    """Names and contents of the files of a data set for `data.pairs`: images/ and pairs.jsonl.

    Ties are left out. Votes on images that changed are left out with a note in `damaged`.

    Raises:
        Missing: no pair is left.
    """
    written: set[str] = set()
    rows = []
    for vote in votes:
        if vote.vote == "tie":
            continue
        winner, loser = (vote.a, vote.b) if vote.vote == "a" else (vote.b, vote.a)
        try:
            images = [_image(catalog, source, vote) for source in (winner, loser)]
        except (Missing, *DAMAGED) as error:
            damaged.append(f"vote of {vote.time}: {reason(error)}")
            continue
        for name, image in images:
            if name not in written:
                written.add(name)
                yield name, image
        chosen, rejected = (name for name, _ in images)
        row = {"prompt": vote.prompt, "image_chosen": chosen, "image_rejected": rejected}
        rows.append(json.dumps(row) + "\n")
    if not rows:
        raise Missing("There is no vote that prefers an image. Vote in the arena first.")
    yield "pairs.jsonl", "".join(rows).encode()


def _image(catalog: Catalog, name: str, vote: Vote) -> tuple[str, bytes]:
    """The name in the data set and the content of an image of a vote.

    Raises:
        Missing: see `_check`.
    """
    source = source_of(catalog, name)
    _check(source, vote)
    content, kind = source.image(vote.place)
    digest = hashlib.sha256(name.encode()).hexdigest()[:12]
    return f"images/{digest}-{vote.place:06d}.{kind.removeprefix('image/')}", content


def write_preferences(catalog: Catalog, folder: Path) -> tuple[Path, int, list[str]]:
    """Write all votes as a data set for `data.pairs`.

    Args:
        catalog: the directories.
        folder: a new directory.

    Returns:
        The path of pairs.jsonl, the number of pairs, and what was left out.

    Raises:
        SettingsError: the directory is not empty, or there is no vote that prefers an image.
        OSError: a file cannot be written.
    """
    if folder.exists() and (folder.is_file() or any(folder.iterdir())):
        raise SettingsError(f"--export-votes {folder}: is not empty. Use a new directory.")
    damaged: list[str] = []
    content = b""
    try:
        for name, content in preference_data(catalog, all_votes(catalog), damaged):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
    except Missing as error:
        raise SettingsError(f"--export-votes {folder}: {error}") from None
    return folder / "pairs.jsonl", content.count(b"\n"), damaged  # pairs.jsonl comes last


def zipped(files: Iterable[tuple[str, bytes]]) -> bytes:
    """A ZIP file with `files`."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as archive:
        for name, content in files:
            archive.writestr(name, content)
    return stream.getvalue()
