"""``frugal-bonsai prune`` end to end on the embedded example, as a user runs it."""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from commands import ENVIRONMENT, fail, frugal_bonsai, succeed
from fresh_process import FreshProcesses

from frugal_bonsai.errors import OutputError
from frugal_bonsai.run.runs import list_runs

# Small, but the whole method: rounds, masks, regression, recovery, verify.
QUICK = ("--windows", "12", "--window", "128", "--masks", "4", "--mask-windows", "4")

PERPLEXITY = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, text, remote = sys.argv[1], sys.argv[2], sys.argv[3] == "1"
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=remote)
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=remote)
ids = tokenizer(open(text, encoding="utf-8").read(), add_special_tokens=False)["input_ids"]
windows = torch.tensor(ids[: len(ids) // 128 * 128]).view(-1, 128)
total = 0.0
with torch.inference_mode():
    for window in windows:
        logits = model(window[None]).logits[0, :-1]
        total += float(torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum"))
    made = model.generate(windows[:1, :8], max_new_tokens=8, do_sample=False)
nll = total / (127 * len(windows))
print(json.dumps({"nll": nll, "generated": made.shape[1],
                  "parameters": sum(p.numel() for p in model.parameters())}))
"""

TARGET = ("--sparsity", "0.3", "--step", "0.15")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from frugal_bonsai.text.stdlib import held_out_text

    path = tmp_path_factory.mktemp("text") / "held_out.txt"
    path.write_text(held_out_text()[:12_000], encoding="utf-8")
    return path


@pytest.fixture(scope="module", params=["uniform", "per-layer"])
def pruned(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, text: Path
) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("pruned") / "model"
    summary = succeed(
        "prune",
        "example",
        "--out",
        out,
        *TARGET,
        "--layout",
        request.param,
        "--eval-text",
        text,
        "--max-cpu-mem",
        "2GB",
        *QUICK,
    )
    return out, summary


def test_a_plan_foresees_at_least_the_tokens_that_are_spent(
    pruned: tuple[Path, dict[str, Any]],
) -> None:
    _, summary = pruned
    planned = succeed("plan", "example", *TARGET, "--layout", summary["layout"], *QUICK)
    spent = summary["forward_tokens"]
    assert spent <= planned["forward_tokens"] < 2 * spent


def test_the_target_is_reached_and_reported(pruned: tuple[Path, dict[str, Any]]) -> None:
    _, summary = pruned
    assert abs(summary["sparsity"] - 0.3) < 0.01
    before, after = summary["before"], summary["after"]
    removed = 1 - after["block_parameters"] / before["block_parameters"]
    assert removed == pytest.approx(summary["sparsity"])
    assert after["weight_bytes"] < before["weight_bytes"]
    assert after["perplexity"] > before["perplexity"] > 1
    assert summary["forward_tokens"] == summary["rounds"][-1]["forward_tokens"] > 0
    assert summary["verify"]["max_relative_difference"] <= 1e-4


def test_plain_transformers_loads_it_and_agrees(
    pruned: tuple[Path, dict[str, Any]], text: Path, fresh: FreshProcesses, tmp_path: Path
) -> None:
    out, summary = pruned
    remote = "0" if summary["layout"] == "uniform" else "1"
    said = fresh.run(PERPLEXITY, out, text, remote, folder=tmp_path)
    found = json.loads(said.splitlines()[-1])
    assert found["generated"] == 16
    assert found["parameters"] == summary["after"]["parameters"]
    reported = summary["after"]["eval_perplexity"]
    assert math.exp(found["nll"]) == pytest.approx(reported, rel=0.005)


def test_eval_agrees_with_what_prune_reported(
    pruned: tuple[Path, dict[str, Any]], text: Path
) -> None:
    out, summary = pruned
    result = succeed("eval", out, "--text", text, "--window", "128", "--max-cpu-mem", "2GB")
    assert result["perplexity"] == pytest.approx(summary["after"]["eval_perplexity"], rel=1e-4)
    assert result["window"] == 128


def test_the_output_has_its_papers_and_nothing_else_is_left(
    pruned: tuple[Path, dict[str, Any]],
) -> None:
    out, summary = pruned
    names = {path.name for path in out.iterdir()}
    assert {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "README.md",
        "pruning_mask.json",
        "pruning_report.json",
        "report.html",
    } <= names
    assert [path.name for path in out.parent.iterdir()] == [out.name]
    mask = json.loads((out / "pruning_mask.json").read_text(encoding="utf-8"))
    for kind, layers in mask["removed"].items():
        kept = [n - len(r) for n, r in zip(summary["dense"][kind], layers, strict=True)]
        assert kept == summary["kept"][kind]
    card = (out / "README.md").read_text(encoding="utf-8")
    assert "128" in card and "stdlib" in card and str(out.parent) not in card
    page = (out / "report.html").read_text(encoding="utf-8")
    assert f"{summary['forward_tokens']:,}" in page and str(out.parent) not in page


@pytest.mark.skipif(os.name == "nt", reason="signals are sent another way on Windows")
def test_ctrl_c_keeps_the_state_and_resume_ends_in_the_same_mask(tmp_path: Path) -> None:
    words = (
        "prune",
        "example",
        "--sparsity",
        "0.2",
        "--step",
        "0.1",
        "--layout",
        "per-layer",
        "--max-cpu-mem",
        "2GB",
        *QUICK,
    )
    out, whole = tmp_path / "stopped", tmp_path / "whole"
    running = subprocess.Popen(
        [sys.executable, "-m", "frugal_bonsai", *words, "--out", str(out)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
    )
    state = tmp_path / "stopped.run" / "state.json"
    deadline = time.monotonic() + 300
    while not state.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    running.send_signal(signal.SIGINT)
    _, errors = running.communicate(timeout=60)
    assert running.returncode == 130, errors
    assert "--resume" in errors and str(tmp_path / "stopped.run") in errors
    assert not out.exists()
    assert len(json.loads(state.read_text(encoding="utf-8"))["rounds"]) < 2
    assert "--resume" in fail(*words, "--out", out)
    assert "masks" in fail(*words, "--out", out, "--resume", "--masks", "6")
    [run] = list_runs(tmp_path)
    assert (run["state"], run["command"], run["out"]) == ("interrupted", "prune", "stopped")
    summary = succeed(*shlex.split(run["resume"])[1:])
    expected = succeed(*words, "--out", whole)
    assert summary["kept"] == expected["kept"]
    assert summary["forward_tokens"] == expected["forward_tokens"]
    mask = (out / "pruning_mask.json").read_text(encoding="utf-8")
    assert (whole / "pruning_mask.json").read_text(encoding="utf-8") == mask
    assert not (tmp_path / "stopped.run").exists()
    events = [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]
    starts = [event["resumed"] for event in events if event["event"] == "start"]
    assert starts == [False, True, True]  # the second was refused for its options
    assert events[-1]["state"] == "finished"


@pytest.mark.skipif(os.name == "nt", reason="signals are sent another way on Windows")
def test_ctrl_c_before_the_first_round_leaves_nothing_and_says_so(tmp_path: Path) -> None:
    out = tmp_path / "stopped"
    running = subprocess.Popen(
        [sys.executable, "-m", "frugal_bonsai", "prune", "example", "--out", str(out)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
    )
    assert running.stderr is not None
    while "held-out perplexity" not in running.stderr.readline():
        assert running.poll() is None
    running.send_signal(signal.SIGINT)
    _, errors = running.communicate(timeout=60)
    assert running.returncode == 130, errors
    assert "nothing is left behind" in errors and "--resume" not in errors
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_full_at_the_end_keeps_the_run_for_a_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("prune", "example", "--out", tmp_path / "out", "--sparsity", "0.1", "--step", "0.1")
    words += ("--level", "none", "--max-cpu-mem", "4GB", *QUICK[:4])

    def full(*_: object) -> None:
        raise OutputError("out: the disk is full")

    with monkeypatch.context() as patched:
        patched.setattr("frugal_bonsai.rewrite.shrink.require_free_space", full)
        errors = fail(*words)
    run = tmp_path / "out.run"
    assert f"the disk is full; what was done is in {run}, add --resume" in errors
    assert list(tmp_path.iterdir()) == [run]
    summary = succeed(*words, "--resume")
    assert len(summary["rounds"]) == 1 and not run.exists()


def test_tables_on_a_pipe_are_plain_and_name_the_load_line(tmp_path: Path) -> None:
    out = tmp_path / "table"
    done = frugal_bonsai(
        "prune",
        "example",
        "--out",
        out,
        "--sparsity",
        "0.05",
        "--level",
        "none",
        "--max-cpu-mem",
        "2GB",
        *QUICK[:4],
    )
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout + done.stderr
    assert "from_pretrained" in done.stdout and "perplexity" in done.stdout.lower()


def test_a_utility_of_ones_own_need_not_be_differentiable(tmp_path: Path) -> None:
    import torch

    from frugal_bonsai import PruneOptions, prune

    calls = []

    def accuracy(logits_SV: torch.Tensor, tokens_S: torch.Tensor) -> float:
        calls.append(logits_SV.shape)
        return float((logits_SV[:-1].argmax(-1) == tokens_S[1:]).float().mean())

    options = PruneOptions(
        settings={"sparsity": 0.1, "step": 0.1, "masks": 2, "mask_windows": 2},
        layout="per-layer",
        windows=4,
        window=64,
        max_cpu_mem="4GB",
    )
    summary = prune("example", tmp_path / "own", options, utility=accuracy)
    # Two masks and none on two windows; then every cut of the trial on the window it did not see.
    [trial] = [report["trial"] for report in summary["rounds"]]
    assert len(trial) >= 2 and len(calls) == 2 * 2 + 2 + len(trial)
    assert all(-1 <= loss <= 0 for loss in trial.values()), "minus an accuracy"
    assert set(calls) == {torch.Size([64, 4096])}
    assert summary["sparsity"] == pytest.approx(0.1, abs=0.01)
    assert summary["settings"]["utility"].endswith("accuracy")
    card = (tmp_path / "own" / "README.md").read_text(encoding="utf-8")
    assert f"| `utility` | `{summary['settings']['utility']}` |" in card


def test_windows_sampled_from_the_model_itself_and_its_time_said_first(tmp_path: Path) -> None:
    words = ("example", "--calibration", "self", "--sparsity", "0.05", "--level", "none")
    words += ("--windows", "4", "--window", "32", "--max-cpu-mem", "2GB")
    said = re.compile(r"5 windows of 32 tokens are sampled .* 31 sweeps .* about \d+ s")
    plan = succeed("plan", *words)
    assert any(said.search(note) for note in plan["notes"])
    assert "sampling" in {phase["name"] for phase in plan["memory_phases"]}
    done = frugal_bonsai("prune", *words, "--out", tmp_path / "self", "--json")
    assert done.returncode == 0, done.stderr
    told = said.search(done.stderr)
    assert told is not None and told.start() < done.stderr.index("sampling calibration text")
    summary = json.loads(done.stdout)
    assert summary["calibration"]["source"].startswith("self")
    assert summary["calibration"]["windows"] == 4
