"""Training: it learns, the best is kept, it resumes to the same numbers, it stops at no number."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import CPU, Tiny, random_windows, relative, sampled_windows, tiny_llama

from frugal_bonsai.adaptation.adapters import add_adapters
from frugal_bonsai.adaptation.optimiser import allowed_optimisers
from frugal_bonsai.adaptation.schedule import Schedule
from frugal_bonsai.adaptation.settings import AdaptSettings, Objective
from frugal_bonsai.adaptation.state import BEST_FILE, STATE_FILE, TrainingFolder
from frugal_bonsai.adaptation.student import Student
from frugal_bonsai.adaptation.teacher import TeacherSettings, build_teacher, identify
from frugal_bonsai.adaptation.train import Trainer
from frugal_bonsai.adaptation.training_data import TrainingData
from frugal_bonsai.errors import BudgetError, CheckpointError, OptionError, StateError
from frugal_bonsai.memory.training_items import NATIVE
from frugal_bonsai.progress import Silent

WINDOW, WINDOWS, HELD_OUT = 12, 28, 4
SETTINGS = AdaptSettings(tokens=20 * 4 * WINDOW, batch=4, evaluations=4, learning_rate=2e-2, seed=3)


class StoppedError(Exception):
    """Ends a run from outside."""


class StopsAt(Silent):
    def __init__(self, step: int) -> None:
        self._left = step

    def step(self, detail: str = "") -> None:
        self._left -= 1
        if self._left == 0:
            raise StoppedError


GOLDEN = Path(__file__).parents[1] / "golden" / "tiny_adapt.json"


@pytest.fixture
def tiny(tmp_path: Path) -> Tiny:
    return tiny_llama(tmp_path / "student", seed=1)


@pytest.fixture
def data(tmp_path: Path) -> TrainingData:
    """The teacher is another random model, and what it writes is the data."""
    teacher = tiny_llama(tmp_path / "teacher", seed=0)
    windows = sampled_windows(teacher.hugging_face(), WINDOWS, WINDOW)
    settings = TeacherSettings(top=8)
    identity = identify(teacher.checkpoint, windows, settings, torch.float32)
    cache = build_teacher(tmp_path / "cache", teacher.engine(), windows, settings, identity)
    return TrainingData(windows_NS=windows, held_out=HELD_OUT, cache=cache)


def trainer(
    tiny: Tiny,
    data: TrainingData,
    folder: Path,
    settings: AdaptSettings = SETTINGS,
    *,
    rank: int = 4,
    **options: Any,
) -> tuple[Trainer, dict[str, torch.nn.Parameter]]:
    student = Student(tiny.checkpoint, tiny.spec, device=CPU, dtype=torch.float32, head_tokens=64)
    student.load(NATIVE)
    parameters = add_adapters(student, rank=rank, alpha=8.0, seed=settings.seed)
    values: dict[str, Any] = {"micro_batch": 2, "progress": Silent()}
    made = Trainer(
        student,
        parameters,
        data,
        settings,
        settings.objective(1.0),
        folder=TrainingFolder(folder, {"settings": asdict(settings)}),
        **{**values, **options},
    )
    return made, parameters


def test_training_comes_nearer_to_the_teacher(
    tiny: Tiny, data: TrainingData, tmp_path: Path
) -> None:
    made, parameters = trainer(tiny, data, tmp_path / "run")
    done = made.run()
    assert done.step == 20 and done.tokens == 20 * 4 * WINDOW and done.stopped is None
    assert [row["step"] for row in done.history] == [0, 5, 10, 15, 20]
    assert done.after["kl"] < 0.8 * done.before["kl"]
    assert done.after["perplexity"] < 0.8 * done.before["perplexity"]
    assert all(row["kl"] <= row["kl_upper"] for row in done.history)
    assert done.after["perplexity"] == min(row["perplexity"] for row in done.history)
    assert made.measure_held_out()["perplexity"] == pytest.approx(done.after["perplexity"])
    assert float(parameters["model.layers.0.mlp.up_proj.lora_B.weight"].detach().abs().max()) > 0


def test_golden_training(tiny: Tiny, data: TrainingData, tmp_path: Path) -> None:
    """Unchanged training keeps its numbers; tests/golden/README.md says how to renew them."""
    made, parameters = trainer(tiny, data, tmp_path / "run")
    rows = made.run().history
    mine = {
        "history": [
            [row["step"], round(row["kl"], 4), round(row["perplexity"], 3)] for row in rows
        ],
        "norms": {name: round(float(p.detach().norm()), 3) for name, p in parameters.items()},
    }
    if os.environ.get("REGENERATE_GOLDEN"):
        GOLDEN.write_text(json.dumps(mine, indent=1) + "\n")
    expected = json.loads(GOLDEN.read_text())
    for own, known in zip(mine["history"], expected["history"], strict=True):
        assert own == pytest.approx(known, rel=1e-3)
    assert mine["norms"] == pytest.approx(expected["norms"], rel=5e-3)


def test_the_held_out_perplexity_is_hugging_faces(
    tiny: Tiny, data: TrainingData, tmp_path: Path
) -> None:
    made, _ = trainer(tiny, data, tmp_path / "run")
    held_out = data.windows_NS[-HELD_OUT:]
    with torch.no_grad():
        loss = tiny.hugging_face()(held_out, labels=held_out).loss
    assert made.measure_held_out()["perplexity"] == pytest.approx(math.exp(loss), rel=1e-5)


@pytest.mark.parametrize("stop", [3, 5, 6, 14])
def test_a_resumed_training_ends_in_the_same_numbers(
    stop: int, tiny: Tiny, data: TrainingData, tmp_path: Path
) -> None:
    whole, expected = trainer(tiny, data, tmp_path / "whole")
    first = whole.run()
    begun, _ = trainer(tiny, data, tmp_path / "run", progress=StopsAt(stop))
    with pytest.raises(StoppedError):
        begun.run()
    goes_on, found = trainer(tiny, data, tmp_path / "run")
    second = goes_on.run(resume=True)
    for name, value in expected.items():
        assert torch.equal(value, found[name]), name
    assert [replace_loss(row) for row in second.history] == [replace_loss(r) for r in first.history]
    assert second.best_step == first.best_step and second.step == 20


def test_eight_bit_moments_learn_as_much_and_resume_to_the_same_numbers(
    tiny: Tiny, data: TrainingData, tmp_path: Path
) -> None:
    """Of rank 180 most parameters are large enough for 8 bits (4,096 elements), some are not."""
    pytest.importorskip("bitsandbytes")
    plain, _ = trainer(tiny, data, tmp_path / "plain", rank=180)
    usual = plain.run()
    options = {"rank": 180, "optimiser": "adamw8bit"}
    whole, expected = trainer(tiny, data, tmp_path / "whole", **options)
    first = whole.run()
    dtypes = {whole._optimiser.state[value]["state1"].dtype for value in expected.values()}
    assert dtypes == {torch.uint8, torch.float32}
    assert first.after["kl"] == pytest.approx(usual.after["kl"], rel=0.05)
    assert first.after["kl"] < 0.8 * first.before["kl"]
    begun, _ = trainer(tiny, data, tmp_path / "run", progress=StopsAt(12), **options)
    with pytest.raises(StoppedError):
        begun.run()
    goes_on, found = trainer(tiny, data, tmp_path / "run", **options)
    goes_on.run(resume=True)
    for name, value in expected.items():
        assert torch.equal(value, found[name]), name


def test_without_bitsandbytes_there_are_no_eight_bit_moments(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    assert allowed_optimisers("auto") == allowed_optimisers("adamw") == ("adamw",)
    with pytest.raises(OptionError, match="--optimizer adamw8bit: needs the bitsandbytes package"):
        allowed_optimisers("adamw8bit")


def replace_loss(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key != "seconds"}


def test_micro_batches_change_nothing(tiny: Tiny, data: TrainingData, tmp_path: Path) -> None:
    results = []
    for micro_batch in (1, 4):
        made, found = trainer(tiny, data, tmp_path / str(micro_batch), micro_batch=micro_batch)
        made.run()
        results.append(found)
    for name, value in results[0].items():
        assert relative(results[1][name].detach(), value.detach()) < 1e-3, name


def test_the_best_is_kept_where_training_makes_it_worse(data: TrainingData, tmp_path: Path) -> None:
    tiny = tiny_llama(tmp_path / "same", seed=0)  # the teacher: nothing is left to learn
    wild = replace(SETTINGS, learning_rate=5.0)
    made, parameters = trainer(tiny, data, tmp_path / "run", wild)
    done = made.run()
    assert done.history[-1]["perplexity"] > done.before["perplexity"]
    assert done.best_step == 0 and done.after == done.before
    ups = [value for name, value in parameters.items() if name.endswith("lora_B.weight")]
    assert all(float(value.detach().abs().max()) == 0.0 for value in ups)


def test_a_loss_that_is_no_number_stops_with_the_best_so_far(
    tiny: Tiny, data: TrainingData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, parameters = trainer(tiny, data, tmp_path / "run")
    original: Callable[..., Any] = Student.gradients
    calls = {"n": 0}

    def broken(self: Student, parts: Any, objective: Objective, *, scale: float) -> Any:
        sums = original(self, parts, objective, scale=scale)
        calls["n"] += 1
        if calls["n"] == 2 * 7 + 1:  # two micro-batches a step: in the eighth
            next(iter(parameters.values())).grad.fill_(math.nan)
        return sums

    monkeypatch.setattr(Student, "gradients", broken)
    done = made.run()
    assert done.step == 7 and done.stopped is not None
    assert done.stopped.startswith("step 8: the gradient's norm is nan")
    assert done.best_step == 5 and done.after["perplexity"] < done.before["perplexity"]
    assert all(bool(value.isfinite().all()) for value in parameters.values())


def test_a_micro_batch_halves_when_memory_runs_out(
    tiny: Tiny, data: TrainingData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gradients of the try that failed are gone: the numbers are those of a smaller micro-batch."""
    short = replace(SETTINGS, tokens=2 * 4 * WINDOW, evaluations=1)
    small, expected = trainer(tiny, data, tmp_path / "small", short, micro_batch=1)
    small.run()
    made, found = trainer(tiny, data, tmp_path / "run", short, micro_batch=2)
    original: Callable[..., Any] = Student.gradients
    seen: list[int] = []

    def scarce(self: Student, parts: Any, objective: Objective, *, scale: float) -> Any:
        seen.append(len(parts[0].tokens_BS))
        if len(seen) == 2:  # the first step's second micro-batch
            raise RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate")
        return original(self, parts, objective, scale=scale)

    monkeypatch.setattr(Student, "gradients", scarce)
    made.run()
    assert seen == [2, 2, *[1] * 8]
    for name, value in expected.items():
        assert torch.equal(value, found[name]), name

    def none_left(self: Student, parts: Any, objective: Objective, *, scale: float) -> Any:
        raise RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate")

    monkeypatch.setattr(Student, "gradients", none_left)
    last, _ = trainer(tiny, data, tmp_path / "last", short)
    with pytest.raises(BudgetError, match="memory ran out with one window"):
        last.run()


def test_a_pruned_model_without_a_finite_loss_is_refused(
    data: TrainingData, tmp_path: Path
) -> None:
    tiny = tiny_llama(tmp_path / "broken", seed=1)
    made, _ = trainer(tiny, data, tmp_path / "run")
    with torch.no_grad():
        made._student.head._linear.weight.fill_(math.nan)
    with pytest.raises(CheckpointError, match="held-out loss of the pruned model"):
        made.run()
    assert not (tmp_path / "run").exists()


def test_a_state_is_resumed_with_its_own_options_alone(
    tiny: Tiny, data: TrainingData, tmp_path: Path
) -> None:
    made, _ = trainer(tiny, data, tmp_path / "run")
    made.run()
    other, _ = trainer(tiny, data, tmp_path / "run", replace(SETTINGS, seed=4))
    with pytest.raises(StateError, match=r"adapt\.safetensors: was made with other options"):
        other.run(resume=True)
    (tmp_path / "run" / STATE_FILE).write_bytes(b"no header")
    again, _ = trainer(tiny, data, tmp_path / "run")
    with pytest.raises(StateError, match="cannot be read"):
        again.run(resume=True)
    assert (tmp_path / "run" / BEST_FILE).exists()


def test_minutes_end_by_the_clock_and_its_schedule(
    tiny: Tiny, data: TrainingData, tmp_path: Path
) -> None:
    now = {"seconds": 100.0}

    class Ticks(Silent):
        def step(self, detail: str = "") -> None:
            now["seconds"] += 2.0

    timed = replace(SETTINGS, tokens=None, seconds=24.0)
    made, _ = trainer(
        tiny, data, tmp_path / "run", timed, progress=Ticks(), clock=lambda: now["seconds"]
    )
    done = made.run()
    assert done.step == 12 and done.seconds == pytest.approx(24.0)
    assert [row["step"] for row in done.history] == [0, 3, 6, 9, 12]


def test_the_clock_tells_no_number_of_steps_before_the_first() -> None:
    settings = AdaptSettings(seconds=100.0, evaluations=10)
    now = {"seconds": 0.0}
    schedule = Schedule(settings, step_tokens=8, pass_steps=2, clock=lambda: now["seconds"])
    schedule.start(0.0)
    assert schedule.steps_to_next(0) == 0
    now["seconds"] = 2.0
    assert schedule.steps_to_next(1) == 5


def test_the_rate_rises_then_falls_to_nothing() -> None:
    settings = AdaptSettings(learning_rate=1.0, warm_up=0.1)
    assert settings.rate(0.05) == pytest.approx(0.5)
    assert settings.rate(0.1) == pytest.approx(1.0)
    assert settings.rate(0.55) == pytest.approx(0.5)
    assert settings.rate(1.0) == pytest.approx(0.0)


def test_each_pass_takes_every_window_once_in_another_order() -> None:
    data = TrainingData(windows_NS=random_windows(10, 4), held_out=2)
    passes = [data.order(number, seed=0) for number in (0, 1, 0)]
    assert passes[0] == passes[2] != passes[1]
    assert sorted(passes[0]) == sorted(passes[1]) == list(range(8))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"loss": "ce"}, "--loss: 'ce'"),
        ({"method": "dora"}, "--method: 'dora'"),
        ({"rank": 0}, "--rank: 0"),
        ({"optimiser": "sgd"}, "--optimizer: 'sgd'"),
        ({"seconds": -1.0}, "--minutes"),
        ({"learning_rate": math.nan}, "--learning-rate: nan"),
        ({"tokens": 5, "seconds": 5.0}, "--tokens and --minutes"),
    ],
)
def test_settings_that_cannot_work_are_named(options: dict[str, Any], said: str) -> None:
    with pytest.raises(OptionError, match=said):
        AdaptSettings(**options)
    with pytest.raises(OptionError, match="no term"):
        AdaptSettings(lm_weight=0.0, kl_weight=0.0).objective(1.0)
