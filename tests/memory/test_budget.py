"""Caps as people give them."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from frugal_bonsai.errors import BudgetError, OptionError
from frugal_bonsai.memory.budget import (
    Budget,
    allocator_share,
    find_device,
    make_budget,
    parse_caps,
)
from frugal_bonsai.memory.meter import peak_gpu_bytes, peak_resident_bytes, resident_bytes
from frugal_bonsai.sizes import GIB

CPU = torch.device("cpu")


def test_without_a_gpu_its_cap_is_said_to_have_no_effect() -> None:
    budget = make_budget(CPU, parse_caps("24GB", "1GB"))
    assert budget.host_bytes == 10**9 and budget.gpu_bytes is None
    assert any("--max-gpu-mem has no effect" in note for note in budget.notes)
    assert make_budget(CPU, parse_caps(None, "1GB")).notes == ()


def test_a_wrong_size_is_refused_even_where_it_has_no_effect() -> None:
    with pytest.raises(OptionError, match="--max-gpu-mem"):
        make_budget(CPU, parse_caps("plenty", None))


def test_without_a_cap_the_machine_keeps_some() -> None:
    import psutil

    budget = make_budget(CPU, parse_caps(None, None))
    assert 0 < budget.host_bytes < psutil.virtual_memory().total


def test_more_than_is_free_is_noted() -> None:
    assert any("more than" in note for note in make_budget(CPU, parse_caps(None, "900TB")).notes)


def test_the_whole_context_is_subtracted_from_the_gpu_cap() -> None:
    budget = Budget(device="cuda", host_bytes=GIB, gpu_bytes=8 * GIB, context_bytes=GIB)
    assert allocator_share(budget, 16 * GIB) == pytest.approx(7 / 16)
    assert allocator_share(replace(budget, gpu_bytes=64 * GIB), 16 * GIB) == 1.0


def test_a_gpu_cap_below_the_context_is_refused() -> None:
    budget = Budget(device="cuda", host_bytes=GIB, gpu_bytes=GIB // 2, context_bytes=GIB)
    with pytest.raises(BudgetError, match=r"512\.00 MiB .* context alone takes 1\.00 GiB"):
        allocator_share(budget, 16 * GIB)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_gpu_that_is_not_there() -> None:
    with pytest.raises(BudgetError, match="no CUDA device"):
        find_device("cuda")
    assert find_device() == CPU


def test_meters() -> None:
    before = peak_resident_bytes()
    block = torch.ones(50_000_000)
    assert peak_resident_bytes() >= before
    assert resident_bytes() >= 200_000_000 * 0.9
    assert peak_resident_bytes() >= resident_bytes() * 0.99
    assert peak_gpu_bytes(CPU, 0) is None
    assert block[0] == 1


HOLES = """
import sys, torch
from frugal_bonsai.memory.budget import enforce_host_cap
from frugal_bonsai.memory.meter import resident_bytes
enforce_host_cap(int(sys.argv[1]), 10**9)
del_me = torch.ones(5_000_000)  # freed, it raises glibc's own threshold beyond 4 MB
del del_me
blocks = [torch.ones(1_000_000) for _ in range(50)]
full = resident_bytes()
del blocks[::2]
print(full - resident_bytes())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
@pytest.mark.parametrize(("cap", "returned"), [(1_100_000_000, True), (2_000_000_000, False)])
def test_near_the_cap_freed_blocks_go_back_to_the_system(cap: int, returned: bool) -> None:
    words = [sys.executable, "-c", HOLES, str(cap)]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert (int(done.stdout) > 90_000_000) is returned
