"""What bad input gets: a text that names what is wrong, exit code 2, and nothing half-written."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from commands import fail, frugal_bonsai, started
from safetensors.torch import load_file, save_file

from frugal_bonsai.checkpoint.folder import SINGLE_FILE
from frugal_bonsai.checkpoint.locate import find_model
from frugal_bonsai.text.windows import load_tokenizer


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A copy of the embedded example."""
    folder = tmp_path / "model"
    shutil.copytree(find_model("example"), folder)
    return folder


def prune(model: str | Path, tmp_path: Path, *more: str | Path) -> str:
    """A prune that fails; nothing is left behind."""
    before = sorted(tmp_path.iterdir())
    text = fail(
        "prune",
        model,
        "--out",
        tmp_path / "out",
        "--calibration",
        "stdlib",
        "--windows",
        "4",
        "--window",
        "64",
        "--max-cpu-mem",
        "2GB",
        *more,
    )
    assert sorted(tmp_path.iterdir()) == before
    return text


def edit_config(model: Path, **values: object) -> None:
    path = model / "config.json"
    config = json.loads(path.read_text(encoding="utf-8")) | values
    path.write_text(json.dumps(config), encoding="utf-8")


def test_a_process_exits_with_2_and_one_text(tmp_path: Path) -> None:
    done = frugal_bonsai("prune", "example", "--out", tmp_path / "out", "--sparsity", "7")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("frugal-bonsai: --sparsity") and "Traceback" not in done.stderr


def test_truncated_weights(model: Path, tmp_path: Path) -> None:
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    assert "model.safetensors" in prune(model, tmp_path)


def test_a_missing_shard(model: Path, tmp_path: Path) -> None:
    (model / "model.safetensors").unlink()
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    assert "model-00001-of-00002.safetensors" in prune(model, tmp_path)


def test_an_index_that_points_outside(model: Path, tmp_path: Path) -> None:
    (model / "model.safetensors").rename(tmp_path / "model.safetensors")
    index = {"weight_map": {"model.norm.weight": "../model.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    assert "outside" in prune(model, tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "name",
    ["model.layers.2.mlp.up_proj.weight", "model.embed_tokens.weight", "model.norm.weight"],
)
def test_weights_that_are_not_finite(model: Path, tmp_path: Path, name: str, value: float) -> None:
    weights = load_file(model / "model.safetensors")
    weights[name].view(-1)[7] = value
    save_file(weights, model / "model.safetensors")
    text = prune(model, tmp_path)
    assert "model.safetensors" in text and name in text and "1 of" in text


def test_eval_of_weights_that_are_not_finite(model: Path) -> None:
    weights = load_file(model / "model.safetensors")
    weights["model.norm.weight"][3] = float("nan")
    save_file(weights, model / "model.safetensors")
    words = ("eval", model, "--text", model / "README.md", "--window", "64", "--windows", "2")
    text = fail(*words, "--json")
    assert "model.safetensors" in text and "model.norm.weight" in text


def test_a_tensor_of_a_wrong_shape(model: Path, tmp_path: Path) -> None:
    weights = load_file(model / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    weights[name] = weights[name][:, :-1].contiguous()
    save_file(weights, model / "model.safetensors")
    text = prune(model, tmp_path)
    assert name in text and "expected" in text


def test_a_tensor_of_a_dtype_that_is_no_weight(model: Path, tmp_path: Path) -> None:
    weights = load_file(model / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    weights[name] = torch.zeros(weights[name].shape, dtype=torch.int32)
    save_file(weights, model / "model.safetensors")
    text = prune(model, tmp_path)
    assert name in text and "I32" in text


def test_a_tensor_that_the_architecture_does_not_have(model: Path, tmp_path: Path) -> None:
    weights = load_file(model / "model.safetensors")
    name = "model.layers.3.self_attn.o_proj.bias"  # config.json says attention_bias false
    weights[name] = torch.ones(192, dtype=torch.bfloat16)
    save_file(weights, model / "model.safetensors")
    text = prune(model, tmp_path)
    assert name in text and "attention_bias" in text


def test_pickled_weights_alone_and_the_line_that_converts_them(model: Path, tmp_path: Path) -> None:
    torch.save(load_file(model / "model.safetensors"), model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()
    text = prune(model, tmp_path)
    assert "pytorch_model.bin" in text
    line = text.split('python -c "')[1].rsplit('"', 1)[0]
    exec(line, {})
    converted = tmp_path / "model-safetensors"
    # It has all that a prune needs: this one goes on to the next error.
    assert "uniform layout can hold" in prune(converted, tmp_path, "--sparsity", "0.999")
    load_tokenizer(converted)
    expected = torch.load(model / "pytorch_model.bin")
    assert all(torch.equal(w, expected[n]) for n, w in load_file(converted / SINGLE_FILE).items())


def test_an_architecture_without_a_table(model: Path, tmp_path: Path) -> None:
    edit_config(model, model_type="mamba")
    text = prune(model, tmp_path)
    assert "'mamba'" in text and "llama" in text and "adding-a-family" in text


def test_a_model_that_is_not_there(tmp_path: Path) -> None:
    assert "no-such-folder" in prune(tmp_path / "no-such-folder", tmp_path)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--sparsity", "0"), "--sparsity"),
        (("--sparsity", "1.5"), "--sparsity"),
        (("--sparsity", "0.999"), "uniform layout can hold"),
        (("--step", "0"), "--step"),
        (("--masks", "3"), "--masks"),
        (("--regression", "paper"), "--level unit"),
        (("--no-recovery", "--refine", "2"), "--refine"),
        (("--window", "4096"), "512"),
        (("--tile", "9999"), "--tile"),
        (("--max-cpu-mem", "lots"), "--max-cpu-mem"),
        (("--max-cpu-mem", "100MB"), "smallest --max-cpu-mem that works"),
        (("--device", "cuda"), "CUDA"),
        (("--device", "tpu"), "'tpu' is not cpu or one of cuda, xpu, mps"),
        (("--max-shard-size", "0"), "--max-shard-size"),
        (("--calibration", "no/such:thing"), "stdlib"),
    ],
)
def test_options_that_cannot_work(tmp_path: Path, words: tuple[str, ...], expected: str) -> None:
    if "cuda" in words and torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    assert expected in prune("example", tmp_path, *words)


def test_a_calibration_text_shorter_than_a_window(tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("Too short.", encoding="utf-8")
    text = prune("example", tmp_path, "--calibration", short)
    assert "short.txt" in text and "64" in text


def test_an_output_that_exists(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("keep me", encoding="utf-8")
    assert "exists" in prune("example", tmp_path)
    assert (out / "mine.txt").read_text(encoding="utf-8") == "keep me"


def test_an_output_under_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("keep me", encoding="utf-8")
    text = prune("example", tmp_path, "--out", tmp_path / "file" / "a" / "out")
    assert "file is a file, not a folder" in text
    assert (tmp_path / "file").read_text(encoding="utf-8") == "keep me"


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(
        "frugal_bonsai.checkpoint.commit.shutil.disk_usage", lambda _: usage._replace(free=1000)
    )
    text = prune("example", tmp_path)
    assert "this prune needs" in text and "are free. Free" in text and "(run folder" in text


@pytest.mark.skipif(os.name == "nt", reason="no limit on file sizes on Windows")
def test_a_disk_that_fills_up_while_the_store_is_written(tmp_path: Path) -> None:
    """A limit on file size stands in for a full disk: the write itself fails."""
    import resource
    import signal

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    done = started(
        "prune",
        "example",
        "--out",
        tmp_path / "out",
        "--windows",
        "4",
        "--window",
        "64",
        "--max-cpu-mem",
        "2GB",
        preexec_fn=limit,
    )
    assert done.returncode == 2, done.stderr
    assert "layer_00000.safetensors" in done.stderr and "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []
