"""The residual stream of every window in flight."""

from __future__ import annotations

import pytest
import torch

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


@pytest.mark.parametrize("resident", [0, 1, 2, 3, 6, 7, 9])
@pytest.mark.parametrize("step", [1, 2, 3, 7])
def test_spilled_windows_come_back(resident: int, step: int) -> None:
    states, values = _states(7, resident), _values(7)
    for start in range(0, 7, step):
        states.write(slice(start, start + step), values[start : start + step])
    for size in (1, 2, 5, 7):
        for start in range(0, 7, size):
            found = states.read(slice(start, start + size))
            assert torch.equal(found, values[start : start + size]), (start, size)
