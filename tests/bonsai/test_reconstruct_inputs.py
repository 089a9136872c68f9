"""The refit of the projections into a sublayer, against captured activations of two models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from reconstructions import RIDGE, Outcome, reconstruct
from tiny_models import BIASES, Tiny, sampled_windows, tiny_llama

from frugal_bonsai.bonsai.reconstruction.input_rows import input_projections
from frugal_bonsai.model.units import KeepMask


def run(
    tiny: Tiny,
    mask: KeepMask,
    tokens_NS: torch.Tensor,
    folder: Path,
    *,
    inputs: bool = True,
    **given: Any,
) -> Outcome:
    engine = tiny.engine(micro_batch=3)
    refitted = mask if inputs else None
    return reconstruct(tiny, mask, tokens_NS, folder, engine=engine, mask=refitted, **given)


@pytest.fixture
def tiny(tmp_path: Path) -> Tiny:
    return tiny_llama(tmp_path / "model", std=0.35, **BIASES)


@pytest.fixture
def tokens(tiny: Tiny) -> torch.Tensor:
    return sampled_windows(tiny.hugging_face(), 24, 32)


def cut(tiny: Tiny) -> KeepMask:
    """One KV group and some channels of every layer."""
    mask = KeepMask(tiny.spec.table)
    for group in tiny.spec.table.groups:
        gone = [1] if group.kind == "attention" else [0, 3, 7, 11]
        mask.of(group)[gone] = False
    return mask


def test_which_projections_read_one_input(tiny: Tiny) -> None:
    attention, ffn = tiny.spec.table.of_layer(1)
    assert input_projections(tiny.spec, attention) == [
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
    ]
    assert input_projections(tiny.spec, ffn) == ["mlp.gate_proj", "mlp.up_proj"]


def test_nothing_removed_changes_nothing(tiny: Tiny, tokens: torch.Tensor, tmp_path: Path) -> None:
    result = run(tiny, KeepMask(tiny.spec.table), tokens, tmp_path / "s")
    refits = result.refits
    for name, weight in refits.items():
        assert torch.allclose(weight, tiny.checkpoint.read(name), atol=2e-4), name
    assert torch.allclose(result.losses_NS, result.dense_losses_NS, atol=1e-3)


def test_first_attention_reads_what_the_dense_one_reads(
    tiny: Tiny, tokens: torch.Tensor, tmp_path: Path
) -> None:
    mask = cut(tiny)
    refits = run(tiny, mask, tokens, tmp_path / "s").refits
    attention = tiny.spec.table.of_layer(0)[0]
    for piece in attention.slices:
        if piece.axis == 0 and "weight" in piece.tensor:
            rows = mask.of(attention).repeat_interleave(piece.width)
            dense = tiny.checkpoint.read(piece.tensor)[rows]
            assert torch.allclose(refits[piece.tensor], dense, atol=1e-4), piece.tensor


def test_gate_and_up_solve_the_least_squares(
    tiny: Tiny, tokens: torch.Tensor, tmp_path: Path
) -> None:
    """Layer 0: dense inputs from Hugging Face, pruned ones from its attention with the refit."""
    mask = cut(tiny)
    refits = run(tiny, mask, tokens, tmp_path / "s").refits
    attention, ffn = tiny.spec.table.of_layer(0)
    seen: list[torch.Tensor] = []
    pruned = tiny.hugging_face()
    with torch.no_grad():
        columns = mask.columns(attention)
        o_proj = pruned.model.layers[0].self_attn.o_proj.weight
        o_proj[:, ~columns] = 0
        o_proj[:, columns] = refits[attention.output_weight]
    for model in (tiny.hugging_face(), pruned):
        gate = model.model.layers[0].mlp.gate_proj
        handle = gate.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, 1)))
        with torch.inference_mode():
            model(tokens)
        handle.remove()
    dense_TH, pruned_TH = (x.double() for x in seen)
    gram = pruned_TH.T @ pruned_TH
    ridge = RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
    keep = mask.of(ffn)
    for name in ("gate_proj", "up_proj"):
        full = f"model.layers.0.mlp.{name}.weight"
        weight = tiny.checkpoint.read(full).double()[keep]
        wanted = pruned_TH.T @ dense_TH @ weight.T + ridge @ weight.T
        expected = torch.linalg.solve(gram + ridge, wanted).T
        assert torch.allclose(refits[full].double(), expected, atol=1e-3), name
        assert not torch.allclose(expected, weight, atol=1e-2)


def test_both_memory_modes_agree(tiny: Tiny, tokens: torch.Tensor, tmp_path: Path) -> None:
    mask = cut(tiny)
    kept = run(tiny, mask, tokens, tmp_path / "a")
    again = run(tiny, mask, tokens, tmp_path / "b", keep_inputs=False)
    refits, others = kept.refits, again.refits
    assert refits.keys() == others.keys()
    for name in refits:
        assert torch.allclose(refits[name], others[name], atol=1e-5), name
    assert torch.allclose(kept.losses_NS, again.losses_NS, atol=1e-4)


def test_it_brings_the_model_nearer_to_the_dense_one(
    tiny: Tiny, tokens: torch.Tensor, tmp_path: Path
) -> None:
    mask = cut(tiny)
    outputs = run(tiny, mask, tokens, tmp_path / "a", inputs=False)
    everything = run(tiny, mask, tokens, tmp_path / "b")
    assert outputs.refits.keys() < everything.refits.keys()
    assert sum(everything.residual) < sum(outputs.residual)
    assert everything.losses_NS.mean() < outputs.losses_NS.mean()
