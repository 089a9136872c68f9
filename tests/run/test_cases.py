"""The shared list of inputs on which the tool once failed, whole: each case gives what is right.

The list is ``../shared/cases``. Its cases without a file have their own tests: a vocabulary below
64 (``test_adapt_top.py``), two runs at once (``test_run_folder.py``), public names
(``test_start.py``), early checks (``test_early.py``), hints that were tried
(``memory/test_plan.py``), a user's utility (``test_prune_command.py``, ``bonsai/test_evaluate.py``)
and the dense figures of later cards (``test_warnings.py``).
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import fail, forked_python, frugal_bonsai, succeed
from export.llama_cpp import complete_to_the_end, needs_llama_cpp
from tiny_models import hugging_face_losses
from transformers import AutoModelForCausalLM, AutoTokenizer

BUILD = """
import runpy, sys
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
WINDOWS = ("--window", "64", "--windows", "2")


@pytest.fixture(scope="module")
def cases(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every case of the list, built once."""
    script = shared / "cases" / "build.py"
    if not script.exists():
        pytest.skip("needs ../shared/cases")
    folder = tmp_path_factory.mktemp("cases")
    forked_python(BUILD, script, folder)
    return folder


@pytest.fixture(scope="module")
def text(shared: Path) -> Path:
    return shared / "text" / "tinystories_calibration.txt"


def quick(text: Path) -> tuple[str | Path, ...]:
    """Return the options of the list's short prune, with fewer windows."""
    words = ("--window", "64", "--windows", "12", "--method", "local-only", "--sparsity", "0.2")
    return (*words, "--max-cpu-mem", "4GB", "--calibration", text)


def pruned(case: Path, out: Path, text: Path, *more: str) -> dict[str, Any]:
    """Prune a case, load the output in plain transformers, and return the summary."""
    summary = succeed("prune", case, "--out", out, *quick(text), *more)
    loaded = AutoModelForCausalLM.from_pretrained(out)
    assert sum(weight.numel() for weight in loaded.parameters()) < 240_000
    return summary


def plain_perplexity(folder: Path, text: Path) -> float:
    """Return the perplexity of the first two windows in plain transformers."""
    characters = text.read_text(encoding="utf-8")[:2000]
    tokens = AutoTokenizer.from_pretrained(folder)(characters, add_special_tokens=False).input_ids
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    windows_NS = torch.tensor(tokens[:128]).view(2, 64)
    return math.exp(float(hugging_face_losses(plain, windows_NS).mean()))


def test_pad_token(cases: Path, text: Path, tmp_path: Path) -> None:
    case = cases / "pad_token"
    found = succeed("eval", case, "--text", text, *WINDOWS)["perplexity"]
    assert found == pytest.approx(plain_perplexity(case, text), rel=1e-5)
    pruned(case, tmp_path / "pruned", text)
    words = ("--teacher", case, "--data", text, "--window", "64", "--tokens", "4096")
    adapted = succeed("adapt", tmp_path / "pruned", *words, "--out", tmp_path / "adapted")
    assert adapted["after"]["perplexity"] < adapted["before"]["perplexity"]
    # The later card has the dense figures too.
    card = (tmp_path / "adapted" / "README.md").read_text(encoding="utf-8")
    assert "The dense ancestor is `pad_token`" in card and "| 1 | prune | pad_token |" in card


def test_added_token(cases: Path, text: Path) -> None:
    case = cases / "added_token"
    said = fail("eval", case, "--text", case / "text.txt", "--window", "64")
    for piece in ("'[PAD]'", "id 512", "vocabulary of 512", "text.txt"):
        assert piece in said
    succeed("eval", case, "--text", text, *WINDOWS)  # its id is never used


def test_left_over_quantization_config(cases: Path, text: Path, tmp_path: Path) -> None:
    summary = pruned(cases / "left_over_quantization_config", tmp_path / "out", text)
    assert any("quantization_config" in note for note in summary["notes"])
    assert "quantization_config" not in (tmp_path / "out" / "config.json").read_text()


REFUSED = {
    "really_quantized/gptq": ("quantised", "quantised weights (gptq)", "use the unquantised"),
    "really_quantized/bnb": ("quantised", "(bitsandbytes)", "or dequantise it once with"),
    "adapter_folder": ("adapter", "is an adapter (LORA) of ", "merge_and_unload"),
    "lfs_pointer": ("lfs-pointer", "was cloned without Git LFS", "lfs pull"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_model(cases: Path, text: Path, tmp_path: Path, name: str) -> None:
    kind, what, advice = REFUSED[name]
    described = succeed("inspect", cases / name)
    assert described["kind"] == kind and what in described["what"]
    for words in (("prune", "--out", tmp_path / "out", *quick(text)), ("eval", "--text", text)):
        said = fail(words[0], cases / name, *words[1:])
        assert what in said and advice in said
    assert list(tmp_path.iterdir()) == []


def test_multimodal(cases: Path, text: Path, tmp_path: Path) -> None:
    """The text model is taken. What is around it is not there, so it is written alone."""
    said = fail("prune", cases / "multimodal", "--out", tmp_path / "whole", *quick(text))
    assert "--text-only" in said and "--assume-family" not in said
    pruned(cases / "multimodal", tmp_path / "out", text, "--text-only")
    assert succeed("inspect", tmp_path / "out")["family"] == "llama"


@pytest.mark.parametrize(
    ("name", "key"),
    [("eps", "rms_norm_eps"), ("layer_types", "layer_types"), ("rope", "rope_scaling")],
)
def test_refused_configs(cases: Path, text: Path, tmp_path: Path, name: str, key: str) -> None:
    case = cases / "refused_configs" / name
    for words in (
        ("inspect", case),
        ("plan", case),
        ("eval", case, "--text", text),
        ("prune", case, "--out", tmp_path / "out", *quick(text)),
    ):
        said = fail(*words)
        assert f"{name}/config.json: transformers does not accept it" in said and key in said
        assert "tokenizer" not in said and "Traceback" not in said


def test_huge_loss(cases: Path, text: Path, tmp_path: Path) -> None:
    case = cases / "huge_loss"
    done = frugal_bonsai("eval", case, "--text", text, *WINDOWS)
    assert done.returncode == 0 and " inf" in done.stdout
    found = succeed("eval", case, "--text", text, *WINDOWS)
    assert found["perplexity"] is None and found["nll"] > 709
    summary = pruned(case, tmp_path / "out", text)
    assert summary["after"]["perplexity"] is None


def test_tied_head_only(cases: Path, text: Path, tmp_path: Path) -> None:
    case = cases / "tied_head_only"
    found = succeed("eval", case, "--text", text, *WINDOWS)["perplexity"]
    assert found == pytest.approx(plain_perplexity(case, text), rel=1e-5)
    pruned(case, tmp_path / "out", text)


@needs_llama_cpp
def test_gpt2_end_of_text(cases: Path, tmp_path: Path) -> None:
    """Its greedy text is commas alone, which end nothing."""
    file = tmp_path / "m.gguf"
    assert succeed("export", cases / "gpt2_end_of_text", "--out", file)["notes"] == []
    answer, properties = complete_to_the_end(file, "Once", 8)
    assert answer.text == "," * 8 and properties["eos_token"] == "<|endoftext|>"


@needs_llama_cpp
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("templates", {"chat_template": "JINJA"}),
        ("special_tokens_map", {"bos_token": "<s>", "eos_token": "</s>"}),
    ],
)
def test_tokenizer_files(cases: Path, tmp_path: Path, name: str, expected: dict[str, str]) -> None:
    file = tmp_path / "m.gguf"
    succeed("export", cases / name, "--out", file)
    _, properties = complete_to_the_end(file, "Once", 2)
    assert {key: properties[key] for key in expected} == expected
