"""Whole layers: how little each changes the residual stream, and which of them go.

In: one unmasked sweep; a target. Out: a score a layer, and a mask without the least useful layers.
A layer's score is ShortGPT's block influence (Men et al. 2024, section 3.1), ``1 - E[cos(h, h')]``
over tokens, h its input and h' its output. Layers are ranked once: what goes changes what the
others see, which the published method leaves out too. Holds what a sweep holds.

Shape suffixes: N windows or units, S tokens, B windows of a micro-batch, H hidden, L layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from frugal_bonsai.accelerator import sum_dtype
from frugal_bonsai.bonsai.importance.scores import Prior
from frugal_bonsai.bonsai.settings import SIMILARITY
from frugal_bonsai.model.units import KeepMask
from frugal_bonsai.stream.call import call_layer
from frugal_bonsai.stream.forward import Sweep
from frugal_bonsai.stream.hidden import HiddenStates
from frugal_bonsai.stream.layers import LayerStream, Parameters


def measure_influence(
    sweep: Sweep, stream: LayerStream, tokens_NS: torch.Tensor, mask: KeepMask
) -> Prior:
    """Block influence of every layer, as the score of each of its units.

    Args:
        sweep: device, micro-batches, progress and token count.
        stream: the dense model.
        tokens_NS: calibration windows.
        mask: units alive.
    """
    skeleton, table = sweep.skeleton, mask.table
    kwargs, hidden = skeleton.layer_kwargs(tokens_NS.shape[1]), sweep.embed(tokens_NS)
    score_N = torch.zeros(table.units, dtype=torch.float64)
    sweep.progress.sweep("statistics", skeleton.spec.layers, tokens_NS.numel())
    with torch.inference_mode():
        for layer, parameters in stream.visit():
            visit = _Visit(skeleton.layers[layer], parameters, kwargs[layer], hidden)
            sweep.batches.run(len(tokens_NS), visit)
            influence = visit.distance / tokens_NS.numel()
            for group in table.of_layer(layer):
                score_N[table.span(group)][mask.of(group)] = influence
            sweep.progress.step(f"layer {layer}")
    sweep.forward_tokens += tokens_NS.numel()
    return Prior(SIMILARITY, score_N)


@dataclass
class _Visit:
    """One layer over any micro-batch; adds ``1 - cos`` up over tokens."""

    module: nn.Module
    parameters: Parameters
    kwargs: dict[str, Any]
    hidden: HiddenStates
    distance: torch.Tensor | float = 0.0

    def __call__(self, items: slice) -> None:
        """Counts nothing before all is done: where memory runs out, it is called again."""
        before_BSH = self.hidden.read(items)
        after_BSH = call_layer(self.module, self.parameters, before_BSH, self.kwargs)
        cosine_BS = torch.cosine_similarity(before_BSH.float(), after_BSH.float(), dim=-1)
        distance = (1 - cosine_BS.to(sum_dtype(cosine_BS.device))).sum()  # nothing waits for it
        self.hidden.write(items, after_BSH)
        self.distance += distance


def drop_layers(mask: KeepMask, score_N: torch.Tensor, target_parameters: int) -> KeepMask:
    """Without the layers of lowest influence: the number of them that is nearest to the target.

    Args:
        mask: units alive.
        score_N: of :func:`measure_influence`.
        target_parameters: parameters removed in all.
    """
    table = mask.table
    scores = {
        group.layer: float(score_N[table.span(group)][mask.of(group)].mean())
        for group in table.groups
        if mask.kept(group)
    }
    order = sorted(scores, key=lambda layer: (scores[layer], layer))
    masks = [mask.without_layers(order[:count]) for count in range(len(order))]
    return min(masks, key=lambda m: abs(m.removed_parameters() - target_parameters))
