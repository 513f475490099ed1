"""The store of an attempt has no keys of earlier attempts of the same torchrun job."""

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
from torch.distributed import TCPStore

from flowgrain.distributed.attempt_store import agree_on_name, attempt_store


@pytest.fixture
def server():
    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def names(server, size, order):
    """The names on which the ranks agree, if they start in this order."""

    def rank_name(rank):
        seconds = timedelta(seconds=20)
        store = TCPStore("127.0.0.1", server.port, size, is_master=False, timeout=seconds)
        return rank, agree_on_name(store, rank, size)

    with ThreadPoolExecutor(size) as pool:
        return dict(pool.map(rank_name, order))


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0)])
def test_ranks_agree_in_every_attempt(server, order):
    found = []
    for size in (3, 3, 2, 3):
        of_ranks = names(server, size, [rank for rank in order if rank < size])
        assert len(set(of_ranks.values())) == 1
        found.append(of_ranks[0])
    assert len(set(found)) == 4


def test_requests_and_answers_of_ended_ranks_have_no_effect(server):
    names(server, 3, (0, 1, 2))
    server.set("flowgrain/ask/1", "number of a rank that has ended")
    server.set("flowgrain/heard/name of a rank that has ended/2", "yes")
    of_ranks = names(server, 3, (0, 2, 1))
    assert len(set(of_ranks.values())) == 1


def test_without_a_store_of_torchrun_the_default_store_is_used(server, monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    assert attempt_store(0, 1, timedelta(seconds=1)) is None
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(server.port))
    stores = [attempt_store(0, 1, timedelta(seconds=20)) for _ in range(2)]
    stores[0].set("key", "old")
    assert stores[0].check(["key"])
    assert not stores[1].check(["key"])
