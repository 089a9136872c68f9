"""Streams and events in name only, and the check that they order every access.

All work is done at once, in the order of the program. What is kept is what a device would know:
which stream was given which work, and which waits for which. Two accesses to the same bytes, one of
them a write, are a race when neither is ordered after the other. The order is kept by torch's own
``torch.cuda._sanitizer``. Unlike that one, a block of memory keeps its history when it is freed and
taken again: its new user on another stream may not overtake the work that still reads it.
"""

from __future__ import annotations

import itertools
import threading
from dataclasses import dataclass
from typing import Any

from torch.cuda._sanitizer import StreamSynchronizations


class RaceError(Exception):
    """Two streams touch the same bytes and nothing orders them."""


@dataclass(frozen=True)
class Access:
    """The last access of one kind to a range of bytes by a stream."""

    number: int
    where: str
    operator: str


_STREAMS = 32
# Ranges of a segment -> their last access; (start, stop, is a write).
Ranges = dict[tuple[int, int, bool], Access]


class Order:
    """The order of streams' work, and the reads and writes of each stream."""

    def __init__(self) -> None:
        self.syncs = StreamSynchronizations()
        self.races: list[str] = []
        self._lock = threading.RLock()
        self._numbers, self._ids = itertools.count(1), itertools.count(1)
        self._streams = itertools.count()
        self._by_segment: dict[int, dict[int, Ranges]] = {}
        self._local = threading.local()

    def new_id(self) -> int:
        """A number for a stream or an event."""
        with self._lock:
            return next(self._ids)

    def new_stream(self) -> int:
        """A number for a stream: one of 32 in turn, as CUDA's are."""
        with self._lock:
            number = next(self._streams) % _STREAMS + 1
            self.syncs.create_stream(number)
            return number

    @property
    def current(self) -> list[Any]:
        """This thread's streams, the current one last; empty for the default one."""
        if not hasattr(self._local, "streams"):
            self._local.streams = []
        streams: list[Any] = self._local.streams
        return streams

    @property
    def current_id(self) -> int:
        """Number of the thread's current stream; 0 is the default one."""
        return self.current[-1].stream_id if self.current else 0

    def launch(self, uses: list[tuple[int, int, int, bool]], where: str, operator: str) -> None:
        """The current stream is given work.

        Args:
            uses: (segment, start, stop, is a write) of what it touches.
            where: line of the package, for people.
            operator: its name, for people.

        Raises:
            RaceError: nothing orders it after what another stream does there.
        """
        with self._lock:
            stream, access = self.current_id, Access(next(self._numbers), where, operator)
            self.syncs.update_seq_num(stream, access.number)
            for segment, start, stop, writes in uses:
                by_stream = self._by_segment.setdefault(segment, {})
                for other, ranges in by_stream.items():
                    if other != stream:
                        self._check(other, ranges, (start, stop, writes), access)
                by_stream.setdefault(stream, {})[start, stop, writes] = access

    def _check(
        self, other: int, ranges: Ranges, mine: tuple[int, int, bool], access: Access
    ) -> None:
        start, stop, writes = mine
        for (first, last, wrote), before in list(ranges.items()):
            if first >= stop or last <= start or not (wrote or writes):
                continue
            if not self.syncs.is_ordered_after(self.current_id, before.number, other):
                self.races.append(
                    f"{access.operator} at {access.where} {'writes' if writes else 'reads'} what "
                    f"{before.operator} at {before.where} {'writes' if wrote else 'reads'} on "
                    f"another stream; nothing orders the two"
                )
                raise RaceError(self.races[-1])
            if writes and start <= first and last <= stop:
                del ranges[first, last, wrote]

    def wait_for_stream(self) -> None:
        """The host waits for the current stream."""
        with self._lock:
            self.syncs.all_streams_wait_for_stream(self.current_id)

    def wait_for_all(self) -> None:
        """The host waits for the device."""
        with self._lock:
            self.syncs.sync_all_streams()


def make_classes(order: Order) -> tuple[type, type]:
    """The classes that take the place of ``torch.Stream`` and ``torch.Event``."""

    class Stream:
        def __init__(self, device: Any = None, **_: Any) -> None:
            self.device, self.stream_id = device, order.new_stream()

        def wait_event(self, event: Event) -> None:
            event.wait(self)

        def wait_stream(self, other: Stream) -> None:
            other.record_event().wait(self)

        def record_event(self, event: Event | None = None) -> Event:
            event = event or Event()
            event.record(self)
            return event

        def is_capturing(self) -> bool:
            return False

        def synchronize(self) -> None:
            order.syncs.all_streams_wait_for_stream(self.stream_id)

        def __enter__(self) -> Stream:
            order.current.append(self)
            return self

        def __exit__(self, *_: object) -> None:
            order.current.pop()

    class Event:
        def __init__(self, device: Any = None, **_: Any) -> None:
            self.event_id, self._recorded = order.new_id(), False

        def record(self, stream: Stream | None = None) -> None:
            with order._lock:
                number = order.current_id if stream is None else stream.stream_id
                order.syncs.record_state(self.event_id, number)
                self._recorded = True

        def wait(self, stream: Stream | None = None) -> None:
            if self._recorded:
                with order._lock:
                    number = order.current_id if stream is None else stream.stream_id
                    order.syncs.stream_wait_for_event(number, self.event_id)

        def synchronize(self) -> None:
            if self._recorded:
                with order._lock:
                    order.syncs.all_streams_wait_for_event(self.event_id)

        def query(self) -> bool:
            return True

    return Stream, Event


def default_stream(stream: type) -> Any:
    """The stream that work goes to where nobody names one."""
    made = stream.__new__(stream)
    made.device, made.stream_id = None, 0
    return made
