"""Stream layers through two reused buffers; the next layer is read in the background.

In: a :class:`~frugal_bonsai.stream.source.LayerSource`. Out: each layer's parameters in the compute
dtype, or as stored where the products accept stored weights.

Memory: two layers as stored, and in the compute dtype those weights that cannot be multiplied as
stored. Nothing is allocated in the steady state. On an accelerator the stored bytes go through
pinned host buffers and their own stream.

Required orders, with C the computing stream and K the copying stream:
- The device buffers are allocated on C, so K first waits for the earlier work of C.
- A copy into a buffer starts after C has used the buffer (K waits for C's event).
- Computing starts after the copy (C waits for K's event).
- The buffers' memory is reused after the last copy: when the stream is closed, the host waits for
  K before it frees the pinned buffers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any

import torch

from frugal_bonsai.accelerator import (
    current_stream,
    empty_host_cache,
    has_streams,
    is_accelerator,
)
from frugal_bonsai.dtypes import torch_dtype
from frugal_bonsai.int8 import dequantise_into, product_tokens
from frugal_bonsai.row_blocks import multiplied_in_blocks
from frugal_bonsai.stream.ahead import ReadAhead
from frugal_bonsai.stream.int8_linear import GPU_MULTIPLE, Int8Weight
from frugal_bonsai.stream.micro_batch import memory_for
from frugal_bonsai.stream.scratch import Scratch
from frugal_bonsai.stream.source import LayerSource, Record, align
from frugal_bonsai.stream.stored_weight import RowsWeight

Parameters = dict[str, torch.Tensor]

# Forms of a weight in products: a tensor in the compute dtype; a large weight on a CPU, of which a
# few rows at a time are dense; int8 codes.
DENSE, ROWS, CODES = "dense", "rows", "codes"
_IN_PLACE = "in place"


class LayerStream:
    """Streams layers from disk to a device.

    Args:
        source: source of the layers.
        device: where they are computed.
        dtype: compute dtype; a tensor stored in this dtype is used in place.
        products: ``"dense"`` makes all weights plain tensors. ``"rows"`` yields large weights as
            :class:`RowsWeight` on a CPU. ``"codes"`` yields int8 weights as :class:`Int8Weight` on
            any device. Modules can multiply these; nothing else can use them.
        buffers: number of layers held as stored; with one, nothing is read in the background.

    Attributes:
        tokens_at_once: maximum number of tokens computed together; None leaves it to the plan.
    """

    def __init__(
        self,
        source: LayerSource,
        *,
        device: torch.device,
        dtype: torch.dtype,
        products: str = DENSE,
        buffers: int = 2,
        exact: tuple[str, ...] = (),
    ) -> None:
        self.source, self.device, self.dtype, self._exact = source, device, dtype, exact
        self._products, self._scratch = products, Scratch(device)
        self.tokens_at_once = self._tokens_at_once()
        largest = max(source.layer_bytes(layer) for layer in range(source.layers))
        slots, streams = min(buffers, source.layers), has_streams(device)
        self._copies = torch.Stream(device) if streams else None
        self._arrived: list[torch.Event | None] = [None, None]
        self._consumed: list[torch.Event | None] = [None, None]
        with memory_for("the buffers of a layer"):
            self._host = [_bytes(largest, pin_memory=streams) for _ in range(slots)]
            self._staged = self._host
            if is_accelerator(device):
                self._staged = [_bytes(largest, device=device) for _ in range(slots)]
            self._dense = _bytes(self._dense_bytes(), device=device)
        if self._copies is not None:
            self._copies.wait_stream(current_stream(device))
        self._first: Future[None] | None = None
        self._ahead = ReadAhead(source)
        self._reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="layer-reader")

    def _tokens_at_once(self) -> int | None:
        if self._products != CODES or self.device.type != "cpu":
            return None
        every = [r for layer in range(self.source.layers) for r in self.source.records(layer)]
        widths = [max(record.shape) for record in every if self._form(record) == CODES]
        return product_tokens(max(widths)) if widths else None

    def _dense_bytes(self) -> int:
        return max(
            sum(
                align(record.elements * self.dtype.itemsize)
                for record in self.source.records(layer)
                if self._form(record) == DENSE
            )
            for layer in range(self.source.layers)
        )

    def _form(self, record: Record) -> str:
        """Return the form in which a stored tensor is yielded."""
        quantised, cpu = record.scales_start is not None, self.device.type == "cpu"
        exact = torch_dtype(record.dtype) == self.dtype or record.name.endswith(self._exact)
        if exact and not quantised:
            return _IN_PLACE
        if self._products == CODES and quantised:
            whole = all(n % GPU_MULTIPLE == 0 for n in record.shape)
            return CODES if cpu or whole else DENSE
        blocks = cpu and multiplied_in_blocks(record.shape, self.dtype.itemsize)
        return ROWS if self._products != DENSE and blocks else DENSE

    def start(self, then: LayerSource | None = None) -> None:
        """Start to read the first layer before :meth:`visit`.

        Args:
            then: source that is read after this visit; the disk continues with its first layer.
        """
        if self._first is None:
            self._ahead = ReadAhead(self.source, then)
            self._first = self._reader.submit(self._fetch, 0, 0)

    def visit(
        self, then: LayerSource | None = None, *, reverse: bool = False
    ) -> Iterator[tuple[int, Parameters]]:
        """Yield ``(layer, parameters)`` in order; parameters are valid until the next layer.

        Args:
            then: source that is read after this visit.
            reverse: visit from the last layer to the first; :meth:`start` must not be called.
        """
        if reverse:
            assert self._first is None
            self._ahead = ReadAhead(self.source, then, reverse=True)
            self._first = self._reader.submit(self._fetch, 0, self.source.layers - 1)
        self.start(then)
        pending, self._first = self._first, None
        assert pending is not None
        order = list(range(self.source.layers))
        if reverse:
            order.reverse()
        for place, layer in enumerate(order):
            pending.result()
            following, ahead = order[place + 1 : place + 2], len(self._host) > 1
            if following and ahead:
                pending = self._reader.submit(self._fetch, place + 1, *following)
            yield layer, self._parameters(layer)
            if self._copies is not None:
                self._consumed[self._slot(layer)] = current_stream(self.device).record_event()
            if following and not ahead:
                pending = self._reader.submit(self._fetch, place + 1, *following)

    def _slot(self, layer: int) -> int:
        return layer % len(self._host)

    # This runs in the reader's thread, which does not inherit inference mode. Buffers made in
    # inference mode, as the head's are, can only be written in inference mode.
    @torch.inference_mode()
    def _fetch(self, place: int, layer: int) -> None:
        """Read the layer at this place of the visit into its buffer."""
        slot = self._slot(layer)
        self._ahead.reach(place)
        if self._copies is None:
            self.source.read(layer, self._host[slot])
            if self._staged is not self._host:
                self._staged[slot].copy_(self._host[slot])
            return
        arrived = self._arrived[slot]
        if arrived is not None:
            arrived.synchronize()  # the pinned buffer is still being copied from
        self.source.read(layer, self._host[slot])
        size = self.source.layer_bytes(layer)
        with self._copies:
            consumed = self._consumed[slot]
            if consumed is not None:
                self._copies.wait_event(consumed)
            self._staged[slot][:size].copy_(self._host[slot][:size], non_blocking=True)
            self._arrived[slot] = self._copies.record_event()

    def _parameters(self, layer: int) -> Parameters:
        slot, offset = self._slot(layer), 0
        stored, parameters = self._staged[slot], Parameters()
        arrived = self._arrived[slot]
        if arrived is not None:
            current_stream(self.device).wait_event(arrived)
        for record in self.source.records(layer):
            form, value = self._form(record), record.view(stored)
            scales_O = None if record.scales_start is None else record.scales(stored)
            if form == _IN_PLACE:
                parameters[record.name] = value
                continue
            if form in (CODES, ROWS):
                kind = Int8Weight if form == CODES else RowsWeight
                parameters[record.name] = kind(value, scales_O, self._scratch)
                continue
            size = math.prod(record.shape) * self.dtype.itemsize
            out = self._dense[offset : offset + size].view(self.dtype).view(record.shape)
            offset = align(offset + size)
            if scales_O is None:
                out.copy_(value)
            else:
                dequantise_into(out, value, scales_O)
            parameters[record.name] = out
        return parameters

    def close(self) -> None:
        """Stop the background reader and free the buffers."""
        self._reader.shutdown(wait=True, cancel_futures=True)
        if self._copies is not None:
            self._copies.synchronize()
        self._host = self._staged = []
        empty_host_cache(self.device)
        self._dense = torch.empty(0)
        self._scratch = Scratch(self.device)

    def __enter__(self) -> LayerStream:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _bytes(size: int, **where: Any) -> torch.Tensor:
    return torch.empty(size, dtype=torch.uint8, **where)
