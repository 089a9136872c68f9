"""Whole experts: how much each adds where the router sends tokens to it, and which of them go.

In: one unmasked sweep; a target. Out: a score an expert, and a mask without the least useful ones.
An expert's score is REAP's saliency (Lasby et al. 2025, arXiv 2510.13999): over the tokens that
are routed to it, the mean of the router's weight times the norm of what it gives. Every layer
loses the same number of experts, as published: scores of different layers do not compare. Experts
are ranked once; what goes sends its tokens to others. Holds what a sweep holds, and the inputs of
one layer's experts.

Shape suffixes: N windows or units, S tokens, B windows of a micro-batch, R tokens of one expert, H
hidden, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear

from frugal_bonsai.accelerator import sum_dtype
from frugal_bonsai.bonsai.importance.scores import Prior
from frugal_bonsai.bonsai.settings import REAP
from frugal_bonsai.errors import OptionError
from frugal_bonsai.model.family_schema import Experts
from frugal_bonsai.model.units import KeepMask, UnitGroup, iterate_layers
from frugal_bonsai.stream.experts import capture_experts
from frugal_bonsai.stream.forward import Sweep
from frugal_bonsai.stream.hidden import HiddenStates
from frugal_bonsai.stream.layers import LayerStream, Parameters


def measure_experts(
    sweep: Sweep, stream: LayerStream, tokens_NS: torch.Tensor, mask: KeepMask
) -> Prior:
    """Saliency of every expert, as the score of each of its units; 0 for one without tokens.

    Args:
        sweep: device, micro-batches, progress and token count.
        stream: the dense model.
        tokens_NS: calibration windows.
        mask: units alive.
    """
    skeleton, table = sweep.skeleton, mask.table
    rule = skeleton.spec.family.experts
    assert rule is not None
    kwargs, hidden = skeleton.layer_kwargs(tokens_NS.shape[1]), sweep.embed(tokens_NS)
    score_N = torch.zeros(table.units, dtype=torch.float64)
    sweep.progress.sweep("statistics", skeleton.spec.layers, tokens_NS.numel())
    with torch.inference_mode():
        for layer, parameters in stream.visit():
            experts = _alive(mask, table.of_layer(layer))
            names = [group.output for group in experts]
            visit = _Visit(skeleton.layers[layer], parameters, kwargs[layer], hidden, rule, names)
            sweep.batches.run(len(tokens_NS), visit)
            for group in experts:
                norms, tokens = visit.norms.get(group.output, 0.0), visit.tokens[group.output]
                score_N[table.span(group)][mask.of(group)] = norms / max(1, tokens)
            sweep.progress.step(f"layer {layer}")
    sweep.forward_tokens += tokens_NS.numel()
    return Prior(REAP, score_N)


@dataclass
class _Visit:
    """One layer over any micro-batch; adds up what its experts give."""

    module: nn.Module
    parameters: Parameters
    kwargs: dict[str, Any]
    hidden: HiddenStates
    rule: Experts
    names: Sequence[str]
    norms: dict[str, float] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)

    def __call__(self, items: slice) -> None:
        """Counts nothing before all is done: where memory runs out, it is called again."""
        hidden_BSH = self.hidden.read(items)
        seen = capture_experts(
            self.module, self.parameters, hidden_BSH, self.kwargs, self.rule, self.names
        )
        norms = {}
        for name, (input_RC, _, _) in seen.inputs.items():
            # The router's weight is in the input already.
            given_RH = linear(input_RC, self.parameters[f"{name}.weight"])
            norms[name] = float(
                torch.linalg.vector_norm(given_RH, dim=1, dtype=sum_dtype(given_RH.device)).sum()
            )
        self.hidden.write(items, seen.result_BSH)
        for name, norm in norms.items():
            self.norms[name] = self.norms.get(name, 0.0) + norm
            self.tokens[name] = self.tokens.get(name, 0) + len(seen.inputs[name][1])


def drop_experts(mask: KeepMask, score_N: torch.Tensor, target_parameters: int) -> KeepMask:
    """Without the least salient experts: as many of every layer as come nearest to the target.

    Args:
        mask: units alive.
        score_N: of :func:`measure_experts`.
        target_parameters: parameters removed in all.
    """
    order = [_by_score(mask, score_N, groups) for _, groups in iterate_layers(mask.table)]
    masks = []
    for count in range(min(map(len, order))):
        keep_N = mask.keep_N.clone()
        for experts in order:
            for group in experts[:count]:
                keep_N[mask.table.span(group)] = False
        masks.append(KeepMask(mask.table, keep_N))
    return min(masks, key=lambda m: abs(m.removed_parameters() - target_parameters))


def check_experts(mask: KeepMask, sparsity: float, blocks: int) -> None:
    """Refuse a sparsity that whole experts cannot give.

    Raises:
        OptionError: the model has none, or at least half of an expert a layer cannot go.
    """
    if not mask.table.has_experts:
        raise OptionError("--allocation experts: this model's layers have no experts; leave it out")
    zeros_N = torch.zeros(mask.table.units)
    one, all_but_one = (
        drop_experts(mask, zeros_N, target).removed_parameters() / blocks
        for target in (_one_each(mask), blocks)
    )
    if not one / 2 < sparsity <= all_but_one:
        raise OptionError(
            f"--sparsity: {sparsity:g} cannot be had from whole experts: one of every layer is "
            f"{one:.3f} of the block parameters and one stays; ask for more than {one / 2:.3f} and "
            f"at most {all_but_one:.3f}"
        )


def _one_each(mask: KeepMask) -> int:
    """Parameters of one expert of every layer."""
    sizes = {
        group.layer: group.count * group.unit_parameters + group.joint_parameters
        for group in _alive(mask, mask.table.groups)
    }
    return sum(sizes.values())


def _alive(mask: KeepMask, groups: Sequence[UnitGroup]) -> list[UnitGroup]:
    return [group for group in groups if group.expert is not None and mask.kept(group)]


def _by_score(
    mask: KeepMask, score_N: torch.Tensor, groups: Sequence[UnitGroup]
) -> list[UnitGroup]:
    """A layer's experts, least salient first."""
    scores = {
        group: float(score_N[mask.table.span(group)][mask.of(group)].mean())
        for group in _alive(mask, groups)
    }
    return sorted(scores, key=lambda group: (scores[group], group.expert))
