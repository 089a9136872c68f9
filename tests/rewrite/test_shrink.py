"""The rewriter's output (values, dtypes, shards, companions) and its refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from frugal_bonsai import load_pruned
from frugal_bonsai.checkpoint.reader import Checkpoint
from frugal_bonsai.errors import CheckpointError, OptionError, OutputError
from frugal_bonsai.model import tied_head
from frugal_bonsai.model.cut import cut_tensor
from frugal_bonsai.model.layout import LAYOUTS, PADDED, PER_LAYER, UNIFORM, layout_rules
from frugal_bonsai.model.units import KeepMask, UnitGroup, UnitSlice, UnitTable
from frugal_bonsai.rewrite import cut_stream
from frugal_bonsai.rewrite import shrink as shrink_module
from frugal_bonsai.rewrite.shrink import shrink
from rewrite.models import (
    MHA,
    expected_llama_tensor,
    keep_counts,
    logits_of,
    open_parent,
    random_mask,
    random_refit,
    save_llama,
    thunks,
    tiny_parent,
    tokens,
)

WEIGHTS = "model.safetensors"


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


def with_zeros_behind(tensor: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    larger = tensor.new_zeros(shape)
    larger[tuple(slice(extent) for extent in tensor.shape)] = tensor
    return larger


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_kept_values_keep_their_bits_and_dtype(
    tmp_path: Path, layout: str, dtype: torch.dtype
) -> None:
    with tiny_parent(tmp_path / "dense", dtype=dtype, attention_bias=True, mlp_bias=True) as parent:
        mask = random_mask(parent.spec, layout)
        refit = random_refit(parent.spec, mask)
        parent.shrink(mask, tmp_path / "out", layout, refit=thunks(refit))
        dense, pruned = load_file(parent.folder / WEIGHTS), load_file(tmp_path / "out" / WEIGHTS)
        assert pruned.keys() == dense.keys()
        for name, tensor in pruned.items():
            expected = expected_llama_tensor(name, dense[name], mask, query_rows=20, head_dim=10)
            expected = refit[name].to(dtype) if name in refit else expected
            if layout == PADDED:
                expected = with_zeros_behind(expected, tensor.shape)
            assert tensor.dtype == dtype
            assert torch.equal(bits(tensor), bits(expected)), name
    assert load_pruned(tmp_path / "out").dtype == dtype


def test_everything_kept_copies_the_model(tmp_path: Path) -> None:
    with tiny_parent(tmp_path / "dense") as parent:
        summary = parent.shrink(KeepMask(parent.spec.table), tmp_path / "out")
        dense, copy = load_file(parent.folder / WEIGHTS), load_file(tmp_path / "out" / WEIGHTS)
        assert all(torch.equal(dense[name], copy[name]) for name in dense | copy)
    assert summary.parameters_before == summary.parameters_after
    assert summary.bytes_before == summary.bytes_after
    assert summary.sparsity == 0
    assert summary.files == ("config.json", WEIGHTS)


def test_summary(tmp_path: Path) -> None:
    with tiny_parent(tmp_path / "dense") as parent:
        mask = keep_counts(parent.spec, {"attention": [1, 3, 2], "ffn": [5, 20, 9]})
        summary = parent.shrink(mask, tmp_path / "out")
    # One KV group: q and o 2*10 rows of 48, k and v 10 rows; one channel: 3 vectors of 48.
    removed = 3 * (2 * 20 + 2 * 10) * 48 + 26 * 3 * 48
    per_layer = 3 * (2 * 20 + 2 * 10) * 48 + 20 * 3 * 48 + 2 * 48
    assert summary.block_parameters_before == 3 * per_layer
    assert summary.block_parameters_after == 3 * per_layer - removed
    assert summary.parameters_before == 3 * per_layer + 2 * 61 * 48 + 48
    assert summary.parameters_after == summary.parameters_before - removed
    assert summary.bytes_before == 4 * summary.parameters_before
    assert summary.bytes_after == 4 * summary.parameters_after
    assert summary.sparsity == pytest.approx(removed / (3 * per_layer))
    assert summary.kept == {"attention": (1, 3, 2), "ffn": (5, 20, 9)}
    assert summary.files == ("config.json", WEIGHTS, "modeling_pruned.py")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_sharded_output_loads_equal(tmp_path: Path, layout: str) -> None:
    with tiny_parent(tmp_path / "dense") as parent:
        mask = random_mask(parent.spec, layout)
        parent.shrink(mask, tmp_path / "whole", layout)
        summary = parent.shrink(mask, tmp_path / "parts", layout, max_shard_bytes=20_000)
    shards = [name for name in summary.files if name.startswith("model-")]
    assert len(shards) > 3
    assert "model.safetensors.index.json" in summary.files
    whole, parts = load_pruned(tmp_path / "whole"), load_pruned(tmp_path / "parts")
    assert torch.equal(logits_of(whole, tokens()), logits_of(parts, tokens()))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("copied", [True, False], ids=["copied", "streamed"])
def test_files_do_not_depend_on_the_size_of_a_piece(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str, copied: bool
) -> None:
    """The files do not depend on whether the system copies whole tensors, either."""
    with tiny_parent(tmp_path / "dense", tie_word_embeddings=True) as parent:
        # The last units go, so that whole pieces at the end of a tensor are empty.
        mask = keep_counts(parent.spec, {"attention": [1, 1, 1], "ffn": [6, 6, 6]})
        parent.shrink(mask, tmp_path / "whole", layout)
        for piece_bytes in (1, 200, 1000):
            monkeypatch.setattr(cut_stream, "PIECE_BYTES", piece_bytes)
            if not copied:
                monkeypatch.setattr("frugal_bonsai.checkpoint.files._COPY", None)
            out = tmp_path / str(piece_bytes)
            parent.shrink(mask, out, layout)
            assert (out / WEIGHTS).read_bytes() == (tmp_path / "whole" / WEIGHTS).read_bytes()


def test_refits_are_asked_for_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    with tiny_parent(tmp_path / "dense") as parent:
        mask = random_mask(parent.spec, PER_LAYER)
        refit = random_refit(parent.spec, mask)
        write = shrink_module.ShardedWriter.write

        def spy(writer: Any, name: str, tensor: torch.Tensor) -> None:
            events.append(f"put {name}")
            write(writer, name, tensor)

        monkeypatch.setattr(shrink_module.ShardedWriter, "write", spy)
        parent.shrink(
            mask,
            tmp_path / "out",
            refit={
                name: (lambda name=name: (events.append(f"get {name}"), refit[name])[1])
                for name in refit
            },
        )
    assert events == [f"{verb} {name}" for name in refit for verb in ("get", "put")]


def test_tensors_that_no_table_names_pass_unchanged(tmp_path: Path) -> None:
    """Old Llama checkpoints hold rotary buffers in their layers; others hold extra tensors."""
    save_llama(tmp_path / "dense")
    tensors = load_file(tmp_path / "dense" / WEIGHTS)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.rand(5)
    tensors["extra.scale"] = torch.tensor(3, dtype=torch.int64)
    save_file(tensors, tmp_path / "dense" / WEIGHTS, metadata={"format": "pt"})
    with open_parent(tmp_path / "dense") as parent:
        parent.shrink(random_mask(parent.spec, UNIFORM), tmp_path / "out", UNIFORM)
    pruned = load_file(tmp_path / "out" / WEIGHTS)
    for name in ("model.layers.0.self_attn.rotary_emb.inv_freq", "extra.scale"):
        assert torch.equal(pruned[name], tensors[name])


def test_fused_tensors_keep_what_lies_between_and_behind_their_slices() -> None:
    """A tensor may have several slices, with rows between and after them."""
    group = UnitGroup(
        layer=0,
        kind="attention",
        count=3,
        unit_parameters=0,
        slices=(
            UnitSlice(tensor="qkv", axis=0, width=2),
            UnitSlice(tensor="qkv", axis=0, width=1, start=7),
            UnitSlice(tensor="qkv", axis=1, width=1, start=1),
        ),
        output="o",
        output_weight="o.weight",
        columns_per_unit=2,
    )
    mask = KeepMask(UnitTable((group,)), torch.tensor([True, False, True]))
    tensor = torch.arange(12 * 5).view(12, 5)
    found = cut_tensor(tensor, [(group, piece) for piece in group.slices], mask)
    rows = [0, 1, 4, 5, 6, 7, 9, 10, 11]
    assert torch.equal(found, tensor[rows][:, [0, 1, 3, 4]])


# -- tied heads ---------------------------------------------------------------------------------
def duplicate_head(folder: Path, change: float = 0.0) -> None:
    tensors = load_file(folder / WEIGHTS)
    assert "lm_head.weight" not in tensors
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + change
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def test_second_copy_of_a_tied_head_is_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_llama(tmp_path / "dense", tie_word_embeddings=True)
    duplicate_head(tmp_path / "dense")
    monkeypatch.setattr(tied_head, "COMPARE_BYTES", 1000)  # several steps, the last one short
    with open_parent(tmp_path / "dense") as parent:
        summary = parent.shrink(random_mask(parent.spec, UNIFORM), tmp_path / "out", UNIFORM)
    assert "lm_head.weight" not in load_file(tmp_path / "out" / WEIGHTS)
    assert summary.bytes_after == 4 * summary.parameters_after
    assert summary.bytes_before == 4 * (summary.parameters_before + 61 * 48)
    model = load_pruned(tmp_path / "out")
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_head_that_is_tied_in_name_only_is_refused(tmp_path: Path) -> None:
    save_llama(tmp_path / "dense", tie_word_embeddings=True)
    duplicate_head(tmp_path / "dense", change=1.0)
    with (
        open_parent(tmp_path / "dense") as parent,
        pytest.raises(CheckpointError, match=r"'lm_head.weight' differs.*tie_word_embeddings"),
    ):
        parent.shrink(random_mask(parent.spec, UNIFORM), tmp_path / "out", UNIFORM)


def test_tied_head_that_only_the_tensors_tell_of_is_said_in_the_config(tmp_path: Path) -> None:
    save_llama(tmp_path / "dense", tie_word_embeddings=True)
    config = json.loads((tmp_path / "dense" / "config.json").read_text())
    del config["tie_word_embeddings"]
    (tmp_path / "dense" / "config.json").write_text(json.dumps(config))
    with open_parent(tmp_path / "dense") as parent:
        parent.shrink(random_mask(parent.spec, UNIFORM), tmp_path / "out", UNIFORM)
    model = load_pruned(tmp_path / "out")
    assert model.lm_head.weight is model.model.embed_tokens.weight


# -- refusals -----------------------------------------------------------------------------------
def test_mask_must_keep_a_unit_of_each_kind(tmp_path: Path) -> None:
    with tiny_parent(tmp_path / "dense") as parent:
        for kind, layer in (("attention", 1), ("ffn", 2)):
            counts = {"attention": [2, 2, 2], "ffn": [9, 9, 9]}
            counts[kind][layer] = 0
            for layout in LAYOUTS:
                text = f"layer {layer} keeps none of its [0-9]+ {kind} units; keep at least one"
                with pytest.raises(OptionError, match=text):
                    parent.shrink(
                        keep_counts(parent.spec, counts), tmp_path / f"{kind}-{layout}", layout
                    )
                assert not any((tmp_path / f"{kind}-{layout}").iterdir())


def test_mask_of_another_model(tmp_path: Path) -> None:
    with (
        tiny_parent(tmp_path / "one") as one,
        tiny_parent(tmp_path / "two", **MHA) as two,
        pytest.raises(OptionError, match=r"belongs to another model \(72 units, this one has 69"),
    ):
        one.shrink(KeepMask(two.spec.table), tmp_path / "out")


def test_count_that_the_rules_forbid(tmp_path: Path) -> None:
    with tiny_parent(tmp_path / "dense") as parent:
        mask = keep_counts(parent.spec, {"attention": [3, 3, 3], "ffn": [8, 9, 8]})
        rules = layout_rules(parent.spec, PER_LAYER, tile=8)
        text = "layer 1 keeps 9 of 20 ffn units, which is not a legal number.*8 and 16"
        with pytest.raises(OptionError, match=text):
            shrink(parent.checkpoint, parent.spec, mask, tmp_path, rules=rules)


NAME = "model.layers.1.mlp.down_proj.weight"
LAYER_NORM = "model.layers.1.input_layernorm.weight"


@pytest.mark.parametrize(
    ("name", "tensor", "text"),
    [
        (LAYER_NORM, torch.zeros(48), f"'{LAYER_NORM}': is neither the final norm nor"),
        ("model.norm.weight", torch.zeros(47), r"norm.weight': found .*\[47\], expected .*\[48\]"),
        (NAME, torch.zeros(48, 20), rf"'{NAME}': found torch.float32 \[48, 20\].*\[48, 9\]"),
        (NAME, torch.zeros(48, 9, dtype=torch.int32), rf"'{NAME}': found torch.int32.*floating"),
        (NAME, torch.full((48, 9), float("nan")), rf"'{NAME}': 432 of 432 values are NaN"),
        (NAME, torch.full((48, 9), 1e6), rf"'{NAME}': 432 of 432.*infinite in torch.float16"),
    ],
)
def test_unfit_refit_tensor(tmp_path: Path, name: str, tensor: torch.Tensor, text: str) -> None:
    with tiny_parent(tmp_path / "dense", dtype=torch.float16) as parent:
        mask = random_mask(parent.spec, UNIFORM)
        with pytest.raises(OptionError, match=text):
            parent.shrink(mask, tmp_path / "out", UNIFORM, refit={name: lambda: tensor})
        assert not any((tmp_path / "out").glob("*.safetensors*"))


def test_a_new_final_norm_is_written(tmp_path: Path) -> None:
    with tiny_parent(tmp_path / "dense") as parent:
        mask, norm_H = random_mask(parent.spec, UNIFORM), torch.arange(48.0)
        parent.shrink(mask, tmp_path / "out", UNIFORM, refit={"model.norm.weight": lambda: norm_H})
        with Checkpoint.open(tmp_path / "out") as output:
            assert torch.equal(output.read("model.norm.weight"), norm_H)


def test_full_disk_is_noticed_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("shutil.disk_usage", lambda _path: full)
    with tiny_parent(tmp_path / "dense") as parent:
        with pytest.raises(OutputError, match=r"the pruned model needs .*free"):
            parent.shrink(KeepMask(parent.spec.table), tmp_path / "out")
        assert not any((tmp_path / "out").iterdir())
