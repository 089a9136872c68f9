"""Whatever is on a disk is recognised before it is read as a model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hostile.folders import gguf_bytes, index, shard
from safetensors.torch import save_file

from frugal_bonsai.checkpoint.locate import find_model
from frugal_bonsai.checkpoint.quantised import drop_left_over
from frugal_bonsai.checkpoint.recognise import recognise
from frugal_bonsai.checkpoint.recognised import MODEL, require_recognised
from frugal_bonsai.errors import CheckpointError, FrugalBonsaiError

INDEX = "model.safetensors.index.json"
ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 1040128\n"
ADAPTER = {"peft_type": "LORA", "base_model_name_or_path": "org/base"}

PROJECTOR = gguf_bytes("mmproj", "clip")

# kind -> name of the case -> contents of the folder, and pieces of the text.
FOLDERS: dict[str, dict[str, tuple[dict[str, Any], list[str]]]] = {
    "adapter": {
        "LoRA": (
            {"adapter_config.json": ADAPTER, "adapter_model.safetensors": shard("a")},
            ["an adapter (LORA) of org/base", "merge_and_unload", "base = "],
        ),
        "pickled": (
            {"adapter_config.json": ADAPTER, "adapter_model.bin": b"PK"},
            ["an adapter (LORA) of org/base"],
        ),
        "of prompts": (
            {"adapter_config.json": {**ADAPTER, "peft_type": "PREFIX_TUNING"}},
            ["(PREFIX_TUNING)", "prune its base model"],
        ),
        "with the base model's config": (
            {"adapter_config.json": ADAPTER, "config.json": LLAMA},
            ["an adapter (LORA) of org/base"],
        ),
        "inside the weights": (
            {"config.json": LLAMA, "model.safetensors": shard("m.q_proj.lora_A.default.weight")},
            ["LoRA weights", "merge"],
        ),
    },
    "lfs-pointer": {
        "weights": (
            {"config.json": LLAMA, "model.safetensors": POINTER},
            ["cloned without Git LFS", "model.safetensors", "lfs pull"],
        ),
        "a shard": (
            {
                "config.json": LLAMA,
                INDEX: index({"a": ONE, "b": TWO}),
                ONE: shard("a"),
                TWO: POINTER,
            },
            [TWO, "lfs pull"],
        ),
        "pickled weights": ({"config.json": LLAMA, "pytorch_model.bin": POINTER}, ["lfs pull"]),
        "tokenizer": (
            {"config.json": LLAMA, "model.safetensors": shard("a"), "tokenizer.json": POINTER},
            ["tokenizer.json", "lfs pull"],
        ),
    },
    "gguf": {
        "several": (
            {"a.gguf": gguf_bytes(), "b.gguf": gguf_bytes(), "p.gguf": PROJECTOR},
            ["holds 3 GGUF files (a.gguf, b.gguf)", "name one of them, such as ", "a.gguf"],
        ),
        "a projector": ({"mmproj.gguf": PROJECTOR}, ["(mmproj), not a language model"]),
        "an adapter": (
            {"lora.gguf": gguf_bytes("adapter")},
            ["is a LoRA adapter for llama.cpp", "name the GGUF file of a model"],
        ),
    },
    "pickled": {
        "bin": ({"config.json": LLAMA, "pytorch_model.bin": b"PK"}, ["pytorch_model.bin", "trust"]),
        "original llama": ({"consolidated.00.pth": b"PK", "params.json": {}}, ["consolidated"]),
    },
    "other-format": {
        "TensorFlow": ({"config.json": LLAMA, "tf_model.h5": b""}, ["TensorFlow", "safetensors"]),
        "ONNX": ({"model.onnx": b""}, ["ONNX"]),
    },
    "diffusion": {
        "pipeline": ({"model_index.json": {"_class_name": "X"}}, ["diffusion pipeline"]),
        "part": (
            {"config.json": {"_class_name": "UNet"}, "model.safetensors": shard("a")},
            ["a part of a diffusion pipeline"],
        ),
    },
    "encoder": {
        "bert": (
            {"config.json": {"model_type": "bert"}, "model.safetensors": shard("a")},
            ["an encoder (bert)", "not a causal language model"],
        ),
        "t5": (
            {
                "config.json": {"model_type": "t5", "is_encoder_decoder": True},
                "model.safetensors": shard("a"),
            },
            ["an encoder-decoder (t5)"],
        ),
        "classifier": (
            {
                "config.json": {**LLAMA, "architectures": ["LlamaForSequenceClassification"]},
                "model.safetensors": shard("score.weight"),
            },
            ["a llama for SequenceClassification"],
        ),
    },
    "multimodal": {
        "nested": (
            {
                "config.json": {"model_type": "gemma3", "text_config": {"model_type": "g_text"}},
                "model.safetensors": shard("a"),
            },
            ["gemma3", "text_config is nested", "'g_text'", "docs/families.md"],
        ),
        "flat": (
            {
                "config.json": {"model_type": "qwen2_vl", "vision_config": {"depth": 1}},
                "model.safetensors": shard("a"),
            },
            ["vision_config is nested"],
        ),
    },
    "incomplete": {
        "shard": (
            {"config.json": LLAMA, INDEX: index({"a": ONE, "b": TWO}), ONE: shard("a")},
            ["lacks 1 shard", TWO, "run the download again"],
        ),
        "no index": (
            {"config.json": LLAMA, ONE: shard("a")},
            [f"lacks {INDEX} and shards 2 of 2"],
        ),
        "of the hub": (
            {"config.json": LLAMA, ".cache/huggingface/download/x.ab12.incomplete": b"1"},
            ["download that has not finished", "x.ab12.incomplete"],
        ),
        "of a browser": (
            {"config.json": LLAMA, "model.safetensors.crdownload": b"1"},
            ["download that has not finished", "model.safetensors.crdownload"],
        ),
        "a part of a GGUF model": (
            {"m-00002-of-00003.gguf": b"GGUF"},
            ["lacks 2 of 3 parts (m-00001-of-00003.gguf, m-00003-of-00003.gguf)"],
        ),
        "no weights": (
            {"config.json": LLAMA, "tokenizer.json": {}},
            ["has no weights, expected model.safetensors or"],
        ),
    },
    "tokenizer": {
        "alone": (
            {"tokenizer.json": {}, "tokenizer_config.json": {}},
            ["a tokenizer without a model", "config.json"],
        )
    },
    "folder-of-models": {
        "of a training": (
            {"checkpoint-500/config.json": LLAMA, "trainer_state.json": {}},
            ["folders with models", "checkpoint-500"],
        ),
        "the hub's cache": (
            {"refs/main": "abc", "snapshots/abc/config.json": LLAMA},
            ["folders with models", "snapshots"],
        ),
    },
    "empty": {"": ({}, ["is empty"])},
    "unknown": {"text": ({"notes.txt": "x"}, ["no config.json and no weights", "notes.txt"])},
}
CASES = [
    pytest.param(kind, *case, id=f"{kind} {name}".strip())
    for kind, cases in FOLDERS.items()
    for name, case in cases.items()
]


def fill(folder: Path, contents: dict[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    for name, content in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, dict):
            content = json.dumps(content)
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


@pytest.mark.parametrize(("kind", "contents", "pieces"), CASES)
def test_a_folder_is_recognised(
    kind: str, contents: dict[str, Any], pieces: list[str], tmp_path: Path
) -> None:
    folder = fill(tmp_path / "m", contents)
    found = recognise(folder)
    assert found.kind == kind and found.advice
    json.dumps(found.to_json())
    with pytest.raises(FrugalBonsaiError) as refused:
        require_recognised(folder, found)
    for piece in [str(folder), *pieces]:
        assert piece in str(refused.value)


def gptq(weights: dict[str, torch.Tensor]) -> None:
    weights["l.q_proj.qweight"] = torch.zeros(8, 64, dtype=torch.int32)
    weights["l.q_proj.qzeros"] = torch.zeros(1, 8, dtype=torch.int32)
    weights["l.q_proj.g_idx"] = torch.zeros(64, dtype=torch.int32)


def awq(weights: dict[str, torch.Tensor]) -> None:
    weights["l.q_proj.qweight"] = torch.zeros(64, 8, dtype=torch.int32)
    weights["l.q_proj.qzeros"] = torch.zeros(1, 8, dtype=torch.int32)


def bitsandbytes(weights: dict[str, torch.Tensor]) -> None:
    weights["l.q_proj.weight"] = torch.zeros(2048, 1, dtype=torch.uint8)
    weights["l.q_proj.weight.absmax"] = torch.ones(8)


def bitsandbytes_int8(weights: dict[str, torch.Tensor]) -> None:
    weights["l.q_proj.weight"] = torch.zeros(64, 64, dtype=torch.int8)
    weights["l.q_proj.SCB"] = torch.ones(64)


def compressed(weights: dict[str, torch.Tensor]) -> None:
    weights["l.q_proj.weight_packed"] = torch.zeros(64, 8, dtype=torch.int32)


def fp8(weights: dict[str, torch.Tensor]) -> None:
    weights["l.q_proj.weight"] = torch.zeros(64, 64).to(torch.float8_e4m3fn)
    weights["l.q_proj.weight_scale_inv"] = torch.ones(1, 1)


def mxfp4(weights: dict[str, torch.Tensor]) -> None:
    weights["l.mlp.experts.gate_up_proj_blocks"] = torch.zeros(4, 8, 2, 16, dtype=torch.uint8)
    weights["l.mlp.experts.gate_up_proj_scales"] = torch.zeros(4, 8, 2, dtype=torch.uint8)


def mxfp8(weights: dict[str, torch.Tensor]) -> None:
    weights["l.q_proj.weight"] = torch.zeros(64, 64).to(torch.float8_e4m3fn)
    weights["l.q_proj.weight_scale"] = torch.zeros(64, 2, dtype=torch.uint8).view(
        torch.float8_e8m0fnu
    )


def torchao(weights: dict[str, torch.Tensor]) -> None:
    weights["l.q_proj.weight:_weight_qdata"] = torch.zeros(64, 64, dtype=torch.int8)


def mlx(weights: dict[str, torch.Tensor]) -> None:
    weights["l.q_proj.weight"] = torch.zeros(64, 8, dtype=torch.uint32)
    weights["l.q_proj.scales"] = torch.ones(64, 1)


Quantise = Callable[[dict[str, torch.Tensor]], None]


@pytest.mark.parametrize(
    ("quantise", "config", "method", "advice"),
    [
        (gptq, {}, "gptq", "unquantised"),
        (gptq, {"quantization_config": {"quant_method": "gptq"}}, "gptq", "unquantised"),
        (awq, {}, "awq", "unquantised"),
        (bitsandbytes, {}, "bitsandbytes", ".dequantize()"),
        (bitsandbytes_int8, {}, "bitsandbytes", ".dequantize()"),
        (compressed, {}, "compressed-tensors", "run_compressed=False"),
        (fp8, {}, "fp8", "FineGrainedFP8Config(dequantize=True)"),
        (fp8, {"quantization_config": {"quant_method": "fbgemm_fp8"}}, "fbgemm_fp8", "unquantised"),
        (mxfp4, {}, "mxfp4", "Mxfp4Config(dequantize=True)"),
        (mxfp8, {}, "fp8 or compressed-tensors", "unquantised"),
        (torchao, {"quantization_config": {"quant_method": "torchao"}}, "torchao", "unquantised"),
        (mlx, {"quantization": {"bits": 4}}, "mlx", "unquantised"),
    ],
)
def test_quantised_weights_are_recognised_by_config_and_by_names(
    quantise: Quantise, config: dict[str, Any], method: str, advice: str, tmp_path: Path
) -> None:
    weights = {"model.norm.weight": torch.ones(64)}
    quantise(weights)
    save_file(weights, fill(tmp_path / "m", {"config.json": LLAMA | config}) / "model.safetensors")
    found = recognise(tmp_path / "m")
    assert found.kind == "quantised" and found.details["method"] == method
    assert f"({method})" in found.what and advice in found.advice
    with pytest.raises(FrugalBonsaiError, match="cannot be pruned"):
        require_recognised(tmp_path / "m", found)


@pytest.mark.parametrize("key", ["quantization_config", "quantization", "compression_config"])
def test_a_left_over_description_of_quantisation_makes_no_quantised_model(
    key: str, tmp_path: Path
) -> None:
    config = LLAMA | {key: {"quant_method": "gptq", "bits": 4}}
    folder = fill(tmp_path / "m", {"config.json": config, "model.safetensors": shard("a")})
    assert recognise(folder).kind == MODEL
    assert drop_left_over(config) == LLAMA


@pytest.mark.parametrize(
    ("name", "content", "kind", "piece"),
    [
        ("model.gguf", PROJECTOR, "gguf", "GGUF file of its language model"),
        ("weights", gguf_bytes("imatrix"), "gguf", "GGUF file of a model"),
        ("model.safetensors", POINTER.encode(), "lfs-pointer", "lfs pull"),
        ("pytorch_model.bin", b"PK\3\4", "pickled", "folder that holds it"),
        ("model.safetensors.incomplete", b"", "incomplete", "not finished"),
        ("config.json", b"{}", "unknown", "is a file; name the folder that holds config.json"),
    ],
)
def test_a_file_is_recognised(
    name: str, content: bytes, kind: str, piece: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    found = recognise(tmp_path / name)
    assert found.kind == kind and piece in f"{found.what}; {found.advice}"


@pytest.mark.parametrize(
    "more",
    [
        {},
        {".cache/huggingface/download/x.incomplete": b""},  # of an earlier attempt
        {"consolidated.safetensors": POINTER, "logo.png": POINTER},  # not read
        {"pytorch_model.bin": b"PK", "model.gguf": b"GGUF", "adapter_config.json": ADAPTER},
    ],
)
def test_a_whole_model_is_one_whatever_lies_beside_it(more: dict[str, Any], tmp_path: Path) -> None:
    whole = {"config.json": LLAMA, "model.safetensors": shard("a")}
    found = recognise(fill(tmp_path / "m", whole | more))
    assert found.kind == MODEL
    require_recognised(tmp_path, found)


def test_a_damaged_file_is_named_by_its_reader(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json: is not JSON"):
        recognise(fill(tmp_path / "m", {"config.json": "{", "model.safetensors": shard("a")}))


def test_a_gguf_file_is_a_model_and_so_is_its_folder(tmp_path: Path) -> None:
    folder = fill(tmp_path / "m", {"m.gguf": gguf_bytes(), "mmproj.gguf": PROJECTOR, "a.txt": ""})
    for path in (folder, folder / "m.gguf"):
        found = recognise(path)
        assert found.kind == MODEL and found.details == {"gguf": "m.gguf"}
    assert find_model(str(folder)) == folder / "m.gguf" == find_model(str(folder / "m.gguf"))
    fill(folder, {"config.json": LLAMA, "model.safetensors": shard("a")})
    assert recognise(folder).details == {} and find_model(str(folder)) == folder


def test_a_gguf_file_that_is_not_there() -> None:
    with pytest.raises(CheckpointError, match=r"'models/m\.gguf': there is no such file"):
        find_model("models/m.gguf")
