"""Life signs: a thread of each rank that tells the others of it, and looks after them.

In: a group. Out: ``group.failure`` and ``group.ended``, within seconds of a rank's failure or of
the run's end. A process that died is seen at once on its own host, elsewhere by its silence. A
worker that computes when the run ends is interrupted.
"""

from __future__ import annotations

import _thread
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from frugal_bonsai.errors import FrugalBonsaiError, RankError
from frugal_bonsai.ranks.group import (
    ENDED,
    FAILED,
    LEFT,
    Group,
    describe_process,
    is_alive,
    process_namespace,
)
from frugal_bonsai.ranks.message import Message

# A rank that gives no sign for so long is taken for dead.
SILENT_SECONDS = 60.0
_LOOK_SECONDS = 0.5
# How long an end waits for others: for rank 0 to hear of a failure, for workers to leave.
_GRACE_SECONDS = 10.0
# How long a worker that computes may take to see the end by itself.
_NOTICE_SECONDS = 1.0


class Watch:
    """Gives signs of this rank and sets ``failure`` and ``ended`` of its group.

    Args:
        group: The group of this rank.
        interrupts: Interrupt the main thread when the run ends.
    """

    def __init__(self, group: Group, *, interrupts: bool) -> None:
        self._group, self._interrupts = group, interrupts
        self._others: dict[int, dict[str, Any]] = {}
        self._signs: dict[int, tuple[int, float]] = {}
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="rank-watch", daemon=True)

    def start(self) -> None:
        """Say who this rank is, and start the thread."""
        launch = self._group.launch
        self._group.put(f"rank/{launch.rank}", Message(describe_process(launch)).to_bytes())
        self._thread.start()

    def stop(self) -> None:
        """Stop the thread."""
        self._stopped.set()
        self._thread.join(timeout=_GRACE_SECONDS)

    @property
    def followed(self) -> list[int]:
        """The ranks that have come, but this one."""
        return list(self._others)

    def _meet(self, own: Group) -> None:
        """Find out which processes the other ranks are: all for rank 0, rank 0 for the others."""
        launch = self._group.launch
        for rank in [0] if launch.rank else self._group.workers:
            if rank not in self._others and own.has(f"rank/{rank}"):
                process = Message.from_bytes(own.get(f"rank/{rank}")).values
                # Not by whether it runs: it may have died since it came.
                here = (launch.host, process_namespace())
                visible = (process["host"], process["namespace"]) == here
                self._signs[rank] = (0, time.monotonic())
                self._others[rank] = {**process, "visible": visible}

    def _run(self) -> None:
        group, own = self._group, self._group.clone()
        while not self._stopped.wait(_LOOK_SECONDS):
            try:
                self._look(own)
            except RankError as error:
                group.failure = str(error)
            if group.failure is not None or group.ended:
                break
        if self._interrupts and not self._stopped.wait(_NOTICE_SECONDS):
            _thread.interrupt_main()
            if not self._stopped.wait(_GRACE_SECONDS):
                os._exit(1)

    def _look(self, own: Group) -> None:
        """Give a sign and look for failures, the end, and signs of others."""
        group = self._group
        own.count(f"sign/{group.launch.rank}")
        self._meet(own)
        if own.has(FAILED):
            group.failure = own.get(FAILED).decode()
        elif own.has(ENDED):
            group.ended = True
        else:
            for process in list(self._others.values()):
                group.failure = group.failure or self._fault(own, process)

    def _fault(self, own: Group, process: dict[str, Any]) -> str | None:
        """Return what is wrong with another rank, if anything is."""
        rank, now = process["rank"], time.monotonic()
        signs, since = self._signs[rank]
        found = own.count(f"sign/{rank}", 0)
        if found != signs:
            self._signs[rank] = (found, now)
        dead = process["visible"] and not is_alive(process)
        silent = found == signs and now - since > SILENT_SECONDS
        if not (dead or silent) or own.has(f"{LEFT}/{rank}"):
            return None
        what = "ended unexpectedly" if dead else f"gave no sign of life for {now - since:.0f} s"
        return f"rank {rank} ({process['host']}, process {process['pid']}) {what}"


@contextmanager
def leading(group: Group) -> Iterator[None]:
    """Watch over a run as its rank 0; at the end tell the workers and wait until they have left.

    Raises:
        RankError: A rank failed; also where the launcher answered its death with SIGTERM.
    """
    watch = Watch(group, interrupts=False)
    watch.start()
    try:
        with interrupted_by_sigterm() as received:
            try:
                yield
            except KeyboardInterrupt as error:
                if received():
                    time.sleep(2 * _LOOK_SECONDS)  # the watch finds out which rank is dead
                if received() and group.failure is not None:
                    raise _explained(group.failure) from error
                raise
            except RankError as error:
                raise _explained(group.failure or str(error)) from error
    finally:
        _dismiss(group, watch)


def _explained(failure: str) -> RankError:
    return RankError(
        f"{failure}; what was done is kept: repeat the command with --resume, on any number "
        f"of ranks"
    )


def _dismiss(group: Group, watch: Watch) -> None:
    """Say that the run ends, and wait a moment for the workers to leave the store."""
    watch.stop()
    # A rank that failed may never leave.
    until = time.monotonic() + (_NOTICE_SECONDS if group.failure else _GRACE_SECONDS)
    with suppress(RankError):
        group.put(ENDED, b"")
        # Without a launcher's own store the store ends with this process: all must have left it.
        own = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" and not group.failure
        waiting = list(group.workers) if own else watch.followed
        while waiting and time.monotonic() < until:
            time.sleep(0.02)
            waiting = [rank for rank in waiting if not group.has(f"{LEFT}/{rank}")]


@contextmanager
def following(group: Group) -> Iterator[None]:
    """Watch over a run as one of its workers; an error here ends the run.

    The end of the run ends the block, wherever it is.

    Raises:
        RankError: Rank 0 died.
    """
    watch, launch = Watch(group, interrupts=True), group.launch
    watch.start()
    try:
        with interrupted_by_sigterm():
            yield
    except (FrugalBonsaiError, KeyboardInterrupt) as error:
        if group.ended:
            return
        if group.failure is not None:
            name = f"rank {launch.rank} ({launch.host})"
            own = group.failure.startswith(name)
            raise RankError(group.failure if own else f"{name} ends: {group.failure}") from error
        if isinstance(error, FrugalBonsaiError) and _told(group, str(error)):
            return
        raise
    except BaseException as error:
        _told(group, f"{type(error).__name__}: {error}")
        raise
    finally:
        watch.stop()
        with suppress(RankError):
            group.put(f"{LEFT}/{launch.rank}", b"")


def _told(group: Group, text: str) -> bool:
    """Tell rank 0 of an error; return whether it has ended the run, and so said it to the user."""
    launch, until = group.launch, time.monotonic() + _GRACE_SECONDS
    with suppress(RankError):
        group.put(FAILED, f"rank {launch.rank} ({launch.host}): {text}".encode())
        while time.monotonic() < until and not group.has(ENDED):
            time.sleep(0.05)
        return group.has(ENDED)
    return False


@contextmanager
def interrupted_by_sigterm() -> Iterator[Callable[[], bool]]:
    """Let SIGTERM act as Ctrl-C does, so that files and locks are left in order.

    Yields:
        A function that tells whether SIGTERM has come.
    """
    came = threading.Event()

    def interrupt(number: int, frame: object) -> None:
        came.set()
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield came.is_set
        return
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield came.is_set
    finally:
        signal.signal(signal.SIGTERM, before)
