"""Run windows of tokens through a streamed model, one layer at a time.

In: windows of tokens, optionally a keep mask for each, optionally a tap on the inputs of the output
projections. Out: the loss of every token, or the last layer's hidden states. A layer is read and
dequantised once per wave, however many masks and windows are in flight. A window's result does not
depend on its neighbours. When memory runs out inside a layer, its micro-batch halves and the layer
continues with the windows that are left.

Memory: the hidden states of a wave, one layer, one micro-batch's activations.

Shape suffixes: N (mask, window) pairs, B pairs of a micro-batch, S tokens, H hidden, C columns of
an output projection, P columns that may be imputed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from frugal_bonsai.memory.plan import SweepLimits
from frugal_bonsai.progress import Progress, Silent
from frugal_bonsai.stream.call import InputHook, call_layer
from frugal_bonsai.stream.head import Head
from frugal_bonsai.stream.hidden import HiddenStates
from frugal_bonsai.stream.layers import LayerStream, Parameters
from frugal_bonsai.stream.micro_batch import MicroBatches
from frugal_bonsai.stream.skeleton import Skeleton
from frugal_bonsai.stream.source import LayerSource
from frugal_bonsai.stream.taps import Masker, Tap, make_hooks, show_inputs


@dataclass(frozen=True)
class LayerVisit:
    """One layer while a sweep visits it.

    Attributes:
        layer: index of the layer.
        module: Hugging Face's layer, on the meta device.
        parameters: name inside the layer -> tensor; valid during the visit.
        kwargs: keyword arguments that the model calls this layer with.
        hidden: the layer's inputs; the visit replaces them by its outputs.
    """

    layer: int
    module: nn.Module
    parameters: Parameters
    kwargs: dict[str, Any]
    hidden: HiddenStates

    def call(
        self, hidden_BSH: torch.Tensor, hooks: Mapping[str, InputHook] | None = None
    ) -> torch.Tensor:
        """Return the layer's output ``[B, S, H]``."""
        return call_layer(self.module, self.parameters, hidden_BSH, self.kwargs, hooks)


class Sweep:
    """Runs windows through a streamed model.

    Attributes:
        forward_tokens: tokens of all forward passes; a partial pass counts by its share.
        batches: the micro-batches with their present size.

    Args:
        skeleton: the model without weights.
        limits: from the memory plan.
        progress: receives each layer visit.
        disk: folder for hidden states that spill to disk.
    """

    def __init__(
        self,
        skeleton: Skeleton,
        limits: SweepLimits,
        *,
        progress: Progress | None = None,
        disk: Path | None = None,
    ) -> None:
        self.skeleton, self.limits, self._disk = skeleton, limits, disk
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
        """Return the negative log-likelihood of tokens 2..S, fp32 ``[N, S-1]`` on the CPU."""
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
        """Run the pairs in waves; yield each wave with its last hidden states.

        ``name`` is the sweep's name for the progress, or a function of the wave that returns it;
        ``then`` is the source that the caller reads after each wave, such as the head.
        """
        for wave in self.waves(len(tokens_NS)):
            called = name if isinstance(name, str) else name(wave)
            mine_NS, number = tokens_NS[wave], wave.start
            yield (
                wave,
                self.run(stream, mine_NS, masker=masker, first=number, name=called, then=then),
            )

    def run(
        self,
        stream: LayerStream,
        tokens_NS: torch.Tensor,
        *,
        masker: Masker | None = None,
        first: int = 0,
        tap: Tap | None = None,
        name: str = "evaluating",
        after_layer: Callable[[int, HiddenStates], None] | None = None,
        then: LayerSource | None = None,
    ) -> HiddenStates:
        """Run one wave through all layers; return the hidden states before the final norm.

        Args:
            stream: the layers.
            tokens_NS: windows of tokens.
            masker: kept columns of each window.
            first: number that the masker gives the first window.
            tap: sees the inputs of the output projections.
            name: sweep's name for the progress.
            after_layer: called with each layer's index and outputs, which the next layer changes.
            then: source that the caller reads next, such as the head.
        """
        window, at_once = tokens_NS.shape[1], stream.tokens_at_once
        most = None if at_once is None else max(1, at_once // window)

        def advance(visit: LayerVisit) -> None:
            groups = self.skeleton.spec.table.of_layer(visit.layer)

            def body(items: slice) -> None:
                numbers = slice(items.start + first, items.stop + first)
                hooks, seen = make_hooks(groups, masker, tap, numbers)
                visit.hidden.write(items, visit.call(visit.hidden.read(items), hooks))
                if tap is not None:
                    show_inputs(tap, seen, self.batches, items.stop - items.start)

            self.batches.run(len(tokens_NS), body, most=most)
            if tap is not None:
                tap.end_layer(visit.layer, visit.parameters)
            if after_layer is not None:
                after_layer(visit.layer, visit.hidden)

        return self.visit_layers(stream, tokens_NS, advance, name=name, then=then)

    def visit_layers(
        self,
        stream: LayerStream,
        tokens_NS: torch.Tensor,
        visit: Callable[[LayerVisit], None],
        *,
        name: str,
        then: LayerSource | None = None,
    ) -> HiddenStates:
        """Call ``visit`` once per layer, in inference mode, and return the last hidden states.

        Args:
            stream: Brings the layers.
            tokens_NS: Token ids, int64.
            visit: Must replace the visit's hidden states by the layer's outputs.
            name: Name of the sweep, for the progress display.
            then: Source that the next sweep reads; its first layer is fetched at the end.
        """
        stream.start(then)
        skeleton = self.skeleton
        kwargs = skeleton.layer_kwargs(tokens_NS.shape[1])
        hidden = self.embed(tokens_NS)
        self.progress.sweep(name, skeleton.spec.layers, tokens_NS.numel())
        with torch.inference_mode():
            for layer, parameters in stream.visit(then):
                module = skeleton.layers[layer]
                visit(LayerVisit(layer, module, parameters, kwargs[layer], hidden))
                self.progress.step(f"layer {layer}")
        self.forward_tokens += tokens_NS.numel()
        return hidden

    def embed(self, tokens_NS: torch.Tensor) -> HiddenStates:
        """Return the first layer's inputs; a window that occurs again is copied."""
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
        """Allocate one hidden state for each token, uninitialised."""
        skeleton = self.skeleton
        return HiddenStates(
            tokens_NS.shape[0],
            tokens_NS.shape[1],
            skeleton.spec.hidden,
            device=skeleton.device,
            dtype=skeleton.dtype,
            resident=self.limits.resident_windows,
            disk=self._disk if self.limits.on_disk else None,
        )

    def waves(self, windows: int, first: int = 0) -> Iterator[slice]:
        """Yield slices of at most ``windows_in_flight`` windows, from ``first`` on.

        A sweep that goes on inside a wave ends that wave where it would have ended.
        """
        step = self.limits.windows_in_flight
        while first < windows:
            stop = min((first // step + 1) * step, windows)
            yield slice(first, stop)
            first = stop
