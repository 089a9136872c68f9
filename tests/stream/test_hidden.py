"""The residual stream of every window in flight."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch

from frugal_bonsai.errors import OutputError
from frugal_bonsai.stream import disk_spill
from frugal_bonsai.stream.hidden import HiddenStates
from frugal_bonsai.stream.spill import Spill

CPU = torch.device("cpu")


def _states(windows: int, resident: int) -> HiddenStates:
    """Hidden states of which ``resident`` windows are on the "device", the rest spilled."""
    states = HiddenStates(windows, 3, 2, device=CPU, dtype=torch.float32, resident=0)
    states._resident = min(windows, resident)
    states._near = states._near[: states._resident]
    spilled = windows - states._resident
    states._far = Spill(spilled, 3, 2, device=CPU, dtype=torch.float32)
    return states


def _values(windows: int) -> torch.Tensor:
    return torch.arange(windows * 6.0).view(windows, 3, 2)


def test_on_a_cpu_all_windows_are_near_and_reads_are_views() -> None:
    states = HiddenStates(5, 3, 2, device=CPU, dtype=torch.float32, resident=0)
    states.write(slice(0, 5), _values(5))
    view = states.read(slice(1, 3))
    view.add_(100)
    assert torch.equal(states.read(slice(1, 3)), _values(5)[1:3] + 100)
    assert torch.equal(states.read(slice(3, 5)), _values(5)[3:])
    assert (states.windows, states.window) == (5, 3)


def _on_disk(windows: int, resident: int, folder: Path) -> HiddenStates:
    return HiddenStates(
        windows, 3, 2, device=CPU, dtype=torch.float32, resident=resident, disk=folder
    )


@pytest.mark.parametrize("resident", [0, 1, 2, 3, 6, 7, 9])
@pytest.mark.parametrize("step", [1, 2, 3, 7])
@pytest.mark.parametrize("where", ["host", "disk", "disk, pages dropped"])
def test_spilled_windows_come_back(
    resident: int, step: int, where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if where == "disk, pages dropped":
        monkeypatch.setattr(disk_spill, "free_memory_bytes", lambda: 0)
    host = where == "host"
    states = _states(7, resident) if host else _on_disk(7, resident, tmp_path)
    values = _values(7)
    assert list(tmp_path.iterdir()) == [], "the file has no name"
    for start in range(0, 7, step):
        states.write(slice(start, start + step), values[start : start + step])
    for size in (1, 2, 5, 7):
        for start in range(0, 7, size):
            found = states.read(slice(start, start + size))
            assert torch.equal(found, values[start : start + size]), (start, size)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_file_holds_every_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(4, 64, 256)
    values = patterns.view(torch.bfloat16).to(dtype)
    states = HiddenStates(4, 64, 256, device=CPU, dtype=dtype, resident=1, disk=tmp_path)
    states.write(slice(0, 4), values)
    assert torch.equal(states.read(slice(0, 4)).view(torch.int16), values.view(torch.int16))


def test_a_disk_without_room_is_named_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    with pytest.raises(OutputError, match=r"hidden states.*disk is full"):
        _on_disk(5, 1, tmp_path)
