"""Recovery without gradients: refit every output projection against the dense residual stream.

In: the dense and the pruned model, streamed side by side over the calibration windows. Out: new
weights for the projections of every layer, and for free the moments that the next round's
prior needs and the pruned model's loss on every window. With X the pruned model's kept inputs to
the projection and T = (dense residual after the sublayer) - (pruned residual before it),

    W' = argmin ||T - X W'^T||^2 + lambda ||W' - W||^2 .

Before that, if asked for, the projections *into* a sublayer (q, k, v; gate, up) are refitted to
give on the pruned model's drifted input what the dense ones give on their own (recover_inputs.py);
after it, if asked for, the FFN's channels themselves are moved (refine.py). Of experts the output
projections are refitted together (recover_experts.py), what flows into them stays as it is.

Aiming at the *dense* residual, not at the pruned layer's own old output, corrects the drift of all
layers before. Where the layer multiplies the projection's output, the aim is divided by that; where
a norm lies behind the projection, the aim is the dense projection's own output. Holds two layers,
two sets of hidden states, one Gram matrix, and (if the plan allows) the inputs X of one layer, else
they are computed again. A refit weight takes the place of the weight that it replaces.

Shape suffixes: N windows, B those of a micro-batch, S tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch

from frugal_bonsai.bonsai.importance.scores import ImportanceBuilder, ImportanceScores
from frugal_bonsai.bonsai.reconstruction.channels import ChannelUpdate
from frugal_bonsai.bonsai.reconstruction.experts import refit_experts
from frugal_bonsai.bonsai.reconstruction.inputs import input_projections, input_rows, refit_inputs
from frugal_bonsai.bonsai.reconstruction.layer_pass import LayerPass, RefitOutput
from frugal_bonsai.bonsai.reconstruction.logit_scale import find_logit_scale
from frugal_bonsai.bonsai.reconstruction.outputs import Solved, solve_output
from frugal_bonsai.model.units import FFN, KeepMask, UnitGroup
from frugal_bonsai.stream.call import call_layer, capture_outputs
from frugal_bonsai.stream.forward import Sweep
from frugal_bonsai.stream.head import Head
from frugal_bonsai.stream.hidden import HiddenStates
from frugal_bonsai.stream.layers import LayerStream
from frugal_bonsai.stream.micro_batch import memory_for


@dataclass(frozen=True, kw_only=True)
class Reconstructed:
    """What a recovery sweep gives.

    Attributes:
        prior: for the next round, from the refit model's own inputs; None where not asked for.
        losses_NS: the refit model's loss of tokens 2..S of every window, fp32 ``[N, S-1]``; with
            its logits scaled, if that was asked for.
        dense_losses_NS: the dense model's; None where they were not asked for.
        residual: share of the dense residual's energy that the refit leaves, per projection.
        logit_scale: the factor that the refit model's logits need (logit_scale.py); None where it
            was not asked for.
        judged: what ``judge`` gave; None without one.
    """

    prior: ImportanceScores | None
    losses_NS: torch.Tensor
    dense_losses_NS: torch.Tensor | None
    residual: list[float]
    logit_scale: float | None = None
    judged: list[float] | None = None


class Reconstruction:
    """The paired sweep.

    Args:
        sweep: device, micro-batches, progress and token count.
        ridge: lambda as a share of the Gram matrix's mean diagonal.
        keep_inputs: hold the inputs of one layer's projections for all windows.
        save: called with each layer's refit weights by full tensor name; it must copy what it
            keeps, their memory is the layer's own.
        saved_dtype: in which dtype a refit weight (full name) will be saved; None is fp32.
        mask: given, the projections *into* each sublayer are refitted first; None leaves them.
        refine: how often the FFN's input projections are refined after that.
        keep_refinement: hold what a refinement aims at and its slopes.
        name: of the sweep, for progress.
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
        refine: int = 0,
        keep_refinement: bool = True,
        name: str = "recovery",
    ) -> None:
        self._sweep, self._ridge, self._keep, self._save = sweep, ridge, keep_inputs, save
        self._saved_dtype = saved_dtype or (lambda _: torch.float32)
        self._mask, self._refine, self._name = mask, refine, name
        self._keep_refinement = keep_refinement and refine > 0
        self._refined_passes = 0.0

    def run(
        self,
        dense: LayerStream,
        pruned: LayerStream,
        head: Head,
        tokens_NS: torch.Tensor,
        prior: ImportanceBuilder | None = None,
        *,
        dense_losses: bool = True,
        held_out: int = 0,
        rescale: bool = False,
        judge: Callable[[HiddenStates], list[float]] | None = None,
    ) -> Reconstructed:
        """Refit all projections; see the module's text.

        Args:
            dense: the dense model.
            pruned: the working store without the units that are gone.
            head: for the losses.
            tokens_NS: calibration windows, all in flight together.
            prior: scores the refit groups for the next round; None where there is none.
            dense_losses: the head is applied to the dense model too.
            held_out: the last windows, on which the refit model is only evaluated. The dense model
                does not see them, nor do ``prior`` and refinement.
            rescale: find the factor that the logits need.
            judge: is shown the refit model's hidden states behind the last layer.
        """
        sweep = self._sweep
        skeleton = sweep.skeleton
        hidden_dense, hidden_pruned = sweep.embed(tokens_NS), sweep.embed(tokens_NS)
        routed = skeleton.spec.family.experts is not None
        both = (self._mask is not None or self._refine > 0) and not routed
        dense_inputs = sweep.hidden_states(tokens_NS) if both else None
        targets = sweep.hidden_states(tokens_NS) if self._keep_refinement else None
        normed = skeleton.spec.family.ffn_norm is not None
        dense_outputs = sweep.hidden_states(tokens_NS) if normed else None
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
                    self._saved_dtype,
                    dense_inputs,
                    dense_outputs,
                )
                fitted = len(tokens_NS) - held_out
                self._refit_layer(work, fitted, held_out, prior, residual, targets)
                sweep.progress.step(f"layer {layer}")
            # The dense model's pass and the pruned one's, twice where inputs are not held.
            # Experts are seen in a pass of their own.
            passes = (2 if self._keep else 3) + int(routed) + self._refined_passes
            fitted_tokens = fitted * tokens_NS.shape[1]
            unseen_tokens = tokens_NS.numel() - fitted_tokens
            sweep.forward_tokens += round(passes * fitted_tokens)
            sweep.forward_tokens += (1 if self._keep else 2) * unseen_tokens
            scale = None
            if rescale:
                seen_NS = tokens_NS[:fitted]
                scale = find_logit_scale(sweep, head, hidden_dense, hidden_pruned, seen_NS)
            judged = None if judge is None else judge(hidden_pruned)  # nll norms them in place
            return Reconstructed(
                prior=None if prior is None else prior.build(),
                judged=judged,
                losses_NS=head.nll(hidden_pruned, tokens_NS, scale=scale or 1.0).clone(),
                dense_losses_NS=head.nll(hidden_dense, tokens_NS).clone() if dense_losses else None,
                residual=residual,
                logit_scale=scale,
            )

    def _refit_layer(
        self,
        work: LayerPass,
        windows: int,
        held_out: int,
        prior: ImportanceBuilder | None,
        residual: list[float],
        targets: HiddenStates | None,
    ) -> None:
        groups = work.sweep.skeleton.spec.table.of_layer(work.layer)
        experts = [
            g for g in groups if f"{g.output}.weight" in work.pruned and g.expert is not None
        ]
        refits: dict[str, torch.Tensor] = {}
        for at, group in enumerate(groups):
            if group.expert is not None:
                continue  # all together, below
            last, refined = at == len(groups) - 1, self._refine > 0 and group.kind == FFN
            if self._mask is not None:
                refits |= refit_inputs(
                    work, group, self._mask, windows, ridge=self._ridge, first=at == 0
                )
            solved = solve_output(
                work,
                group,
                windows,
                partial(self._target, work, group, last=last),
                ridge=self._ridge,
                keep=self._keep and not refined,  # a refinement changes them
                prior=prior,
                held_out=held_out,
            )
            if refined:
                solved = _set_aside(work, group, solved)
                solved, moved = self._refine_inputs(work, group, windows, solved, prior, targets)
                refits |= moved
            residual.append(solved.left)
            refits[group.output_weight] = work.adopt(f"{group.output}.weight", solved.weight_HC)
            bias_H = work.pruned.get(f"{group.output}.bias")
            work.outputs[group.output] = RefitOutput(
                solved.inputs, work.pruned[f"{group.output}.weight"], bias_H
            )
        if experts:
            moved, left = refit_experts(work, experts, windows, ridge=self._ridge, prior=prior)
            refits |= moved
            residual += left
        work.sweep.batches.run(windows + held_out, partial(_advance, work))
        self._save(work.layer, refits)
        # Outputs that are computed again refer to the pass that holds them: a cycle of tensors.
        work.outputs.clear()

    def _refine_inputs(
        self,
        work: LayerPass,
        group: UnitGroup,
        windows: int,
        solved: Solved,
        prior: ImportanceBuilder | None,
        targets: HiddenStates | None,
    ) -> tuple[Solved, dict[str, torch.Tensor]]:
        """Move the channels and refit what mixes them in turn, as long as less is left.

        The layer pass computes with the new input projections from then on. Returns the best refit
        and the new input projections as they are to be saved, by full name.
        """
        spec = work.sweep.skeleton.spec
        assert work.dense_inputs is not None
        projections = input_rows(spec, group)
        names = list(dict.fromkeys(f"{rows.projection}.weight" for rows in projections))
        sizes = sum(work.pruned[name].numel() for name in (*names, f"{group.output}.weight"))
        with memory_for(f"refinement of {group.name}"):
            problem = ChannelUpdate(
                work,
                group,
                projections,
                windows,
                inputs=work.dense_inputs,  # read for the last time by these projections' refit
                targets=targets,
                keep=self._keep_refinement,
            )
            refits: dict[str, torch.Tensor] = {}
            # Its inputs are computed once more at the layer's end.
            passes = float(self._keep)
            # Other windows in every step: twice the steps for the same tokens.
            for part in problem.parts(self._refine):
                before = {name: work.pruned[name] for name in names}
                moved = problem.improve(solved.weight_HC, part)
                tried = solve_output(
                    work,
                    group,
                    windows,
                    problem.target,
                    ridge=self._ridge,
                    keep=False,
                    prior=prior,
                    most_left=solved.left,
                )
                passes += 1 + problem.passes * (part.stop - part.start) / windows
                work.pruned.update(before)
                if tried.left >= solved.left:
                    break
                solved = _set_aside(work, group, tried)
                del tried
                prefix = spec.prefix(work.layer)
                refits = {prefix + name: work.adopt(name, moved.pop(name)) for name in names}
        self._refined_passes += passes * sizes / spec.block_parameters
        return solved, refits

    def _target(
        self, work: LayerPass, group: UnitGroup, items: slice, *, last: bool
    ) -> tuple[torch.Tensor, Callable[[], None]]:
        """The dense residual after the sublayer minus the pruned before it; what is to be kept.

        The dense layer is computed once, with its first sublayer; its output then replaces the
        dense hidden states, which are the target of the last sublayer. That is done by the second
        result, once nothing can go wrong any more.
        """
        if last:
            return work.last_target(group.output, items), _nothing
        before_BSH = work.hidden_dense.read(items)
        family = work.sweep.skeleton.spec.family
        wanted = [group.output]
        if work.dense_outputs is not None:
            wanted.append(family.ffn_output)
        seen = capture_outputs(
            work.module,
            work.dense,
            before_BSH,
            work.kwargs,
            wanted,
            input_of=self._last_input(work),
        )
        own_BSH, last_BSH = seen.outputs[group.output], seen.outputs.get(family.ffn_output)
        result_BSH, input_BSH = seen.result_BSH, seen.input_BSH
        del seen  # what is not kept is not held either
        missing_BSH = before_BSH + work.added(group.output, own_BSH, work.dense)
        missing_BSH = missing_BSH - work.residual(items)
        target_BSH = work.to_give(group.output, missing_BSH, own_BSH)

        def keep() -> None:
            if work.dense_inputs is not None and input_BSH is not None:
                work.dense_inputs.write(items, input_BSH)
            if work.dense_outputs is not None and last_BSH is not None:
                work.dense_outputs.write(items, last_BSH)
            work.hidden_dense.write(items, result_BSH)

        return target_BSH, keep

    def _last_input(self, work: LayerPass) -> str | None:
        """The module whose dense input is kept for the last sublayer's own refit."""
        last = work.sweep.skeleton.spec.table.of_layer(work.layer)[-1]
        if self._mask is None or last.expert is not None:
            return None
        spec = work.sweep.skeleton.spec
        return input_projections(spec, last)[0]


def _set_aside(work: LayerPass, group: UnitGroup, solved: Solved) -> Solved:
    """The same refit where the dense layer's weight was, if it fits there."""
    weight_HC = work.borrow(f"{group.output}.weight", solved.weight_HC)
    return replace(solved, weight_HC=weight_HC)


def _advance(work: LayerPass, items: slice) -> None:
    """The refit layer's output takes the place of its input."""
    hidden_BSH = work.hidden_pruned.read(items)
    with work.known(items):
        output_BSH = call_layer(work.module, work.pruned, hidden_BSH, work.kwargs)
    work.hidden_pruned.write(items, output_BSH)


def _nothing() -> None:
    """Nothing is to be kept."""
