"""``frugal-bonsai eval --runtime llama.cpp``: a GGUF file's perplexity in a real llama.cpp."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
from commands import fail, frugal_bonsai, succeed
from export.llama_cpp import needs_llama_cpp
from export.test_llama_cpp import export
from export.test_llama_cpp_families import FULL
from tiny_models import save_pair_tokenizer, tiny_family

from frugal_bonsai.errors import BenchError
from frugal_bonsai.evaluation.llama_cpp import GgufFile
from frugal_bonsai.run.child import Child

LLAMA_CPP = ("--runtime", "llama.cpp", "--threads", "1")


@needs_llama_cpp
def test_the_perplexity_is_that_of_the_streamed_model(
    tmp_path: Path, stories3m: Path, shared: Path
) -> None:
    text = ("--text", shared / "text" / "tinystories_test.txt", "--window", "64", "--windows", "70")
    (tmp_path / "folder").mkdir()
    file = tmp_path / "folder" / "m.gguf"
    export(stories3m, file, "f32")
    streamed = succeed("eval", stories3m, *text, "--threads", "1")
    found = succeed("eval", file, *text, *LLAMA_CPP)
    assert found["perplexity"] == pytest.approx(streamed["perplexity"], rel=3e-4)
    assert found["perplexity_error"] == pytest.approx(streamed["perplexity_error"], rel=3e-3)
    assert streamed["runtime"] == "streamed" and found["runtime"] == "llama.cpp"
    same = ("text", "window", "windows", "tokens", "gpu_peak_bytes")
    assert [found[key] for key in same] == [streamed[key] for key in same]
    assert found["file_bytes"] == file.stat().st_size and found["tensors"] == {"f32": 56}
    assert found["threads"] == 1 and found["tokens_per_second"] > 0
    # The process of llama.cpp does not hold torch, which takes 200 MB.
    assert file.stat().st_size < found["host_peak_bytes"] < 250e6
    done = frugal_bonsai("eval", tmp_path / "folder", *text[:4], "--windows", "2", *LLAMA_CPP)
    assert done.returncode == 0, done.stderr
    for expected in ("tensors", "56 f32", "of llama.cpp's process", "perplexity, window 64"):
        assert expected in done.stdout


@needs_llama_cpp
@pytest.mark.parametrize("family", ["gemma2", "granite"])
def test_heads_that_cap_or_scale_their_logits(tmp_path: Path, shared: Path, family: str) -> None:
    """The command itself compares a log-probability with llama.cpp's; here all are compared."""
    changes = {"final_logit_softcapping": 2.0} if family == "gemma2" else {"logits_scaling": 0.25}
    tiny_family(tmp_path / "dense", family, **FULL, **changes)
    save_pair_tokenizer(tmp_path / "dense")
    export(tmp_path / "dense", tmp_path / "m.gguf", "f32")
    text = ("--text", shared / "text" / "tinystories_test.txt", "--window", "64", "--windows", "4")
    streamed = succeed("eval", tmp_path / "dense", *text)
    found = succeed("eval", tmp_path / "m.gguf", *text, *LLAMA_CPP)
    assert found["nll"] == pytest.approx(streamed["nll"], abs=2e-3)


def test_losses_of_a_head_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = np.random.default_rng(0)
    head_VH = draw.normal(size=(37, 32)).astype(np.float32)
    hidden_TH, targets_T = draw.normal(size=(9, 32)).astype(np.float32), draw.integers(0, 37, 9)
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_context_length(64)
    head = gguf.quantize(head_VH, gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("token_embd.weight", head, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    for write in ("header", "kv_data", "tensors"):
        getattr(writer, f"write_{write}_to_file")()
    writer.close()
    logits_TV = hidden_TH @ gguf.dequantize(head, gguf.GGMLQuantizationType.Q8_0).T
    expected_T = np.log(np.exp(logits_TV).sum(1)) - logits_TV[np.arange(9), targets_T]
    file = GgufFile(tmp_path / "m.gguf")
    assert file.positions == 64 and file.formats == {"q8_0": 1}
    for values in (2**22, 5 * 32):
        monkeypatch.setattr("frugal_bonsai.evaluation.llama_cpp._BLOCK_VALUES", values)
        assert file.losses(hidden_TH, targets_T) == pytest.approx(expected_T, abs=1e-4)


@needs_llama_cpp
def test_a_head_that_llama_cpp_computes_otherwise(tmp_path: Path) -> None:
    """The file's cap is taken for a key of another architecture here: the figures differ."""
    changes = {"final_logit_softcapping": 1.0}
    tiny_family(tmp_path / "dense", "gemma2", **FULL, **changes)
    save_pair_tokenizer(tmp_path / "dense")
    export(tmp_path / "dense", tmp_path / "m.gguf", "f32")
    code = """
import sys
from frugal_bonsai.evaluation import llama_cpp
from frugal_bonsai.run import llama_cpp_worker
from frugal_bonsai.run.child import serve
original = llama_cpp._value
llama_cpp._value = lambda r, key: None if key.endswith("softcapping") else original(r, key)
serve(llama_cpp_worker._Losses())
"""
    (tmp_path / "uncapped.py").write_text(code, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{tmp_path}:{Path(__file__).parents[2]}")
        child = Child("uncapped", "m.gguf", 1)
    with child:
        child.ask({"file": str(tmp_path / "m.gguf")})
        child.ask({"window": 32, "threads": 1})
        with pytest.raises(BenchError, match="changes the logits in a way that is not known here"):
            child.ask({"windows": [list(range(300, 332))]})


@needs_llama_cpp
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--window", "600"), "--window: 600 tokens is outside 2..512 (the model's positions)"),
        (("--window", "500"), "tokens, shorter than one window of 500"),
        (("--weights", "int8"), "--runtime llama.cpp does not know --weights"),
        (
            ("--max-cpu-mem", "2GB", "--device", "cpu"),
            "--runtime llama.cpp does not know --max-cpu-mem, --device: llama.cpp holds the whole",
        ),
    ],
)
def test_options_that_cannot_work(tmp_path: Path, words: tuple[str, ...], expected: str) -> None:
    (tmp_path / "short.txt").write_text("def f(x):\n    return x\n" * 9, encoding="utf-8")
    succeed("export", "example", "--out", tmp_path / "m.gguf")
    text = ("--text", tmp_path / "short.txt")
    assert expected in fail("eval", tmp_path / "m.gguf", *text, *LLAMA_CPP, *words)


def test_what_is_no_gguf_file(tmp_path: Path) -> None:
    text = ("--text", "stdlib", *LLAMA_CPP)
    assert "write one: frugal-bonsai export example" in fail("eval", "example", *text)
    (tmp_path / "m.gguf").write_bytes(b"GGUF nonsense" * 10)
    assert "m.gguf: is no readable GGUF file" in fail("eval", tmp_path / "m.gguf", *text)


@needs_llama_cpp
def test_llama_cpp_says_why_it_cannot_load_a_file(tmp_path: Path, stories260k: Path) -> None:
    export(stories260k, tmp_path / "m.gguf", "f16")
    data = (tmp_path / "m.gguf").read_bytes()
    (tmp_path / "m.gguf").write_bytes(data.replace(b"output_norm.weight", b"output_nine.weight"))
    text = fail("eval", tmp_path / "m.gguf", "--text", "stdlib", "--windows", "1", *LLAMA_CPP)
    assert "m.gguf: llama.cpp cannot load it" in text and "output_norm" in text


def test_a_part_of_a_split_file_is_refused(tmp_path: Path) -> None:
    part = tmp_path / "m-00002-of-00002.gguf"
    part.write_bytes(b"GGUF")
    for model in (part, tmp_path):
        said = fail("eval", model, "--text", "stdlib", *LLAMA_CPP)
        assert "m-00002-of-00002.gguf: is a part of a split GGUF file" in said
        assert "llama-gguf-split --merge" in said and "m-00001-of-00002.gguf" in said
