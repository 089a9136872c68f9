"""Recovery without gradients: refit every output projection against the dense residual stream.

In: the dense and the pruned model, streamed side by side over the calibration windows. Out: new
weights for the projections of every layer, and for free the moments that the next round's
prior needs and the pruned model's loss on every window. With X the pruned model's kept inputs to
the projection and T = (dense residual after the sublayer) - (pruned residual before it),

    W' = argmin ||T - X W'^T||^2 + lambda ||W' - W||^2 .

Before that, if asked for, the projections *into* a sublayer (q, k, v; gate, up) are refitted to
give on the pruned model's drifted input what the dense ones give on their own (recover_inputs.py).

Aiming at the *dense* residual, not at the pruned layer's own old output, corrects the drift of all
layers before. Holds two layers, two sets of hidden states, one Gram matrix, and (if the plan
allows) the inputs X of one layer, else they are computed again. A refit weight takes the place of
the weight that it replaces.

Shape suffixes: N windows, B those of a micro-batch, S tokens, H hidden, C kept columns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from frugal_bonsai.bonsai.gram import Moments, ridge_refit_
from frugal_bonsai.bonsai.layer_pass import InputsAgain, LayerPass, RefitOutput
from frugal_bonsai.bonsai.prior import Prior, PriorBuilder
from frugal_bonsai.bonsai.recover_inputs import input_projections, refit_inputs
from frugal_bonsai.model.units import KeepMask, UnitGroup
from frugal_bonsai.stream.call import call_layer, capture_output
from frugal_bonsai.stream.forward import Sweep
from frugal_bonsai.stream.head import Head
from frugal_bonsai.stream.layers import LayerStream
from frugal_bonsai.stream.micro_batch import memory_for


@dataclass(frozen=True, kw_only=True)
class Recovered:
    """What a recovery sweep gives.

    Attributes:
        prior: for the next round, from the refit model's own inputs.
        losses_NS: the refit model's loss of tokens 2..S of every window, fp32 ``[N, S-1]``.
        dense_losses_NS: the dense model's; None where they were not asked for.
        residual: share of the dense residual's energy that the refit leaves, per projection.
    """

    prior: Prior
    losses_NS: torch.Tensor
    dense_losses_NS: torch.Tensor | None
    residual: list[float]


class Recovery:
    """The paired sweep.

    Args:
        sweep: device, micro-batches, progress and token count.
        ridge: lambda as a share of the Gram matrix's mean diagonal.
        keep_inputs: hold the inputs of one layer's projections for all windows.
        save: called with each layer's refit weights by full tensor name; it must copy what it
            keeps, their memory is the layer's own.
        saved_dtype: in which dtype a refit weight (full name) will be saved; None is fp32.
        mask: given, the projections *into* each sublayer are refitted first; None leaves them.
    """

    def __init__(
        self,
        sweep: Sweep,
        *,
        ridge: float,
        keep_inputs: bool,
        save: Callable[[int, dict[str, torch.Tensor]], None],
        saved_dtype: Callable[[str], torch.dtype] | None = None,
        mask: KeepMask | None = None,
    ) -> None:
        self._sweep, self._ridge, self._keep, self._save = sweep, ridge, keep_inputs, save
        self._saved_dtype = saved_dtype or (lambda _: torch.float32)
        self._mask = mask

    def run(
        self,
        dense: LayerStream,
        pruned: LayerStream,
        head: Head,
        tokens_NS: torch.Tensor,
        prior: PriorBuilder,
        *,
        dense_losses: bool = True,
    ) -> Recovered:
        """Refit all projections; see the module's text.

        Args:
            dense: the dense model.
            pruned: the working store without the units that are gone.
            head: for the losses.
            tokens_NS: calibration windows, all in flight together.
            prior: scores the refit groups for the next round.
            dense_losses: the head is applied to the dense model too.
        """
        sweep = self._sweep
        skeleton = sweep.skeleton
        hidden_dense, hidden_pruned = sweep.embed(tokens_NS), sweep.embed(tokens_NS)
        dense_inputs = sweep.hidden_states(tokens_NS) if self._mask is not None else None
        kwargs = skeleton.layer_kwargs(tokens_NS.shape[1])
        sweep.progress.sweep("recovery", skeleton.spec.layers, 2 * tokens_NS.numel())
        residual: list[float] = []
        with torch.inference_mode():
            for (layer, mine), (_, theirs) in zip(pruned.visit(), dense.visit(), strict=True):
                work = LayerPass(
                    sweep,
                    layer,
                    theirs,
                    mine,
                    hidden_dense,
                    hidden_pruned,
                    kwargs[layer],
                    self._saved_dtype,
                    dense_inputs,
                )
                self._refit_layer(work, len(tokens_NS), prior, residual)
                sweep.progress.step(f"layer {layer}")
            passes = 2 if self._keep else 3
            sweep.forward_tokens += passes * tokens_NS.numel()
            return Recovered(
                prior=prior.build(),
                losses_NS=head.nll(hidden_pruned, tokens_NS).clone(),
                dense_losses_NS=head.nll(hidden_dense, tokens_NS).clone() if dense_losses else None,
                residual=residual,
            )

    def _refit_layer(
        self, work: LayerPass, windows: int, prior: PriorBuilder, residual: list[float]
    ) -> None:
        groups = work.sweep.skeleton.spec.table.of_layer(work.layer)
        refits: dict[str, torch.Tensor] = {}
        for at, group in enumerate(groups):
            last = at == len(groups) - 1
            if self._mask is not None:
                refits |= refit_inputs(
                    work, group, self._mask, windows, ridge=self._ridge, first=at == 0
                )
            with memory_for(f"recovery of {group.output_weight}"):
                weight_HC, moments, left, inputs = self._solve(work, group, windows, last=last)
            prior.add(group, moments, weight_HC)
            residual.append(left)
            refits[group.output_weight] = work.adopt(f"{group.output}.weight", weight_HC)
            bias_H = work.pruned.get(f"{group.output}.bias")
            work.outputs[group.output] = RefitOutput(
                inputs, work.pruned[f"{group.output}.weight"], bias_H
            )
        work.sweep.batches.run(windows, partial(_advance, work))
        self._save(work.layer, refits)

    def _target(
        self, work: LayerPass, group: UnitGroup, items: slice, *, last: bool
    ) -> tuple[torch.Tensor, Callable[[], None]]:
        """The dense residual after the sublayer minus the pruned before it; what is to be kept.

        The dense layer is computed once, with its first sublayer; its output then replaces the
        dense hidden states, which are the target of the last sublayer. That is done by the second
        result, once nothing can go wrong any more.
        """
        if last:
            return work.hidden_dense.read(items) - work.residual(items), _nothing
        before_BSH = work.hidden_dense.read(items)
        after_BSH, sublayer_BSH, input_BSH = capture_output(
            work.module,
            work.dense,
            before_BSH,
            work.kwargs,
            group.output,
            input_of=self._last_input(work),
        )
        target_BSH = before_BSH + sublayer_BSH - work.residual(items)

        def keep() -> None:
            if work.dense_inputs is not None and input_BSH is not None:
                work.dense_inputs.write(items, input_BSH)
            work.hidden_dense.write(items, after_BSH)

        return target_BSH, keep

    def _last_input(self, work: LayerPass) -> str | None:
        """The module whose dense input is kept for the last sublayer's own refit."""
        if self._mask is None:
            return None
        spec = work.sweep.skeleton.spec
        return input_projections(spec, spec.table.of_layer(work.layer)[-1])[0]

    def _solve(
        self, work: LayerPass, group: UnitGroup, windows: int, *, last: bool
    ) -> tuple[torch.Tensor, Moments, float, Callable[[slice], torch.Tensor]]:
        """Accumulate the Gram matrix and the cross moments, then solve."""
        weight_HC = work.pruned[f"{group.output}.weight"]
        bias_H = work.pruned.get(f"{group.output}.bias")
        columns, device = weight_HC.shape[1], weight_HC.device
        moments = Moments(columns, device=device, gram=True)
        cross = _Cross(weight_HC.shape[0], columns, device)
        kept = work.room(columns) if self._keep else None
        batches = work.sweep.batches

        def add(items: slice) -> None:
            target_BSH, keep = self._target(work, group, items, last=last)
            if bias_H is not None:
                target_BSH = target_BSH - bias_H
            input_BSC = work.inputs(group.output, items)
            keep()
            if kept is not None:
                kept.write(items, input_BSC)
            batches.run(len(input_BSC), lambda part: moments.add(input_BSC[part]))
            batches.run(len(input_BSC), lambda part: cross.add(input_BSC[part], target_BSH[part]))

        batches.run(windows, add)
        factor = moments.factor(self._ridge, where=f"recovery of {group.output_weight}")
        left = 1.0 - ridge_refit_(factor, cross.sum_HC, weight_HC) / max(cross.energy, 1e-300)
        inputs = kept.read if kept is not None else InputsAgain(work, group.output)
        return cross.sum_HC, moments, left, inputs


class _Cross:
    """Running sums over tokens of ``t x^T`` and of the targets' energy."""

    def __init__(self, hidden: int, columns: int, device: torch.device) -> None:
        self.sum_HC = torch.zeros(hidden, columns, device=device)
        self.energy = 0.0

    def add(self, input_BSC: torch.Tensor, target_BSH: torch.Tensor) -> None:
        """Add one micro-batch: all of it, or nothing when memory runs out."""
        target_TH = target_BSH.flatten(0, 1).float()
        energy = float(torch.linalg.vector_norm(target_TH, dtype=torch.float64)) ** 2
        self.sum_HC.addmm_(target_TH.T, input_BSC.flatten(0, 1).float())
        self.energy += energy


def _advance(work: LayerPass, items: slice) -> None:
    """The refit layer's output takes the place of its input."""
    hidden_BSH = work.hidden_pruned.read(items)
    with work.known(items):
        output_BSH = call_layer(work.module, work.pruned, hidden_BSH, work.kwargs)
    work.hidden_pruned.write(items, output_BSH)


def _nothing() -> None:
    """Nothing is to be kept."""
