"""The predicted time of one answer, and the part of it that a unit takes.

In: a model, the operations of its layers, a machine's profile. Out: milliseconds, dense and pruned.
One prefill takes the prompt through the model. Then each decode step computes one token, for which
all weights and the KV cache are read from memory. Holds a few numbers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from frugal_bonsai.accelerator import is_accelerator
from frugal_bonsai.hardware.operations import LayerOperations, Rates
from frugal_bonsai.hardware.profile import HardwareProfile
from frugal_bonsai.model.family import ModelSpec
from frugal_bonsai.model.units import ATTENTION, KeepMask, UnitGroup


@dataclass(frozen=True, kw_only=True)
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
        layer, profile, prompt = self.layer, self.profile, self.prompt_tokens
        # Elementwise traffic that a layer without units does not have belongs to the columns.
        traffic = layer.traffic_bytes - layer.kept(0.0).traffic_bytes
        share = group.columns_per_unit / (layer.query + layer.ffn)
        seconds = prompt * share * traffic / profile.memory_bytes_per_second
        seconds += prompt * 2 * group.unit_parameters / profile.products[profile.arithmetic]
        if group.kind != ATTENTION:
            return seconds + self._decode_seconds(group.unit_parameters)
        operations = prompt**2 * layer.attention * group.columns_per_unit / layer.query
        seconds += operations / profile.attention_flops_per_second
        cached = 2 * self.spec.head_dim * (prompt + self.generated_tokens / 2)
        return seconds + self._decode_seconds(group.unit_parameters + cached)

    def _decode_seconds(self, elements: float) -> float:
        element_bytes = 2 if is_accelerator(self.profile.device) else 4
        size_bytes = self.generated_tokens * elements * element_bytes
        return size_bytes / self.profile.memory_bytes_per_second

    def milliseconds(self, mask: KeepMask) -> float:
        """Return the milliseconds of an answer of the model with these units."""
        # Arrays of an earlier answer are used again.
        rates = Rates(replace(self.profile, fresh_bytes_per_second=None))
        bare = rates.forward(self.layer.kept(0.0), self.prompt_tokens, 1, 1).seconds
        bare += self.generated_tokens * self.profile.call_seconds
        rest = (self.spec.layers - len(mask.dropped_layers())) * bare
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
