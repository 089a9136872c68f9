"""Statistics and reconstruction after memory ran out give what a run that never lacked it gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from reconstructions import Outcome, reconstruct
from tiny_models import Tiny, random_mask, random_windows, tiny_llama

from frugal_bonsai.bonsai.importance.gram import Moments
from frugal_bonsai.bonsai.importance.scores import ImportanceBuilder
from frugal_bonsai.bonsai.reconstruction import channel_block, least_squares
from frugal_bonsai.bonsai.reconstruction.least_squares import LeastSquares
from frugal_bonsai.bonsai.reconstruction.sublayer import Sublayer
from frugal_bonsai.errors import BudgetError
from frugal_bonsai.model.units import KeepMask
from frugal_bonsai.stream.engine import Engine

WINDOWS, WINDOW = 11, 16


class FailAt:
    def __init__(self, *calls: int) -> None:
        self.calls, self.fail = 0, calls

    def __call__(self, *_: Any) -> None:
        self.calls += 1
        if self.calls in self.fail:
            raise MemoryError


@pytest.fixture
def tiny(tmp_path: Path) -> Tiny:
    return tiny_llama(tmp_path / "m", std=0.35)


def _builder(mask: KeepMask) -> ImportanceBuilder:
    return ImportanceBuilder("exact", mask, damping=1e-3, generator=torch.Generator())


def _scores(engine: Engine, mask: KeepMask) -> torch.Tensor:
    builder = _builder(mask)
    with engine.native() as stream:
        engine.sweep.run(stream, random_windows(WINDOWS, WINDOW), tap=builder)
    return builder.build().score_N


@pytest.mark.parametrize("call", [1, 4])
def test_statistics(call: int, tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    mask = KeepMask(tiny.spec.table)
    expected = _scores(tiny.engine(micro_batch=4), mask)
    fail, add = FailAt(call), Moments.add

    def failing(self: Moments, input_BSC: torch.Tensor) -> None:
        fail()
        add(self, input_BSC)

    monkeypatch.setattr(Moments, "add", failing)
    engine = tiny.engine(micro_batch=4)
    torch.testing.assert_close(_scores(engine, mask), expected, rtol=1e-4, atol=1e-7)
    assert engine.sweep.batches.size == 2


def _reconstruct(
    engine: Engine, tiny: Tiny, folder: Path, *, keep: bool, updates: int = 0
) -> Outcome:
    mask = random_mask(tiny.spec, off=0.3)
    return reconstruct(
        tiny,
        mask,
        random_windows(WINDOWS, WINDOW),
        folder,
        engine=engine,
        mask=mask,
        channel_updates=updates,
        keep_inputs=keep,
        keep_updates=keep,
    )


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("call", [5, 11, 20])
def test_reconstruction_lacks_memory_in_a_forward(
    keep: bool, call: int, tiny: Tiny, tmp_path: Path
) -> None:
    expected = _reconstruct(tiny.engine(micro_batch=4), tiny, tmp_path / "s", keep=keep)
    engine, fail = tiny.engine(micro_batch=4), FailAt(call)
    for layer in engine.skeleton.layers:
        layer.get_submodule("self_attn.q_proj").register_forward_pre_hook(fail)
    result = _reconstruct(engine, tiny, tmp_path / "s", keep=keep)
    assert fail.calls > call and engine.sweep.batches.size < 4
    _assert_equal(result, expected)


@pytest.mark.parametrize("call", [1, 2, 7])
def test_reconstruction_lacks_memory_for_its_sums(
    call: int, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = _reconstruct(tiny.engine(micro_batch=4), tiny, tmp_path / "s", keep=True)
    fail, add = FailAt(call), LeastSquares.add_targets

    def failing(self: Any, *inputs: torch.Tensor) -> None:
        fail()
        add(self, *inputs)

    monkeypatch.setattr(LeastSquares, "add_targets", failing)
    engine = tiny.engine(micro_batch=4)
    result = _reconstruct(engine, tiny, tmp_path / "s", keep=True)
    assert engine.sweep.batches.size == 2
    _assert_equal(result, expected)


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("call", [1, 6, 12])
def test_channel_update_lacks_memory(
    keep: bool, call: int, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slopes that were kept by larger micro-batches are read by smaller ones."""
    engine = tiny.engine(micro_batch=4)
    expected = _reconstruct(engine, tiny, tmp_path / "s", keep=keep, updates=1)
    fail, activation = FailAt(call), Sublayer.activation

    def failing(self: Sublayer, before: Any) -> torch.Tensor:
        fail()
        return activation(self, before)

    monkeypatch.setattr(Sublayer, "activation", failing)
    engine = tiny.engine(micro_batch=4)
    result = _reconstruct(engine, tiny, tmp_path / "s", keep=keep, updates=1)
    assert fail.calls > call and engine.sweep.batches.size < 4
    _assert_equal(result, expected)


def test_channel_update_lacks_memory_there_and_back(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = tiny.engine(micro_batch=4)
    expected = _reconstruct(engine, tiny, tmp_path / "s", keep=True, updates=1)
    fail, held = FailAt(5), channel_block.BlockProblem._held_slopes

    def failing(self: Any, slopes: torch.Tensor, items: slice) -> torch.Tensor:
        fail()  # called once a micro-batch: three to hold the slopes, then to read them
        return held(self, slopes, items)

    monkeypatch.setattr(channel_block.BlockProblem, "_held_slopes", failing)
    engine = tiny.engine(micro_batch=4)
    result = _reconstruct(engine, tiny, tmp_path / "s", keep=True, updates=1)
    assert engine.sweep.batches.size == 2
    _assert_equal(result, expected)


def test_reconstruction_that_lacks_memory_for_its_solve_is_the_users_error(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refit(*_: Any) -> float:
        raise MemoryError

    monkeypatch.setattr(least_squares, "ridge_refit_", refit)
    with pytest.raises(
        BudgetError, match=r"in reconstruction of model\.layers\.0\.self_attn\.o_proj"
    ):
        _reconstruct(tiny.engine(), tiny, tmp_path / "s", keep=True)


def _assert_equal(result: Outcome, expected: Outcome) -> None:
    assert result.refits.keys() == expected.refits.keys()
    for name, weight in result.refits.items():
        torch.testing.assert_close(weight, expected.refits[name], rtol=2e-3, atol=2e-4)
    torch.testing.assert_close(result.losses_NS, expected.losses_NS, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(result.dense_losses_NS, expected.dense_losses_NS)
    scores, wanted = result.scores.score_N, expected.scores.score_N
    torch.testing.assert_close(scores, wanted, rtol=1e-2, atol=1e-6)
