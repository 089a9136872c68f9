"""Bias compensation: add the mean output of the removed units to a bias (FLAP, An et al. 2023).

In: the dense weights, the mean inputs of the output projections before a cut, the units that the
cut removes. Out: a new bias for every output projection. With W the projection's weight and g its
removed columns, ``b' = b + W_g E[x_g]``. Memory: some rows of one projection.

Shape suffixes: H hidden, C columns.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from frugal_bonsai.checkpoint.reader import Checkpoint
from frugal_bonsai.model.biases import output_bias
from frugal_bonsai.model.cut import Refit
from frugal_bonsai.model.family import ModelSpec
from frugal_bonsai.model.units import KeepMask

# Rows of a projection that are read at a time.
_ROWS = 128


def compensate_by_bias(
    checkpoint: Checkpoint,
    spec: ModelSpec,
    before: KeepMask,
    after: KeepMask,
    means: Mapping[str, torch.Tensor],
    earlier: Refit,
) -> Iterator[tuple[int, dict[str, torch.Tensor]]]:
    """Yield the biases after a cut: (layer, full name of the bias -> fp32 ``[H]``).

    Args:
        checkpoint: the dense model.
        spec: its description.
        before: units that remained when the means were measured.
        after: units that remain after the cut.
        means: full name of an output projection's weight -> mean inputs of its remaining columns.
        earlier: biases of earlier rounds.
    """
    for layer in range(spec.layers):
        biases: dict[str, torch.Tensor] = {}
        for group in spec.table.of_layer(layer):
            name, columns_C = output_bias(group), before.columns(group)
            gone_C = columns_C & ~after.columns(group)
            mean_C = torch.zeros(len(columns_C)).masked_scatter(
                columns_C, means[group.output_weight]
            )
            bias_H = _times(checkpoint, group.output_weight, mean_C * gone_C)
            if name in earlier:
                bias_H += earlier[name]().float()
            elif name in checkpoint.tensors:
                bias_H += checkpoint.read(name).float()
            biases[name] = bias_H
        yield layer, biases


def _times(checkpoint: Checkpoint, name: str, vector_C: torch.Tensor) -> torch.Tensor:
    """Return a weight ``[H, C]`` times a vector, fp32 ``[H]``, reading some rows at a time."""
    entry = checkpoint.tensors[name]
    rows = entry.shape[1] if entry.transposed else entry.shape[0]
    parts = []
    for start in range(0, rows, _ROWS):
        stop = min(start + _ROWS, rows)
        read = checkpoint.read_rows(name, start, stop).float()
        parts.append(read.T @ vector_C[start:stop] if entry.transposed else read @ vector_C)
    return torch.stack(parts).sum(0) if entry.transposed else torch.cat(parts)
