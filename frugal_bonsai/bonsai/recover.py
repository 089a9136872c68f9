"""Recovery without gradients: refit every output projection against the dense residual stream.

In: the dense and the pruned model, streamed side by side over the calibration windows. Out: new
weights for the projections of every layer, and for free the moments that the next round's
prior needs and the pruned model's loss on every window. With X the pruned model's kept inputs to
the projection and T = (dense residual after the sublayer) - (pruned residual before it),

    W' = argmin ||T - X W'^T||^2 + lambda ||W' - W||^2 .

Before that, if asked for, the projections *into* a sublayer (q, k, v; gate, up) are refitted to
give on the pruned model's drifted input what the dense ones give on their own (recover_inputs.py);
after it, if asked for, the FFN's channels themselves are moved (refine.py).

Aiming at the *dense* residual, not at the pruned layer's own old output, corrects the drift of all
layers before. Holds two layers, two sets of hidden states, one Gram matrix, and (if the plan
allows) the inputs X of one layer, else they are computed again.

Shape suffixes: N windows, B those of a micro-batch, S tokens, H hidden, C kept columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from frugal_bonsai.bonsai.gram import Moments, ridge_refit
from frugal_bonsai.bonsai.layer_pass import InputsAgain, KeptInputs, LayerPass, RefitOutput
from frugal_bonsai.bonsai.prior import Prior, PriorBuilder
from frugal_bonsai.bonsai.recover_inputs import input_projections, refit_inputs
from frugal_bonsai.bonsai.refine import Refinement
from frugal_bonsai.model.units import FFN, KeepMask, UnitGroup
from frugal_bonsai.stream.call import call_layer, capture_output
from frugal_bonsai.stream.forward import Sweep
from frugal_bonsai.stream.head import Head
from frugal_bonsai.stream.layers import LayerStream


@dataclass(frozen=True, kw_only=True)
class Recovered:
    """What a recovery sweep gives.

    Attributes:
        prior: for the next round, from the refit model's own inputs.
        losses_NS: the refit model's loss of tokens 2..S of every window, fp32 ``[N, S-1]``.
        dense_losses_NS: the dense model's.
        residual: share of the dense residual's energy that the refit leaves, per projection.
    """

    prior: Prior
    losses_NS: torch.Tensor
    dense_losses_NS: torch.Tensor
    residual: list[float]


@dataclass(frozen=True)
class _Solved:
    """A projection's refit, what it was solved from, and the share of the target that it leaves."""

    weight_HC: torch.Tensor
    moments: Moments
    left: float
    inputs: Callable[[slice], torch.Tensor]


class Recovery:
    """The paired sweep.

    Args:
        sweep: device, micro-batches, progress and token count.
        ridge: lambda as a share of the Gram matrix's mean diagonal.
        keep_inputs: hold the inputs of one layer's projections for all windows.
        save: called with each layer's refit weights by full tensor name.
        mask: given, the projections *into* each sublayer are refitted first; None leaves them.
        refine: how often the FFN's input projections are refined after that.
        name: of the sweep, for progress.
    """

    def __init__(
        self,
        sweep: Sweep,
        *,
        ridge: float,
        keep_inputs: bool,
        save: Callable[[int, dict[str, torch.Tensor]], None],
        mask: KeepMask | None = None,
        refine: int = 0,
        name: str = "recovery",
    ) -> None:
        self._sweep, self._ridge, self._keep, self._save = sweep, ridge, keep_inputs, save
        self._mask, self._refine, self._name = mask, refine, name
        self._refined_passes = 0.0

    def run(
        self,
        dense: LayerStream,
        pruned: LayerStream,
        head: Head,
        tokens_NS: torch.Tensor,
        prior: PriorBuilder,
    ) -> Recovered:
        """Refit all projections; see the module's text.

        Args:
            dense: the dense model.
            pruned: the working store without the units that are gone.
            head: for the losses.
            tokens_NS: calibration windows, all in flight together.
            prior: scores the refit groups for the next round.
        """
        sweep = self._sweep
        skeleton = sweep.skeleton
        hidden_dense, hidden_pruned = sweep.embed(tokens_NS), sweep.embed(tokens_NS)
        both = self._mask is not None or self._refine > 0
        dense_inputs = sweep.hidden_states(tokens_NS) if both else None
        self._refine_targets = sweep.hidden_states(tokens_NS) if self._refine else None
        kwargs = skeleton.layer_kwargs(tokens_NS.shape[1])
        sweep.progress.sweep(self._name, skeleton.spec.layers, 2 * tokens_NS.numel())
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
                    dense_inputs,
                )
                self._refit_layer(work, len(tokens_NS), prior, residual)
                sweep.progress.step(f"layer {layer}")
            passes = 2 if self._keep else 3
            sweep.forward_tokens += round((passes + self._refined_passes) * tokens_NS.numel())
            return Recovered(
                prior=prior.build(),
                losses_NS=head.nll(hidden_pruned, tokens_NS).clone(),
                dense_losses_NS=head.nll(hidden_dense, tokens_NS).clone(),
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
            targets = self._targets(work, group, windows, last=last)
            solved = self._solve(work, group, targets)
            if self._refine and group.kind == FFN:
                solved, refined = self._refine_inputs(work, group, windows, solved)
                refits |= refined
            prior.add(group, solved.moments, solved.weight_HC)
            residual.append(solved.left)
            refits[group.output_weight] = solved.weight_HC
            bias_H = work.pruned.get(f"{group.output}.bias")
            work.outputs[group.output] = RefitOutput(
                solved.inputs, solved.weight_HC.to(work.sweep.skeleton.dtype), bias_H
            )
        for items in work.sweep.micro_batches(windows):
            hidden_BSH = work.hidden_pruned.read(items)
            with work.known(items):
                output_BSH = call_layer(work.module, work.pruned, hidden_BSH, work.kwargs)
            work.hidden_pruned.write(items, output_BSH)
        self._save(work.layer, refits)
        # Outputs that are computed again refer to the pass that holds them: a cycle of tensors.
        work.outputs.clear()

    def _targets(
        self, work: LayerPass, group: UnitGroup, windows: int, *, last: bool
    ) -> Iterator[tuple[slice, torch.Tensor]]:
        """For each micro-batch, the dense residual after the sublayer minus the pruned before it.

        The dense layer is computed once, with its first sublayer; its output then replaces the
        dense hidden states, which are the target of the last sublayer.
        """
        for items in work.sweep.micro_batches(windows):
            if last:
                dense_BSH = work.hidden_dense.read(items)
            else:
                before_BSH = work.hidden_dense.read(items)
                after_BSH, sublayer_BSH, input_BSH = capture_output(
                    work.module,
                    work.dense,
                    before_BSH,
                    work.kwargs,
                    group.output,
                    input_of=self._last_input(work),
                )
                if work.dense_inputs is not None and input_BSH is not None:
                    work.dense_inputs.write(items, input_BSH)
                dense_BSH = before_BSH + sublayer_BSH
                work.hidden_dense.write(items, after_BSH)
            yield items, dense_BSH - work.residual(items)

    def _last_input(self, work: LayerPass) -> str | None:
        """The module whose dense input is kept for the last sublayer's own refit."""
        if self._mask is None:
            return None
        spec = work.sweep.skeleton.spec
        return input_projections(spec, spec.table.of_layer(work.layer)[-1])[0]

    def _solve(
        self,
        work: LayerPass,
        group: UnitGroup,
        targets: Iterator[tuple[slice, torch.Tensor]],
    ) -> _Solved:
        """Accumulate the Gram matrix and the cross moments, then solve."""
        weight_HC = work.pruned[f"{group.output}.weight"]
        bias_H = work.pruned.get(f"{group.output}.bias")
        moments = Moments(weight_HC.shape[1], device=weight_HC.device, gram=True)
        cross_CH = torch.zeros(weight_HC.shape[1], weight_HC.shape[0], device=weight_HC.device)
        energy = 0.0
        kept: dict[int, torch.Tensor] = {}
        for items, target_BSH in targets:
            input_BSC = work.inputs(group.output, items)
            if bias_H is not None:
                target_BSH = target_BSH - bias_H
            target_TH = target_BSH.flatten(0, 1).float()
            moments.add(input_BSC)
            cross_CH.addmm_(input_BSC.flatten(0, 1).float().T, target_TH)
            energy += float(target_TH.double().square().sum())
            if self._keep:
                kept[items.start] = input_BSC
        assert moments.gram_CC is not None
        where = f"recovery of {group.output_weight}"
        refit_HC = ridge_refit(moments.gram_CC, cross_CH, weight_HC, ridge=self._ridge, where=where)
        refit_CH = refit_HC.T
        explained = (
            2 * (refit_CH * cross_CH).sum() - (refit_CH * (moments.gram_CC @ refit_CH)).sum()
        )
        left = 1.0 - float(explained) / max(energy, 1e-300)

        inputs = KeptInputs(kept) if self._keep else InputsAgain(work, group.output)
        return _Solved(refit_HC, moments, left, inputs)

    def _refine_inputs(
        self, work: LayerPass, group: UnitGroup, windows: int, solved: _Solved
    ) -> tuple[_Solved, dict[str, torch.Tensor]]:
        """Move the channels and refit what mixes them in turn, as long as less is left.

        The layer pass computes with the new input projections from then on.
        """
        spec = work.sweep.skeleton.spec
        assert work.dense_inputs is not None and self._refine_targets is not None
        projections = input_projections(spec, group)
        problem = Refinement(
            work,
            group,
            projections,
            windows,
            inputs=work.dense_inputs,  # read for the last time by the refit of these projections
            targets=self._refine_targets,
            keep=self._keep,
        )
        best: dict[str, torch.Tensor] = {}
        sizes = sum(work.pruned[f"{name}.weight"].numel() for name in (*projections, group.output))
        # Other windows in every step: twice the steps for the same tokens.
        for part in problem.parts(self._refine):
            before = {f"{name}.weight": work.pruned[f"{name}.weight"] for name in projections}
            new = problem.improve(solved.weight_HC, part)
            tried = self._solve(work, group, problem.pairs())
            passes = 1 + problem.passes * (part.stop - part.start) / windows
            self._refined_passes += passes * sizes / spec.block_parameters
            if tried.left >= solved.left:
                work.pruned.update(before)
                break
            solved, best = tried, new
        prefix = spec.prefix(work.layer)
        return solved, {prefix + name: weight for name, weight in best.items()}
