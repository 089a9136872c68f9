"""Statistics and recovery after memory ran out give what a run that never lacked it gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import Tiny, random_mask, random_windows, tiny_llama

from frugal_bonsai.bonsai.importance.gram import Moments
from frugal_bonsai.bonsai.importance.scores import ImportanceBuilder
from frugal_bonsai.bonsai.reconstruction import outputs as recover_outputs
from frugal_bonsai.bonsai.reconstruction.channels import ChannelUpdate
from frugal_bonsai.bonsai.reconstruction.reconstruct import Reconstructed, Reconstruction
from frugal_bonsai.errors import BudgetError
from frugal_bonsai.model.units import KeepMask
from frugal_bonsai.stream.engine import Engine
from frugal_bonsai.stream.store import NATIVE, build_store

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


def _prior(engine: Engine, mask: KeepMask) -> torch.Tensor:
    builder = _builder(mask)
    with engine.native() as stream:
        engine.sweep.run(stream, random_windows(WINDOWS, WINDOW), tap=builder)
    return builder.build().score_N


@pytest.mark.parametrize("call", [1, 4])
def test_statistics(call: int, tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    mask = KeepMask(tiny.spec.table)
    expected = _prior(tiny.engine(micro_batch=4), mask)
    fail, add = FailAt(call), Moments.add

    def failing(self: Moments, input_BSC: torch.Tensor) -> None:
        fail()
        add(self, input_BSC)

    monkeypatch.setattr(Moments, "add", failing)
    engine = tiny.engine(micro_batch=4)
    torch.testing.assert_close(_prior(engine, mask), expected, rtol=1e-4, atol=1e-7)
    assert engine.sweep.batches.size == 2


def _recover(
    engine: Engine, tiny: Tiny, folder: Path, *, keep: bool, refine: int = 0
) -> tuple[Reconstructed, dict[str, torch.Tensor]]:
    mask = random_mask(tiny.spec, off=0.3)
    refits: dict[str, torch.Tensor] = {}
    recovery = Reconstruction(
        engine.sweep,
        ridge=1e-3,
        keep_inputs=keep,
        save=lambda _, given: refits.update({n: w.clone() for n, w in given.items()}),
        mask=mask,
        refine=refine,
        keep_refinement=keep,
    )
    store = build_store(folder, tiny.checkpoint, tiny.spec, weights=NATIVE, mask=mask)
    with engine.dense_stream(tiny.source()) as parent, engine.dense_stream(store) as pruned:
        tokens = random_windows(WINDOWS, WINDOW)
        return recovery.run(parent, pruned, engine.head, tokens, _builder(mask)), refits


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("call", [5, 11, 20])
def test_recovery_lacks_memory_in_a_forward(
    keep: bool, call: int, tiny: Tiny, tmp_path: Path
) -> None:
    expected, wanted = _recover(tiny.engine(micro_batch=4), tiny, tmp_path / "s", keep=keep)
    engine, fail = tiny.engine(micro_batch=4), FailAt(call)
    for layer in engine.skeleton.layers:
        layer.get_submodule("self_attn.q_proj").register_forward_pre_hook(fail)
    result, refits = _recover(engine, tiny, tmp_path / "s", keep=keep)
    assert fail.calls > call and engine.sweep.batches.size < 4
    _assert_equal(result, refits, expected, wanted)


@pytest.mark.parametrize("call", [1, 2, 7])
def test_recovery_lacks_memory_for_its_sums(
    call: int, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, wanted = _recover(tiny.engine(micro_batch=4), tiny, tmp_path / "s", keep=True)
    fail, add = FailAt(call), recover_outputs.Cross.add

    def failing(self: Any, *inputs: torch.Tensor) -> None:
        fail()
        add(self, *inputs)

    monkeypatch.setattr(recover_outputs.Cross, "add", failing)
    engine = tiny.engine(micro_batch=4)
    result, refits = _recover(engine, tiny, tmp_path / "s", keep=True)
    assert engine.sweep.batches.size == 2
    _assert_equal(result, refits, expected, wanted)


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("call", [1, 6, 12])
def test_refinement_lacks_memory(
    keep: bool, call: int, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slopes that were kept by larger micro-batches are read by smaller ones."""
    engine = tiny.engine(micro_batch=4)
    expected, wanted = _recover(engine, tiny, tmp_path / "s", keep=keep, refine=1)
    fail, activation = FailAt(call), ChannelUpdate._activation

    def failing(self: ChannelUpdate, before: Any) -> torch.Tensor:
        fail()
        return activation(self, before)

    monkeypatch.setattr(ChannelUpdate, "_activation", failing)
    engine = tiny.engine(micro_batch=4)
    result, refits = _recover(engine, tiny, tmp_path / "s", keep=keep, refine=1)
    assert fail.calls > call and engine.sweep.batches.size < 4
    _assert_equal(result, refits, expected, wanted)


def test_refinement_lacks_memory_there_and_back(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = tiny.engine(micro_batch=4)
    expected, wanted = _recover(engine, tiny, tmp_path / "s", keep=True, refine=1)
    fail, own = FailAt(5), ChannelUpdate._own

    def failing(self: ChannelUpdate, items: slice) -> slice:
        fail()  # called once a micro-batch: three to keep the slopes, then to read them
        return own(self, items)

    monkeypatch.setattr(ChannelUpdate, "_own", failing)
    engine = tiny.engine(micro_batch=4)
    result, refits = _recover(engine, tiny, tmp_path / "s", keep=True, refine=1)
    assert engine.sweep.batches.size == 2
    _assert_equal(result, refits, expected, wanted)


def test_recovery_that_lacks_memory_for_its_solve_is_the_users_error(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refit(*_: Any) -> float:
        raise MemoryError

    monkeypatch.setattr(recover_outputs, "ridge_refit_", refit)
    with pytest.raises(BudgetError, match=r"in recovery of model\.layers\.0\.self_attn\.o_proj"):
        _recover(tiny.engine(), tiny, tmp_path / "s", keep=True)


def _assert_equal(
    result: Reconstructed,
    refits: dict[str, torch.Tensor],
    expected: Reconstructed,
    wanted: dict[str, torch.Tensor],
) -> None:
    assert refits.keys() == wanted.keys()
    for name, weight in refits.items():
        torch.testing.assert_close(weight, wanted[name], rtol=2e-3, atol=2e-4)
    torch.testing.assert_close(result.losses_NS, expected.losses_NS, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(result.dense_losses_NS, expected.dense_losses_NS)
    assert result.prior is not None and expected.prior is not None
    torch.testing.assert_close(result.prior.score_N, expected.prior.score_N, rtol=1e-2, atol=1e-6)
