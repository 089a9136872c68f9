"""Importance of whole layers and of whole experts, from one unmasked sweep.

In: the dense model and calibration windows. Out: a score per layer or expert, as the score of each
of its units, which selection/whole.py ranks. Memory: that of a sweep; for ``reap`` also the inputs
of one layer's experts.

``similarity`` scores layers by ShortGPT's block influence (Men et al. 2024, section 3.1): ``1 -
E[cos(h, h')]`` over tokens, with h the layer's input and h' its output. ``reap`` scores experts by
REAP's saliency (Lasby et al. 2025, arXiv 2510.13999): the mean, over the tokens routed to an
expert, of the router's weight times the norm of the expert's output. An expert without tokens has
saliency 0.

Shape suffixes: N windows or units, S tokens, B windows of a micro-batch, R tokens of one expert, H
hidden, C channels.
"""

from __future__ import annotations

from collections import defaultdict

import torch

from frugal_bonsai.accelerator import sum_dtype
from frugal_bonsai.bonsai.importance.scores import ImportanceScores
from frugal_bonsai.bonsai.settings import REAP
from frugal_bonsai.model.units import KeepMask, UnitGroup
from frugal_bonsai.stream.experts import capture_experts
from frugal_bonsai.stream.forward import LayerVisit, Sweep
from frugal_bonsai.stream.layers import LayerStream


def measure_whole(
    name: str, sweep: Sweep, stream: LayerStream, tokens_NS: torch.Tensor, mask: KeepMask
) -> ImportanceScores:
    """Score whole layers or experts.

    Args:
        name: ``similarity`` or ``reap``.
        sweep: device, micro-batches, progress and token count.
        stream: the dense model.
        tokens_NS: calibration windows.
        mask: the remaining units.
    """
    score_N = torch.zeros(mask.table.units, dtype=torch.float64)
    measure = _saliency if name == REAP else _influence

    def visit_layer(visit: LayerVisit) -> None:
        groups = [group for group in mask.table.of_layer(visit.layer) if mask.kept(group)]
        for group, score in measure(sweep, visit, tokens_NS, groups).items():
            score_N[mask.table.span(group)][mask.of(group)] = score

    sweep.visit_layers(stream, tokens_NS, visit_layer, name="statistics")
    return ImportanceScores(name, score_N)


def _influence(
    sweep: Sweep, visit: LayerVisit, tokens_NS: torch.Tensor, groups: list[UnitGroup]
) -> dict[UnitGroup, float]:
    """Advance the layer and return its block influence for each of its groups."""
    distances: list[torch.Tensor] = []

    def body(items: slice) -> None:
        before_BSH = visit.hidden.read(items)
        after_BSH = visit.call(before_BSH)
        cosine_BS = torch.cosine_similarity(before_BSH.float(), after_BSH.float(), dim=-1)
        distance = (1 - cosine_BS.to(sum_dtype(cosine_BS.device))).sum()
        visit.hidden.write(items, after_BSH)
        distances.append(distance)  # last: after lack of memory, body is called again

    sweep.batches.run(len(tokens_NS), body)
    return dict.fromkeys(groups, float(sum(distances, 0.0) / tokens_NS.numel()))


def _saliency(
    sweep: Sweep, visit: LayerVisit, tokens_NS: torch.Tensor, groups: list[UnitGroup]
) -> dict[UnitGroup, float]:
    """Advance the layer and return the saliency of each of its experts."""
    rule = sweep.skeleton.spec.family.experts
    assert rule is not None
    norms, tokens = defaultdict[str, float](float), defaultdict[str, int](int)
    experts = [group for group in groups if group.expert is not None]
    names = [group.output for group in experts]
    if not experts:
        return _influence(sweep, visit, tokens_NS, [])

    def body(items: slice) -> None:
        hidden_BSH = visit.hidden.read(items)
        captured = capture_experts(
            visit.module, visit.parameters, hidden_BSH, visit.kwargs, rule, names
        )
        added = {name: _norms(output_RH) for name, output_RH in captured.outputs(visit.parameters)}
        visit.hidden.write(items, captured.result_BSH)
        # Last: after lack of memory, body is called again.
        for name, norm in added.items():
            norms[name] += norm
            tokens[name] += len(captured.inputs[name][1])

    sweep.batches.run(len(tokens_NS), body)
    return {group: norms[group.output] / max(1, tokens[group.output]) for group in experts}


def _norms(output_RH: torch.Tensor) -> float:
    """Return the sum of the norms of an expert's outputs."""
    dtype = sum_dtype(output_RH.device)
    return float(torch.linalg.vector_norm(output_RH, dim=1, dtype=dtype).sum())
