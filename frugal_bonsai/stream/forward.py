"""The masked sweep: layers outermost, every (mask, window) pair inside.

In: windows of tokens, optionally a keep mask for each, optionally a tap on the inputs of the output
projections. Out: the loss of every token. A layer is read and dequantised once per wave, however
many masks and windows are in flight. Holds the hidden states of a wave, one layer, one
micro-batch's activations. Never lets one window's result depend on its neighbours. When memory runs
out inside a layer, its micro-batch halves and the layer goes on with the windows that are left.

Shape suffixes: N pairs of mask and window, B those of a micro-batch, S tokens, H hidden, C columns
of an output projection.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch

from frugal_bonsai.accelerator import to_device
from frugal_bonsai.memory.plan import SweepLimits
from frugal_bonsai.model.units import UnitGroup
from frugal_bonsai.progress import Progress, Silent
from frugal_bonsai.stream.call import InputHook, call_layer
from frugal_bonsai.stream.head import Head
from frugal_bonsai.stream.hidden import HiddenStates
from frugal_bonsai.stream.layers import LayerStream, Parameters
from frugal_bonsai.stream.micro_batch import MicroBatches
from frugal_bonsai.stream.skeleton import Skeleton
from frugal_bonsai.stream.source import LayerSource


class Masker(Protocol):
    """Gives each (mask, window) pair its kept columns."""

    def columns(self, group: UnitGroup, items: slice) -> torch.Tensor | None:
        """Bool ``[B, C]`` over the columns that the streamed layer has; None keeps all."""

    def stand_in(
        self, group: UnitGroup, input_BSC: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Columns ``[P]`` and what takes their place where they are off ``[B, S, P]``.

        All columns that a mask may switch off are among them. None: zeros do.
        """


class Tap(Protocol):
    """Sees the inputs of the output projections, and each layer's end."""

    def inputs(self, group: UnitGroup, input_BSC: torch.Tensor) -> None:
        """One micro-batch's input of an output projection, in the compute dtype.

        Must change nothing before everything that it allocates is there: when memory runs out, it
        is called again with parts of the micro-batch.
        """

    def end_layer(self, layer: int, parameters: Parameters) -> None:
        """All windows have passed a layer; its parameters are still valid."""


class Sweep:
    """Runs windows through a streamed model.

    Attributes:
        forward_tokens: tokens that went through the whole model so far, partial passes counted by
            their share.
        batches: the micro-batches, and what became of their size.

    Args:
        skeleton: the model without weights.
        limits: from the memory plan.
        progress: told of each layer visit.
    """

    def __init__(
        self, skeleton: Skeleton, limits: SweepLimits, *, progress: Progress | None = None
    ) -> None:
        self.skeleton, self.limits = skeleton, limits
        self.progress: Progress = progress or Silent()
        self.batches = MicroBatches(limits.micro_batch, progress=self.progress)
        self.forward_tokens = 0

    def losses(
        self,
        stream: LayerStream,
        head: Head,
        tokens_NS: torch.Tensor,
        *,
        masker: Masker | None = None,
        name: str | Callable[[slice], str] = "evaluating",
    ) -> torch.Tensor:
        """Negative log-likelihood of tokens 2..S of each pair, fp32 ``[N, S-1]`` on the CPU."""
        losses = []
        waves = self.hidden_waves(stream, tokens_NS, masker=masker, name=name, then=head.to_read)
        for wave, hidden in waves:
            with torch.inference_mode():
                losses.append(head.nll(hidden, tokens_NS[wave]))
            del hidden  # not held while the next wave runs
        return torch.cat(losses).clone()

    def hidden_waves(
        self,
        stream: LayerStream,
        tokens_NS: torch.Tensor,
        *,
        masker: Masker | None,
        name: str | Callable[[slice], str],
        then: LayerSource | None = None,
    ) -> Iterator[tuple[slice, HiddenStates]]:
        """Run all pairs, as many at a time as the plan lets in flight; yield each wave's end.

        The name of the sweep, for the progress, may be made from the wave's pairs. ``then`` is read
        behind each wave.
        """
        for wave in self.waves(len(tokens_NS)):
            called = name if isinstance(name, str) else name(wave)
            shifted = _shifted(masker, wave)
            yield wave, self.run(stream, tokens_NS[wave], masker=shifted, name=called, then=then)

    def run(
        self,
        stream: LayerStream,
        tokens_NS: torch.Tensor,
        *,
        masker: Masker | None = None,
        tap: Tap | None = None,
        name: str = "evaluating",
        after_layer: Callable[[int, HiddenStates], None] | None = None,
        then: LayerSource | None = None,
    ) -> HiddenStates:
        """One wave through all layers; the hidden states behind the last one, before the norm.

        ``after_layer`` is shown the hidden states behind each layer, which the next one changes.
        ``then`` is what the caller reads next, such as the head.
        """
        stream.start(then)
        window, at_once = tokens_NS.shape[1], stream.tokens_at_once
        most = None if at_once is None else max(1, at_once // window)
        kwargs = self.skeleton.layer_kwargs(window)
        hidden = self.embed(tokens_NS)
        self.progress.sweep(name, self.skeleton.spec.layers, tokens_NS.numel())
        with torch.inference_mode():
            for layer, parameters in stream.visit(then):
                visit = _LayerVisit(self, layer, parameters, kwargs[layer], hidden, masker, tap)
                self.batches.run(len(tokens_NS), visit, most=most)
                if tap is not None:
                    tap.end_layer(layer, parameters)
                if after_layer is not None:
                    after_layer(layer, hidden)
                self.progress.step(f"layer {layer}")
        self.forward_tokens += tokens_NS.numel()
        return hidden

    def embed(self, tokens_NS: torch.Tensor) -> HiddenStates:
        """The first layer's inputs of these windows; a window that occurs again is copied."""
        hidden = self.hidden_states(tokens_NS)
        distinct_US, where_N = torch.unique(tokens_NS, dim=0, return_inverse=True)

        def embed(items: slice) -> None:
            embedded_BSH = self.skeleton.embed(distinct_US[items])
            for item, embedded_SH in enumerate(embedded_BSH, start=items.start):
                for place in (where_N == item).nonzero().flatten().tolist():
                    hidden.write(slice(place, place + 1), embedded_SH[None])

        self.batches.run(len(distinct_US), embed)
        return hidden

    def hidden_states(self, tokens_NS: torch.Tensor) -> HiddenStates:
        """Room for one hidden state a token, not written yet."""
        skeleton = self.skeleton
        return HiddenStates(
            tokens_NS.shape[0],
            tokens_NS.shape[1],
            skeleton.spec.hidden,
            device=skeleton.device,
            dtype=skeleton.dtype,
            resident=self.limits.resident_windows,
        )

    def waves(self, windows: int) -> Iterator[slice]:
        """Slices of at most ``windows_in_flight`` windows."""
        step = self.limits.windows_in_flight
        for start in range(0, windows, step):
            yield slice(start, min(start + step, windows))


class _LayerVisit:
    """One layer over any micro-batch of a wave."""

    def __init__(
        self,
        sweep: Sweep,
        layer: int,
        parameters: Parameters,
        kwargs: dict[str, Any],
        hidden: HiddenStates,
        masker: Masker | None,
        tap: Tap | None,
    ) -> None:
        self._batches = sweep.batches
        self._module = sweep.skeleton.layers[layer]
        self._groups = sweep.skeleton.spec.table.of_layer(layer)
        self._parameters, self._kwargs = parameters, kwargs
        self._hidden, self._masker, self._tap = hidden, masker, tap

    def __call__(self, items: slice) -> None:
        """Compute the layer, then keep its output, then show the tap the inputs."""
        hooks, seen = _hooks(self._groups, self._masker, self._tap, items)
        self._hidden.write(
            items,
            call_layer(
                self._module, self._parameters, self._hidden.read(items), self._kwargs, hooks
            ),
        )
        if self._tap is not None:
            _show(self._tap, seen, self._batches, items.stop - items.start)


def _show(
    tap: Tap, seen: list[tuple[UnitGroup, torch.Tensor]], batches: MicroBatches, windows: int
) -> None:
    """The layer is done: what the tap lacks memory for is shown to it in smaller parts."""
    for group, input_BSC in seen:
        batches.run(windows, lambda part, g=group, x=input_BSC: tap.inputs(g, x[part]))  # type: ignore[misc]


class _Shifted:
    """A wave's view of a masker: items count from the wave's first pair."""

    def __init__(self, masker: Masker, first: int) -> None:
        self._masker, self._first = masker, first

    def columns(self, group: UnitGroup, items: slice) -> torch.Tensor | None:
        return self._masker.columns(
            group, slice(items.start + self._first, items.stop + self._first)
        )

    def stand_in(
        self, group: UnitGroup, input_BSC: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        return self._masker.stand_in(group, input_BSC)


def _shifted(masker: Masker | None, wave: slice) -> Masker | None:
    return None if masker is None else _Shifted(masker, wave.start)


def _hooks(
    groups: tuple[UnitGroup, ...], masker: Masker | None, tap: Tap | None, items: slice
) -> tuple[dict[str, InputHook], list[tuple[UnitGroup, torch.Tensor]]]:
    """Hooks that mask, and that keep the inputs for the tap until the layer has succeeded."""
    hooks: dict[str, InputHook] = {}
    seen: list[tuple[UnitGroup, torch.Tensor]] = []

    def make(group: UnitGroup, keep_BC: torch.Tensor | None) -> InputHook:
        def hook(input_BSC: torch.Tensor) -> torch.Tensor | None:
            if keep_BC is not None and masker is not None:
                _switch_off(masker, group, to_device(keep_BC, input_BSC.device), input_BSC)
            if tap is not None:
                seen.append((group, input_BSC))
            return None

        return hook

    for group in groups:
        keep_BC = None if masker is None else masker.columns(group, items)
        if keep_BC is not None or tap is not None:
            hooks[group.output] = make(group, keep_BC)
    return hooks, seen


def _switch_off(
    masker: Masker, group: UnitGroup, keep_BC: torch.Tensor, input_BSC: torch.Tensor
) -> None:
    """Zero the columns that a mask does not keep, or put what stands in for them there."""
    stand_in = masker.stand_in(group, input_BSC)
    if stand_in is None:
        input_BSC.mul_(keep_BC.to(input_BSC.dtype)[:, None, :])
        return
    columns_P, instead_BSP = stand_in
    input_BSC[..., columns_P] = torch.where(
        keep_BC[:, None, columns_P], input_BSC[..., columns_P], instead_BSP
    )
