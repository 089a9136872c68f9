"""Hidden states in host memory, copied to the device and back while the device computes.

In: the windows of a micro-batch. Out: their hidden states on the device. The next micro-batch is
fetched and the last one written back in the background, each on its own stream.

Memory: the windows in pinned host memory, and on the device one micro-batch ahead and one behind.

Required orders, with C the computing stream, I the stream that copies in and O the stream that
copies out. All device memory is allocated on C, so that freed memory may be used by C again:
- A fetch starts after the work that C received before the fetch's memory was allocated (I waits for
  C), and after the last write of its windows (I waits for O's event).
- Computing starts after the fetch (C waits for I's event), even if the fetch is discarded.
- A write starts after the computation (O waits for C), which has waited for every fetch of the same
  windows.
- The written tensor is held until C waits for that write, one write later.

Shape suffixes: B windows of a micro-batch, S tokens of a window, H hidden.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

from frugal_bonsai.accelerator import current_stream, has_streams


@dataclass(frozen=True)
class _Copy:
    """A micro-batch that is being copied, held until the copy is complete."""

    items: slice
    hidden_BSH: torch.Tensor
    done: torch.Event | None


class Spill:
    """Hidden states of ``windows`` windows on the host.

    Args:
        windows: number of windows.
        window: S, number of tokens of each.
        hidden: H.
        device: where micro-batches are computed; a device without streams copies synchronously.
        dtype: compute dtype.
    """

    def __init__(
        self, windows: int, window: int, hidden: int, *, device: torch.device, dtype: torch.dtype
    ) -> None:
        self._device = device
        self._ahead: _Copy | None = None
        self._behind: _Copy | None = None
        streams = has_streams(device)
        self._in = torch.Stream(device) if streams else None
        self._out = torch.Stream(device) if streams else None
        self._written: list[torch.Event | None] = [None] * windows
        # One block a window: torch's pinned allocator rounds every block up to a power of two.
        self._host = [
            torch.empty(window, hidden, dtype=dtype, pin_memory=streams) for _ in range(windows)
        ]

    def read(self, items: slice) -> torch.Tensor:
        """Return ``[B, S, H]`` on the device; start to fetch the micro-batch after it."""
        ahead, self._ahead = self._ahead, None
        self._wait_for(ahead)
        if ahead is None or ahead.items != items:
            ahead = self._fetch(items)
            self._wait_for(ahead)
        following = self._following(items)
        if following != items:
            self._ahead = self._fetch(following)
        return ahead.hidden_BSH

    def write(self, items: slice, hidden_BSH: torch.Tensor) -> None:
        """Store these windows' new hidden states ``[B, S, H]``."""
        ahead = self._ahead
        if ahead is not None and _overlap(ahead.items, items):
            self._wait_for(ahead)
            self._ahead = ahead = None
        self._wait_for(self._behind)
        if self._out is not None:
            self._out.wait_stream(current_stream(self._device))
        with _on(self._out):
            for place, hidden_SH in zip(range(items.start, items.stop), hidden_BSH, strict=True):
                self._host[place].copy_(hidden_SH, non_blocking=True)
        self._behind = _Copy(items, hidden_BSH, _event(self._out))
        self._written[items] = [self._behind.done] * (items.stop - items.start)

    def _fetch(self, items: slice) -> _Copy:
        first = self._host[items.start]
        hidden_BSH = torch.empty(
            items.stop - items.start, *first.shape, dtype=first.dtype, device=self._device
        )
        if self._in is not None:
            self._in.wait_stream(current_stream(self._device))
            for written in {event for event in self._written[items] if event is not None}:
                self._in.wait_event(written)
        with _on(self._in):
            for place, hidden_SH in zip(range(items.start, items.stop), hidden_BSH, strict=True):
                hidden_SH.copy_(self._host[place], non_blocking=True)
        return _Copy(items, hidden_BSH, _event(self._in))

    def _wait_for(self, copy: _Copy | None) -> None:
        """Make later work wait for the copy, including work that reuses its memory."""
        if copy is not None and copy.done is not None:
            current_stream(self._device).wait_event(copy.done)

    def _following(self, items: slice) -> slice:
        """Return the slice to fetch next: as long as this one, from 0 after the last window."""
        start = items.stop if items.stop < len(self._host) else 0
        return slice(start, min(start + items.stop - items.start, len(self._host)))

    def __del__(self) -> None:
        """Free the memory of running copies only after they are complete."""
        self._wait_for(self._ahead)
        self._wait_for(self._behind)


def _overlap(one: slice, other: slice) -> bool:
    return bool(one.start < other.stop and other.start < one.stop)


def _on(stream: torch.Stream | None) -> AbstractContextManager[object]:
    return nullcontext() if stream is None else stream


def _event(stream: torch.Stream | None) -> torch.Event | None:
    """Record an event after all work that the stream has received."""
    return None if stream is None else stream.record_event()
