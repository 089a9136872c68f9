"""Tensors of GGUF files are those that transformers' own loader dequantises, bit for bit."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from frugal_bonsai.checkpoint.gguf_reader import GgufCheckpoint
from frugal_bonsai.errors import CheckpointError, UnsupportedModelError
from frugal_bonsai.from_gguf.open import open_gguf
from frugal_bonsai.model.canonical_names import describe_checkpoint

from .files import WIDE, exported, rewritten

MATRICES = ("attn_q.", "attn_k.", "attn_v.", "attn_output.", "ffn_", "token_embd")


def kinds_of(*kinds: str) -> dict[str, str]:
    """Return number formats for the matrices, in turn."""
    return {part: kinds[at % len(kinds)] for at, part in enumerate(MATRICES)}


def in_transformers(path: Path, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=dtype)
    return dict(model.state_dict())


def assert_equal_to_transformers(path: Path) -> GgufCheckpoint:
    """Compare every tensor, and some of its rows, with transformers' in the same dtype."""
    read = open_gguf(path)
    spec = describe_checkpoint(read)
    dtype = getattr(torch, read.config["dtype"])
    for loaded in {torch.float32, dtype}:
        expected = in_transformers(path, loaded)
        assert expected.keys() - read.tensors.keys() <= {spec.family.head}
        for name, entry in read.tensors.items():
            found = read.read(name)
            assert found.dtype == dtype
            same = expected[name].T if entry.transposed else expected[name]
            assert torch.equal(found, same.to(dtype)), name
            if not entry.transposed:
                middle = len(found) // 2
                assert torch.equal(
                    read.read_rows(name, middle // 2, middle + 1), found[middle // 2 : middle + 1]
                )
    return read


# Number formats -> the dtype in which they are read.
FORMATS = {
    "f32": (("F32",), torch.float32),
    "f16": (("F16",), torch.float16),
    "bf16": (("BF16",), torch.bfloat16),
    "mostly f16": (("F16", "F32", "F32", "F32", "F16", "F16"), torch.float16),
    "q8_0": (("Q8_0",), torch.bfloat16),
    "q4 and q5": (("Q4_0", "Q4_1", "Q5_0", "Q5_1", "F16", "Q8_0"), torch.bfloat16),
    "k-quants": (("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"), torch.bfloat16),
    "i-quants": (("IQ4_NL", "IQ4_XS", "IQ3_S", "IQ2_XXS"), torch.bfloat16),
}


@pytest.mark.parametrize("formats", FORMATS)
def test_number_formats(tmp_path: Path, formats: str) -> None:
    kinds, dtype = FORMATS[formats]
    source = exported(tmp_path / "m", **WIDE)
    path = rewritten(source, tmp_path / "k.gguf", kinds=kinds_of(*kinds))
    with assert_equal_to_transformers(path) as read:
        assert read.config["dtype"] == str(dtype).removeprefix("torch.")
        assert {entry.gguf_kind for entry in read.tensors.values()} == {*kinds, "F32"}


# transformers' own reader leaves these values at the defaults of the config class.
WITH_DEFAULTS: dict[str, dict[str, Any]] = {
    "qwen2": {"use_sliding_window": False},
    "qwen3": {"head_dim": 128},
    "gemma2": {"query_pre_attn_scalar": 32},
    "gemma3": {"query_pre_attn_scalar": 32},
    "gpt2": {"max_position_embeddings": 1024, "n_inner": None},
    "stablelm": {"partial_rotary_factor": 0.25},
}


@pytest.mark.parametrize("family", WITH_DEFAULTS)
def test_families(tmp_path: Path, family: str) -> None:
    changes = ({} if family == "gpt2" else WIDE) | WITH_DEFAULTS[family]
    if family == "stablelm":  # its config class has no such key
        del changes["head_dim"]
    path = exported(tmp_path / "m", family, **changes)
    if family != "gpt2":
        path = rewritten(path, tmp_path / "q.gguf", kinds=kinds_of("Q8_0"))
    assert_equal_to_transformers(path).close()


@pytest.mark.parametrize(
    ("variable", "name"),
    [("SMOLLM2_GGUF", "smollm2-135m.gguf"), ("GEMMA3_GGUF", "gemma3-270m.gguf")],
)
def test_real_files(variable: str, name: str) -> None:
    """Real Q4_1 and Q4_K_M files: shared/tools/real_models.py --gguf makes them."""
    path = Path(os.environ.get(variable, name))
    if not path.is_file():
        pytest.skip(f"set {variable} to the path of {name} (real_models.py --gguf)")
    assert_equal_to_transformers(path).close()


def test_any_rows_from_several_threads(tmp_path: Path) -> None:
    source = exported(tmp_path / "m", **WIDE)
    with open_gguf(rewritten(source, tmp_path / "q.gguf", kinds=kinds_of("Q4_0"))) as read:
        name = "model.layers.1.self_attn.q_proj.weight"
        whole = read.read(name)
        spans = [(start, stop) for start in range(0, 256, 37) for stop in range(start, 257, 45)]
        with ThreadPoolExecutor(4) as pool:
            rows = list(pool.map(lambda span: read.read_rows(name, *span), spans))
        for (start, stop), found in zip(spans, rows, strict=True):
            assert torch.equal(found, whole[start:stop])
        places = torch.tensor([200, 3, 3, 255, 17])
        assert torch.equal(read.gather_rows(name, places), whole[places])
        read.announce(name, 5, 9)
        with pytest.raises(ValueError, match="no whole rows"):
            read._file(read.tensors[name].file).read_into(
                memoryview(bytearray(3)), read.tensors[name].start + 2, "x"
            )


def test_parts_of_a_split_file(tmp_path: Path) -> None:
    """The first part has the metadata; every part has tensors."""
    source = exported(tmp_path / "m")
    parts = [tmp_path / f"s-0000{number}-of-00002.gguf" for number in (1, 2)]
    with open_gguf(source) as whole:
        half = tuple(name for name in whole.header.tensors if name.startswith("blk.1."))
        rest = tuple(whole.header.tensors.keys() - set(half))
        rewritten(source, parts[0], drop=half)
        rewritten(source, parts[1], drop=rest)
        for part in parts:
            with open_gguf(part) as read:
                assert read.tensors.keys() == whole.tensors.keys()
                for name in whole.tensors:
                    assert torch.equal(read.read(name), whole.read(name))
    parts[1].unlink()
    with pytest.raises(CheckpointError, match=r"s-00002-of-00002\.gguf: cannot be read"):
        open_gguf(parts[0])


REFUSED = {
    "unknown": ({"general.architecture": "mamba"}, (), "architecture 'mamba' are not read"),
    "deci": ({"general.architecture": "deci"}, (), "name the pruned folder that it was exported"),
    "yarn": (
        {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0},
        (),
        r"llama.rope.scaling.type is 'yarn' with the factor 4.0",
    ),
    "part": ({"llama.rope.dimension_count": 2}, (), "2 of the 4 dimensions of a head are rotated"),
    "values": ({"llama.attention.value_length": 8}, (), "keys have 4 dimensions and values 8"),
    "layers": (
        {"llama.feed_forward_length": [20, 16]},
        (),
        r"llama.feed_forward_length differs from layer to layer \(\[20, 16\]",
    ),
    "no epsilon": ({}, ("llama.attention.layer_norm_rms_epsilon",), "has no llama.attention.layer"),
    "no count": ({}, ("llama.block_count",), "llama.block_count is None, expected a positive"),
    "no embedding": ({}, ("token_embd.weight",), "has no token embedding"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(tmp_path: Path, case: str) -> None:
    metadata, drop, text = REFUSED[case]
    source = exported(tmp_path / "m")
    if "general.architecture" in metadata:
        renamed = metadata["general.architecture"]
        metadata = {**metadata, f"{renamed}.block_count": 2}
    path = tmp_path / "changed.gguf"
    rewritten(source, path, metadata=metadata, drop=drop)
    with pytest.raises((UnsupportedModelError, CheckpointError), match=text) as refused:
        open_gguf(path)
    assert str(path) in str(refused.value)


def test_keys_that_are_not_read_are_named(tmp_path: Path) -> None:
    source = exported(tmp_path / "m", "qwen3")
    named = rewritten(source, tmp_path / "n.gguf", metadata={"qwen3.logit_scale": 2.0})
    with open_gguf(named) as read:
        assert read.notes == ("n.gguf: the key qwen3.logit_scale (2.0) is not read",)


def test_a_list_of_the_layers_with_a_sliding_window(tmp_path: Path) -> None:
    source = exported(tmp_path / "m", "gemma3", query_pre_attn_scalar=4)
    listed = {"gemma3.attention.sliding_window_pattern": [False, True], "gemma3.expert_count": 0}
    with open_gguf(rewritten(source, tmp_path / "n.gguf", metadata=listed)) as read:
        assert read.config["layer_types"] == ["full_attention", "sliding_attention"]
        assert read.notes == ()


def test_a_tensor_that_the_architecture_lacks(tmp_path: Path) -> None:
    source = exported(tmp_path / "m", "gemma3", query_pre_attn_scalar=4)
    with open_gguf(source) as read:
        metadata = read.header.metadata
    sizes = {f"llama.{key[7:]}": value for key, value in metadata.items() if key[:7] == "gemma3."}
    path = tmp_path / "l.gguf"
    rewritten(source, path, metadata={"general.architecture": "llama", **sizes})
    with pytest.raises(
        UnsupportedModelError, match=r"tensor 'blk.0.post_attention_norm.weight' has no"
    ):
        open_gguf(path)
