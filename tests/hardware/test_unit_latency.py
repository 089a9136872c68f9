"""Predicted answers of a model: they add up over units, and follow the machine's rates."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hardware.profiles import cpu, cuda
from tiny_models import tiny_llama

from frugal_bonsai.hardware.latency import LatencyModel
from frugal_bonsai.hardware.profile import HardwareProfile
from frugal_bonsai.hardware.throughput import Rates
from frugal_bonsai.model.family import ModelSpec
from frugal_bonsai.model.units import ATTENTION, FFN, KeepMask
from frugal_bonsai.run.open import open_model
from frugal_bonsai.stream.operations import count_operations


@pytest.fixture(scope="module")
def spec() -> Iterator[ModelSpec]:
    with open_model("example") as model:
        yield model.spec


def _latency(spec: ModelSpec, profile: HardwareProfile, prompt: int, answer: int) -> LatencyModel:
    layer = count_operations(spec, 128, torch.float32)
    return LatencyModel(spec, layer, profile, prompt, answer)


@pytest.mark.parametrize("profile", [cpu(fresh_bytes_per_second=None), cuda()], ids=["cpu", "gpu"])
def test_a_prefill_takes_what_its_layers_cost(spec: ModelSpec, profile: HardwareProfile) -> None:
    """Units and rest add up to the whole layers' work at the machine's rates."""
    found = _latency(spec, profile, 200, 0)
    layers = spec.layers * Rates(profile).forward(found.layer, 200, 1).seconds
    assert found.milliseconds(KeepMask(spec.table)) == pytest.approx(1e3 * layers, rel=1e-9)


def test_a_decode_step_reads_every_weight_and_the_cache(spec: ModelSpec) -> None:
    profile = cpu(memory_bytes_per_second=1e9, call_seconds=0.0)
    dense = KeepMask(spec.table)
    one, two = (_latency(spec, profile, 64, n).milliseconds(dense) for n in (1, 2))
    weights = spec.table.parameters + spec.vocabulary * spec.hidden
    keys = 2 * spec.layers * spec.kv_heads * spec.head_dim
    # The second step reads 64.5 cached tokens more than none, and both half a token more.
    expected = 4 * (weights + keys * (2 * 65.0 - 64.5)) / 1e9
    assert two - one == pytest.approx(1e3 * expected, rel=1e-6)


def test_units_cost_what_the_machine_is_slow_at(spec: ModelSpec) -> None:
    size = {g.kind: g.unit_parameters for g in spec.table.groups}

    def ratio(profile: HardwareProfile, prompt: int = 512, answer: int = 0) -> float:
        """Time of attention against the FFN's at equal parameters."""
        unit = _latency(spec, profile, prompt, answer).unit
        return (unit[ATTENTION] / size[ATTENTION]) / (unit[FFN] / size[FFN])

    assert ratio(cpu(attention_flops_per_second=1e8)) > 20 * ratio(cpu())
    # The longer the prompt, the dearer attention; a long answer is all weights and the cache.
    assert ratio(cpu(), prompt=4096) > ratio(cpu(), prompt=64)
    assert ratio(cpu(attention_flops_per_second=1e8), answer=4096) < ratio(
        cpu(attention_flops_per_second=1e8)
    )


def test_pruned_models_are_as_much_faster_as_their_units_say(spec: ModelSpec) -> None:
    latency, dense = _latency(spec, cpu(), 128, 16), KeepMask(spec.table)
    mask = KeepMask(spec.table)
    for group in spec.table.groups:
        if group.kind == FFN:
            mask.of(group)[:100] = False
    saved = 100 * spec.layers * latency.unit[FFN]
    assert latency.milliseconds(dense) - latency.milliseconds(mask) == pytest.approx(saved)
    # A whole layer's norms and its 17 calls of a millisecond go with its units.
    gone = latency.milliseconds(dense) - latency.milliseconds(dense.without_layers([1]))
    units = sum(g.count * latency.unit[g.kind] for g in spec.table.of_layer(1))
    assert gone - units == pytest.approx(17, rel=0.03)
    told = latency.describe(mask)
    assert told["speed_up"] == pytest.approx(
        latency.milliseconds(dense) / latency.milliseconds(mask)
    )
    assert (told["prompt_tokens"], told["generated_tokens"]) == (128, 16)


def test_shared_heads_count_their_key_and_value_once(tmp_path: Path) -> None:
    """Grouped queries cache a part of what as many own heads do."""
    grouped, own = (
        tiny_llama(tmp_path / str(heads), num_attention_heads=6, num_key_value_heads=heads).spec
        for heads in (3, 6)
    )
    slow = cpu(memory_bytes_per_second=1e6)
    cached = []
    for spec in (grouped, own):
        short, long = (_latency(spec, slow, 1, n).unit[ATTENTION] / n for n in (10, 110))
        units = next(g.count for g in spec.table.groups if g.kind == ATTENTION)
        cached.append(units * (long - short))
    assert cached[1] == pytest.approx(2 * cached[0], rel=0.05)
