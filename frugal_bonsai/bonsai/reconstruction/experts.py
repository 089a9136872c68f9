"""Refitting the output projections of a layer's experts: down_proj of each that is left.

In: a layer of both models, attention refitted. Out: new weights of every expert's output
projection. What the layer's experts should add up to is the dense residual stream behind the layer
minus the pruned one before it; what they miss of that, D, is shared out among a token's experts as
the router weighs them, s (they add up to one). With X an expert's own inputs over the tokens routed
to it, weighted as the router weighs them, and W its weight,

    W' = argmin ||X W^T + s D - X W'^T||^2 + lambda ||W' - W||^2 ,

so that experts that all reach their aim reach the layer's. Which tokens an expert sees is the
pruned model's router's to say; it and what flows into the experts stay as they are. An expert that
no token is sent to keeps its weights. Holds one Gram matrix and the cross moments of every expert.

Shape suffixes: B windows of a micro-batch, S tokens, T tokens of a micro-batch, R those of one
expert, H hidden, C kept columns.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn.functional import linear

from frugal_bonsai.bonsai.importance.gram import Moments, ridge_refit_
from frugal_bonsai.bonsai.importance.scores import ImportanceBuilder
from frugal_bonsai.bonsai.reconstruction.layer_pass import LayerPass
from frugal_bonsai.bonsai.reconstruction.outputs import Cross
from frugal_bonsai.model.units import UnitGroup
from frugal_bonsai.stream.experts import capture_experts
from frugal_bonsai.stream.micro_batch import memory_for


def refit_experts(
    work: LayerPass,
    groups: Sequence[UnitGroup],
    windows: int,
    *,
    ridge: float,
    prior: ImportanceBuilder | None,
) -> tuple[dict[str, torch.Tensor], list[float]]:
    """Refit all of a layer's experts from one pass; the layer computes with them from then on.

    Args:
        work: the layer of both models.
        groups: the experts' units, of those that are left.
        windows: how many are learnt from.
        ridge: lambda as a share of each Gram matrix's mean diagonal.
        prior: scores the groups from the same moments.

    Returns:
        The refit weights by full name, and what each leaves of its aim's energy.
    """
    refits, left = dict[str, torch.Tensor](), []
    with memory_for(f"recovery of layer {work.layer}'s experts"):
        sums = _accumulate(work, groups, windows)
        for group in groups:
            moments, cross = sums.pop(group.output)
            name = f"{group.output}.weight"
            if not moments.empty:
                factor = moments.factor(ridge, where=f"recovery of {group.output_weight}")
                explained = ridge_refit_(factor, cross.sum_HC, work.pruned[name])
                left.append(1.0 - explained / max(cross.energy, 1e-300))
            else:
                cross.sum_HC.copy_(work.pruned[name])
            if prior is not None:
                prior.add(group, moments, cross.sum_HC)
            refits[group.output_weight] = work.adopt(name, cross.sum_HC)
            del moments, cross
    return refits, left


def _accumulate(
    work: LayerPass, groups: Sequence[UnitGroup], windows: int
) -> dict[str, tuple[Moments, Cross]]:
    """Each expert's moments and cross moments, by its output projection."""
    device, batches = work.sweep.skeleton.device, work.sweep.batches
    sums = dict[str, tuple[Moments, Cross]]()
    for group in groups:
        hidden, columns = work.pruned[f"{group.output}.weight"].shape
        moments = Moments(columns, device=device, gram=True)
        sums[group.output] = (moments, Cross(hidden, columns, device))
    spec = work.sweep.skeleton.spec
    rule = spec.family.experts
    assert rule is not None

    def add(items: slice) -> None:
        hidden_BSH = work.hidden_pruned.read(items)
        with work.known(items):
            seen = capture_experts(
                work.module, work.pruned, hidden_BSH, work.kwargs, rule, list(sums)
            )
        missing_BSH = work.hidden_dense.read(items) - seen.result_BSH
        missing_TH = missing_BSH.flatten(0, 1) / spec.residual_scale
        weights_T = seen.weights_T.clamp_min(torch.finfo(seen.weights_T.dtype).tiny)
        pieces = []
        for name, (input_RC, tokens_R, weight_R) in seen.inputs.items():
            share_R1 = (weight_R / weights_T[tokens_R])[:, None].to(missing_TH.dtype)
            aim_RH = linear(input_RC, work.pruned[f"{name}.weight"])
            pieces.append((name, input_RC, aim_RH.addcmul_(missing_TH[tokens_R], share_R1)))
        tokens = len(missing_TH)
        # From here on nothing is tried again: what lacks memory now is refused.
        batches.run(1, lambda _: _add(sums, pieces, tokens))

    batches.run(windows, add)
    return sums


def _add(
    sums: dict[str, tuple[Moments, Cross]],
    pieces: list[tuple[str, torch.Tensor, torch.Tensor]],
    tokens: int,
) -> None:
    """Add every expert's rows of a micro-batch of so many tokens."""
    for name, input_RC, aim_RH in pieces:
        moments, cross = sums[name]
        moments.add(input_RC[None], tokens=tokens)
        cross.add(input_RC[None], aim_RH[None])
