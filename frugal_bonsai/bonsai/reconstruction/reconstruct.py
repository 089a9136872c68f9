"""Reconstruction without gradients: refit each projection against the dense residual stream.

In: the dense and the pruned model, streamed side by side over windows of tokens. Out: new weights
of every layer's projections, and from the same moments the next round's importance. With X the
remaining inputs of an output projection and T = (dense residual stream after the sublayer) -
(pruned residual stream before it),

    W' = argmin ||T - X W'^T||^2 + lambda ||W' - W||^2 .

Three steps surround this refit (outputs.py). Before it, the projections into the sublayer are
refitted to their dense outputs (inputs.py). After it, the FFN's channels may be updated
(channels.py). A layer's experts are refitted together (experts.py).

The target is the *dense* residual stream, not the pruned layer's former output, so a refit also
corrects the drift of all layers before it. Where the layer multiplies the projection's output, the
target is divided by the multiplier. Where a norm follows the projection, the target is the dense
projection's own output.

Memory: two layers, two sets of hidden states, one Gram matrix, and where the plan allows it the
inputs X of one layer; otherwise these are computed again. A refit weight overwrites the weight that
it replaces.

Shape suffixes: N windows, S tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from frugal_bonsai.bonsai.importance.scores import ImportanceBuilder, ImportanceScores
from frugal_bonsai.bonsai.reconstruction.channels import update_channels
from frugal_bonsai.bonsai.reconstruction.experts import refit_experts
from frugal_bonsai.bonsai.reconstruction.finished import FinishedLayers
from frugal_bonsai.bonsai.reconstruction.inputs import refit_inputs
from frugal_bonsai.bonsai.reconstruction.layer_pass import (
    LayerPass,
    PairedSweep,
    ReconstructionOptions,
)
from frugal_bonsai.bonsai.reconstruction.outputs import refit_output
from frugal_bonsai.model.units import FFN, UnitGroup
from frugal_bonsai.stream.forward import Sweep
from frugal_bonsai.stream.hidden import HiddenStates
from frugal_bonsai.stream.layers import LayerStream


@dataclass(frozen=True, kw_only=True)
class Reconstructed:
    """Result of a reconstruction.

    Attributes:
        scores: importance of the refit model's units for the next round; None if not requested.
        residual: share of each target's energy that its refit does not explain.
        hidden_dense: the dense model's hidden states of all fitted windows before the final norm.
        hidden_pruned: the refit model's hidden states of all windows before the final norm.
    """

    scores: ImportanceScores | None
    residual: list[float]
    hidden_dense: HiddenStates
    hidden_pruned: HiddenStates


class Reconstruction:
    """Refits one pruned model.

    Args:
        sweep: device, micro-batches, progress and token count.
        options: which projections are refitted, and what may be held.
        save: called with each layer's index and refit weights by full name; the weights' memory
            belongs to the layer, so ``save`` must copy what it keeps.
        name: sweep's name for the progress.
    """

    def __init__(
        self,
        sweep: Sweep,
        options: ReconstructionOptions,
        *,
        save: Callable[[int, dict[str, torch.Tensor]], None],
        name: str = "recovery",
    ) -> None:
        self._sweep, self._options, self._save, self._name = sweep, options, save, name

    def run(
        self,
        dense: LayerStream,
        pruned: LayerStream,
        tokens_NS: torch.Tensor,
        scores: ImportanceBuilder | None = None,
        *,
        held_out: int = 0,
        finished: FinishedLayers | None = None,
    ) -> Reconstructed:
        """Refit all projections, layer by layer.

        Args:
            dense: the dense model.
            pruned: the working store without the removed units.
            tokens_NS: windows of tokens, all in flight together.
            scores: computes the next round's importance from the refit model; None computes none.
            held_out: number of windows, the last ones, that only the pruned model passes through:
                refits and scores do not see them.
            finished: layers that a stopped run had finished; None notes and restores none.
        """
        skeleton = self._sweep.skeleton
        pair = self._prepare(tokens_NS, scores, held_out)
        kwargs = skeleton.layer_kwargs(tokens_NS.shape[1])
        self._sweep.progress.sweep(self._name, skeleton.spec.layers, 2 * tokens_NS.numel())
        residual, extra_passes = [], 0.0
        with torch.inference_mode():
            for (layer, mine), (_, theirs) in zip(pruned.visit(), dense.visit(), strict=True):
                work = LayerPass(pair, layer, theirs, mine, kwargs[layer])
                if finished is None or not finished.restore(work):
                    self._refit_layer(work)
                    self._save(layer, work.refits)
                    if finished is not None:
                        finished.note(work)
                residual += work.residual
                extra_passes += work.extra_passes
                self._sweep.progress.step(f"layer {layer}")
        self._count_tokens(pair, extra_passes)
        return Reconstructed(
            scores=None if scores is None else scores.build(),
            residual=residual,
            hidden_dense=pair.hidden_dense,
            hidden_pruned=pair.hidden_pruned,
        )

    def _prepare(
        self, tokens_NS: torch.Tensor, scores: ImportanceBuilder | None, held_out: int
    ) -> PairedSweep:
        """Embed the windows for both models and allocate the buffers that the options need."""
        sweep, options = self._sweep, self._options
        family = sweep.skeleton.spec.family

        def buffer(needed: bool) -> HiddenStates | None:
            return sweep.hidden_states(tokens_NS) if needed else None

        updates = options.channel_updates > 0
        both = options.mask is not None or updates
        return PairedSweep(
            sweep=sweep,
            options=options,
            hidden_dense=sweep.embed(tokens_NS),
            hidden_pruned=sweep.embed(tokens_NS),
            fitted=len(tokens_NS) - held_out,
            held_out=held_out,
            scores=scores,
            dense_inputs=buffer(both and family.experts is None),
            targets=buffer(updates and options.keep_updates),
            dense_outputs=buffer(family.ffn_norm is not None),
        )

    def _refit_layer(self, work: LayerPass) -> None:
        """Refit the layer's sublayers in order, then advance the pruned model."""
        groups = work.spec.table.of_layer(work.layer)
        for at, group in enumerate(groups):
            if group.expert is not None:
                continue
            if self._options.mask is not None:
                refit_inputs(work, group, first=at == 0)
            self._refit_sublayer(work, group, last=group.kind == FFN)
        experts = [
            g for g in groups if g.expert is not None and f"{g.output}.weight" in work.pruned
        ]
        if experts:
            refit_experts(work, experts)
        work.advance()

    def _refit_sublayer(self, work: LayerPass, group: UnitGroup, *, last: bool) -> None:
        """Refit an output projection; update the channels before it where that is requested."""
        options = self._options
        updates = options.channel_updates if group.kind == FFN else 0

        def target(items: slice) -> tuple[torch.Tensor, Callable[[], None]]:
            if last:
                return work.last_target(group, items), lambda: None
            return work.first_target(group, items)

        # An update changes the inputs, so these are not held.
        refit = refit_output(work, group, target, keep=options.keep_inputs and not updates)
        if updates:
            refit = update_channels(work, group, refit, steps=updates, keep=options.keep_updates)
        work.residual.append(refit.residual)
        work.adopt(f"{group.output}.weight", refit.weight_HC)
        work.register_output(group.output, refit.inputs)

    def _count_tokens(self, pair: PairedSweep, extra_passes: float) -> None:
        """Add the tokens of all passes through the model to the sweep's count."""
        keep, experts = self._options.keep_inputs, pair.sweep.skeleton.spec.family.experts
        window = pair.hidden_pruned.window
        # Dense model, pruned model, pruned model again where inputs are not held, experts.
        passes = (2 if keep else 3) + (0 if experts is None else 1) + extra_passes
        self._sweep.forward_tokens += round(passes * (pair.fitted * window))
        self._sweep.forward_tokens += (1 if keep else 2) * pair.held_out * window
