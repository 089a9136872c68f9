"""Refit the output projections of a layer's experts.

In: a layer of both models whose attention is refitted. Out: new weights of the output projection of
each remaining expert. The layer's experts should add up to the dense residual stream after the
layer minus the pruned one before it. Let D be the difference between this target and their present
sum. D is divided among a token's experts in proportion to their router weights s, normalised to add
up to one. With X an expert's inputs over its tokens, multiplied by the router's weight, and W its
output projection,

    W' = argmin ||X W^T + s D - X W'^T||^2 + lambda ||W' - W||^2 ,

so that the layer reaches its target if every expert does. The pruned model's router decides which
tokens an expert receives. The router and the experts' input projections are not refitted. An expert
without tokens keeps its weights. Where a norm follows the sum, which cannot restore what the
residual stream lacks, the target is the dense experts' own sum.

Memory: one Gram matrix and the cross moments of every expert.

Shape suffixes: B windows of a micro-batch, S tokens, T tokens of a micro-batch, R tokens of one
expert, H hidden, C remaining columns.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn.functional import linear

from frugal_bonsai.bonsai.reconstruction.layer_pass import LayerPass
from frugal_bonsai.bonsai.reconstruction.least_squares import LeastSquares
from frugal_bonsai.model.units import UnitGroup
from frugal_bonsai.stream.experts import capture_experts
from frugal_bonsai.stream.micro_batch import memory_for


def refit_experts(work: LayerPass, groups: Sequence[UnitGroup]) -> None:
    """Refit all of a layer's experts in one pass; the layer computes with them from then on.

    Args:
        work: the layer of both models.
        groups: units of the remaining experts.
    """
    scores = work.pair.scores
    with memory_for(f"reconstruction of layer {work.layer}'s experts"):
        problems = _accumulate(work, [group.output for group in groups])
        for group in groups:
            problem, name = problems.pop(group.output), f"{group.output}.weight"
            if not problem.moments.empty:
                where = f"reconstruction of {group.output_weight}"
                work.residual.append(problem.solve_(work.pair.options.ridge, where=where))
            else:
                problem.weight_HC.copy_(work.pruned[name])
            if scores is not None:
                scores.add(group, problem.moments, problem.weight_HC)
            work.adopt(name, problem.weight_HC)
            del problem


def _accumulate(work: LayerPass, outputs: Sequence[str]) -> dict[str, LeastSquares]:
    """Return each expert's least-squares problem, by its output projection."""
    problems = {name: LeastSquares(work.pruned[f"{name}.weight"]) for name in outputs}
    rule = work.spec.family.experts
    assert rule is not None
    dense = work.pair.dense_outputs

    def add(items: slice) -> None:
        hidden_BSH = work.pair.hidden_pruned.read(items)
        with work.with_refits(items):
            captured = capture_experts(
                work.module,
                work.pruned,
                hidden_BSH,
                work.kwargs,
                rule,
                outputs,
                keep_sum=dense is not None,
            )
        if dense is not None and captured.sum_TH is not None:
            missing_TH = dense.read(items).flatten(0, 1) - captured.sum_TH
        else:
            missing_BSH = work.pair.hidden_dense.read(items) - captured.result_BSH
            missing_TH = missing_BSH.flatten(0, 1) / work.spec.residual_scale
        weights_T = captured.weights_T.clamp_min(torch.finfo(captured.weights_T.dtype).tiny)
        targets = {}
        for name, (input_RC, tokens_R, weight_R) in captured.inputs.items():
            share_R1 = (weight_R / weights_T[tokens_R])[:, None].to(missing_TH.dtype)
            output_RH = linear(input_RC, work.pruned[f"{name}.weight"])
            targets[name] = output_RH.addcmul_(missing_TH[tokens_R], share_R1)

        def add_all(_: slice) -> None:
            for name, target_RH in targets.items():
                input_1RC = captured.inputs[name][0][None]
                problems[name].moments.add(input_1RC, tokens=len(missing_TH))
                problems[name].add_targets(input_1RC, target_RH[None])

        # One indivisible item: sums that have begun to change are not tried again.
        work.run(1, add_all)

    work.run(work.pair.fitted, add)
    return problems
