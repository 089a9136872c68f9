"""The student's losses and gradients against Hugging Face's model, peft and plain autograd."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import (
    BIASES,
    CPU,
    FAMILY_CONFIGS,
    MHA,
    TIED,
    Tiny,
    random_windows,
    relative,
    tiny_family,
    tiny_llama,
)

from frugal_bonsai.adaptation import stored_linear
from frugal_bonsai.adaptation.adapters import add_adapters, merged_weights, trained_projections
from frugal_bonsai.adaptation.objective import (
    TopTokens,
    divergence,
    divergence_bounds,
)
from frugal_bonsai.adaptation.settings import Objective
from frugal_bonsai.adaptation.state import BEST_FILE, TrainingFolder
from frugal_bonsai.adaptation.stored_linear import StoredLinear
from frugal_bonsai.adaptation.student import TRAINED, StreamedStudent, Student
from frugal_bonsai.adaptation.teacher_cache import Targets
from frugal_bonsai.adaptation.training_data import MicroBatch
from frugal_bonsai.int8 import quantise_rows
from frugal_bonsai.memory.training_items import INT8, NATIVE
from frugal_bonsai.model.families import FAMILIES
from frugal_bonsai.stream.scratch import Scratch
from frugal_bonsai.stream.stored_weight import RowsWeight, dense_weight


def student_of(tiny: Tiny, *, head_tokens: int = 5) -> Student:
    return Student(
        tiny.checkpoint, tiny.spec, device=CPU, dtype=torch.float32, head_tokens=head_tokens
    )


Parameters = dict[str, torch.nn.Parameter]


def dense(module: StoredLinear) -> torch.Tensor:
    return dense_weight(RowsWeight(module.weight.data, module.scales, Scratch(CPU)))


def lora(tiny: Tiny, *, form: str = NATIVE) -> tuple[Student, Parameters]:
    student = student_of(tiny)
    student.load(form)
    adapters = add_adapters(student, rank=3, alpha=6.0, seed=7)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():  # B is zero at first: nothing of A would show
        for name, value in adapters.items():
            if name.endswith("lora_B.weight"):
                value.normal_(std=0.1, generator=generator)
    return student, adapters


def random_targets(windows: int, window: int, layers: tuple[int, ...] = ()) -> Targets:
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(windows, window - 1, 53, generator=generator)
    values, ids = logits.log_softmax(-1).topk(6, dim=-1)
    rest = 1.0 - values.exp().sum(-1)
    hidden = {at: torch.randn(windows, window, 24, generator=generator) for at in layers}
    return Targets(TopTokens(values, ids, rest), hidden)


def merged_model(tiny: Tiny, trained: Parameters, folder: Path) -> torch.nn.Module:
    """Hugging Face's model with what the file of the best parameters makes of its weights."""
    model = tiny.hugging_face()
    best = TrainingFolder(folder, {})
    best.save_best(trained)
    with (
        torch.no_grad(),
        merged_weights(tiny.checkpoint, folder / BEST_FILE, scaling=2.0) as merged,
    ):
        assert len(merged) == 7 * 3
        for name, merge in merged.items():
            model.get_parameter(name).copy_(merge())
    return model


@pytest.mark.parametrize("changes", [{}, TIED, BIASES, MHA], ids=["gqa", "tied", "biases", "mha"])
def test_logits_are_those_of_the_merged_model(changes: dict[str, Any], tmp_path: Path) -> None:
    tiny, windows = tiny_llama(tmp_path / "m", **changes), random_windows(3, 9)
    student, adapters = lora(tiny)
    with torch.no_grad():
        expected = merged_model(tiny, adapters, tmp_path)(windows).logits
        untrained = tiny.hugging_face()(windows).logits
    assert relative(expected, untrained) > 1e-2
    assert relative(student.logits(windows), expected) < 1e-5


# `adapt` refuses experts, and attention that is known by its output alone.
KNOWN = sorted(
    name
    for name, (kind, _) in FAMILY_CONFIGS.items()
    if FAMILIES[kind].attention_parts and FAMILIES[kind].experts is None
)


@pytest.mark.parametrize("name", KNOWN)
def test_every_family_is_computed_as_hugging_face_does(name: str, tmp_path: Path) -> None:
    tiny, windows = tiny_family(tmp_path / "m", name), random_windows(2, 9)
    student, adapters = lora(tiny)
    with torch.no_grad():
        expected = tiny.hugging_face()(windows).logits
    for name_, value in adapters.items():
        if name_.endswith("lora_B.weight"):
            value.data.zero_()
    assert relative(student.logits(windows), expected) < 1e-5
    sums = student.gradients([MicroBatch(windows)], Objective(lm=1.0), scale=1.0)
    following = windows[:, 1:, None]
    nll = -expected[:, :-1].log_softmax(-1).gather(-1, following).sum()
    assert sums.lm == pytest.approx(float(nll), rel=1e-4)
    ups = [v for n, v in adapters.items() if n.endswith("lora_B.weight")]
    assert ups and all(float(value.grad.abs().max()) > 0 for value in ups)


@pytest.mark.parametrize("window", [9, 64])
@pytest.mark.parametrize("split", [1, 2, 4])
def test_gradients_are_those_of_plain_autograd(split: int, window: int, tmp_path: Path) -> None:
    """All three terms, whatever the micro-batches; in the oracle nothing is computed again."""
    tiny, windows = tiny_llama(tmp_path / "m"), random_windows(4, window)
    student, adapters = lora(tiny)
    targets = random_targets(4, window, layers=(0, 1))
    objective = Objective(lm=0.7, kl=1.3, hidden=0.4)
    tokens = windows[:, 1:].numel()
    parts = [
        MicroBatch(windows[at : at + split], _slice(targets, slice(at, at + split)))
        for at in range(0, 4, split)
    ]
    for part in parts:
        student.gradients([part], objective, scale=1 / tokens)
    found = {name: value.grad.clone() for name, value in adapters.items()}

    for value in adapters.values():
        value.grad = None
    hidden = student.skeleton.embed(windows).clone()
    loss = torch.zeros(())
    for layer, module in enumerate(student.layers):
        hidden = module(hidden, **student._arguments(window)[layer])
        if layer in targets.hidden:
            want = targets.hidden[layer]
            loss = loss + 0.4 * ((hidden - want).square().sum(-1) / want.square().sum(-1)).sum()
    logits = student.head.logits(hidden)[:, :-1]
    logq = logits.log_softmax(-1)
    loss = loss - 0.7 * logq.gather(-1, windows[:, 1:, None]).sum()
    p, q = targets.top.values_TK.exp(), logq.gather(-1, targets.top.ids_TK)
    rest, others = targets.top.rest_T, (1 - q.exp().sum(-1)).log()
    loss = loss + 1.3 * ((p * (p.log() - q)).sum() + (rest * (rest.log() - others)).sum())
    (loss / tokens).backward()
    for name, value in adapters.items():
        assert value.grad is not None and float(value.grad.abs().max()) > 0, name
        assert relative(found[name], value.grad) < 1e-4, name


def _slice(targets: Targets, here: slice) -> Targets:
    top = targets.top
    return Targets(
        TopTokens(top.values_TK[here], top.ids_TK[here], top.rest_T[here]),
        {layer: states[here] for layer, states in targets.hidden.items()},
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3"])
def test_streamed_gradients_are_the_resident_ones(
    name: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    """One layer's weights at a time, a step's micro-batches through each."""
    tiny, windows = tiny_family(tmp_path / "m", name, dtype=dtype), random_windows(4, 9)
    objective = Objective(lm=0.7, kl=1.3, hidden=0.4)
    targets = random_targets(4, 9, layers=(0, 1))
    ones = [slice(at, at + 1) for at in range(4)]
    parts = [MicroBatch(windows[one], _slice(targets, one)) for one in ones]
    resident, expected = lora(tiny)
    for part in parts:
        resident.gradients([part], objective, scale=1 / 32)

    class Watched(StreamedStudent):
        """Counts the layers whose weights are there."""

        most, visits = 0, 0

        def _call(self, layer: int, hidden_BSH: torch.Tensor) -> torch.Tensor:
            there = [
                at
                for at in range(self.spec.layers)
                if any(self._stored_linear(at, path).weight.numel() for path in self.projections)
            ]
            assert there == [layer]
            self.visits += 1
            return super()._call(layer, hidden_BSH)

    streamed = Watched(tiny.checkpoint, tiny.spec, device=CPU, dtype=torch.float32, head_tokens=5)
    streamed.load()
    found = add_adapters(streamed, rank=3, alpha=6.0, seed=7)
    with torch.no_grad():
        for key, value in expected.items():
            found[key].copy_(value)
    sums = streamed.gradients(parts, objective, scale=1 / 32)
    assert streamed.visits == 2 * tiny.spec.layers * len(parts)
    for key, value in expected.items():
        assert float(value.grad.abs().max()) > 0
        assert relative(found[key].grad, value.grad) < 1e-4, key
    measured = resident.measure(parts, objective)
    assert sums.hidden == pytest.approx(measured.hidden, rel=1e-4)
    assert sums.kl == pytest.approx(measured.kl, rel=1e-4)
    assert relative(streamed.logits(windows), resident.logits(windows)) < 1e-5


def test_full_training_has_the_gradients_of_hugging_face(tmp_path: Path) -> None:
    tiny, windows = tiny_llama(tmp_path / "m", **TIED), random_windows(3, 9)
    student = student_of(tiny)
    student.load(TRAINED)
    trained = trained_projections(student)
    sums = student.gradients([MicroBatch(windows)], Objective(lm=1.0), scale=1 / (3 * 8))
    model = tiny.hugging_face()
    loss = model(windows, labels=windows).loss
    loss.backward()
    assert sums.lm / sums.tokens == pytest.approx(float(loss.detach()), rel=1e-5)
    assert len(trained) == 3 * 7
    for name, value in trained.items():
        assert relative(value.grad, model.get_parameter(name).grad) < 1e-4, name


def test_an_int8_student_computes_with_the_quantised_weights(tmp_path: Path) -> None:
    tiny, windows = tiny_llama(tmp_path / "m"), random_windows(3, 9)
    student, adapters = lora(tiny, form=INT8)
    model = merged_model(tiny, adapters, tmp_path)
    with torch.no_grad():
        for layer in range(3):
            for path in student.projections:
                name = f"model.layers.{layer}.{path}.weight"
                base = student.layers[layer].get_submodule(path).base_layer
                assert base.weight.dtype == torch.int8
                change = dense(base) - tiny.checkpoint.read(name)
                assert 0 < relative(dense(base), tiny.checkpoint.read(name)) < 2e-2
                model.get_parameter(name).add_(change)
        head = student.head._linear
        assert head.weight.dtype == torch.int8
        assert 0 < relative(dense(head), tiny.checkpoint.read("lm_head.weight")) < 2e-2
        model.lm_head.weight.copy_(dense(head))
        expected = model(windows).logits
    assert relative(student.logits(windows), expected) < 1e-5
    student.gradients([MicroBatch(windows)], Objective(lm=1.0), scale=1.0)
    assert all(value.grad is not None for value in adapters.values())


@pytest.mark.parametrize("stored", [torch.int8, torch.bfloat16])
@pytest.mark.parametrize("block_bytes", [1, 5 * 24 * 4, 2**20])
def test_a_weight_that_is_dense_in_parts_multiplies_as_a_whole(
    stored: torch.dtype, block_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One row at a time, five, all of the 53."""
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(53, 24, generator=generator)
    module = StoredLinear(24, 53, dtype=torch.float32, bias_O=torch.randn(53, generator=generator))
    if stored == torch.int8:
        module.load(*quantise_rows(weight))
    else:
        module.load(weight.to(stored))
    monkeypatch.setattr(stored_linear, "DENSE_BLOCK_BYTES", block_bytes)
    inputs = torch.randn(3, 7, 24, generator=generator)
    results = []
    for product in (module, lambda x: torch.nn.functional.linear(x, dense(module), module.bias)):
        value = inputs.clone().requires_grad_()
        output = product(value)
        output.square().sum().backward()
        results.append((output.detach(), value.grad))
    assert relative(results[0][0], results[1][0]) < 1e-6
    assert relative(results[0][1], results[1][1]) < 1e-6


def test_a_student_in_bf16_computes_nearly_the_same(tmp_path: Path) -> None:
    """As on a GPU: products in bf16, adapters and their gradients in fp32."""
    tiny, windows = tiny_llama(tmp_path / "m", std=0.1), random_windows(3, 9)
    exact, expected = lora(tiny)
    rough = Student(tiny.checkpoint, tiny.spec, device=CPU, dtype=torch.bfloat16, head_tokens=5)
    rough.load(INT8)
    found = add_adapters(rough, rank=3, alpha=6.0, seed=7)
    with torch.no_grad():
        for key, value in expected.items():
            found[key].copy_(value)
    assert relative(rough.logits(windows), exact.logits(windows)) < 5e-2
    exact.gradients([MicroBatch(windows)], Objective(lm=1.0), scale=1.0)
    rough.gradients([MicroBatch(windows)], Objective(lm=1.0), scale=1.0)
    for key, value in expected.items():
        assert found[key].grad.dtype == torch.float32
        assert relative(found[key].grad, value.grad) < 0.1, key


def test_adapters_come_from_the_seed_and_leave_torchs_generator_alone(tmp_path: Path) -> None:
    tiny = tiny_llama(tmp_path / "m")
    torch.manual_seed(11)
    before = torch.random.get_rng_state()
    values = []
    for seed in (1, 1, 2):
        student = student_of(tiny)
        student.load(NATIVE)
        values.append(add_adapters(student, rank=2, alpha=2.0, seed=seed))
    assert torch.equal(torch.random.get_rng_state(), before)
    name = "model.layers.1.mlp.down_proj.lora_A.weight"
    assert torch.equal(values[0][name], values[1][name])
    assert not torch.equal(values[0][name], values[2][name])
    assert float(values[0][name.replace("lora_A", "lora_B")].abs().max()) == 0.0


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("kept", [1, 6, 53])
def test_the_divergence_lies_between_its_bounds(kept: int, temperature: float) -> None:
    generator = torch.Generator().manual_seed(0)
    teacher, student = (2 * torch.randn(40, 53, generator=generator) for _ in range(2))
    logp, logq = (x.div(temperature).log_softmax(-1) for x in (teacher, student))
    exact = float((logp.exp() * (logp - logq)).sum())
    values, ids = logp.topk(kept, dim=-1)
    top = TopTokens(values, ids, (1 - values.exp().sum(-1)).clamp(min=0))
    lower, upper = divergence_bounds(student, top, temperature)
    assert float(lower) <= exact * (1 + 1e-5) and exact <= float(upper) * (1 + 1e-5)
    assert float(divergence(student, top, temperature)) == pytest.approx(float(lower))
    if kept == 53:
        assert float(lower) == pytest.approx(exact, rel=1e-4)
        assert float(upper) == pytest.approx(exact, rel=1e-4)


def test_a_student_like_its_teacher_has_no_divergence() -> None:
    logits = torch.randn(10, 53, generator=torch.Generator().manual_seed(0))
    values, ids = logits.log_softmax(-1).topk(6, dim=-1)
    top = TopTokens(values, ids, 1 - values.exp().sum(-1))
    assert abs(float(divergence(logits, top))) < 1e-4
