"""A short soak: a run of ten steps under every fault once is the undisturbed one."""

import os
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parent.parent / "scripts"


def test_every_fault_once(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(SCRIPTS), prepend=os.pathsep)  # for the server that forks the processes
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import soak

    possible = set(soak.FAULTS) - {"rank"}  # of one process; test_processes.py kills one of two
    found = soak.soak(tmp_path, steps=10, seed=1, faults=len(possible))
    assert {fault for fault, _ in found["faults"]} == possible
    assert sum(what == "stopped" for _, what in found["faults"]) >= 4
    assert found["memory_growth"] == pytest.approx(1, abs=0.2)
    assert "soak" in sys.modules
