"""Biases that the pruned model has and its source lacks.

A bias can replace the mean of what pruning removes (FLAP, arXiv 2312.11983). In: a
:class:`ModelSpec` and names of replaced tensors. Out: the names of the biases to add, and the
config keys that ask for them. An architecture has a bias at all projections of a kind in every
layer or at none, so the projections without a computed bias get one of zeros. Holds names.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from frugal_bonsai.errors import OptionError
from frugal_bonsai.model.family import ModelSpec
from frugal_bonsai.model.units import UnitGroup

WEIGHT, BIAS = ".weight", ".bias"


def bias_of(weight: str) -> str:
    """Return the name of the bias beside a weight."""
    return weight.removesuffix(WEIGHT) + BIAS


def weight_of(bias: str) -> str:
    """Return the name of the weight beside a bias."""
    return bias.removesuffix(BIAS) + WEIGHT


def output_bias(group: UnitGroup) -> str:
    """Return the full name of the bias of a group's output projection."""
    return bias_of(group.output_weight)


def require_output_biases(spec: ModelSpec) -> None:
    """Check that every output projection has a bias or can get one.

    Raises:
        OptionError: a projection has none, and the architecture has no config key that asks for
            one.
    """
    for group in spec.table.groups:
        has = f"{group.output}{BIAS}" in spec.layer_tensors[group.layer]
        if not has and group.kind not in spec.family.bias_keys:
            raise OptionError(
                f"--bias: {spec.family.model_type} has no bias at {group.output} and no config key "
                "that asks for one; leave --bias out"
            )


def added_biases(spec: ModelSpec, refit: Iterable[str]) -> tuple[str, ...]:
    """Return the full names of the biases that the source lacks and the output has.

    Args:
        spec: the source.
        refit: full names of the tensors that the output replaces or adds.
    """
    refit = set(refit)
    kinds = {g.kind for g in spec.table.groups if output_bias(g) in refit}
    names = []
    for group in spec.table.groups:
        if group.kind not in kinds:
            continue
        prefix, tensors = spec.prefix(group.layer), spec.layer_tensors[group.layer]
        weights = [p.tensor for p in group.slices if p.tensor.endswith(WEIGHT) and not p.joint]
        biases = [bias_of(weight) for weight in weights]
        names += [bias for bias in biases if bias.removeprefix(prefix) not in tensors]
    return tuple(names)


def with_bias_keys(spec: ModelSpec, added: Iterable[str]) -> ModelSpec:
    """Return the model with a config that asks for the added biases."""
    added = set(added)
    kinds = {g.kind for g in spec.table.groups if output_bias(g) in added}
    keys = {spec.family.bias_keys[kind]: True for kind in sorted(kinds)}
    return replace(spec, config={**spec.config, **keys})
