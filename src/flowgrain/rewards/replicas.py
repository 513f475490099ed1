"""Several reward servers that serve the same reward: load balance, retries and hedged requests.

A request goes to the replica with the fewest open requests of this process. If the replica fails,
another replica gets the request at once. If it is slow, a second replica gets the same request, and
the first answer counts (Dean and Barroso 2013, The Tail at Scale). A replica that failed gets no
requests until it has passed a health check. Scores never depend on which replica answered, because
all replicas must have the same identity.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from flowgrain.distributed import env_rank
from flowgrain.rewards.http_client import Failure, Server
from flowgrain.settings import one_line

log = logging.getLogger(__name__)

Hedge = float | Literal["p95", "never"]

LONGEST_PAUSE = 60.0
"""Longest time in seconds after which a replica that failed is checked again. The first is 1 s."""
FEWEST_TIMES = 20
"""Answers that must have arrived before their 95% quantile is used."""
_KEPT_TIMES = 200


@dataclass(eq=False)
class Replica:
    """One of several servers with the same reward.

    Attributes:
        url: address of the server.
        healthy: it passed a health check, and no request failed since then. Otherwise its next
            request starts with a health check.
        not_before: time of `time.monotonic` before which it gets no requests.
        failures: failures since the last health check that it passed.
        open: open requests of this process.
        checking: a thread is checking its health.
        requests, failed: requests that were sent, and that failed.
        retries: requests that were sent after another replica failed.
        hedges: requests that were sent because another replica was slow.
    """

    url: str
    healthy: bool = False
    not_before: float = 0.0
    failures: int = 0
    open: int = 0
    checking: bool = False
    requests: int = 0
    failed: int = 0
    retries: int = 0
    hedges: int = 0

    def __str__(self) -> str:
        return f"the reward server at {self.url}"

    @property
    def counters(self) -> str:
        """The numbers of requests in words."""
        return (
            f"{self.requests} requests, {self.failed} failed, "
            f"{self.retries} retries, {self.hedges} hedges"
        )


class Replicas(Server):
    """The connections to several servers with the same reward.

    Args:
        urls: addresses of the servers.
        reward: name of the reward.
        token_variable: see `Server`.
        hedge_after: seconds after which a second replica gets the same request. "p95": the 95%
            quantile of the times of the last answers.
        limits: timeout, deadline, retries and backoff of `Server`. A retry is a round of all
            replicas.

    Attributes:
        replicas: the servers.
        identity: identity of the first replica that passed a health check. None before.
    """

    def __init__(
        self,
        urls: Sequence[str],
        reward: str,
        token_variable: str,
        hedge_after: Hedge,
        **limits: Any,
    ) -> None:
        super().__init__(", ".join(urls), token_variable, connections=len(urls), **limits)
        first = env_rank()[0] % len(urls)  # ranks start at different replicas
        self.replicas = [Replica(url) for url in (*urls[first:], *urls[:first])]
        self.reward, self.hedge_after = reward, hedge_after
        self.identity: dict[str, str] | None = None
        self._times: deque[float] = deque(maxlen=_KEPT_TIMES)
        self._lock = threading.Lock()

    def __str__(self) -> str:
        return f"the reward servers at {self.url}"

    def choose(
        self, tried: Collection[Replica], reason: Literal["", "retry", "hedge"]
    ) -> Replica | None:
        """The replica for the next request, which counts as open.

        Replicas that did not fail go first. A hedged request only goes to an idle one of them.

        Args:
            tried: replicas that already have this request.
            reason: "" for the first request, "retry" after a failure, "hedge" beside a slow one.

        Returns:
            None if all replicas were tried, or if none is idle for a hedged request.
        """
        with self._lock:
            now = time.monotonic()
            left = [replica for replica in self.replicas if replica not in tried]
            ready = [r for r in left if not r.failures and now >= r.not_before]
            if reason == "hedge":
                left = ready = [replica for replica in ready if not replica.open]
            if not left:
                return None
            chosen = min(
                ready or left,
                key=lambda r: (max(r.not_before - now, 0) if not ready else 0, r.open, r.requests),
            )
            chosen.open += 1
            chosen.requests += 1
            chosen.retries += reason == "retry"
            chosen.hedges += reason == "hedge"
            return chosen

    def due(self) -> list[Replica]:
        """Replicas that failed, and whose next health check is due. The caller must check them."""
        with self._lock:
            now = time.monotonic()
            found = [
                replica
                for replica in self.replicas
                if replica.failures and not replica.checking and now >= replica.not_before
            ]
            for replica in found:
                replica.checking = True
            return found

    def hedge_seconds(self) -> float | None:
        """Time after which a second replica gets the request. None: never."""
        if self.hedge_after == "never":
            return None
        if self.hedge_after != "p95":
            return float(self.hedge_after)
        with self._lock:
            times = list(self._times)
        return float(np.quantile(times, 0.95)) if len(times) >= FEWEST_TIMES else None

    def close(self, replica: Replica, seconds: float | None) -> None:
        """Count a request as no longer open. `seconds`: its time, or a lower bound."""
        with self._lock:
            replica.open -= 1
            if seconds is not None:
                self._times.append(seconds)

    def record_failure(self, replica: Replica, failure: Failure, of_request: bool = True) -> None:
        """Give no requests to a replica that failed or is busy, for some time.

        Args:
            replica: the replica.
            failure: why it cannot be used.
            of_request: whether a request failed, and not a health check without a request.
        """
        with self._lock:
            now = time.monotonic()
            if failure.busy_seconds is not None:
                replica.not_before = now + failure.busy_seconds
                return
            first = replica.failures == 0
            replica.failed += of_request
            replica.failures += 1
            replica.healthy = False
            replica.not_before = now + min(2.0 ** min(replica.failures - 1, 30), LONGEST_PAUSE)
        if first:
            log.warning(
                "The reward server at %s %s. Its requests go to the other replicas (%s).",
                *(replica.url, failure, replica.counters),
            )

    def record_health(self, replica: Replica, identity: dict[str, str]) -> None:
        """Use a replica that passed a health check.

        Raises:
            Failure: its identity differs from the identity of the other replicas.
        """
        with self._lock:
            self.identity = self.identity or identity
            expected = self.identity
            if identity == expected:
                back = replica.failures > 0
                replica.healthy, replica.failures, replica.not_before = True, 0, 0.0
        if identity != expected:
            raise Mismatch(_difference(self.reward, identity, expected))
        if back:
            log.warning(
                "The reward server at %s is used again (%s).", replica.url, replica.counters
            )


class Mismatch(Failure):
    """A replica does not serve the reward that the other replicas serve."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason, again=False)


def _difference(reward: str, found: dict[str, str], expected: dict[str, str]) -> str:
    """What differs between two identities."""
    for name in dict.fromkeys([*expected, *found]):
        one, other = found.get(name, "none"), expected.get(name, "none")
        if one != other:
            break
    return (
        f"serves another reward {reward!r} than the other replicas "
        f"({one_line(name, 50)} {one_line(one, 50)}, not {one_line(other, 50)})"
    )
