"""Requests to a reward server, with limits on time, size and failures. Also tokens and PNG images.

A server may be dead, slow or hostile. A watcher thread closes the connections of requests that take
too long, whatever they wait for, and reports long waits.
"""

import io
import logging
import os
import threading
import time
import zlib
from collections.abc import Callable
from http.client import HTTPException
from typing import Self, TypeVar

import requests
from PIL import Image
from pydantic import ValidationError
from torch import Tensor
from urllib3.exceptions import HTTPError

from flowgrain.rewards.connections import Attempt, WatchedAdapter
from flowgrain.settings import one_line

log = logging.getLogger(__name__)
# They log tracebacks of damaged headers. The reason of the failed request says the same.
for _name in ("urllib3.connection", "urllib3.connectionpool"):
    logging.getLogger(_name).setLevel(logging.ERROR)

T = TypeVar("T")

MAX_ANSWER = 4 * 2**20
"""Largest answer of a server in bytes, compressed and decompressed."""
NOTICE_SECONDS = 10.0
"""A wait is reported after this time, and again each time it has doubled."""
_SHOWN = 200
"""Characters of a text from a server that a message shows."""
_RETRIED = (429, 500, 502, 503, 504)
_ACCEPT = {"Accept-Encoding": "identity", "Content-Type": "application/json"}


class ServerError(Exception):
    """A server returned no usable answer. The message names the server and the reason."""


class Failure(Exception):
    """An attempt failed.

    Attributes:
        again: whether another attempt may succeed.
        busy_seconds: the server asked to wait. Such an attempt is not counted.
    """

    def __init__(self, reason: str, again: bool, busy_seconds: float | None = None) -> None:
        super().__init__(reason)
        self.again, self.busy_seconds = again, busy_seconds


class Server:
    """The connection to a reward server.

    A request is repeated after a connection error, and after the statuses 429, 500, 502, 503, 504.
    After `patience` failed requests in a row, or at the deadline, the server is given up until the
    next scoring call.

    Args:
        url: address of the requests, for messages too.
        token_variable: environment variable with a bearer token. Without it, no token is sent.
        timeout: longest time of one request from the connection to the end of the answer, in
            seconds.
        deadline: longest time of a scoring call with all its requests, in seconds.
        retries: repetitions of a failed request.
        backoff: factor of the exponential waiting time between repetitions, in seconds.
        connections: number of connections that are kept open.
        patience: failed requests in a row after which the server is given up.
    """

    def __init__(
        self,
        url: str,
        token_variable: str,
        *,
        timeout: float,
        deadline: float,
        retries: int,
        backoff: float,
        connections: int = 1,
        patience: int = 2,
    ) -> None:
        self.url, self.timeout, self.deadline = url, timeout, deadline
        self.retries, self.backoff, self.patience = retries, backoff, patience
        self.failures = 0
        self.session = requests.Session()
        for scheme in ("http://", "https://"):
            self.session.mount(scheme, WatchedAdapter(pool_maxsize=connections))
        token = os.environ.get(token_variable)
        if token:
            self.session.headers["Authorization"] = b"Bearer " + os.fsencode(token)

    def __str__(self) -> str:
        return f"the reward server at {self.url}"


class ScoringCall:
    """The requests of one scoring call, with a common deadline. A context manager.

    Attributes:
        reason: reason of the first failed request, or None.
        gave_up: the server is not used any more in this step.
    """

    def __init__(self, server: Server) -> None:
        self.server = server
        self.reason: str | None = None
        self.gave_up = False
        self._begin = time.monotonic()
        self._until = self._begin + server.deadline
        self._attempts: set[Attempt] = set()
        self._lock, self._done = threading.Lock(), threading.Event()

    def __enter__(self) -> Self:
        threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        with self._lock:  # after an exception, requests of other threads may be open
            for attempt in self._attempts:
                attempt.expire()

    def post(self, body: bytes, parse: Callable[[bytes], T]) -> T:
        """The answer to the JSON `body`, read by `parse`. Several threads may call it.

        Raises:
            ServerError: there is no answer, or `parse` raised a ValueError.
        """
        tries, server = 0, self.server
        while not self.gave_up and not self._done.is_set():
            try:
                answer = self.answer(body, parse)
                server.failures = 0
                return answer
            except Failure as failure:
                tries += failure.busy_seconds is None
                pause = failure.busy_seconds or server.backoff * 2 ** min(tries - 1, 30)
                late = time.monotonic() + pause >= self._until
                if late or not failure.again or tries > server.retries:
                    self._fail(str(failure), late and failure.again)
                else:
                    time.sleep(pause)
        raise ServerError(self.reason or f"{server} is not used any more")

    def answer(self, body: bytes, parse: Callable[[bytes], T]) -> T:
        """The answer to one attempt.

        Raises:
            Failure: there is none, or `parse` raised a ValueError.
        """
        return parsed(self.attempt(self.server.url, body, Attempt()), parse)

    @property
    def ended(self) -> bool:
        """Whether the scoring call is over, so that no request may start."""
        return self._done.is_set()

    def _fail(self, reason: str, late: bool = False) -> None:
        """Count a failed request.

        Raises:
            ServerError: always.
        """
        server = self.server
        text = f"{server} {reason}"
        if late:
            text += f". The scoring call reached its limit deadline={server.deadline:g} s"
        with self._lock:
            server.failures += 1
            if self.reason is None:
                log.warning("%s. Its images have no score.", text[0].upper() + text[1:])
                self.reason = text
            self.gave_up = self.gave_up or late or server.failures >= server.patience
        raise ServerError(text)

    def attempt(
        self, url: str, body: bytes | None, attempt: Attempt, seconds: float | None = None
    ) -> bytes:
        """The body of an answer with status 200 to a POST, or to a GET without `body`.

        Args:
            url: address of the request.
            body: JSON, or None.
            attempt: another thread can close its connection.
            seconds: longest time. Default: `timeout` of the server.

        Raises:
            Failure: there is none.
        """
        server, begin = self.server, time.monotonic()
        attempt.until = min(begin + (seconds or server.timeout), self._until)
        with self._lock:
            self._attempts.add(attempt)
        try:
            with (
                attempt,
                server.session.request(
                    "GET" if body is None else "POST",
                    url,
                    data=body,
                    headers=_ACCEPT,
                    timeout=max(attempt.until - begin, 0.001),
                    stream=True,
                    allow_redirects=False,
                ) as response,
            ):
                _check_status(response)
                answer = _read_body(response, MAX_ANSWER)
                if attempt.expired:  # a closed connection looks like the end of the answer
                    raise TimeoutError
                return answer
        except (requests.RequestException, HTTPError, HTTPException, OSError) as error:
            seconds = time.monotonic() - begin
            if attempt.expired or isinstance(_root(error), TimeoutError):
                reason = f"sent no complete answer within {seconds:.3g} s"
            else:
                reason = f"cannot be used: {one_line(_root(error), _SHOWN)}"
            raise Failure(reason, again=True) from error
        finally:
            with self._lock:
                self._attempts.discard(attempt)

    def _watch(self) -> None:
        """Close the connections of attempts that take too long, and report a long wait."""
        notice = NOTICE_SECONDS
        while not self._done.wait(min(0.1, self.server.timeout / 4)):
            now = time.monotonic()
            with self._lock:
                for attempt in self._attempts:
                    if now >= attempt.until and not attempt.expired:
                        attempt.expire()
            if now - self._begin >= notice:
                log.warning(
                    "Waiting for %s for %.0f s. It is given up after deadline=%g s.",
                    self.server,
                    now - self._begin,
                    self.server.deadline,
                )
                notice *= 2


def parsed(answer: bytes, parse: Callable[[bytes], T]) -> T:
    """`answer` read by `parse`.

    Raises:
        Failure: `parse` raised a ValueError.
    """
    try:
        return parse(answer)
    except ValidationError as error:
        detail = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, detail["loc"]))
        text = f"{f'{place}: ' if place else ''}{detail['msg']}"
        raise Failure(f"sent an unusable answer: {text}", again=False) from error
    except ValueError as error:
        text = f"sent an unusable answer: {one_line(error, _SHOWN)}"
        raise Failure(text, again=False) from error


def _check_status(response: requests.Response) -> None:
    """Check that the status is 200.

    Raises:
        Failure: it is not.
    """
    status = response.status_code
    if status == 200:
        return
    reason = f"answered {status} {one_line(response.reason or '', _SHOWN)}".rstrip()
    if 300 <= status < 400:
        target = one_line(response.headers.get("Location", "another address"), _SHOWN)
        raise Failure(f"{reason}: it redirects to {target}. Set url to this address", again=False)
    try:
        detail = one_line(_read_body(response, 2**16).decode("utf-8", "replace"), _SHOWN)
    except (Failure, requests.RequestException, HTTPError, HTTPException, OSError):
        detail = ""
    wait, busy = response.headers.get("Retry-After", ""), None
    if status in (429, 503) and wait.isascii() and wait.isdigit():
        busy = max(float(wait[:9]), 0.1)
    raise Failure(f"{reason}: {detail}" if detail else reason, status in _RETRIED, busy)


def _read_body(response: requests.Response, limit: int) -> bytes:
    """The decompressed body.

    Raises:
        Failure: it is larger than `limit` bytes, compressed or decompressed, or is compressed in
            an unknown way.
    """
    encoding = response.headers.get("Content-Encoding", "identity").strip().lower()
    if encoding not in ("", "identity", "gzip", "x-gzip", "deflate"):
        shown = one_line(encoding, _SHOWN)
        text = f"sent an answer in the encoding {shown}, which it was not asked for"
        raise Failure(text, again=False)
    too_large = Failure(f"sent an answer of more than {limit} bytes", again=False)
    raw = bytearray()
    while part := response.raw.read(2**16, decode_content=False):  # fails after a truncated body
        raw += part
        if len(raw) > limit:
            raise too_large
    if encoding in ("", "identity"):
        return bytes(raw)
    decompressor = zlib.decompressobj(47)  # gzip or zlib
    try:
        body = decompressor.decompress(raw, limit + 1)
    except zlib.error as error:
        raise Failure(f"sent damaged compressed data ({error})", again=False) from error
    if len(body) > limit:
        raise too_large
    return body


def _root(error: BaseException) -> BaseException:
    """The first of a chain of exceptions: the error of the operating system, not its wrappers."""
    while (cause := error.__cause__ or error.__context__) is not None:
        error = cause
    return error


def encode_png(image: Tensor) -> bytes:
    """An image [3, H, W] in 0..1 as a PNG file."""
    pixels = (image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="png")
    return file.getvalue()
