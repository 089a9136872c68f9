"""Channel updates: against the Jacobian that autograd gives for Hugging Face's own FFN."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from reconstructions import RIDGE, Outcome, reconstruct
from tiny_models import BIASES, Tiny, relative, sampled_windows, tiny_llama
from transformers.models.llama.modeling_llama import LlamaMLP

from frugal_bonsai.bonsai.reconstruction import channels
from frugal_bonsai.bonsai.reconstruction.channel_block import DAMPING
from frugal_bonsai.bonsai.reconstruction.channels import ChannelUpdate
from frugal_bonsai.bonsai.reconstruction.layer_pass import (
    LayerPass,
    PairedSweep,
    ReconstructionOptions,
)
from frugal_bonsai.bonsai.reconstruction.least_squares import LeastSquares, conjugate_gradients
from frugal_bonsai.memory.work import UPDATE_ITERATIONS
from frugal_bonsai.model.units import KeepMask
from frugal_bonsai.stream.store import build_store

WINDOWS, WINDOW = 24, 20


def cut(tiny: Tiny) -> KeepMask:
    """A third of the channels of every layer."""
    mask = KeepMask(tiny.spec.table)
    for group in tiny.spec.table.groups:
        if group.kind == "ffn":
            mask.of(group)[[0, 3, 4, 7, 11, 15]] = False
    return mask


def run(
    tiny: Tiny,
    tokens_NS: torch.Tensor,
    folder: Path,
    *,
    steps: int,
    keep: bool = True,
    fast: bool = False,
) -> Outcome:
    engine, mask = tiny.engine(micro_batch=5), cut(tiny)
    return reconstruct(
        tiny,
        mask,
        tokens_NS,
        folder,
        engine=engine,
        mask=mask,
        channel_updates=steps,
        keep_inputs=keep,
        keep_updates=keep,
        fast=fast,
    )


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return tiny_llama(tmp_path_factory.mktemp("channels") / "m", std=0.35, **BIASES)


@pytest.fixture(scope="module")
def tokens(tiny: Tiny) -> torch.Tensor:
    return sampled_windows(tiny.hugging_face(), WINDOWS, WINDOW)


def test_conjugate_gradients_solve_a_system_in_as_many_steps_as_it_has_unknowns() -> None:
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(7, 7, generator=generator, dtype=torch.float64)
    matrix, right = root @ root.T + torch.eye(7), torch.randn(7, generator=generator).double()
    solution = conjugate_gradients(lambda x: matrix @ x, right, 7)
    assert torch.allclose(matrix @ solution, right, atol=1e-8)
    assert not torch.equal(conjugate_gradients(lambda x: matrix @ x, right, 2), solution)
    assert not conjugate_gradients(lambda x: matrix @ x, torch.zeros(7), 3).any()


def _problem(
    tiny: Tiny,
    tokens: torch.Tensor,
    folder: Path,
    *,
    keep: bool = True,
    iterations: int = UPDATE_ITERATIONS,
) -> tuple[ChannelUpdate, Any]:
    """Layer 0's FFN with a third of its channels gone and nothing refitted."""
    engine, mask = tiny.engine(micro_batch=7), cut(tiny)
    sweep = engine.sweep
    store = build_store(folder, tiny.checkpoint, tiny.spec, weights="native", mask=mask)
    with engine.dense_stream(tiny.source()) as dense, engine.dense_stream(store) as pruned:
        theirs, mine = (
            {name: value.clone() for name, value in next(iter(stream.visit()))[1].items()}
            for stream in (dense, pruned)
        )
    pair = PairedSweep(
        sweep=sweep,
        options=ReconstructionOptions(ridge=RIDGE),
        hidden_dense=sweep.embed(tokens),
        hidden_pruned=sweep.embed(tokens),
        fitted=len(tokens),
        held_out=0,
        scores=None,
        dense_inputs=sweep.hidden_states(tokens),
        dense_outputs=None,
        targets=sweep.hidden_states(tokens) if keep else None,
    )
    kwargs = engine.skeleton.layer_kwargs(tokens.shape[1])[0]
    work = LayerPass(pair, 0, theirs, mine, kwargs)
    attention, ffn = tiny.spec.table.of_layer(0)
    # Attention is whole: its output is the same in both models; the target is the dense FFN's.
    everything = slice(0, len(tokens))
    dense_NSH = pair.hidden_dense.read(everything)
    pair.hidden_dense.write(everything, dense_NSH + 0.1 * dense_NSH.sin())
    work.outputs[attention.output] = lambda items: torch.zeros_like(pair.hidden_pruned.read(items))
    return ChannelUpdate(work, ffn, keep=keep, iterations=iterations), work


def _oracle(
    problem: ChannelUpdate, work: Any, tiny: Tiny, *, curved: int = WINDOWS
) -> dict[str, torch.Tensor]:
    """(J^T J + mu S) d = J^T r by a dense solve, J from autograd.

    J^T J is that of the first windows, scaled to all of them.
    """
    module = LlamaMLP(tiny.hugging_face().config).double()
    names = ["gate_proj.weight", "up_proj.weight"]
    parameters = {
        name.removeprefix("mlp."): value.double()
        for name, value in work.pruned.items()
        if name.startswith("mlp.")
    }
    windows = slice(0, WINDOWS)
    x = problem.inputs.read(windows).flatten(0, 1).double()
    target = problem.target(windows)[0].flatten(0, 1).double()

    def output(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        moved = {**parameters, names[0]: gate, names[1]: up}
        result: torch.Tensor = torch.func.functional_call(module, moved, (x,))
        return result

    gate, up = (parameters[name] for name in names)
    parts = torch.autograd.functional.jacobian(output, (gate, up), vectorize=True)
    jacobian = torch.cat([part.flatten(0, 1).flatten(1) for part in parts], dim=1)
    residual = (target - output(gate, up)).flatten()
    gram = x.T @ x / len(x)
    gram.diagonal().add_(1e-4 * gram.diagonal().mean())
    # The slopes' squares, from the same Jacobian: d out_h / d gate_rc = down_hr slope_tr x_tc.
    before = [
        x @ parameters[f"{p}_proj.weight"].T + parameters[f"{p}_proj.bias"] for p in ("gate", "up")
    ]
    sigmoid = before[0].sigmoid()
    slopes = [sigmoid * (1 + before[0] * (1 - sigmoid)) * before[1], sigmoid * before[0]]
    down = parameters["down_proj.weight"].square().sum(0)
    weight = torch.cat([down * slope.square().mean(0) for slope in slopes])
    penalty = torch.block_diag(*(w * gram for w in weight)) * DAMPING * len(x)
    part = jacobian.unflatten(0, (WINDOWS, -1))[:curved].flatten(0, 1)
    curvature = part.T @ part * (WINDOWS / curved)
    change = torch.linalg.solve(curvature + penalty, jacobian.T @ residual)
    moved = change.view(2, *gate.shape)
    return {f"mlp.{name}": parameters[name] + moved[at] for at, name in enumerate(names)}


@pytest.mark.parametrize(("curved", "keep"), [(WINDOWS, True), (16, True), (16, False)])
def test_converged_update_is_the_damped_least_squares_solution(
    tiny: Tiny,
    tokens: torch.Tensor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    curved: int,
    keep: bool,
) -> None:
    monkeypatch.setattr(channels, "curvature_windows", lambda *_: curved)
    with torch.inference_mode():
        problem, work = _problem(tiny, tokens, tmp_path / "s", keep=keep, iterations=400)
        weights = problem.improve(work.pruned["mlp.down_proj.weight"], slice(0, WINDOWS))
    problem, work = _problem(tiny, tokens, tmp_path / "s")
    for name, expected in _oracle(problem, work, tiny, curved=curved).items():
        before = work.pruned[name].double()
        assert relative(weights[name].double() - before, expected - before) < 2e-2, name


def test_held_slopes_and_slopes_computed_again_give_the_same(
    tiny: Tiny, tokens: torch.Tensor, tmp_path: Path
) -> None:
    found = []
    with torch.inference_mode():
        for keep in (True, False):
            problem, work = _problem(tiny, tokens, tmp_path / str(keep), keep=keep)
            found.append(problem.improve(work.pruned["mlp.down_proj.weight"], slice(0, WINDOWS)))
    for name, weight in found[0].items():
        assert torch.equal(weight, found[1][name])


def test_passes_count_the_part_of_the_windows_that_the_curvature_is_measured_on(
    tiny: Tiny, tokens: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with torch.inference_mode():
        problem, _ = _problem(tiny, tokens, tmp_path / "s")
    assert problem.passes(slice(0, 12)) == 12 * (2 + 2 * UPDATE_ITERATIONS)
    monkeypatch.setattr(channels, "curvature_windows", lambda *_: 3)
    assert problem.passes(slice(0, 12)) == 12 * 2 + 3 * 2 * UPDATE_ITERATIONS


def test_fast_products_change_the_refits_by_rounding_alone(
    tiny: Tiny, tokens: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The passes round their factors where the CPU can; the solves never do."""
    seen: dict[str, set[str]] = {"passes": set(), "solves": set()}
    products = torch.backends.mkldnn.matmul
    added, solved = LeastSquares.add_targets, LeastSquares.solve_

    def add(self: Any, *args: Any) -> None:
        seen["passes"].add(products.fp32_precision)
        added(self, *args)

    def solve(self: Any, *args: Any, **kwargs: Any) -> float:
        seen["solves"].add(products.fp32_precision)
        return solved(self, *args, **kwargs)

    monkeypatch.setattr(LeastSquares, "add_targets", add)
    monkeypatch.setattr(LeastSquares, "solve_", solve)
    before = products.fp32_precision
    exact = run(tiny, tokens, tmp_path / "exact", steps=1)
    assert seen == {"passes": {before}, "solves": {before}}
    fast = run(tiny, tokens, tmp_path / "fast", steps=1, fast=True)
    assert seen == {"passes": {before, "bf16"}, "solves": {before}}
    assert products.fp32_precision == before
    assert relative(fast.losses_NS, exact.losses_NS) < 5e-2
    assert relative(fast.losses_NS.mean(), exact.losses_NS.mean()) < 5e-3


def test_updates_leave_less_of_the_residual_and_of_the_loss(
    tiny: Tiny, tokens: torch.Tensor, tmp_path: Path
) -> None:
    plain, once, twice = (
        run(tiny, tokens, tmp_path / str(steps), steps=steps) for steps in (0, 1, 2)
    )
    left = [sum(result.residual[1::2]) for result in (plain, once, twice)]
    assert max(left[1:]) < 0.8 * left[0]
    assert set(twice.refits) == set(plain.refits)
    dense = plain.dense_losses_NS.mean()
    assert twice.losses_NS.mean() - dense < 0.9 * (plain.losses_NS.mean() - dense)
    # What the sweep says is what the masked parent with these weights gives.
    engine = tiny.engine()
    readers = {name: (lambda value=value: value) for name, value in twice.refits.items()}
    with engine.stream(tiny.source(mask=cut(tiny), refit=readers)) as stream:
        losses = engine.losses(stream, tokens, "masked parent")
    assert relative(twice.losses_NS, losses) < 1e-4


def test_recomputed_inputs_give_the_same(tiny: Tiny, tokens: torch.Tensor, tmp_path: Path) -> None:
    kept, again = (
        run(tiny, tokens, tmp_path / str(keep), steps=1, keep=keep) for keep in (True, False)
    )
    for name, weight in kept.refits.items():
        assert torch.equal(weight, again.refits[name]), name
    assert torch.equal(kept.losses_NS, again.losses_NS)


def test_passes_through_the_sublayer_count_by_its_share(
    tiny: Tiny, tokens: torch.Tensor, tmp_path: Path
) -> None:
    plain, updated = (
        run(tiny, tokens, tmp_path / str(steps), steps=steps).forward_tokens for steps in (0, 1)
    )
    weights = 3 * 3 * 24 * 14  # layers, projections, hidden, channels kept
    share = weights / tiny.spec.block_parameters
    # One block: there once and for its residual, the iterations; a solve; the layer's end.
    passes = 2 + 2 * UPDATE_ITERATIONS + 1 + 1
    assert updated - plain == round(passes * share * tokens.numel())
