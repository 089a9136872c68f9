"""The residual stream of every window in flight."""

from __future__ import annotations

import pytest
import torch

from frugal_bonsai.stream.hidden import HiddenStates

CPU = torch.device("cpu")


class _ActsAsGpu:
    """Says that it is no CPU, so that spilling is exercised without a GPU."""

    type = "stand-in"


def _states(windows: int, resident: int, monkeypatch: pytest.MonkeyPatch) -> HiddenStates:
    """Hidden states of which ``resident`` windows are on the "device", the rest spilled."""
    empty = torch.empty

    def plain_empty(*shape: int, **options: object) -> torch.Tensor:
        options = {k: v for k, v in options.items() if k == "dtype"}
        return empty(*shape, **options).fill_(float("nan"))  # type: ignore[call-overload]

    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", plain_empty)
        states = HiddenStates(
            windows, 3, 2, device=_ActsAsGpu(), dtype=torch.float32, resident=resident
        )
    states.device = CPU
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
def test_spilled_windows_come_back(
    resident: int, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    states, values = _states(7, resident, monkeypatch), _values(7)
    assert len(states._near) == min(7, resident)
    assert len(states._far) == max(0, 7 - resident)
    for start in range(0, 7, step):
        states.write(slice(start, start + step), values[start : start + step])
    for size in (1, 2, 5, 7):
        for start in range(0, 7, size):
            found = states.read(slice(start, start + size))
            assert torch.equal(found, values[start : start + size]), (start, size)
