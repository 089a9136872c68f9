"""Hidden states that spill: whatever is fetched ahead, a read gives what was written last."""

from __future__ import annotations

import random

import pytest
import torch

from frugal_bonsai.stream.spill import Spill

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
WINDOWS, WINDOW, HIDDEN = 11, 3, 4


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> torch.device:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return torch.device(request.param)


def _spill(device: torch.device) -> tuple[Spill, torch.Tensor]:
    values = torch.rand(WINDOWS, WINDOW, HIDDEN)
    spill = Spill(WINDOWS, WINDOW, HIDDEN, device=device, dtype=torch.float32)
    spill.write(slice(0, WINDOWS), values.to(device))
    return spill, values


@pytest.mark.parametrize("batch", [1, 2, 4, 11, 20])
def test_layer_after_layer(batch: int, device: torch.device) -> None:
    spill, values = _spill(device)
    for layer in range(3):
        for start in range(0, WINDOWS, batch):
            items = slice(start, min(start + batch, WINDOWS))
            read = spill.read(items)
            assert read.device.type == device.type and torch.equal(read.cpu(), values[items])
            spill.write(items, read * 2 + layer)
        values = values * 2 + layer


@pytest.mark.parametrize("seed", range(20))
def test_any_order_of_reads_and_writes(seed: int, device: torch.device) -> None:
    """Micro-batches that halve, passes that only read, writes over what is fetched ahead."""
    spill, values = _spill(device)
    draw = random.Random(seed)
    for _ in range(60):
        start = draw.randrange(WINDOWS)
        items = slice(start, draw.randrange(start, WINDOWS) + 1)
        if draw.random() < 0.5:
            assert torch.equal(spill.read(items).cpu(), values[items])
        else:
            values[items] = torch.rand(items.stop - items.start, WINDOW, HIDDEN)
            spill.write(items, values[items].to(device))


def test_the_next_micro_batch_is_fetched_and_the_first_of_the_next_layer() -> None:
    spill, _ = _spill(torch.device("cpu"))
    ahead = []
    for start in range(0, WINDOWS, 4):
        spill.read(slice(start, min(start + 4, WINDOWS)))
        assert spill._ahead is not None
        ahead.append((spill._ahead.items.start, spill._ahead.items.stop))
    assert ahead == [(4, 8), (8, 11), (0, 3)]
