"""Hidden states in host memory that come to the device and back without the device waiting.

In: a micro-batch's windows by number. Out: their hidden states on the device; the micro-batch that
follows is fetched meanwhile, what is written goes back meanwhile, each on a CUDA stream of its own.
Holds the windows in pinned host memory, and on the device one micro-batch ahead and one behind.

Orders that must hold, and what holds them (C: the stream that computes, I and O: those that copy in
and out): a fetch follows the last write of its windows (I waits for O's event); computing follows
the fetch (C waits for I's event); writing follows computing (O waits for C's event); a write does
not overtake a fetch of the same windows (O waits for I's event), and such a fetch is thrown away.

Shape suffixes: B windows of a micro-batch, S tokens of a window, H hidden.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class _Fetch:
    """Windows on their way to the device."""

    items: slice
    hidden_BSH: torch.Tensor
    arrived: torch.cuda.Event | None


class Spill:
    """Hidden states of ``windows`` windows on the host.

    Args:
        windows: how many.
        window: S, tokens of each.
        hidden: H.
        device: where micro-batches are computed; without CUDA everything is copied at once.
        dtype: compute dtype.
    """

    def __init__(
        self, windows: int, window: int, hidden: int, *, device: torch.device, dtype: torch.dtype
    ) -> None:
        self._device = device
        cuda = device.type == "cuda"
        # One block a window: torch's pinned allocator rounds every block up to a power of two.
        self._host = [
            torch.empty(window, hidden, dtype=dtype, pin_memory=cuda) for _ in range(windows)
        ]
        self._in: Any = torch.cuda.Stream(device) if cuda else None
        self._out: Any = torch.cuda.Stream(device) if cuda else None
        self._written: list[torch.cuda.Event | None] = [None] * windows
        self._ahead: _Fetch | None = None

    def read(self, items: slice) -> torch.Tensor:
        """``[B, S, H]`` on the device; the same number of windows behind them is fetched next."""
        ahead, self._ahead = self._ahead, None
        fetch = ahead if ahead is not None and ahead.items == items else self._fetch(items)
        if fetch.arrived is not None:
            now = torch.cuda.current_stream(self._device)
            now.wait_event(fetch.arrived)
            fetch.hidden_BSH.record_stream(now)
        following = self._following(items)
        if following != items:
            self._ahead = self._fetch(following)
        return fetch.hidden_BSH

    def write(self, items: slice, hidden_BSH: torch.Tensor) -> None:
        """Keep these windows' new hidden states ``[B, S, H]``."""
        ahead = self._ahead
        overtaken = (
            ahead is not None and ahead.items.start < items.stop and items.start < ahead.items.stop
        )
        if self._out is not None:
            computed = torch.cuda.Event()
            computed.record(torch.cuda.current_stream(self._device))
            self._out.wait_event(computed)
            if ahead is not None and overtaken:
                self._out.wait_event(ahead.arrived)
            hidden_BSH.record_stream(self._out)
        with _on(self._out):
            for place, hidden_SH in zip(range(items.start, items.stop), hidden_BSH, strict=True):
                self._host[place].copy_(hidden_SH, non_blocking=True)
            self._written[items] = [_event(self._out)] * (items.stop - items.start)
        if overtaken:
            self._ahead = None

    def _fetch(self, items: slice) -> _Fetch:
        first = self._host[items.start]
        with _on(self._in):
            for written in {event for event in self._written[items] if event is not None}:
                self._in.wait_event(written)
            hidden_BSH = torch.empty(
                items.stop - items.start, *first.shape, dtype=first.dtype, device=self._device
            )
            for place, hidden_SH in zip(range(items.start, items.stop), hidden_BSH, strict=True):
                hidden_SH.copy_(self._host[place], non_blocking=True)
            return _Fetch(items, hidden_BSH, _event(self._in))

    def _following(self, items: slice) -> slice:
        """The next micro-batch; behind the last one the first of the next layer."""
        start = items.stop if items.stop < len(self._host) else 0
        return slice(start, min(start + items.stop - items.start, len(self._host)))


def _on(stream: Any) -> AbstractContextManager[Any]:
    return nullcontext() if stream is None else torch.cuda.stream(stream)


def _event(stream: Any) -> torch.cuda.Event | None:
    """An event behind everything that the stream has been given."""
    if stream is None:
        return None
    event = torch.cuda.Event()
    event.record(stream)
    return event
