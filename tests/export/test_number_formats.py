"""Number formats: what a real llama.cpp computes from them, and what the file holds."""

from __future__ import annotations

import shutil
from pathlib import Path

import gguf
import pytest
import torch
from rewrite.models import keep_counts, open_parent
from safetensors.torch import load_file, save_file
from tiny_models import hugging_face_losses, save_pair_tokenizer, tiny_family
from transformers import AutoModelForCausalLM, AutoTokenizer

from export.llama_cpp import needs_llama_cpp
from export.test_llama_cpp import export
from export.test_llama_cpp_families import FAMILIES, FULL
from export.test_refused_models import refused
from frugal_bonsai.cli.rewrite import export_command
from frugal_bonsai.export import gguf_tensor
from frugal_bonsai.export.tensors import DTYPES
from frugal_bonsai.model.layout import PER_LAYER
from frugal_bonsai.rewrite.companions import write_companions
from frugal_bonsai.run.child import Child
from frugal_bonsai.run.export import export_gguf

# Mean distance of a token's loss from that of the dequantised weights: the KV cache is f16, and
# with quantised weights llama.cpp rounds the inputs of each product to 8 bits.
NATS = {"f32": 0.002, "f16": 0.003, "bf16": 0.015}
QUANTISED_NATS = 0.06
# These move a token's loss by many times that from the dense model's, so a format that llama.cpp
# reads in another way cannot pass.
COARSE = ("q5_1", "q5_0", "q4_1", "q4_0")


# Bits of a value, scales included.
BITS = {"f32": 32, "f16": 16, "bf16": 16, "q8_0": 8.5, "q5_1": 6, "q5_0": 5.5, "q4_1": 5}
BITS |= {"q4_0": 4.5}


def llama_cpp_losses(file: Path, windows_NS: torch.Tensor) -> torch.Tensor:
    with Child("frugal_bonsai.run.llama_cpp_worker", "test", 1) as child:
        child.ask({"file": str(file)})
        child.ask({"window": windows_NS.shape[1], "threads": 1})
        return torch.tensor(child.ask({"windows": windows_NS.tolist()})["losses"])


def dequantised_losses(file: Path, windows_NS: torch.Tensor) -> torch.Tensor:
    """Return the losses of the file's weights, as transformers dequantises and computes them."""
    model = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32
    )
    return hugging_face_losses(model, windows_NS)


def story_windows(folder: Path, shared: Path) -> torch.Tensor:
    text = (shared / "text" / "tinystories_test.txt").read_text(encoding="utf-8")[:1500]
    tokens = AutoTokenizer.from_pretrained(folder)(text, add_special_tokens=False).input_ids
    return torch.tensor(tokens[:256]).view(4, 64)


def with_row_3(source: Path, folder: Path, value: float) -> None:
    """Copy a model, with one value throughout row 3 of the second layer's up projection."""
    shutil.copytree(source, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_the_option_has_every_format() -> None:
    [option] = [option for option in export_command.params if option.name == "dtype"]
    assert set(option.type.choices) == set(DTYPES)  # type: ignore[attr-defined]


@needs_llama_cpp
@pytest.mark.parametrize("dtype", DTYPES)
def test_llama_cpp_computes_with_the_dequantised_weights(
    tmp_path: Path, stories3m: Path, shared: Path, dtype: str
) -> None:
    file, windows_NS = tmp_path / "m.gguf", story_windows(stories3m, shared)
    summary = export(stories3m, file, dtype)
    expected = {dtype: 43, "f32": 13} if dtype != "f32" else {"f32": 56}
    assert summary.formats == expected and summary.fallbacks == []
    [matrix] = [t for t in gguf.GGUFReader(file).tensors if t.name == "blk.0.ffn_up.weight"]
    assert 8 * matrix.n_bytes / matrix.n_elements == BITS[dtype]
    found = llama_cpp_losses(file, windows_NS)
    expected_NS = dequantised_losses(file, windows_NS)
    distance = float((found - expected_NS).abs().mean())
    assert distance < NATS.get(dtype, QUANTISED_NATS)
    dense = AutoModelForCausalLM.from_pretrained(stories3m, dtype=torch.float32)
    moved = float((expected_NS - hugging_face_losses(dense, windows_NS)).abs().mean())
    if dtype in COARSE:
        assert moved > 4 * distance
    else:
        assert moved < QUANTISED_NATS


@needs_llama_cpp
def test_rows_that_are_no_multiple_of_32(tmp_path: Path, stories260k: Path, shared: Path) -> None:
    """The FFN has 172 channels: every down projection is f16 beside q4_1, and llama.cpp runs it."""
    file, windows_NS = tmp_path / "m.gguf", story_windows(stories260k, shared)
    summary = export_gguf(str(stories260k), file, dtype="q4_1")
    assert summary["tensors"] == {"q4_1": 31, "f32": 11, "f16": 5}
    [note] = summary["notes"]
    assert note.startswith("f16 instead of q4_1, whose blocks need rows in multiples of 32: 5 ten")
    assert "(blk.0.ffn_down.weight, blk.1.ffn_down.weight, blk.2.ffn_down.weight and 2 mo" in note
    distance = llama_cpp_losses(file, windows_NS) - dequantised_losses(file, windows_NS)
    assert float(distance.abs().mean()) < QUANTISED_NATS


@needs_llama_cpp
def test_layers_of_different_widths(tmp_path: Path, stories3m: Path, shared: Path) -> None:
    counts = {"attention": [1] * 6, "ffn": [100, 300, 256, 128, 64, 384]}
    with open_parent(stories3m) as parent:
        parent.shrink(keep_counts(parent.spec, counts), tmp_path / "out", PER_LAYER)
    write_companions(stories3m, tmp_path / "out")
    windows_NS = story_windows(stories3m, shared)
    summary = export(tmp_path / "out", tmp_path / "m.gguf", "q8_0")
    assert summary.fallbacks == ["blk.0.ffn_down.weight", "blk.1.ffn_down.weight"]
    export(tmp_path / "out", tmp_path / "full.gguf", "f32")
    found = [llama_cpp_losses(tmp_path / name, windows_NS) for name in ("m.gguf", "full.gguf")]
    # Nothing makes up for what was removed: the losses are 8 nats, and rounding moves them more.
    assert float((found[0] - found[1]).abs().mean()) < 2 * QUANTISED_NATS


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_file_states_its_format(tmp_path: Path, stories260k: Path, dtype: str) -> None:
    export(stories260k, tmp_path / "m.gguf", dtype)
    fields = gguf.GGUFReader(tmp_path / "m.gguf").fields
    name = "ALL_F32" if dtype == "f32" else f"MOSTLY_{dtype.upper()}"
    assert fields["general.file_type"].contents() == gguf.LlamaFileType[name]
    assert fields["general.quantization_version"].contents() == 2


@pytest.mark.parametrize("dtype", ["f32", "q4_1"])
@pytest.mark.parametrize("family", ["mistral", "gpt2", "phi3", "pythia"])
def test_blocks_of_rows_give_the_same_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, dtype: str
) -> None:
    """Rows are read, reordered, transposed and split in blocks: three rows at a time, and all."""
    tiny_family(tmp_path / "dense", family, **FULL, **FAMILIES[family][0])
    save_pair_tokenizer(tmp_path / "dense")
    export(tmp_path / "dense", tmp_path / "whole.gguf", dtype)
    monkeypatch.setattr(gguf_tensor, "_BLOCK_VALUES", 3 * 24)
    export(tmp_path / "dense", tmp_path / "blocks.gguf", dtype)
    assert (tmp_path / "blocks.gguf").read_bytes() == (tmp_path / "whole.gguf").read_bytes()


@pytest.mark.parametrize(
    ("value", "dtype", "text"),
    [
        (1e6, "q4_0", "values beyond 524032, too large for q4_0; take --dtype bf16 or f32"),
        (-1e5, "q5_1", "values beyond 65504, too large for q5_1"),
        (1e7, "q8_0", "values beyond 8.31901e+06, too large for q8_0"),
    ],
)
def test_scales_that_f16_cannot_hold(
    tmp_path: Path, stories260k: Path, value: float, dtype: str, text: str
) -> None:
    """The scale would be infinity, and llama.cpp would compute NaN."""
    with_row_3(stories260k, tmp_path / "dense", value)
    refused(tmp_path / "dense", tmp_path, text.replace("+", r"\+"), dtype)


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_denormal_numbers_become_zero(tmp_path: Path, stories260k: Path) -> None:
    with_row_3(stories260k, tmp_path / "dense", 1e-44)
    for dtype in ("q8_0", *COARSE):
        export(tmp_path / "dense", tmp_path / f"{dtype}.gguf", dtype)
        [up] = [
            tensor
            for tensor in gguf.GGUFReader(tmp_path / f"{dtype}.gguf").tensors
            if tensor.name == "blk.1.ffn_up.weight"
        ]
        assert not gguf.dequantize(up.data, up.tensor_type)[3].any()
