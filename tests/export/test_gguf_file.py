"""What stands in a GGUF file, and what is refused before one is written; no llama.cpp is needed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rewrite.models import keep_counts, open_parent, tiny_parent
from safetensors.torch import load_file, save_file
from tiny_models import tiny_family

from export.test_llama_cpp import FAMILIES, FULL, export
from frugal_bonsai.errors import CheckpointError, UnsupportedModelError
from frugal_bonsai.export.architecture import describe_shape
from frugal_bonsai.export.gguf_file import write_gguf
from frugal_bonsai.export.tensors import interleave
from frugal_bonsai.model.family import ModelSpec
from frugal_bonsai.model.layout import PER_LAYER
from frugal_bonsai.model.units import KeepMask, UnitTable
from frugal_bonsai.rewrite.companions import write_companions


def ragged(spec: ModelSpec) -> ModelSpec:
    """The same model with a unit less of each kind in its second layer."""
    groups = [replace(g, count=g.count - g.layer) for g in spec.table.groups]
    return replace(spec, table=UnitTable(tuple(groups)))


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3"])
def test_which_families_are_a_deci_where_layers_differ(tmp_path: Path, family: str) -> None:
    spec = ragged(tiny_family(tmp_path / "m", family, **FULL, **FAMILIES[family]).spec)
    if family == "qwen3":
        with pytest.raises(UnsupportedModelError, match="does not compute this one; prune with"):
            describe_shape(spec)
        return
    shape = describe_shape(spec)
    assert (shape.architecture, shape.heads, shape.kv_heads) == ("deci", (6, 4), (3, 2))
    assert shape.interleaved


@pytest.mark.parametrize(
    ("family", "text"),
    [
        ("mistral", "sliding_window is 5; llama.cpp computes full attention"),
        ("qwen2", "sliding_window is 5; llama.cpp computes full attention"),
        ("qwen3-biases", r"k_proj\.bias, and llama.cpp's architecture 'qwen3' has no such bias"),
        ("gemma2", "model_type 'gemma2' is not exported to GGUF; exported are: llama, mistral"),
    ],
)
def test_families_that_are_refused(
    tmp_path: Path, stories260k: Path, family: str, text: str
) -> None:
    tiny_family(tmp_path / "dense", family, **FULL)
    write_companions(stories260k, tmp_path / "dense")
    refused(tmp_path / "dense", tmp_path, text)


def test_rows_in_llama_cpps_order() -> None:
    rows = torch.arange(2 * 6)  # two heads of six: halves 0 1 2 | 3 4 5
    assert interleave(rows, 2).tolist() == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]
    weight = rows[:, None] * torch.ones(1, 3)
    assert torch.equal(interleave(weight, 2)[:, 1], interleave(rows, 2).float())


def test_what_the_file_says(tmp_path: Path, stories3m: Path) -> None:
    from gguf import GGUFReader

    counts = {"attention": [2, 1, 2, 1, 1, 2], "ffn": [512, 300, 256, 128, 64, 384]}
    with open_parent(stories3m) as parent:
        parent.shrink(keep_counts(parent.spec, counts), tmp_path / "out", PER_LAYER)
    write_companions(stories3m, tmp_path / "out")
    export(tmp_path / "out", tmp_path / "m.gguf")
    reader = GGUFReader(tmp_path / "m.gguf")
    said = {key: field.contents() for key, field in reader.fields.items()}
    assert said["deci.attention.head_count"] == [6, 3, 6, 3, 3, 6]
    assert said["deci.attention.head_count_kv"] == counts["attention"]
    assert said["deci.feed_forward_length"] == counts["ffn"]
    assert said["deci.attention.key_length"] == said["deci.attention.value_length"] == 32
    assert said["tokenizer.ggml.model"] == "llama" and said["tokenizer.ggml.add_bos_token"]
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert "output.weight" not in tensors  # tied
    source = load_file(tmp_path / "out" / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    found = torch.from_numpy(tensors["blk.1.ffn_down.weight"].data.copy())
    assert torch.equal(found, source[name].float())


def refused(folder: Path, tmp_path: Path, text: str, dtype: str = "f32") -> None:
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises((UnsupportedModelError, CheckpointError), match=text):
        export(folder, tmp_path / "m.gguf", dtype)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; llama.cpp computes silu"),
        (
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "rope_type is 'dynamic'; .*default, linear and llama3",
        ),
    ],
)
def test_functions_that_llama_cpp_does_not_have(
    tmp_path: Path, stories260k: Path, changes: dict[str, Any], text: str
) -> None:
    with tiny_parent(tmp_path / "dense", vocab_size=512, **changes) as parent:
        write_companions(stories260k, parent.folder)
    refused(tmp_path / "dense", tmp_path, text)


def test_a_model_without_a_tokenizer(tmp_path: Path) -> None:
    with tiny_parent(tmp_path / "dense"):
        pass
    refused(tmp_path / "dense", tmp_path, r"has no tokenizer\.json, and a GGUF file needs")


@pytest.mark.parametrize(
    ("value", "dtype", "text"),
    [
        (float("nan"), "f32", "'model.layers.1.mlp.up_proj.weight' holds NaN or infinity"),
        (1e6, "f16", "values beyond 65504, too large for f16; take --dtype f32 or q8_0"),
    ],
)
def test_values_that_the_format_cannot_hold(
    tmp_path: Path, stories260k: Path, value: float, dtype: str, text: str
) -> None:
    with tiny_parent(tmp_path / "dense", vocab_size=512) as parent:
        write_companions(stories260k, parent.folder)
    file = tmp_path / "dense" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = value
    save_file(tensors, file, metadata={"format": "pt"})
    refused(tmp_path / "dense", tmp_path, text, dtype)


def test_one_tensor_is_read_at_a_time(
    tmp_path: Path, stories260k: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gguf import GGUFWriter

    events: list[str] = []
    with open_parent(stories260k) as parent:
        read, write = parent.checkpoint.read, GGUFWriter.write_tensor_data

        def spy(self: GGUFWriter, tensor: Any) -> None:
            events.append("write")
            write(self, tensor)

        monkeypatch.setattr(GGUFWriter, "write_tensor_data", spy)
        monkeypatch.setattr(
            parent.checkpoint, "read", lambda name: (events.append("read"), read(name))[1]
        )
        write_gguf(parent.checkpoint, parent.spec, tmp_path / "m.gguf", name="m", dtype="f16")
        count = len(parent.checkpoint.tensors)
    assert events == ["read", "write"] * count


def test_a_uniform_model_at_a_head_count_that_llamas_config_forbids(
    tmp_path: Path, stories260k: Path
) -> None:
    """transformers' class refuses five heads for 48; llama.cpp's does not."""
    changes = {"num_attention_heads": 6, "num_key_value_heads": 6, "vocab_size": 512}
    with tiny_parent(tmp_path / "dense", **changes) as parent:
        mask = KeepMask(parent.spec.table)
        for group in parent.spec.table.groups:
            mask.of(group)[5:] = False
        parent.shrink(mask, tmp_path / "out", PER_LAYER)
    write_companions(stories260k, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_attention_heads"] == 5
    assert export(tmp_path / "out", tmp_path / "m.gguf").architecture == "llama"
