"""The stand-in itself: it computes, and it refuses what a device would refuse or do wrong."""

from __future__ import annotations

import gc

import pytest
import torch
from stand_in_device import Machine, MixedDevicesError, RaceError, installed
from torch import nn

from frugal_bonsai.accelerator import to_device
from frugal_bonsai.int8 import dequantise_into

CUDA, MIB = torch.device("cuda:0"), 2**20


def test_it_computes_and_says_where(machine: Machine) -> None:
    values = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    there = values.to(CUDA)
    assert there.device == CUDA and (there @ there.T).device == CUDA
    assert torch.equal((there @ there.T).cpu(), values @ values.T)
    there[1:3] = 2.0
    there[:, torch.tensor([0, 4]).to(CUDA)] += 1
    values[1:3] = 2.0
    values[:, [0, 4]] += 1
    assert torch.equal(there.cpu(), values)
    assert torch.equal(there[there > 1].cpu(), values[values > 1])


def test_gradients_flow(machine: Machine) -> None:
    weight = nn.Parameter(torch.ones(3, 4, device=CUDA))
    torch.nn.functional.linear(torch.ones(2, 4, device=CUDA), weight).sum().backward()
    assert weight.grad is not None and weight.grad.device == CUDA
    assert torch.equal(weight.grad.cpu(), torch.full((3, 4), 2.0))


def test_tensors_of_two_devices_do_not_meet(machine: Machine) -> None:
    """The error names the line of the package."""
    there = torch.zeros(4, 3, device=CUDA)
    with pytest.raises(MixedDevicesError, match=r"int8\.py:\d+ dequantise_into.*cuda:0.*cpu"):
        dequantise_into(there, torch.ones(4, 3, dtype=torch.int8, device=CUDA), torch.ones(4))
    with pytest.raises(MixedDevicesError):
        torch.zeros(3)[torch.tensor([1], device=CUDA)]
    with pytest.raises(MixedDevicesError):
        there[torch.tensor([True, False, True, True], device=CUDA)] = torch.ones(3, 3)
    numbers = torch.zeros(4, 3, device=CUDA) + torch.tensor(1.0)
    assert torch.equal(numbers.cpu(), torch.ones(4, 3))


def test_what_waits_for_the_device_is_counted(machine: Machine) -> None:
    there = torch.ones(3, device=CUDA)
    float(there.sum())
    there.nonzero()
    there[there > 0] = 0
    assert sum(machine.waits.values()) == 3
    assert not machine.pageable


def test_copies_of_pageable_memory_are_counted(machine: Machine) -> None:
    torch.ones(3).to(CUDA)
    torch.ones(3).to(CUDA, non_blocking=True)
    torch.ones(3, device=CUDA).cpu()
    assert sorted(direction for direction, _ in machine.pageable.elements()) == [
        "device to host",
        "host to device",
        "host to device",
    ]
    machine.pageable.clear()
    to_device(torch.ones(3), CUDA)
    torch.empty(3, pin_memory=True).copy_(torch.ones(3, device=CUDA), non_blocking=True)
    assert not machine.pageable


def test_two_streams_need_an_order(machine: Machine) -> None:
    there, side = torch.zeros(8, device=CUDA), torch.Stream(CUDA)
    with pytest.raises(RaceError, match=r"add_.* writes what .*writes on another stream"), side:
        there.add_(1)
    side.wait_stream(torch.accelerator.current_stream(CUDA))
    with side:
        there.add_(1)
        event = side.record_event()
    with pytest.raises(RaceError):
        there.mul_(2)
    torch.accelerator.current_stream(CUDA).wait_event(event)
    there.mul_(2)
    assert len(machine.order.races) == 2


def test_disjoint_parts_need_none(machine: Machine) -> None:
    there, side = torch.zeros(8, device=CUDA), torch.Stream(CUDA)
    side.wait_stream(torch.accelerator.current_stream(CUDA))
    with side:
        there[:4].add_(1)
    there[4:].add_(1)
    with pytest.raises(RaceError):
        there[3:5].add_(1)


def test_memory_that_is_taken_again_is_still_read(machine: Machine) -> None:
    """torch's own sanitizer cannot see this: there a block's history ends as it is freed."""
    side, first = torch.Stream(CUDA), torch.ones(2 * MIB, dtype=torch.uint8, device=CUDA)
    first.sum()  # queued, perhaps not done
    block = first.holder.block
    del first
    again = torch.empty(2 * MIB, dtype=torch.uint8, device=CUDA)
    assert again.holder.block is block
    with pytest.raises(RaceError), side:
        again.fill_(2)
    torch.accelerator.synchronize()
    with side:
        again.fill_(2)


def test_a_stream_keeps_what_it_frees(machine: Machine) -> None:
    def hold(stream: torch.Stream) -> None:
        with stream:
            torch.empty(30 * MIB, dtype=torch.uint8, device=CUDA)

    for _ in range(3):
        torch.empty(30 * MIB, dtype=torch.uint8, device=CUDA)
    assert machine.memory.reserved == 30 * MIB
    hold(torch.Stream(CUDA))
    hold(torch.Stream(CUDA))
    assert machine.memory.reserved == 90 * MIB
    torch.accelerator.empty_cache()
    assert machine.memory.reserved == 0 and machine.memory.max_reserved == 90 * MIB


def test_large_blocks_are_split_and_joined(machine: Machine) -> None:
    whole = torch.empty(40 * MIB, dtype=torch.uint8, device=CUDA)
    del whole
    one = torch.empty(10 * MIB, dtype=torch.uint8, device=CUDA)
    two = torch.empty(30 * MIB, dtype=torch.uint8, device=CUDA)
    assert machine.memory.reserved == machine.memory.allocated == 40 * MIB
    del one, two
    torch.empty(40 * MIB, dtype=torch.uint8, device=CUDA)
    assert machine.memory.reserved == 40 * MIB


def test_memory_runs_out_at_the_cap(machine: Machine) -> None:
    torch.cuda.set_per_process_memory_fraction(64 * MIB / machine.memory.total_bytes, CUDA)
    cached = torch.empty(60 * MIB, dtype=torch.uint8, device=CUDA)
    with pytest.raises(torch.OutOfMemoryError, match="out of memory"):
        torch.empty(30 * MIB, dtype=torch.uint8, device=CUDA)
    del cached  # what is only cached is given back first
    torch.empty(30 * MIB, dtype=torch.uint8, device=CUDA)
    with pytest.raises(ValueError, match="index"):
        torch.cuda.set_per_process_memory_fraction(0.5, torch.device("cuda"))


def test_pinned_memory_is_a_power_of_two_and_stays(machine: Machine) -> None:
    block = torch.empty(3 * MIB, dtype=torch.uint8, pin_memory=True)
    part = block[MIB:]
    del block
    gc.collect()
    assert machine.is_pinned(part) and machine.pinned.reserved == 4 * MIB
    del part
    gc.collect()
    torch.empty(5 * MIB, dtype=torch.uint8, pin_memory=True)
    assert machine.pinned.reserved == 12 * MIB
    torch.accelerator.empty_host_cache()
    assert machine.pinned.reserved == 0


def test_mps_has_no_fp64_and_no_streams() -> None:
    with installed("mps") as machine:
        there = torch.ones(3, device=machine.device)
        assert there.device.type == "mps"
        with pytest.raises(TypeError, match="no float64"):
            there.double()
    assert not torch.accelerator.is_available()


def test_nothing_is_left_behind() -> None:
    """Libraries remember which devices they have found; other tests run in the same process."""
    from transformers import masking_utils
    from transformers.utils import is_torch_xpu_available

    with installed("xpu"):
        assert is_torch_xpu_available()
    assert not is_torch_xpu_available() and not masking_utils._is_torch_xpu_available
    assert not torch.accelerator.is_available() and not torch.cuda.is_available()
    assert torch.tensor([1.0]).device.type == "cpu" and torch.Stream.__module__ == "torch"
