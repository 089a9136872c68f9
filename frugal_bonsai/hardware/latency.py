"""The predicted time of one answer, and the part of it that a unit takes.

In: a model, a layer's operations, a machine's profile. Out: milliseconds, dense and pruned. One
prefill takes the prompt through the model. Each decode step reads all weights and the KV cache.
Elementwise work and calls are the layer's own, not its units'. Holds a few numbers.
"""

from __future__ import annotations

from dataclasses import dataclass

from frugal_bonsai.hardware.profile import HardwareProfile
from frugal_bonsai.hardware.throughput import LayerOperations
from frugal_bonsai.model.family import ModelSpec
from frugal_bonsai.model.units import ATTENTION, KeepMask, UnitGroup


@dataclass(frozen=True)
class LatencyModel:
    """Milliseconds of an answer, linear in the units that the model keeps.

    Attributes:
        spec: The dense model.
        layer: Operations of its mean layer.
        profile: The machine.
        prompt_tokens: Tokens of the prompt.
        generated_tokens: Number of decode steps.
    """

    spec: ModelSpec
    layer: LayerOperations
    profile: HardwareProfile
    prompt_tokens: int
    generated_tokens: int

    @property
    def unit(self) -> dict[str, float]:
        """Milliseconds of one unit of each kind."""
        groups = {group.kind: group for group in self.spec.table.groups}
        return {kind: 1e3 * self._unit_seconds(group) for kind, group in groups.items()}

    def _unit_seconds(self, group: UnitGroup) -> float:
        profile, parameters = self.profile, group.unit_parameters
        seconds = self.prompt_tokens * 2 * parameters / profile.products[profile.arithmetic]
        if group.kind != ATTENTION:
            return seconds + self._decode_seconds(parameters)
        share = group.columns_per_unit / self.layer.query
        operations = self.prompt_tokens**2 * self.layer.attention * share
        seconds += operations / profile.attention_flops_per_second
        cached = 2 * self.spec.head_dim * (self.prompt_tokens + self.generated_tokens / 2)
        return seconds + self._decode_seconds(parameters + cached)

    def _decode_seconds(self, elements: float) -> float:
        """Return the seconds of reading elements in every decode step."""
        size_bytes = self.generated_tokens * elements * self.profile.element_bytes
        return size_bytes / self.profile.memory_bytes_per_second

    def milliseconds(self, mask: KeepMask) -> float:
        """Return the milliseconds of an answer of the model with these units."""
        traffic_bytes = self.prompt_tokens * self.layer.traffic_bytes
        layer = traffic_bytes / self.profile.memory_bytes_per_second
        layer += (1 + self.generated_tokens) * self.profile.call_seconds
        rest = (self.spec.layers - len(mask.dropped_layers())) * layer
        rest += self._decode_seconds(self.spec.vocabulary * self.spec.hidden)
        unit = self.unit
        return 1e3 * rest + sum(mask.kept(g) * unit[g.kind] for g in mask.table.groups)

    def describe(self, mask: KeepMask) -> dict[str, float | int | str]:
        """Return the latency, dense and pruned, as plain values."""
        dense, pruned = self.milliseconds(KeepMask(mask.table)), self.milliseconds(mask)
        return {
            "profile": self.profile.name,
            "prompt_tokens": self.prompt_tokens,
            "generated_tokens": self.generated_tokens,
            "dense_milliseconds": dense,
            "pruned_milliseconds": pruned,
            "speed_up": dense / pruned,
            **{f"{kind}_unit_milliseconds": value for kind, value in self.unit.items()},
        }
