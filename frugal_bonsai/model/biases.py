"""Biases that a model gets because what is removed from it leaves its mean behind (FLAP).

In: a :class:`ModelSpec` and names of tensors. Out: which tensors and config keys the pruned model
has more than its source. An architecture gives a bias to all projections of a kind in every layer
or to none: those that nothing is known for are zero. Holds names.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from frugal_bonsai.errors import OptionError
from frugal_bonsai.model.family import ModelSpec
from frugal_bonsai.model.units import UnitGroup

WEIGHT, BIAS = ".weight", ".bias"


def output_bias(group: UnitGroup) -> str:
    """Full name of the bias of a group's output projection."""
    return group.output_weight.removesuffix(WEIGHT) + BIAS


def weight_of(bias: str) -> str:
    """Name of the weight beside a bias."""
    return bias.removesuffix(BIAS) + WEIGHT


def require_output_biases(spec: ModelSpec) -> None:
    """Check that every output projection has a bias or can get one.

    Raises:
        OptionError: the architecture has no room for them.
    """
    for group in spec.table.groups:
        has = f"{group.output}{BIAS}" in spec.layer_tensors[group.layer]
        if not has and group.kind not in spec.family.bias_keys:
            raise OptionError(
                f"--bias: {spec.family.model_type} has no bias at {group.output} and no config key "
                "that asks for one; leave --bias out"
            )


def added_biases(spec: ModelSpec, refit: Iterable[str]) -> tuple[str, ...]:
    """Full names of the biases that the source lacks and a model with these tensors has.

    Args:
        spec: the source.
        refit: names of replaced tensors.
    """
    refit = set(refit)
    kinds = {g.kind for g in spec.table.groups if output_bias(g) in refit}
    names = []
    for group in spec.table.groups:
        if group.kind not in kinds:
            continue
        prefix, tensors = spec.prefix(group.layer), spec.layer_tensors[group.layer]
        weights = [p.tensor for p in group.slices if p.tensor.endswith(WEIGHT) and not p.joint]
        for weight in weights:
            bias = weight.removesuffix(WEIGHT) + BIAS
            if bias.removeprefix(prefix) not in tensors:
                names.append(bias)
    return tuple(names)


def with_bias_keys(spec: ModelSpec, added: Iterable[str]) -> ModelSpec:
    """The model with a config that asks for the biases of these kinds."""
    added = set(added)
    kinds = {g.kind for g in spec.table.groups if output_bias(g) in added}
    keys = {spec.family.bias_keys[kind]: True for kind in sorted(kinds)}
    return replace(spec, config={**spec.config, **keys})
