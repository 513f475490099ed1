"""A scoring call to several reward servers: health checks, retries and hedged requests."""

import queue
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Generic, Literal, NoReturn, TypeVar

from flowgrain.rewards.connections import Attempt
from flowgrain.rewards.http_client import Failure, ScoringCall, parsed
from flowgrain.rewards.messages import Health
from flowgrain.rewards.replicas import Mismatch, Replica, Replicas
from flowgrain.settings import SettingsError, one_line

T = TypeVar("T")

HEALTH_SECONDS = 5.0
"""Longest time of a health check."""
IDLE_SECONDS = 0.05
"""Time between two looks for an idle replica that can answer a slow request."""


class ReplicaCall(ScoringCall):
    """The requests of one scoring call to several replicas."""

    server: Replicas

    def answer(self, body: bytes, parse: Callable[[bytes], T]) -> T:
        """The first usable answer of a replica.

        Raises:
            Failure: all replicas failed.
        """
        self._check_due()
        race = _Race(self, body, parse)
        try:
            return race.run()
        finally:
            race.cancel()

    def check(self, replica: Replica, attempt: Attempt) -> None:
        """Check the health and the identity of a replica.

        Raises:
            Failure: it does not answer, or does not serve the same reward.
        """
        url = f"{replica.url}/health"
        health = parsed(
            self.attempt(url, None, attempt, HEALTH_SECONDS), Health.model_validate_json
        )
        reward = self.server.reward
        if reward not in health.rewards:
            names = one_line(", ".join(health.rewards), 200)
            raise Mismatch(f"does not serve the reward {reward!r}. It serves: {names}")
        identity = health.identities.get(reward)
        if identity is None:
            raise Mismatch(
                f"does not send the identity of the reward {reward!r}. Start it with flowgrain "
                "serve of this version"
            )
        self.server.record_health(replica, identity)

    def _check_due(self) -> None:
        """Check replicas that failed, in threads."""

        def check(replica: Replica) -> None:
            try:
                self.check(replica, Attempt())
            except Failure as failure:
                if not self.ended:
                    self.server.record_failure(replica, failure, of_request=False)
            finally:
                replica.checking = False

        for replica in self.server.due():
            threading.Thread(target=check, args=(replica,), daemon=True).start()


class _Race(Generic[T]):
    """A request that one or two replicas at a time try to answer."""

    def __init__(self, call: ReplicaCall, body: bytes, parse: Callable[[bytes], T]) -> None:
        self.call, self.server, self.body, self.parse = call, call.server, body, parse
        self.tried: list[Replica] = []
        self.running: dict[Replica, Attempt] = {}
        self.failures: list[tuple[Replica, Failure]] = []
        self.results: queue.SimpleQueue[tuple[Replica, Callable[[], T]]] = queue.SimpleQueue()
        self.won = False

    def run(self) -> T:
        """The first usable answer.

        Raises:
            Failure: all replicas failed.
        """
        wait = self.server.hedge_seconds()
        self._start("")
        while self.running:
            try:
                replica, outcome = self.results.get(timeout=wait)
            except queue.Empty:
                wait = None if self._start("hedge") else IDLE_SECONDS
                continue
            del self.running[replica]
            try:
                return outcome()
            except Failure as failure:
                self.failures.append((replica, failure))
            if not self.running and not self.call.ended:
                self._start("retry")
        raise self._failure()

    def cancel(self) -> None:
        """Close the connections of the replicas that have not answered."""
        self.won = True
        for attempt in self.running.values():
            attempt.expire()

    def _start(self, reason: Literal["", "retry", "hedge"]) -> bool:
        """Send the request to another replica. Returns whether there is one."""
        replica = self.server.choose(self.tried, reason)
        if replica is None:
            return False
        self.tried.append(replica)
        self.running[replica] = attempt = Attempt()
        arguments = (replica, attempt, reason == "hedge")
        threading.Thread(target=self._send, args=arguments, daemon=True).start()
        return True

    def _send(self, replica: Replica, attempt: Attempt, hedge: bool) -> None:
        """Send the request to a replica. Its answer or its error goes to `results`."""
        seconds, begin = None, time.monotonic()
        outcome: Callable[[], T]
        try:
            if not replica.healthy:
                self.call.check(replica, attempt)
                begin = time.monotonic()
            raw = self.call.attempt(f"{replica.url}/score", self.body, attempt)
            outcome = partial(lambda answer: answer, parsed(raw, self.parse))
            seconds = time.monotonic() - begin
        except BaseException as error:  # raised again in the thread of the caller
            outcome = partial(_raise, error)
            cancelled = self.won and attempt.expired
            if cancelled and not hedge:
                seconds = time.monotonic() - begin  # a lower bound, or fast answers would prevail
            if isinstance(error, Failure) and not cancelled and not self.call.ended:
                self.server.record_failure(replica, error)
        self.server.close(replica, seconds)
        self.results.put((replica, outcome))

    def _failure(self) -> Failure:
        """The failure of all replicas as one."""
        failures = [failure for _, failure in self.failures]
        busy = [f.busy_seconds for f in failures if f.busy_seconds is not None]
        replica, last = self.failures[-1]
        count = len(failures) - 1
        others = f", and {count} other {'replica' if count == 1 else 'replicas'} failed"
        return Failure(
            f"sent no usable answer: {replica.url} {last}{others if count else ''}",
            any(failure.again for failure in failures),
            min(busy) if len(busy) == len(failures) else None,
        )


def _raise(error: BaseException) -> NoReturn:
    raise error


def check_replicas(server: Replicas) -> None:
    """Check before a run starts that all replicas that answer serve the same reward.

    A replica that does not answer is reported and left out until it does.

    Raises:
        SettingsError: no replica answers, or a replica does not serve the same reward.
    """
    reasons: list[str] = []
    last: Failure | None = None
    for replica in server.replicas:
        try:
            with ReplicaCall(server) as call:  # every check has a deadline of its own
                call.check(replica, Attempt())
        except Failure as failure:
            if not failure.again:
                raise SettingsError(
                    f"{replica.url} {failure}. Start all servers with the same command, "
                    "versions and token, or remove this address."
                ) from failure
            last = failure
            reasons.append(f"{replica.url} {failure}")
            if len(reasons) < len(server.replicas):
                server.record_failure(replica, failure, of_request=False)
    if len(reasons) == len(server.replicas):
        raise SettingsError(
            f"no server answers ({reasons[0]}). Start at least one of them with "
            f"flowgrain serve {server.reward}, or correct the addresses."
        ) from last
