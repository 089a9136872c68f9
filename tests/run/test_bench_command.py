"""``frugal-bonsai bench``: two models timed in turn, as a user runs it."""

from __future__ import annotations

import json
import shutil
import statistics
from pathlib import Path
from typing import Any

import pytest
from commands import fail, frugal_bonsai, succeed
from export.llama_cpp import needs_llama_cpp

from frugal_bonsai.checkpoint.locate import find_model
from frugal_bonsai.checkpoint.reader import Checkpoint
from frugal_bonsai.model.family import describe_model
from frugal_bonsai.model.units import KeepMask
from frugal_bonsai.rewrite.mask_file import write_mask

SHORT = ("--prompt-tokens", "16", "--new-tokens", "3", "--repeat", "3", "--threads", "1")


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example with every second unit gone."""
    folder = tmp_path_factory.mktemp("bench")
    with Checkpoint.open(find_model("example")) as checkpoint:
        spec = describe_model(checkpoint.config, checkpoint.shapes)
        mask = KeepMask(spec.table)
        for group in spec.table.groups:
            mask.of(group)[1::2] = False
        write_mask(folder / "mask.json", "example", spec, mask)
    succeed("shrink", "example", "--mask", folder / "mask.json", "--out", folder / "half")
    return folder / "half"


def check_figures(result: dict[str, Any]) -> None:
    for kind in ("prefill", "decode"):
        for model in ("dense", "pruned"):
            figure = result[model][f"{kind}_tokens_per_second"]
            assert len(figure["runs"]) == 3 and min(figure["runs"]) > 0
            assert figure["median"] == statistics.median(figure["runs"])
            assert figure["smallest"] == min(figure["runs"])
            assert figure["largest"] == max(figure["runs"])
        medians = [result[m][f"{kind}_tokens_per_second"]["median"] for m in ("dense", "pruned")]
        assert result["ratios"][kind] == pytest.approx(medians[1] / medians[0])
    peaks = [result[model]["host_peak_bytes"] for model in ("dense", "pruned")]
    assert result["ratios"]["host_peak_bytes"] == pytest.approx(peaks[1] / peaks[0])


def test_both_models_in_one_run_in_turn(half: Path) -> None:
    done = frugal_bonsai("bench", "example", half, *SHORT, "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    check_figures(result)
    assert (result["prompt_tokens"], result["new_tokens"], result["repeat"]) == (16, 3, 3)
    dense, pruned = result["dense"], result["pruned"]
    assert dense["model"] == "example" and pruned["model"] == str(half)
    assert (dense["dtype"], dense["device"], dense["threads"]) == ("float32", "cpu", 1)
    assert pruned["block_parameters"] < 0.6 * dense["block_parameters"]
    # Each in a process of its own: torch alone holds more than 100 MB.
    assert min(dense["host_peak_bytes"], pruned["host_peak_bytes"]) > 10**8
    assert dense["gpu_peak_bytes"] is None and result["ratios"]["gpu_peak_bytes"] is None
    said = [line for line in done.stderr.splitlines() if "prefill" in line]
    turns = ["dense" if "dense" in line else "pruned" for line in said]
    assert turns == ["dense", "pruned"] * 4
    assert ["not counted" in line for line in said] == [True, True] + [False] * 6


def test_the_table(half: Path) -> None:
    done = frugal_bonsai("bench", "example", half, *SHORT)
    assert done.returncode == 0, done.stderr
    words = " ".join(done.stdout.split())
    for expected in ("prefill of 16 tokens", "decode of 3 tokens", "peak host memory", "float32"):
        assert expected in words


@needs_llama_cpp
def test_llama_cpp(half: Path, tmp_path: Path) -> None:
    succeed("export", "example", "--out", tmp_path / "dense.gguf")
    (tmp_path / "folder").mkdir()
    succeed("export", half, "--out", tmp_path / "folder" / "half.gguf")
    words = (tmp_path / "dense.gguf", tmp_path / "folder", "--runtime", "llama.cpp", *SHORT)
    result = succeed("bench", *words)
    check_figures(result)
    assert result["pruned"]["weight_bytes"] == (tmp_path / "folder" / "half.gguf").stat().st_size


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("example", "example", "--repeat", "0"), "--repeat: 0 is not at least 1"),
        (("example", "example", "--prompt-tokens", "600"), "more than the 512 positions"),
        (("example", "m.gguf"), "MODEL 'm.gguf': there is no such file"),
        (("example", "nowhere", "--runtime", "llama.cpp"), "frugal-bonsai export example"),
        (("a", "b", "--runtime", "llama.cpp", "--dtype", "float32"), "for --runtime transformers"),
        (("nowhere", "example"), "MODEL 'nowhere' is neither"),
    ],
)
def test_options_that_cannot_work(words: tuple[str, ...], expected: str) -> None:
    assert expected in fail("bench", *words)


def test_a_model_that_does_not_load(tmp_path: Path) -> None:
    """Its process says why; the other one is ended too."""
    shutil.copytree(find_model("example"), tmp_path / "broken")
    config = tmp_path / "broken" / "config.json"
    values = json.loads(config.read_text(encoding="utf-8")) | {"pad_token_id": 100_000}
    config.write_text(json.dumps(values), encoding="utf-8")
    text = fail("bench", "example", tmp_path / "broken", *SHORT)
    assert "pruned model" in text and "ended with code 1" in text and "Padding_idx" in text


@needs_llama_cpp
def test_a_file_that_is_no_gguf(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF nonsense" * 10)
    file = tmp_path / "m.gguf"
    assert "is GGUF of version" in fail("bench", file, file, "--runtime", "llama.cpp")
