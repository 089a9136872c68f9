"""How long a model takes to answer on a machine, and what a unit's part of that is.

In: a model, a machine's profile, a prompt's and an answer's length. Out: milliseconds, dense and
pruned. The model is in memory and answers one prompt: a *prefill* of all prompt tokens, bound by
arithmetic, then one *decode* step a generated token, which reads every weight and the KV cache for
a single token and is bound by whichever of memory and arithmetic is slower (the roofline). Costs of
the prefill are those of cost.py, memory that is allocated anew left out; all are linear in the
units, so the model's time is what it takes without any unit, and a unit's milliseconds for each one
that stays. Pure; holds a few numbers.

Legend: H hidden, S prompt tokens, c bytes of an element.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from frugal_bonsai.accelerator import is_accelerator
from frugal_bonsai.hardware.cost import (
    Batch,
    Cost,
    LayerWidths,
    attention_cost,
    ffn_cost,
    layer_cost,
    layer_widths,
    outputs_cost,
)
from frugal_bonsai.hardware.profile import HardwareProfile
from frugal_bonsai.model.family import ModelSpec
from frugal_bonsai.model.units import ATTENTION, FFN, KeepMask, UnitGroup

_MILLISECONDS = 1e3


@dataclass(frozen=True, kw_only=True)
class LatencyModel:
    """Milliseconds of one answer on one machine.

    Attributes:
        profile: the machine's name.
        prompt_tokens: S.
        generated_tokens: decode steps.
        unit: milliseconds of one unit of each kind.
        rest: of the model without any unit: norms, residual sums, calls, the head.
        dropped_layer: of the rest, what goes with a whole layer.
    """

    profile: str
    prompt_tokens: int
    generated_tokens: int
    unit: dict[str, float]
    rest: float
    dropped_layer: float

    def milliseconds(self, mask: KeepMask) -> float:
        """Of one answer by the model with these units."""
        units = sum(mask.kept(group) * self.unit[group.kind] for group in mask.table.groups)
        return self.rest + units - len(mask.dropped_layers()) * self.dropped_layer


def model_latency(
    spec: ModelSpec, profile: HardwareProfile, *, prompt_tokens: int, generated_tokens: int
) -> LatencyModel:
    """The times of a model's units on a machine.

    Args:
        spec: the dense model.
        profile: of the machine.
        prompt_tokens: of the prompt.
        generated_tokens: of the answer.
    """
    times = _Times(spec, profile, prompt_tokens, generated_tokens)
    first = {group.kind: group for group in reversed(spec.table.groups)}
    layer = times.bare_layer()
    return LatencyModel(
        profile=profile.name,
        prompt_tokens=prompt_tokens,
        generated_tokens=generated_tokens,
        unit={kind: times.unit(group) for kind, group in first.items()},
        rest=spec.layers * layer + times.head(),
        dropped_layer=layer,
    )


class _Times:
    def __init__(
        self, spec: ModelSpec, profile: HardwareProfile, prompt: int, generated: int
    ) -> None:
        self._spec, self._profile = spec, profile
        self._prompt, self._generated = prompt, generated
        self._element_bytes = 2 if is_accelerator(profile.device) else 4
        self._batch = Batch(window=prompt, micro_batch=1, element_bytes=self._element_bytes)
        self._mean = layer_widths(spec)
        zeros = dict.fromkeys(self._mean.__dataclass_fields__, 0.0)
        self._none = LayerWidths(**{**zeros, "hidden": float(spec.hidden)})

    def unit(self, group: UnitGroup) -> float:
        """One unit's milliseconds: what its widths add to a layer without units."""
        prefix, shapes = self._spec.prefix(group.layer), self._spec.layer_tensors[group.layer]
        weights = {"in": 0.0, "out": 0.0}
        for piece in group.slices:
            shape = shapes[piece.tensor.removeprefix(prefix)]
            if len(shape) == 2 and not piece.joint:
                side = "out" if piece.tensor == group.output_weight else "in"
                weights[side] += piece.width * shape[1 - piece.axis]
        if group.kind == ATTENTION:
            columns = float(group.columns_per_unit)
            key = columns * self._mean.key / self._mean.query
            own = replace(
                self._none,
                query=columns,
                key=key,
                attention_in=weights["in"],
                attention_out=weights["out"],
            )
            part = attention_cost
        else:
            assert group.kind == FFN
            key = 0.0
            own = replace(self._none, ffn=1.0, ffn_in=weights["in"], ffn_out=weights["out"])
            part = ffn_cost
        prefill = self._seconds(
            _less(part(own, self._batch, self._prompt), part(self._none, self._batch, self._prompt))
            + _less(
                outputs_cost(own, self._batch, self._prompt),
                outputs_cost(self._none, self._batch, self._prompt),
            )
        )
        # Keys and values of all tokens before are read; their products are 2 operations each.
        context = self._prompt + self._generated / 2
        cached = 2 * key * context
        operations = 2 * group.unit_parameters + 4 * context * (
            group.columns_per_unit if group.kind == ATTENTION else 0
        )
        decode = self._decode(group.unit_parameters + cached, operations)
        return _MILLISECONDS * (prefill + self._generated * decode)

    def bare_layer(self) -> float:
        """A layer without units: norms, residual sums, the call."""
        prefill = self._seconds(layer_cost(self._none, self._batch, self._prompt))
        return _MILLISECONDS * (prefill + self._generated * self._profile.call_seconds)

    def head(self) -> float:
        """The logits of the last prompt token and of every generated one but the last."""
        weights = self._spec.vocabulary * self._spec.hidden
        steps = max(1, self._generated)
        return _MILLISECONDS * steps * self._decode(weights, 2 * weights)

    def _decode(self, elements: float, operations: float) -> float:
        """Seconds of one token: elements are read, operations done, the slower one binds."""
        read = elements * self._element_bytes / self._profile.memory_bytes_per_second
        return max(read, operations / self._profile.products[self._profile.arithmetic])

    def _seconds(self, cost: Cost) -> float:
        profile = self._profile
        return (
            cost.products / profile.products[profile.arithmetic]
            + cost.attention / profile.attention_flops_per_second
            + cost.traffic / profile.memory_bytes_per_second
            + cost.calls * profile.call_seconds
        )


def _less(cost: Cost, other: Cost) -> Cost:
    return cost + other * -1


def describe_latency(latency: LatencyModel, mask: KeepMask) -> dict[str, float | int | str]:
    """Dense and pruned as plain values, for the summary and the card."""
    dense = latency.milliseconds(KeepMask(mask.table))
    pruned = latency.milliseconds(mask)
    return {
        "profile": latency.profile,
        "prompt_tokens": latency.prompt_tokens,
        "generated_tokens": latency.generated_tokens,
        "dense_milliseconds": dense,
        "pruned_milliseconds": pruned,
        "speed_up": dense / pruned if pruned else math.inf,
        **{f"{kind}_unit_milliseconds": value for kind, value in latency.unit.items()},
    }
