"""Importance of whole layers: how much each layer changes the residual stream.

In: one unmasked sweep. Out: a score per layer, which selection/whole.py ranks. The score is
ShortGPT's block influence (Men et al. 2024, section 3.1), ``1 - E[cos(h, h')]`` over tokens, with h
the layer's input and h' its output. Memory: that of a sweep.

Shape suffixes: N windows or units, S tokens, B windows of a micro-batch, H hidden.
"""

from __future__ import annotations

import torch

from frugal_bonsai.accelerator import sum_dtype
from frugal_bonsai.bonsai.importance.scores import ImportanceScores
from frugal_bonsai.bonsai.settings import SIMILARITY
from frugal_bonsai.model.units import KeepMask
from frugal_bonsai.stream.forward import LayerVisit, Sweep
from frugal_bonsai.stream.layers import LayerStream


def measure_influence(
    sweep: Sweep, stream: LayerStream, tokens_NS: torch.Tensor, mask: KeepMask
) -> ImportanceScores:
    """Return the block influence of every layer, as the score of each of its units.

    Args:
        sweep: device, micro-batches, progress and token count.
        stream: the dense model.
        tokens_NS: calibration windows.
        mask: the remaining units.
    """
    score_N = torch.zeros(mask.table.units, dtype=torch.float64)

    def measure(visit: LayerVisit) -> None:
        distances: list[torch.Tensor] = []

        def body(items: slice) -> None:
            before_BSH = visit.hidden.read(items)
            after_BSH = visit.call(before_BSH)
            cosine_BS = torch.cosine_similarity(before_BSH.float(), after_BSH.float(), dim=-1)
            distance = (1 - cosine_BS.to(sum_dtype(cosine_BS.device))).sum()
            visit.hidden.write(items, after_BSH)
            distances.append(distance)  # last: after lack of memory, body is called again

        sweep.batches.run(len(tokens_NS), body)
        influence = sum(distances, 0.0) / tokens_NS.numel()
        for group in mask.table.of_layer(visit.layer):
            score_N[mask.table.span(group)][mask.of(group)] = influence

    sweep.visit_layers(stream, tokens_NS, measure, name="statistics")
    return ImportanceScores(SIMILARITY, score_N)
