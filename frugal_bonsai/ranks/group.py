"""The ranks of one launch and the store through which they talk.

In: a :class:`~frugal_bonsai.ranks.launch.Launch`. Out: a :class:`Group`, on which values are put,
waited for and counted, and whose waits end with an error when a rank fails, dies or falls silent.
``torch.distributed``'s TCPStore carries everything; no process group is made, so that a rank may
have any device. Holds nothing but the values that are put and not yet removed.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import torch.distributed

from frugal_bonsai.errors import RankError
from frugal_bonsai.ranks.launch import Launch

# The store takes values of 8 MiB at most.
PART_BYTES = 4 * 2**20
# Ranks must come, and the store must answer, within this time.
_START = timedelta(seconds=300)
_LONGEST_PAUSE_SECONDS, _SHORTEST_PAUSE_SECONDS = 0.1, 0.004
FAILED, ENDED, LEFT = "failed", "ended", "left"


class Group:
    """The ranks of one launch, as one of them sees it.

    Args:
        launch: The place of this process.
        store: The ``torch.distributed.Store`` of all ranks.

    Attributes:
        failure: Text that says which rank failed; None while all is well.
        ended: Rank 0 has said that the run ends.
    """

    def __init__(self, launch: Launch, store: Any) -> None:
        self.launch, self._store = launch, store
        self.failure: str | None = None
        self.ended = False

    @property
    def workers(self) -> range:
        """All ranks but rank 0."""
        return range(1, self.launch.ranks)

    def clone(self) -> Group:
        """Return the same group with a connection of its own, for another thread."""
        return Group(self.launch, self._store.clone())

    def put(self, key: str, data: bytes) -> None:
        """Put a value of any size; it is there when its key is."""
        parts = range(0, len(data), PART_BYTES)
        with self._talking():
            for number, start in enumerate(parts):
                self._store.set(f"{key}#{number}", data[start : start + PART_BYTES])
            self._store.set(key, str(len(parts)))

    def get(self, key: str) -> bytes:
        """Return a value, once it is there.

        Raises:
            RankError: A rank failed meanwhile.
        """
        self.wait(key)
        with self._talking():
            parts = int(self._store.get(key))
            return b"".join(self._store.get(f"{key}#{number}") for number in range(parts))

    def has(self, *keys: str) -> bool:
        """Return whether all these keys are there."""
        with self._talking():
            return bool(self._store.check(list(keys)))

    def remove(self, key: str) -> None:
        """Remove a value."""
        with self._talking():
            for number in range(int(self._store.get(key))):
                self._store.delete_key(f"{key}#{number}")
            self._store.delete_key(key)

    def count(self, key: str, more: int = 1) -> int:
        """Add to a counter, which starts at 0, and return its new value."""
        with self._talking():
            return int(self._store.add(key, more))

    def forget(self, key: str) -> None:
        """Remove a counter."""
        with self._talking():
            self._store.delete_key(key)

    def wait(self, key: str, what: str = "") -> None:
        """Wait until a key is there.

        Args:
            key: The key.
            what: Text for the error if it takes longer than ranks may take to come. Empty waits
                as long as it takes.

        Raises:
            RankError: A rank failed meanwhile, or rank 0 ended the run.
        """
        pause, until = _SHORTEST_PAUSE_SECONDS, time.monotonic() + _START.total_seconds()
        while not self.has(key):
            self.check()
            if what and time.monotonic() > until:
                raise RankError(f"{what} within {_START.total_seconds():.0f} s")
            time.sleep(pause)
            pause = min(1.5 * pause, _LONGEST_PAUSE_SECONDS)

    def wait_count(self, key: str, value: int) -> None:
        """Wait until a counter has reached a value.

        Raises:
            RankError: A rank failed meanwhile.
        """
        while self.count(key, 0) < value:
            self.check()
            time.sleep(_SHORTEST_PAUSE_SECONDS)

    def check(self) -> None:
        """Raise if a rank failed or the run ended.

        Raises:
            RankError: Names the rank.
        """
        if self.failure is not None:
            raise RankError(self.failure)
        if self.ended:
            raise RankError("rank 0 ended the run")

    @contextmanager
    def _talking(self) -> Iterator[None]:
        """Turn a lost connection into the error of a rank."""
        try:
            yield
        except RuntimeError as error:  # torch.distributed's errors are of this kind
            self.check()
            first = str(error).partition("\n")[0]
            raise RankError(
                f"rank {self.launch.rank} ({self.launch.host}) has lost the other ranks ({first}); "
                f"has their launcher ended?"
            ) from error


def connect(launch: Launch) -> Group:
    """Connect with the store of a launch.

    Raises:
        RankError: The store of the launcher, or of rank 0, does not answer.
    """
    if not torch.distributed.is_available():
        raise RankError("this torch has no torch.distributed; run prune in one process")
    from torch.distributed import PrefixStore, rendezvous  # type: ignore[attr-defined]

    try:
        store, _, _ = next(rendezvous("env://", timeout=_START))
    except (RuntimeError, ValueError) as error:
        first = str(error).partition("\n")[0]
        raise RankError(
            f"rank {launch.rank} ({launch.host}): the ranks do not meet ({first}); start all with "
            f"torchrun or accelerate launch, and see that MASTER_ADDR and MASTER_PORT can be "
            f"reached from each host"
        ) from error
    return Group(launch, PrefixStore("frugal-bonsai", store))


def describe_process(launch: Launch) -> dict[str, Any]:
    """Return what identifies this process to others on its host and to users."""
    return {
        "rank": launch.rank,
        "host": launch.host,
        "pid": os.getpid(),
        "created": psutil.Process().create_time(),
        "namespace": process_namespace(),
    }


def process_namespace() -> str:
    """Return what tells containers of one host apart, which do not see each other's processes."""
    try:
        return str(Path("/proc/self/ns/pid").readlink())
    except OSError:  # not Linux
        return ""


def is_alive(process: dict[str, Any]) -> bool:
    """Return whether a process of this host, by :func:`describe_process`, runs."""
    try:
        found = psutil.Process(process["pid"])
        same = bool(abs(found.create_time() - process["created"]) < 1.0)
        return same and bool(found.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
