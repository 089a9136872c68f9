"""The choice of a device, its memory, and its caps."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from stand_in_device import CONTEXT_BYTES, GIB, Machine, installed

from frugal_bonsai import accelerator
from frugal_bonsai.errors import BudgetError, OptionError
from frugal_bonsai.hardware.profile import read_profile
from frugal_bonsai.memory import budget as budgets
from frugal_bonsai.memory.budget import enforce_gpu_cap, find_device, make_budget, parse_caps
from frugal_bonsai.memory.meter import peak_gpu_bytes, reserved_gpu_bytes
from frugal_bonsai.run import machine as machines
from frugal_bonsai.run.profile import profile

MIB = 2**20


@pytest.mark.parametrize("name", [None, "cuda", "cuda:0"])
def test_a_device_has_a_number(name: str | None, machine: Machine) -> None:
    """Finding 1: torch sets no memory fraction for a device without one."""
    device = find_device(name)
    assert device == torch.device("cuda:0") and device.index == 0
    enforce_gpu_cap(device, make_budget(device, parse_caps("8GB", None)))
    assert machine.memory.limit_bytes == pytest.approx(8e9 - CONTEXT_BYTES, rel=1e-6)


def test_without_a_number_the_cap_cannot_be_set(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Finding 1 put back."""
    from frugal_bonsai import PruneOptions, prune

    monkeypatch.setattr(machines, "find_device", lambda _=None: torch.device("cuda"))
    options = PruneOptions(window=16, windows=2, profile="rtx-12gb")
    with pytest.raises(ValueError, match="index"):
        prune("example", "never", options)
    assert not Path("never").exists()


@pytest.mark.parametrize("kind", ["xpu", "mps"])
def test_other_accelerators_are_found_by_themselves_and_by_name(kind: str) -> None:
    with installed(kind):
        assert find_device() == find_device(kind) == torch.device(kind, 0)
        assert find_device("cpu") == torch.device("cpu")
        with pytest.raises(BudgetError, match="cuda was asked for, but torch finds no CUDA device"):
            find_device("cuda")
        with pytest.raises(BudgetError, match=f"{kind}:1 was asked for, but torch finds 1"):
            find_device(f"{kind}:1")


@pytest.mark.parametrize("name", ["gpu", "cuda:", "cuda:x", "cuda0", "", "npu", "cuda:-1"])
def test_what_is_no_device(name: str, machine: Machine) -> None:
    with pytest.raises(OptionError, match="is not cpu or one of cuda, xpu, mps"):
        find_device(name)


def test_without_a_cap_some_of_the_device_is_left(machine: Machine) -> None:
    budget = make_budget(machine.device, parse_caps(None, None))
    assert budget.device == "cuda" and budget.gpu_bytes is not None
    assert budget.context_bytes == CONTEXT_BYTES
    assert budget.gpu_bytes == machine.memory.total_bytes - 384 * MIB
    assert budget.notes == ()


def test_a_cap_above_what_is_free_is_noted(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    others = 5 * GIB
    total = machine.memory.total_bytes
    monkeypatch.setattr(
        torch.cuda, "mem_get_info", lambda *_: (total - machine.memory.reserved - others, total)
    )
    monkeypatch.setattr(budgets, "measure_context", lambda _: CONTEXT_BYTES)
    notes = " ".join(make_budget(machine.device, parse_caps("16GiB", None)).notes)
    assert "is more than the 11.39 GiB that are free on this GPU now" in notes
    assert make_budget(machine.device, parse_caps("8GiB", None)).notes == ()
    assert (
        "more than the GPU's 16.00 GiB"
        in make_budget(machine.device, parse_caps("17GiB", None)).notes[0]
    )


def test_the_context_is_measured_with_everything_that_loads_late(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Finding 9: cuSOLVER and the triangular solves load at their first use."""
    seen = []
    run = type(machine).run

    def watched(self: Machine, func, args, kwargs):  # type: ignore[no-untyped-def]
        seen.append(func.name())
        return run(self, func, args, kwargs)

    monkeypatch.setattr(type(machine), "run", watched)
    assert budgets.measure_context(machine.device) == CONTEXT_BYTES
    assert {"aten::linalg_cholesky_ex", "aten::linalg_solve_triangular", "aten::bmm"} <= {*seen}


def test_meters(machine: Machine) -> None:
    block = torch.empty(40 * MIB, dtype=torch.uint8, device=machine.device)
    assert reserved_gpu_bytes() == 40 * MIB == accelerator.reserved_bytes(machine.device)
    del block
    torch.accelerator.empty_cache()
    assert reserved_gpu_bytes() == 0
    assert peak_gpu_bytes(machine.device, CONTEXT_BYTES) == 40 * MIB + CONTEXT_BYTES


def test_memory_that_is_shared_counts_once() -> None:
    with installed("mps") as machine:
        budget = make_budget(machine.device, parse_caps("3GB", "2GB"))
        assert (budget.device, budget.host_bytes, budget.gpu_bytes) == ("mps", 2 * 10**9, None)
        assert make_budget(machine.device, parse_caps("1GB", "2GB")).host_bytes == 10**9
        assert any("computes in the host's memory" in note for note in budget.notes)
        assert peak_gpu_bytes(machine.device, 0) is None and reserved_gpu_bytes() == 0


def test_a_profile_of_the_device(machine: Machine, tmp_path: Path) -> None:
    out = tmp_path / "device.toml"
    measured = profile(out=out, device="cuda", folder=tmp_path, quick=True)
    assert {"fp32", "tf32", "bf16"} <= measured["products"].keys()
    assert measured["name"] == "stand-in cuda" and measured["fresh_bytes_per_second"] is None
    assert measured["gpu_bytes"] == machine.memory.total_bytes
    assert measured["copy_bytes_per_second"] > 0
    found = read_profile(out)
    assert found.device == "cuda" and found.products["tf32"] > 0
    assert (found.gram_arithmetic, found.update_arithmetic) == ("bf16", "tf32")
    assert machine.order.races == []


def test_fast_products_are_asked_for_and_left(machine: Machine) -> None:
    cuda, cpu = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
    before = cuda.fp32_precision, cpu.fp32_precision
    with accelerator.fast_products(machine.device):
        assert (cuda.fp32_precision, cpu.fp32_precision) == ("tf32", before[1])
    assert (cuda.fp32_precision, cpu.fp32_precision) == before
    with accelerator.fast_products(torch.device("cpu")):
        assert (cuda.fp32_precision, cpu.fp32_precision) == (before[0], "bf16")
    assert (cuda.fp32_precision, cpu.fp32_precision) == before
