"""Memory that runs out: the micro-batch halves inside the layer, and nothing is done twice."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import Tiny, random_mask, random_windows, tiny_llama

from frugal_bonsai.errors import BudgetError
from frugal_bonsai.model.units import KeepMask, UnitGroup
from frugal_bonsai.progress import Silent
from frugal_bonsai.stream import vocabulary_sums
from frugal_bonsai.stream.layers import Parameters
from frugal_bonsai.stream.micro_batch import MicroBatches, is_out_of_memory

WINDOWS, WINDOW = 11, 12
CPU_TEXT = (
    "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you "
    "tried to allocate 99 bytes. Error code 12 (Cannot allocate memory)"
)
ERRORS: dict[str, Callable[[], Exception]] = {
    "cuda": lambda: torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    "cpu": lambda: RuntimeError(CPU_TEXT),
    "python": MemoryError,
    "driver": lambda: RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be"),
    "hip": lambda: RuntimeError("HIP error: out of memory"),
    "cusolver": lambda: RuntimeError("cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling"),
    "cudnn": lambda: RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    "xpu": lambda: RuntimeError("level_zero backend failed: UR_RESULT_ERROR_OUT_OF_DEVICE_MEMORY"),
    "mps": lambda: RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)."),
}
OTHERS = ("CUDA error: an illegal memory access was encountered", "CUSOLVER_STATUS_NOT_INITIALIZED")


class Listener(Silent):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


class FailAt:
    """A hook that raises at these calls, counted from 1."""

    def __init__(self, *calls: int, error: Callable[[], Exception] = MemoryError) -> None:
        self.calls, self.fail, self.error = 0, calls, error

    def __call__(self, *_: Any) -> None:
        self.calls += 1
        if self.calls in self.fail:
            raise self.error()


@pytest.mark.parametrize("make", ERRORS.values(), ids=ERRORS)
def test_errors_that_say_memory_ran_out(make: Callable[[], Exception]) -> None:
    assert is_out_of_memory(make())


@pytest.mark.parametrize("text", OTHERS)
def test_errors_that_do_not(text: str) -> None:
    assert not is_out_of_memory(RuntimeError(text))


def test_fewer_than_planned_where_these_are_faster() -> None:
    def slices(most: int | None, *, weight: int = 1) -> list[tuple[int, int]]:
        found: list[tuple[int, int]] = []
        batches = MicroBatches(6)
        batches.run(
            7, lambda items: found.append((items.start, items.stop)), weight=weight, most=most
        )
        assert batches.size == 6, "what was planned stays"
        return found

    assert slices(None) == [(0, 6), (6, 7)]
    assert slices(4) == [(0, 4), (4, 7)]
    assert slices(10) == slices(None)
    assert slices(4, weight=2) == [(0, 2), (2, 4), (4, 6), (6, 7)]
    assert slices(1, weight=2) == [(at, at + 1) for at in range(7)], "one at least"


def test_what_torch_really_raises_is_known() -> None:
    with pytest.raises(RuntimeError) as raised:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(raised.value)


@pytest.mark.parametrize(
    "error", [RuntimeError("shapes do not match"), ValueError("out of memory."), KeyError("x")]
)
def test_other_errors_are_not_taken_for_it(error: Exception) -> None:
    assert not is_out_of_memory(error)

    def body(_: slice) -> None:
        raise error

    with pytest.raises(type(error)):
        MicroBatches(4).run(8, body)


def test_every_window_is_done_once_in_order() -> None:
    listener = Listener()
    batches, fail, done = MicroBatches(5, progress=listener), FailAt(2, 3), list[int]()

    def body(items: slice) -> None:
        fail()
        done.extend(range(items.start, items.stop))

    batches.run(12, body)
    assert done == list(range(12))
    assert (batches.planned, batches.size) == (5, 1)  # 5 -> 2 -> 1
    assert listener.notes == [
        "memory ran out with 5 windows in a micro-batch; going on with 2",
        "memory ran out with 2 windows in a micro-batch; going on with 1",
    ]


def test_a_last_smaller_micro_batch_halves_from_what_it_was() -> None:
    batches, seen = MicroBatches(8), list[tuple[int, int]]()
    fail = FailAt(2)

    def body(items: slice) -> None:
        fail()
        seen.append((items.start, items.stop))

    batches.run(12, body)
    assert seen == [(0, 8), (8, 10), (10, 12)] and batches.size == 2


def test_one_window_that_does_not_fit_is_the_users_error() -> None:
    with pytest.raises(
        BudgetError, match=r"with 1 window in a micro-batch.*can't allocate.*--window"
    ):
        MicroBatches(4).run(8, FailAt(*range(1, 99), error=ERRORS["cpu"]))


class Masks:
    def __init__(self, masks: list[KeepMask]) -> None:
        self.masks = masks

    def columns(self, group: UnitGroup, items: slice) -> torch.Tensor | None:
        return torch.stack([mask.columns(group) for mask in self.masks[items]])

    def impute(self, group: UnitGroup, input_BSC: torch.Tensor) -> None:
        return None


@pytest.fixture
def tiny(tmp_path: Path) -> Tiny:
    return tiny_llama(tmp_path / "m")


@pytest.mark.parametrize("make", ERRORS.values(), ids=ERRORS)
def test_a_masked_sweep_goes_on_inside_the_layer(make: Callable[[], Exception], tiny: Tiny) -> None:
    tokens = random_windows(WINDOWS, WINDOW)
    masker = Masks([random_mask(tiny.spec, seed=i) for i in range(WINDOWS)])
    engine = tiny.engine(micro_batch=4)
    with engine.native() as stream:
        expected = engine.sweep.losses(stream, engine.head, tokens, masker=masker)
    listener = Listener()
    engine = tiny.engine(micro_batch=4, progress=listener)
    windows = Counter[int]()
    for layer, module in enumerate(engine.skeleton.layers):
        module.register_forward_hook(
            lambda _, args, __, layer=layer: windows.update({layer: len(args[0])})
        )
    # Layer 1's second micro-batch lacks memory in the middle of the layer.
    fail = FailAt(2, error=make)
    engine.skeleton.layers[1].get_submodule("mlp").register_forward_pre_hook(fail)
    with engine.native() as stream:
        found = engine.sweep.losses(stream, engine.head, tokens, masker=masker)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert windows == {0: WINDOWS, 1: WINDOWS, 2: WINDOWS}, "no window passes a layer twice"
    assert (engine.sweep.batches.planned, engine.sweep.batches.size) == (4, 2)
    assert listener.notes == ["memory ran out with 4 windows in a micro-batch; going on with 2"]


class FailingTap:
    """Lacks memory at one call; keeps what it sees."""

    def __init__(self, fail: FailAt) -> None:
        self.fail, self.seen = fail, dict[UnitGroup, list[torch.Tensor]]()

    def inputs(self, group: UnitGroup, input_BSC: torch.Tensor) -> None:
        self.fail()
        self.seen.setdefault(group, []).append(input_BSC.clone())

    def end_layer(self, layer: int, parameters: Parameters) -> None: ...


@pytest.mark.parametrize("call", [1, 2, 8])
def test_a_tap_that_lacks_memory_sees_each_window_once(call: int, tiny: Tiny) -> None:
    tokens = random_windows(WINDOWS, WINDOW)
    calm, troubled = FailingTap(FailAt()), FailingTap(FailAt(call))
    for tap in (calm, troubled):
        engine = tiny.engine(micro_batch=4)
        with engine.native() as stream:
            hidden = engine.sweep.run(stream, tokens, tap=tap).read(slice(0, WINDOWS))
        if tap is calm:
            expected = hidden
    torch.testing.assert_close(hidden, expected, rtol=1e-5, atol=1e-5)
    for group, parts in calm.seen.items():
        torch.testing.assert_close(torch.cat(troubled.seen[group]), torch.cat(parts))
    assert engine.sweep.batches.size == 2


@pytest.mark.parametrize(("call", "size"), [(1, 2 * WINDOW), (7, 22)])
def test_the_head_halves_its_blocks(
    call: int, size: int, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens, listener = random_windows(WINDOWS, WINDOW), Listener()
    engine = tiny.engine(head_rows=20, head_tokens=4 * WINDOW, progress=listener)
    with engine.native() as stream, torch.inference_mode():
        hidden = engine.sweep.run(stream, tokens)
        again = engine.sweep.run(stream, tokens)
        expected = engine.head.nll(hidden, tokens)
        fail = FailAt(call)
        engine.skeleton.norm.register_forward_hook(fail)
        adding = vocabulary_sums._log_sum_exp_
        monkeypatch.setattr(
            vocabulary_sums, "_log_sum_exp_", lambda logits: (fail(), adding(logits))[1]
        )
        found = engine.head.nll(again, tokens)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert (engine.head.batches.planned, engine.head.batches.size) == (4 * WINDOW, size)
    assert len(listener.notes) == 1 and "tokens in a block of logits" in listener.notes[0]
