"""The lock of a run's directory: one process at a time trains in it.

The kernel holds the lock and releases it when the process ends, however it ends. On NFS the lock
also holds for other machines, if the file system passes locks on. A second file says who has the
lock, and reveals a process that ended without releasing it.
"""

import contextlib
import json
import os
import socket
import weakref
from datetime import datetime
from pathlib import Path
from typing import Any

from filelock import BaseFileLock, FileLock, Timeout

from flowgrain.records.files import write_atomically
from flowgrain.settings import SettingsError

LOCK = ".lock"
"""Name of the file that the kernel locks. It remains after a run."""
HOLDER = ".lock.json"
"""Name of the file with host, process and start time of the process that has the lock."""


class RunLock:
    """The lock of the directory `folder`.

    It is released by `release`, when the object is deleted, and when the process ends.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._release: weakref.finalize[Any, RunLock] | None = None

    @property
    def held(self) -> bool:
        """Whether this object has the lock."""
        return self._release is not None and self._release.alive

    def acquire(self, wait: float = 0.0) -> list[str]:
        """Lock the directory. Creates it if necessary. Does nothing if this object has the lock.

        Args:
            wait: 0, or the longest time in seconds to wait for a process that has the lock and is
                known to end. Such a process may have been on another host.

        Returns:
            A message if the lock was taken over from a process that did not release it.

        Raises:
            SettingsError: another process has the lock, or a process of another host may have it.
            OSError: the directory cannot be written.
        """
        if self.held:
            return []
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.folder / LOCK, thread_local=False)
        file = self.folder / HOLDER
        try:
            lock.acquire(timeout=wait)
        except Timeout:
            raise SettingsError(
                f"{self.folder}: another process trains in this directory "
                f"({describe_holder(read_holder(file))}). Wait until it ends, or stop it."
            ) from None
        try:
            before = read_holder(file)
            other_host = before is not None and before.get("host") != socket.gethostname()
            if other_host and not wait:
                raise SettingsError(
                    f"{self.folder}: a process of another host may train in this directory "
                    f"({describe_holder(before)}). If it has ended, delete {file}."
                )
            write_atomically(file, json.dumps(_this_process()))
        except BaseException:
            lock.release()
            raise
        self._release = weakref.finalize(self, _release, lock, file, os.getpid())
        if before is None:
            return []
        return [f"the lock of a process that has ended ({describe_holder(before)}) was taken over"]

    def release(self) -> None:
        """Release the lock, if this object has it."""
        if self._release is not None:
            self._release()


def _release(lock: BaseFileLock, file: Path, pid: int) -> None:
    if os.getpid() == pid:  # not a fork of the process that has the lock
        with contextlib.suppress(OSError):
            file.unlink(missing_ok=True)
        lock.release()


def _this_process() -> dict[str, Any]:
    started = datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
    return {"host": socket.gethostname(), "pid": os.getpid(), "started": started}


def read_holder(file: Path) -> dict[str, Any] | None:
    """Host, process and start time of the process that has the lock. None without this file."""
    try:
        holder = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError):
        return {}
    return holder if isinstance(holder, dict) else {}


def describe_holder(holder: dict[str, Any] | None) -> str:
    """The holder in words."""
    host, pid, started = ((holder or {}).get(key, "unknown") for key in ("host", "pid", "started"))
    return f"host {host}, process {pid}, since {started}"
