"""Importance of whole experts: how much each adds for the tokens that are routed to it.

In: one unmasked sweep. Out: a score per expert, which selection/whole.py ranks. The score is REAP's
saliency (Lasby et al. 2025, arXiv 2510.13999): the mean, over the tokens routed to an expert, of
the router's weight times the norm of the expert's output. Memory: that of a sweep, and the inputs
of one layer's experts.

Shape suffixes: N windows or units, S tokens, B windows of a micro-batch, R tokens of one expert, H
hidden, C channels.
"""

from __future__ import annotations

from collections import defaultdict

import torch
from torch.nn.functional import linear

from frugal_bonsai.accelerator import sum_dtype
from frugal_bonsai.bonsai.importance.scores import ImportanceScores
from frugal_bonsai.bonsai.settings import REAP
from frugal_bonsai.model.units import KeepMask
from frugal_bonsai.stream.experts import capture_experts
from frugal_bonsai.stream.forward import LayerVisit, Sweep
from frugal_bonsai.stream.layers import LayerStream


def measure_saliency(
    sweep: Sweep, stream: LayerStream, tokens_NS: torch.Tensor, mask: KeepMask
) -> ImportanceScores:
    """Return the saliency of every expert, as the score of each of its units.

    An expert without tokens has saliency 0.

    Args:
        sweep: device, micro-batches, progress and token count.
        stream: the dense model.
        tokens_NS: calibration windows.
        mask: the remaining units.
    """
    rule = sweep.skeleton.spec.family.experts
    assert rule is not None
    score_N = torch.zeros(mask.table.units, dtype=torch.float64)

    def measure(visit: LayerVisit) -> None:
        norms, tokens = defaultdict[str, float](float), defaultdict[str, int](int)
        groups = mask.table.of_layer(visit.layer)
        experts = [group for group in groups if group.expert is not None and mask.kept(group)]
        names = [group.output for group in experts]

        def body(items: slice) -> None:
            hidden_BSH = visit.hidden.read(items)
            captured = capture_experts(
                visit.module, visit.parameters, hidden_BSH, visit.kwargs, rule, names
            )
            added = {
                # The input contains the router's weight.
                name: _norms(input_RC, visit.parameters[f"{name}.weight"])
                for name, (input_RC, _, _) in captured.inputs.items()
            }
            visit.hidden.write(items, captured.result_BSH)
            # Last: after lack of memory, body is called again.
            for name, norm in added.items():
                norms[name] += norm
                tokens[name] += len(captured.inputs[name][1])

        sweep.batches.run(len(tokens_NS), body)
        for group in experts:
            saliency = norms[group.output] / max(1, tokens[group.output])
            score_N[mask.table.span(group)][mask.of(group)] = saliency

    sweep.visit_layers(stream, tokens_NS, measure, name="statistics")
    return ImportanceScores(REAP, score_N)


def _norms(input_RC: torch.Tensor, weight_HC: torch.Tensor) -> float:
    """Return the sum of the norms of an expert's outputs."""
    output_RH = linear(input_RC, weight_HC)
    dtype = sum_dtype(output_RH.device)
    return float(torch.linalg.vector_norm(output_RH, dim=1, dtype=dtype).sum())
