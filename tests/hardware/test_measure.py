"""Measuring gives a machine's rates, and leaves nothing behind."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch

from frugal_bonsai.errors import OutputError
from frugal_bonsai.hardware import measure
from frugal_bonsai.hardware.measure import Timer
from frugal_bonsai.hardware.measure_disk import measure_disk
from frugal_bonsai.sizes import MIB

TIMER = Timer(device=torch.device("cpu"), seconds=0.0, least=1)


def test_the_fastest_run_counts_and_the_first_does_not() -> None:
    calls: list[int] = []

    def run() -> None:
        calls.append(len(calls))
        if len(calls) == 1:
            sum(range(3_000_000))  # a first run's set-up

    seconds = Timer(device=torch.device("cpu"), seconds=0.0, least=3).best(run)
    assert len(calls) == 4 and seconds < 0.01


def test_rates_are_those_of_a_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "SHAPES", ((256, 512),))
    products = measure.measure_products(TIMER)
    assert {"fp32", "bf16"} <= set(products) <= {"fp32", "bf16", "int8"}
    rates = [*products.values(), measure.measure_attention(TIMER)]
    assert all(1e7 < rate < 1e15 for rate in rates)
    assert 1e7 < measure.measure_memory(TIMER) < 1e14
    assert 1e7 < (measure.measure_fresh(TIMER) or 0) < 1e14
    assert measure.measure_copy(TIMER) is None
    assert set(measure.measure_products(TIMER, quick=True)) == {"fp32", "bf16", "int8"}


def test_a_product_that_the_device_lacks_is_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("_int_mm is not implemented for this device")

    monkeypatch.setattr(measure, "SHAPES", ((64, 128),))
    monkeypatch.setattr(torch, "_int_mm", refuse)
    assert set(measure.measure_products(TIMER)) == {"fp32", "bf16"}


def test_a_disk_is_measured_and_its_file_removed(tmp_path: Path) -> None:
    rates = measure_disk(tmp_path, 16 * MIB)
    assert min(rates.cold, rates.warm, rates.write) > 1e5
    assert "16.00 MiB" in rates.note and list(tmp_path.iterdir()) == []


def test_a_system_that_cannot_forget_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "posix_fadvise", raising=False)
    rates = measure_disk(tmp_path, 16 * MIB)
    assert rates.cold == min(rates.write, rates.warm)
    assert "no posix_fadvise" in rates.note and "write rate" in rates.note


def test_the_file_goes_whatever_happens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(_: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", stop)
    with pytest.raises(KeyboardInterrupt):
        measure_disk(tmp_path, 16 * MIB)
    assert list(tmp_path.iterdir()) == []


def test_no_room_and_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    with pytest.raises(OutputError, match="nowhere"):
        measure_disk(tmp_path / "nowhere", 16 * MIB)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=40 * MIB))
    with pytest.raises(OutputError, match="--dir"):
        measure_disk(tmp_path, 1024 * MIB)
