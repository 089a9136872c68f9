"""Rates and the time that they predict."""

from __future__ import annotations

from pathlib import Path

import torch

from frugal_bonsai.checkpoint.locate import find_model
from frugal_bonsai.checkpoint.reader import Checkpoint
from frugal_bonsai.memory.hardware import (
    HardwareProfile,
    estimate_time,
    flops_per_token,
    measure_profile,
)
from frugal_bonsai.model.family import ModelSpec, describe_model


def example() -> tuple[ModelSpec, Path]:
    checkpoint = Checkpoint.open(find_model("example"))
    return (
        describe_model(checkpoint.config, checkpoint.shapes),
        next(iter(checkpoint.tensors.values())).file,
    )


def test_measured_rates_are_those_of_a_machine() -> None:
    spec, file = example()
    profile = measure_profile(spec, torch.device("cpu"), torch.float32, file)
    assert 1e8 < profile.flops < 1e15
    assert 1e6 < profile.disk_bytes_per_second <= 2e9
    assert "CPU" in profile.name


def test_arithmetic_of_a_token() -> None:
    spec, _ = example()
    window = 256
    attention = 2 * 2 * 8 * 32 * window / 2 * 6
    assert flops_per_token(spec, window) == (2 * spec.block_parameters + attention + 2 * 4096 * 192)


def test_what_binds() -> None:
    spec, _ = example()
    fast = HardwareProfile(name="x", flops=1e15, disk_bytes_per_second=1e6, source="made up")
    slow = HardwareProfile(name="x", flops=1e9, disk_bytes_per_second=1e12, source="made up")
    for profile, binds in ((fast, "disk"), (slow, "compute")):
        estimate = estimate_time(
            profile,
            spec,
            window=256,
            forward_tokens=10_000,
            gram_tokens=1_000,
            sweeps=10,
            stores=2,
            store_bytes=3_000_000,
        )
        assert estimate.binds == binds
        assert estimate.total_seconds == estimate.sweeps_seconds + estimate.stores_seconds
    assert estimate.sweeps_seconds > 10_000 * flops_per_token(spec, 256) / 1e9
