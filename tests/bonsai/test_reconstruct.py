"""Reconstruction: the refit against least squares on what two Hugging Face models compute."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from reconstructions import RIDGE, Outcome, reconstruct
from tiny_models import (
    BIASES,
    MHA,
    TIED,
    Tiny,
    hugging_face_losses,
    random_mask,
    random_windows,
    relative,
    sampled_windows,
    tiny_llama,
)

from frugal_bonsai.bonsai.importance.scores import ImportanceBuilder
from frugal_bonsai.model.units import KeepMask
from frugal_bonsai.stream.store import INT8, NATIVE, build_store

Refits = dict[str, torch.Tensor]


def _reconstruct(
    tiny: Tiny,
    mask: KeepMask,
    tokens: torch.Tensor,
    folder: Path,
    *,
    micro_batch: int = 8,
    **given: Any,
) -> Outcome:
    engine = tiny.engine(micro_batch=micro_batch)
    return reconstruct(tiny, mask, tokens, folder, engine=engine, damping=1e-4, **given)


def _losses(tiny: Tiny, mask: KeepMask, refits: Refits, tokens: torch.Tensor) -> torch.Tensor:
    """Of the masked parent with these refits."""
    engine = tiny.engine()
    readers = {name: (lambda value=value: value) for name, value in refits.items()}
    with engine.stream(tiny.source(mask=mask, refit=readers)) as stream:
        return engine.losses(stream, tokens, "masked parent")


@pytest.fixture(scope="module")
def sampled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tiny, torch.Tensor]:
    """A peaked model with biases and text of its own: any harm to it raises the loss."""
    tiny = tiny_llama(tmp_path_factory.mktemp("reconstruct") / "m", std=0.35, **BIASES)
    return tiny, sampled_windows(tiny.hugging_face(), 48, 16)


@pytest.mark.parametrize("changes", [{}, {**MHA, **TIED, **BIASES}], ids=["gqa", "mha-biases"])
def test_with_nothing_removed_nothing_changes(changes: dict[str, Any], tmp_path: Path) -> None:
    tiny, tokens = tiny_llama(tmp_path / "m", **changes), random_windows(20, 16)
    mask = KeepMask(tiny.spec.table)
    result = _reconstruct(tiny, mask, tokens, tmp_path)
    refits = result.refits
    dense = hugging_face_losses(tiny.hugging_face(), tokens)
    assert relative(result.dense_losses_NS, dense) < 1e-5
    assert relative(result.losses_NS, dense) < 1e-3
    assert len(result.residual) == 6 and max(map(abs, result.residual)) < 1e-5
    for name, weight in refits.items():
        assert relative(weight, tiny.checkpoint.read(name)) < 1e-3
    assert set(refits) == {g.output_weight for g in tiny.spec.table.groups}


def test_refit_brings_back_residual_and_loss(
    sampled: tuple[Tiny, torch.Tensor], tmp_path: Path
) -> None:
    tiny, tokens = sampled
    mask = random_mask(tiny.spec, off=0.3, seed=1)
    result = _reconstruct(tiny, mask, tokens, tmp_path)
    refits = result.refits
    dense = result.dense_losses_NS.mean()
    plain = _losses(tiny, mask, {}, tokens).mean()
    assert relative(result.dense_losses_NS, hugging_face_losses(tiny.hugging_face(), tokens)) < 1e-5
    assert dense < result.losses_NS.mean() < dense + 0.8 * (plain - dense)
    # What the sweep says about the refit model is what the masked parent with the refits gives.
    assert relative(result.losses_NS, _losses(tiny, mask, refits, tokens)) < 1e-4
    assert all(0 < left < 1 for left in result.residual)
    # A refit that is held to the old weights leaves more of the residual.
    held = _reconstruct(tiny, mask, tokens, tmp_path, ridge=1.0)
    assert sum(result.residual) < sum(held.residual)


@pytest.mark.parametrize("keep_inputs", [True, False])
def test_windows_held_out_are_judged_by_and_not_learnt_from(
    keep_inputs: bool, sampled: tuple[Tiny, torch.Tensor], tmp_path: Path
) -> None:
    tiny, tokens = sampled
    mask = random_mask(tiny.spec, off=0.3, seed=1)
    kept: dict[str, Any] = {"keep_inputs": keep_inputs}
    alone = _reconstruct(tiny, mask, tokens[:30], tmp_path, **kept)
    result = _reconstruct(tiny, mask, tokens, tmp_path, held_out=18, **kept)
    refits = result.refits
    for name, weight in refits.items():
        assert relative(weight, alone.refits[name]) < 1e-4, name
    assert result.losses_NS.shape == (48, 15)
    assert relative(result.losses_NS[:30], alone.losses_NS) < 1e-4
    assert relative(result.losses_NS[30:], _losses(tiny, mask, refits, tokens[30:])) < 1e-4
    assert result.losses_NS[30:].mean() > result.losses_NS[:30].mean()
    spent = result.forward_tokens - alone.forward_tokens
    assert spent == (1 if keep_inputs else 2) * 18 * 16


def _tapped(model: Any, tokens: torch.Tensor, layer: int) -> dict[str, torch.Tensor]:
    """Everything around layer's two projections in Hugging Face's model, ``[T, .]`` float64."""
    seen: dict[str, torch.Tensor] = {}
    block = model.model.layers[layer]

    def flat(name: str, value: torch.Tensor) -> None:
        seen[name] = value.flatten(0, 1).double()

    block.register_forward_pre_hook(lambda _, args: flat("before", args[0]))
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        block.get_submodule(name).register_forward_hook(
            lambda _, args, output, name=name: (
                (
                    flat(f"{name}.in", args[0]),
                    flat(f"{name}.out", output),
                )
                and None
            )
        )
    with torch.no_grad():
        model(tokens)
    seen["middle"] = seen["before"] + seen["self_attn.o_proj.out"]
    seen["after"] = seen["middle"] + seen["mlp.down_proj.out"]
    return seen


def _augmented(
    x: torch.Tensor, target: torch.Tensor, anchor: torch.Tensor, ridge: float
) -> torch.Tensor:
    root = (ridge * x.square().sum(0).mean()).sqrt()
    rows = torch.cat([x, root * torch.eye(x.shape[1], dtype=torch.float64)])
    return torch.linalg.lstsq(rows, torch.cat([target, root * anchor.T])).solution.T


@pytest.mark.parametrize("changes", [{}, BIASES], ids=["plain", "biases"])
@pytest.mark.parametrize("layer", [0, 1])
def test_refit_equals_least_squares_on_captured_activations(
    changes: dict[str, Any], layer: int, tmp_path: Path
) -> None:
    """Both projections of a layer in turn, on Hugging Face's dense model and its zeroed copy.

    Layer 1's oracle has layer 0's refits set in the zeroed copy, and its down_proj's has the new
    o_proj: T is the dense residual minus the pruned one as it then is.
    """
    tiny, tokens = tiny_llama(tmp_path / "m", **changes), random_windows(24, 16)
    mask = random_mask(tiny.spec)
    refits = _reconstruct(tiny, mask, tokens, tmp_path).refits
    dense = _tapped(tiny.hugging_face(), tokens, layer)
    pruned_model = tiny.hugging_face(mask)
    parameters = dict(pruned_model.named_parameters())
    for group in tiny.spec.table.groups:
        if group.layer > layer:
            break
        if group.layer == layer:
            pruned = _tapped(pruned_model, tokens, layer)
            attention = group.kind == "attention"
            before = pruned["before" if attention else "middle"]
            target = dense["middle" if attention else "after"] - before
            bias = parameters.get(f"{group.output_weight.removesuffix('weight')}bias")
            if bias is not None:
                target = target - bias.detach().double()
            columns = mask.columns(group)
            anchor = parameters[group.output_weight].detach().double()[:, columns]
            x = pruned[f"{group.output}.in"][:, columns]
            expected = _augmented(x, target, anchor, RIDGE)
            assert relative(refits[group.output_weight].double(), expected) < 2e-3, group.name
        with torch.no_grad():
            weight = parameters[group.output_weight]
            weight[:, mask.columns(group)] = refits[group.output_weight]


def test_residual_is_the_share_that_least_squares_leaves(tmp_path: Path) -> None:
    tiny, tokens = tiny_llama(tmp_path / "m", **BIASES), random_windows(24, 16)
    mask = random_mask(tiny.spec)
    result = _reconstruct(tiny, mask, tokens, tmp_path)
    refits = result.refits
    group = tiny.spec.table.groups[0]
    dense, pruned = (
        _tapped(model, tokens, 0) for model in (tiny.hugging_face(), tiny.hugging_face(mask))
    )
    bias = tiny.checkpoint.read("model.layers.0.self_attn.o_proj.bias").double()
    target = dense["middle"] - pruned["before"] - bias
    inputs = pruned["self_attn.o_proj.in"][:, mask.columns(group)]
    left = target - inputs @ refits[group.output_weight].double().T
    expected = left.square().sum() / target.square().sum()
    assert result.residual[0] == pytest.approx(float(expected), rel=1e-3)


@pytest.mark.parametrize("micro_batch", [1, 5, 100])
def test_held_and_recomputed_inputs_give_the_same_weights(micro_batch: int, tmp_path: Path) -> None:
    tiny, tokens = tiny_llama(tmp_path / "m", **BIASES), random_windows(11, 12)
    mask = random_mask(tiny.spec)
    kept, again = (
        _reconstruct(tiny, mask, tokens, tmp_path, keep_inputs=keep, micro_batch=micro_batch)
        for keep in (True, False)
    )
    assert all(torch.equal(kept.refits[name], again.refits[name]) for name in kept.refits)
    assert torch.equal(kept.losses_NS, again.losses_NS)
    assert torch.equal(kept.scores.score_N, again.scores.score_N)
    assert kept.residual == again.residual
    spent = (kept.forward_tokens, again.forward_tokens)
    assert spent == (2 * tokens.numel(), 3 * tokens.numel())


def test_micro_batches_do_not_matter(tmp_path: Path) -> None:
    tiny, tokens = tiny_llama(tmp_path / "m"), random_windows(12, 12)
    mask = random_mask(tiny.spec)
    whole = _reconstruct(tiny, mask, tokens, tmp_path, micro_batch=12).refits
    parts = _reconstruct(tiny, mask, tokens, tmp_path, micro_batch=5).refits
    assert max(relative(parts[name], whole[name]) for name in whole) < 2e-3


@pytest.mark.parametrize("name", ["exact", "fluctuation"])
def test_next_importance_is_that_of_the_refit_model(name: str, tmp_path: Path) -> None:
    """The scores equal those that a separate sweep over the refit model measures."""

    tiny, tokens = tiny_llama(tmp_path / "m", **BIASES), random_windows(20, 12)
    mask = random_mask(tiny.spec)
    result = _reconstruct(tiny, mask, tokens, tmp_path, score=name)
    engine = tiny.engine()
    store = build_store(
        tmp_path / "refit",
        tiny.checkpoint,
        tiny.spec,
        weights=NATIVE,
        mask=mask,
        refit={n: (lambda w=w: w) for n, w in result.refits.items()},
    )
    builder = ImportanceBuilder(name, mask, damping=1e-4, generator=torch.Generator())
    with engine.stream(store) as stream:
        engine.sweep.run(stream, tokens, tap=builder)
    measured = builder.build().score_N
    torch.testing.assert_close(result.scores.score_N, measured, rtol=1e-2, atol=1e-8)
    assert not result.scores.score_N[~mask.keep_N].any()
    assert (result.scores.score_N[mask.keep_N] > 0).all()


def test_int8_stores_are_reconstructed_too(
    sampled: tuple[Tiny, torch.Tensor], tmp_path: Path
) -> None:
    tiny, tokens = sampled
    mask = random_mask(tiny.spec, off=0.3, seed=1)
    native, int8 = (
        _reconstruct(tiny, mask, tokens, tmp_path / weights, weights=weights)
        for weights in (NATIVE, INT8)
    )
    assert float(int8.losses_NS.mean()) == pytest.approx(float(native.losses_NS.mean()), rel=0.05)
