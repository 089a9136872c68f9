"""The masked sweep on an accelerator: nothing waits in its inner loop, every access is ordered."""

from __future__ import annotations

import sys
from collections import Counter
from typing import Any

import pytest
import torch
from stand_in_device import Machine, RaceError
from tiny_models import Tiny, random_mask, random_windows, relative, sweep_limits, tiny_llama

from frugal_bonsai.bonsai.importance.imputation import Imputations, Tensors
from frugal_bonsai.model.units import UnitGroup
from frugal_bonsai.progress import Silent
from frugal_bonsai.stream import forward, layers, taps
from frugal_bonsai.stream.engine import Engine, compute_dtype
from frugal_bonsai.stream.hidden import HiddenStates
from frugal_bonsai.stream.spill import Spill
from frugal_bonsai.stream.store import INT8, LayerStore, build_store

WINDOWS, WINDOW = 8, 12
BF16 = torch.bfloat16


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return tiny_llama(tmp_path_factory.mktemp("sweep") / "m", dtype=BF16, std=0.35)


@pytest.fixture(scope="module")
def store(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> LayerStore:
    folder = tmp_path_factory.mktemp("store")
    return build_store(folder, tiny.checkpoint, tiny.spec, weights=INT8)


class Masks:
    """Random masks, one for each window, of the first half of every group, and its stand-ins."""

    def __init__(self, tiny: Tiny, device: torch.device) -> None:
        self.masks = [random_mask(tiny.spec, seed=seed) for seed in range(WINDOWS)]
        for mask in self.masks:
            for group in tiny.spec.table.groups:
                mask.of(group)[group.count // 2 :] = True
        self._stand_ins = Imputations(self._read, tiny.spec.table.groups, device)

    def columns(self, group: UnitGroup, items: slice) -> torch.Tensor:
        return torch.stack([mask.columns(group) for mask in self.masks[items]])

    def impute(self, group: UnitGroup, input_BSC: torch.Tensor) -> Any:
        return self._stand_ins.of(group, input_BSC)

    def _read(self, group: UnitGroup) -> Tensors:
        generator = torch.Generator().manual_seed(group.layer)
        pool = group.count // 2 * group.columns_per_unit
        matrix = 0.1 * torch.randn(pool, group.columns - pool, generator=generator)
        return {"columns": torch.arange(pool), "matrix": matrix.half()}


def _engine(tiny: Tiny, device: torch.device, **limits: Any) -> Engine:
    model = (tiny.checkpoint, tiny.spec)
    return Engine(
        *model, device=device, dtype=BF16, limits=sweep_limits(**limits), progress=Silent()
    )


def _losses(engine: Engine, store: LayerStore, masker: Masks | None = None) -> torch.Tensor:
    with engine.stream(store) as stream:
        return engine.sweep.losses(
            stream, engine.head, random_windows(WINDOWS, WINDOW), masker=masker
        )


def test_an_accelerator_computes_in_bf16(machine: Machine) -> None:
    assert compute_dtype(machine.device) == BF16
    assert compute_dtype(torch.device("cpu")) == torch.float32


@pytest.mark.parametrize("resident", [0, 3, WINDOWS])
@pytest.mark.parametrize("micro_batch", [1, 3, WINDOWS])
def test_losses_are_those_of_the_same_arithmetic_on_a_cpu(
    resident: int, micro_batch: int, tiny: Tiny, store: LayerStore, machine: Machine
) -> None:
    """To the bit, whatever spills and however micro-batches are cut, and without a race."""
    cpu = torch.device("cpu")
    expected = _losses(_engine(tiny, cpu, micro_batch=WINDOWS), store, Masks(tiny, cpu))
    engine = _engine(
        tiny,
        machine.device,
        resident_windows=resident,
        micro_batch=micro_batch,
        head_rows=20,
        head_tokens=30,
    )
    for _ in range(2):
        found = _losses(engine, store, Masks(tiny, machine.device))
        assert found.device == cpu
        assert torch.allclose(found, expected, rtol=2e-2, atol=2e-2)
    assert machine.order.races == []


def test_int8_codes_are_multiplied_as_stored(
    tiny: Tiny, store: LayerStore, machine: Machine
) -> None:
    """The inputs keep 16 bits; projections whose sizes are no multiples of 8 are made dense."""
    expected = _losses(_engine(tiny, machine.device, resident_windows=WINDOWS), store)
    engine = tiny.engine(
        device=machine.device, dtype=BF16, arithmetic="int8", resident_windows=3, micro_batch=3
    )
    with engine.evaluation_stream(store) as stream:
        forms = {type(value).__name__ for _, layer in stream.visit() for value in layer.values()}
        tokens_NS = random_windows(WINDOWS, WINDOW)
        found = engine.sweep.losses(stream, engine.head, tokens_NS)
    assert "Int8Weight" in forms and len(forms) > 1
    # Dense weights are rounded to bf16, codes are not.
    assert relative(found, expected) < 3e-2
    assert machine.order.races == []


def test_resident_and_spilled_windows_give_the_same(
    tiny: Tiny, store: LayerStore, machine: Machine
) -> None:
    losses = [
        _losses(_engine(tiny, machine.device, resident_windows=resident, micro_batch=2), store)
        for resident in (WINDOWS, 3, 0)
    ]
    assert torch.equal(losses[0], losses[1]) and torch.equal(losses[0], losses[2])


@pytest.mark.parametrize("resident", [0, WINDOWS])
def test_no_micro_batch_waits_for_the_device(
    resident: int, tiny: Tiny, store: LayerStore, machine: Machine
) -> None:
    """Layers and head make the device wait for nothing, and copy nothing pageable.

    Two things do, outside of the layers: Hugging Face asks once for each micro-batch that is
    embedded whether its positions are of packed sequences, and the losses of a wave come back.
    """
    seen = []
    for micro_batch in (WINDOWS, 1):
        engine = _engine(tiny, machine.device, resident_windows=resident, micro_batch=micro_batch)
        engine.skeleton.layer_kwargs(WINDOW)
        machine.waits.clear()
        machine.pageable.clear()
        _losses(engine, store, Masks(tiny, machine.device))
        seen.append((Counter(machine.waits), Counter(machine.pageable)))
    for (waits, pageable), micro_batches in zip(seen, (1, WINDOWS), strict=True):
        assert [where.split()[-1] for _, where in waits] == ["_run_base"]
        assert sum(waits.values()) == micro_batches
        assert [(way, where.split()[-1]) for way, where in pageable] == [("device to host", "nll")]
        assert sum(pageable.values()) == 1


def test_a_sweep_that_waits_for_each_micro_batch_would_be_seen(
    tiny: Tiny, store: LayerStore, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(taps, "to_device", lambda mask, device: mask.to(device))
    engine = _engine(tiny, machine.device, resident_windows=WINDOWS, micro_batch=1)
    _losses(engine, store, Masks(tiny, machine.device))
    pageable = {where.split()[0].partition(":")[0]: n for (_, where), n in machine.pageable.items()}
    assert pageable["stream/taps.py"] == WINDOWS * len(tiny.spec.table.groups)


# -- the order of the streams --------------------------------------------------------------------
def _forget_the_first_wait(machine: Machine, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    """The copy stream does not wait in the named function, as it did not before."""
    stream = torch.Stream
    wait = stream.wait_stream

    def wait_elsewhere(self: Any, other: Any) -> None:
        if sys._getframe(1).f_code.co_name != where:
            wait(self, other)

    monkeypatch.setattr(stream, "wait_stream", wait_elsewhere)


def test_a_head_is_not_read_into_memory_that_is_still_read(
    tiny: Tiny, store: LayerStore, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Finding 2 put back: the final norms are queued, then rows land where those still read."""
    _losses(_engine(tiny, machine.device, head_rows=20, resident_windows=WINDOWS), store)
    assert machine.order.races == []
    _forget_the_first_wait(machine, monkeypatch, "__init__")
    with pytest.raises(RaceError, match=r"copy_ at stream/layers\.py:\d+ _fetch writes"):
        _losses(_engine(tiny, machine.device, head_rows=20, resident_windows=WINDOWS), store)


def test_memory_of_a_closed_stream_is_not_taken_before_its_last_copy(
    tiny: Tiny, store: LayerStore, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def begin_and_close() -> torch.Tensor:
        engine = _engine(tiny, machine.device)
        with engine.stream(store) as stream:
            size = stream._staged[0].numel()
            stream.start()
        return torch.empty(size, dtype=torch.uint8, device=machine.device).fill_(1)

    begin_and_close()
    monkeypatch.setattr(torch.Stream, "synchronize", lambda _: None)
    with pytest.raises(RaceError, match=r"_fetch writes on another stream"):
        begin_and_close()


@pytest.mark.parametrize("where", ["_fetch", "write"])
def test_spilled_windows_need_their_order(
    where: str, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def pass_layers() -> None:
        hidden = HiddenStates(6, 4, 8, device=machine.device, dtype=BF16, resident=0)
        for start in range(6):
            items = slice(start, start + 1)
            hidden.write(items, torch.ones(1, 4, 8, dtype=BF16, device=machine.device))
        for _ in range(2):
            for start in range(6):
                items = slice(start, start + 1)
                hidden.write(items, hidden.read(items) * 2)

    pass_layers()
    _forget_the_first_wait(machine, monkeypatch, where)
    with pytest.raises(RaceError):
        pass_layers()


def test_what_a_reader_throws_away_is_still_waited_for(machine: Machine) -> None:
    spill = Spill(8, 4, 8, device=machine.device, dtype=BF16)
    for start in range(0, 8, 2):
        spill.write(slice(start, start + 2), torch.ones(2, 4, 8, dtype=BF16, device=machine.device))
    for start, stop in ((0, 2), (4, 6), (2, 4), (0, 4), (3, 5), (5, 6)):
        items = slice(start, stop)
        spill.write(items, spill.read(items) + 1)
    del spill
    torch.ones(2, 4, 8, dtype=BF16, device=machine.device)
    assert machine.order.races == []


def test_buffers_of_inference_mode_are_filled_by_the_readers_thread(
    tiny: Tiny, store: LayerStore, machine: Machine
) -> None:
    """The head's stream is opened in inference mode; its copies run in a thread outside of it."""
    engine = _engine(tiny, machine.device)
    with torch.inference_mode(), engine.stream(store) as stream:
        assert stream._staged[0].is_inference()
        assert [layer for layer, _ in stream.visit()] == list(range(tiny.spec.layers))


# -- memory ------------------------------------------------------------------------------------
def test_spilling_reserves_the_same_however_often(
    tiny: Tiny, store: LayerStore, machine: Machine
) -> None:
    """Finding 8: freed micro-batches go back to the pool of the stream that computes."""
    engine = _engine(tiny, machine.device, resident_windows=0, micro_batch=2)
    reserved = []
    for _ in range(5):
        _losses(engine, store, Masks(tiny, machine.device))
        reserved.append(machine.memory.reserved)
    assert len(set(reserved[1:])) == 1
    pools = {segment.pool for segment in machine.memory._segments}
    assert {stream for stream, _ in pools} == {0}


def test_pinned_memory_is_given_back(tiny: Tiny, store: LayerStore, machine: Machine) -> None:
    """Finding 4: what one phase pins is not added to what the next one does."""
    engine = _engine(tiny, machine.device, resident_windows=0, micro_batch=2)
    _losses(engine, store)
    layer = 1 << (max(map(store.layer_bytes, range(store.layers))) - 1).bit_length()
    with engine.stream(store):
        assert machine.pinned.reserved == 2 * layer
    assert machine.pinned.reserved == 0


def test_the_micro_batch_halves_where_the_device_has_no_more(
    tiny: Tiny, store: LayerStore, machine: Machine
) -> None:
    expected = _losses(_engine(tiny, machine.device, resident_windows=WINDOWS), store)
    engine = _engine(tiny, machine.device, resident_windows=WINDOWS, micro_batch=WINDOWS)
    raised = []

    def short(*given: Any, **kwargs: Any) -> torch.Tensor:
        if given[2].shape[0] > 2:
            raised.append(given[2].shape[0])
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return call(*given, **kwargs)

    call = forward.call_layer
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(forward, "call_layer", short)
        found = _losses(engine, store)
    assert raised == [8, 4] and engine.sweep.batches.size == 2
    assert torch.equal(found, expected)
    assert machine.order.races == []


def test_hidden_states_and_buffers_that_do_not_fit_are_refused_in_words(
    tiny: Tiny, store: LayerStore, machine: Machine
) -> None:
    from frugal_bonsai.errors import BudgetError

    machine.memory.limit_bytes = 0
    with pytest.raises(BudgetError, match=r"memory ran out in hidden states of 9 windows"):
        HiddenStates(9, 4, 8, device=machine.device, dtype=BF16, resident=9)
    with pytest.raises(BudgetError, match=r"memory ran out in the buffers of a layer"):
        layers.LayerStream(store, device=machine.device, dtype=BF16)
