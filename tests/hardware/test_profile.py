"""A profile is checked when it is made, and gives the caps of its machine."""

from __future__ import annotations

from typing import Any

import profiles
import pytest
import torch

from frugal_bonsai.errors import OptionError
from frugal_bonsai.hardware.measure import device_name
from frugal_bonsai.memory.budget import parse_caps
from frugal_bonsai.run.machine import profile_budget
from frugal_bonsai.sizes import GIB


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"name": ""}, "name is ''"),
        ({"source": 3}, "source is 3"),
        ({"device": "tpu"}, "device is 'tpu', expected one of cpu, cuda, xpu, mps"),
        ({"host_bytes": 0}, "host_bytes is 0"),
        ({"host_bytes": 1.5e9}, "expected a positive whole number"),
        ({"disk_cold_bytes_per_second": -1.0}, "disk_cold_bytes_per_second is -1.0"),
        ({"memory_bytes_per_second": float("inf")}, "memory_bytes_per_second is inf"),
        ({"memory_bytes_per_second": "fast"}, "memory_bytes_per_second is 'fast'"),
        ({"call_seconds": True}, "call_seconds is True"),
        ({"gpu_bytes": 8 * GIB}, "a cpu profile has no gpu_bytes"),
        ({"copy_bytes_per_second": 1e9}, "a cpu profile has no copy_bytes_per_second"),
        ({"products": {"fp32": 1e11, "fp8": 1e12}}, "products.fp8 is unknown"),
        ({"products": {"int8": 1e11}}, "products.fp32 is missing"),
        ({"products": {"fp32": 0}}, "products.fp32 is 0"),
        ({"products": 1e11}, "products is 1"),
    ],
)
def test_a_value_that_cannot_be_is_named(changes: dict[str, Any], expected: str) -> None:
    with pytest.raises(OptionError) as refusal:
        profiles.cpu(**changes)
    assert expected in str(refusal.value)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"gpu_bytes": None}, "a cuda profile needs gpu_bytes"),
        ({"copy_bytes_per_second": None}, "a cuda profile needs copy_bytes_per_second"),
        ({"products": {"fp32": 1e13}}, "products.bf16 is missing"),
    ],
)
def test_a_gpu_needs_its_own(changes: dict[str, Any], expected: str) -> None:
    with pytest.raises(OptionError, match=expected):
        profiles.cuda(**changes)


def test_no_overhead_is_a_value_that_can_be() -> None:
    assert profiles.cpu(call_seconds=0, start_seconds=0.0).start_seconds == 0


def test_what_sweeps_compute_in() -> None:
    assert (profiles.cpu().arithmetic, profiles.cuda().arithmetic) == ("fp32", "bf16")


def test_caps_default_to_the_profiles_memory() -> None:
    budget = profile_budget(profiles.cuda(), parse_caps(None, None))
    assert (budget.device, budget.gpu_bytes, budget.host_bytes) == ("cuda", 24 * GIB, 63 * GIB)
    assert budget.notes == ()
    # A machine with very little keeps half for others, not less than nothing.
    assert (
        profile_budget(profiles.cpu(host_bytes=GIB), parse_caps(None, None)).host_bytes == GIB // 2
    )


def test_caps_beyond_the_profiles_memory_are_noted() -> None:
    budget = profile_budget(profiles.cuda(), parse_caps("48GB", "900GB"))
    assert budget.gpu_bytes == 24 * GIB and budget.host_bytes == 900 * 10**9
    assert [note.split()[0] for note in budget.notes] == ["--max-cpu-mem", "--max-gpu-mem"]
    assert all("more than the profile's" in note for note in budget.notes)


def test_a_gpu_cap_on_a_cpu_profile_has_no_effect_but_must_be_a_size() -> None:
    budget = profile_budget(profiles.cpu(), parse_caps("8GB", "2GB"))
    assert budget.gpu_bytes is None and budget.host_bytes == 2 * 10**9
    assert "--max-gpu-mem has no effect" in budget.notes[0]
    with pytest.raises(OptionError, match="--max-gpu-mem"):
        profile_budget(profiles.cpu(), parse_caps("lots", None))


def test_the_name_says_how_many_threads() -> None:
    assert device_name(torch.device("cpu")).endswith(", 1 thread")
