"""``frugal-bonsai adapt``, as a user runs it: prune, adapt, load, evaluate."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import fail, forget_peak, frugal_bonsai, succeed
from fresh_process import FreshProcesses
from safetensors.torch import load_file
from test_shrink_command import describe, keep_some, plain_logits

import frugal_bonsai as package
from frugal_bonsai.model.layout import PADDED, PER_LAYER, UNIFORM
from frugal_bonsai.model.units import KeepMask
from frugal_bonsai.progress import Silent
from frugal_bonsai.rewrite.mask_file import write_mask
from frugal_bonsai.run import adapt as command
from frugal_bonsai.run.evaluate import evaluate
from frugal_bonsai.run.options import EvalOptions

WINDOW = 64
QUICK = ("--window", str(WINDOW), "--windows", "24", "--batch", "4", "--evaluations", "2")


@pytest.fixture(autouse=True)
def own_peak() -> None:
    """What adapts in this process plans from what it holds, not from other tests' peaks."""
    forget_peak()


def prune_some(dense: Path, layout: str, tmp_path: Path) -> Path:
    """Half of the units gone, at random: bad enough that there is something to learn."""
    _, spec = describe(dense)
    out = tmp_path / f"pruned-{layout}"
    write_mask(tmp_path / "mask.json", "stories260K", spec, keep_some(spec, layout))
    package.shrink(str(dense), tmp_path / "mask.json", out, layout=layout)
    return out


@pytest.fixture
def text(shared: Path, tmp_path: Path) -> Path:
    """A part of the calibration text, a JSON line a paragraph."""
    whole = (shared / "text" / "tinystories_calibration.txt").read_text(encoding="utf-8")
    lines = [json.dumps({"text": story}) for story in whole[:30_000].split("\n\n")]
    (tmp_path / "stories.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return tmp_path / "stories.jsonl"


@pytest.mark.slow
@pytest.mark.parametrize("layout", [UNIFORM, PER_LAYER])
def test_the_output_is_better_and_computes_what_the_student_did(
    layout: str,
    stories260k: Path,
    text: Path,
    tmp_path: Path,
    fresh: FreshProcesses,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pruned, out = prune_some(stories260k, layout, tmp_path), tmp_path / "out"
    seen: dict[str, Any] = {}
    original = command.write_adapted

    def write(*args: Any, **options: Any) -> Any:
        seen.update(options)
        return original(*args, **options)

    monkeypatch.setattr(command, "write_adapted", write)
    options = package.AdaptOptions(
        teacher=str(stories260k),
        data=(str(text),),
        settings={"batch": 4, "evaluations": 2, "tokens": 8_000},
        window=WINDOW,
        windows=24,
        eval_text=str(text),
        max_cpu_mem="3GB",
    )
    summary = package.adapt(str(pruned), out, options)
    before, after = summary["before"], summary["after"]
    assert after["perplexity"] < 0.8 * before["perplexity"]
    assert after["eval_perplexity"] < 0.8 * before["eval_perplexity"]
    assert after["kl"] < before["kl"] and after["parameters"] == before["parameters"]
    assert summary["verify"]["student_difference"] < 1e-4
    assert summary["layout"] == layout and not (tmp_path / "out.run").exists()
    # A fresh process, plain transformers: what the student computed when it was trained.
    student_NSV = seen["student_NSV"]
    tokens_NS = seen["held_out_NS"][: len(student_NSV), : student_NSV.shape[1]]
    found_NSV = plain_logits(fresh, out, layout, tokens_NS, tmp_path)
    difference = (found_NSV - student_NSV).abs().max()
    assert float(difference / student_NSV.abs().max()) < 1e-4
    # The streamed evaluation of the output says what the report says.
    again = evaluate(str(out), EvalOptions(text=str(text), window=WINDOW))
    assert again["perplexity"] == pytest.approx(after["eval_perplexity"], rel=1e-4)
    # Same files, same shapes; only the projections changed.
    old, new = load_file(pruned / "model.safetensors"), load_file(out / "model.safetensors")
    assert {n: t.shape for n, t in old.items()} == {n: t.shape for n, t in new.items()}
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    assert changed == {name for name in old if "_proj." in name}
    assert json.loads((pruned / "config.json").read_text()) == json.loads(
        (out / "config.json").read_text()
    )


@pytest.mark.slow
def test_the_command_prints_a_table_and_writes_card_and_report(
    stories260k: Path, text: Path, tmp_path: Path
) -> None:
    pytest.importorskip("bitsandbytes")
    pruned, out = prune_some(stories260k, UNIFORM, tmp_path), tmp_path / "out"
    done = frugal_bonsai(
        *("adapt", pruned, "--teacher", stories260k, "--data", text, "--data", "self"),
        *("--loss", "kl+hidden", "--weights", "int8", "--rank", "8", "--tokens", "2k"),
        *("--optimizer", "adamw8bit"),
        *(*QUICK, "--out", out, "--max-cpu-mem", "3GB"),
    )
    assert done.returncode == 0, done.stderr
    assert "held-out perplexity" in done.stderr and "tokens/s" in done.stderr
    assert f"saved: {out} (uniform layout)" in done.stdout
    assert "student: int8 weights, rank 8, adamw8bit, micro-batches" in done.stdout
    report = json.loads((out / "adaptation_report.json").read_text(encoding="utf-8"))
    assert report["data"]["sources"] == ["file stories.jsonl", "self (sampled from the teacher)"]
    assert report["data"]["windows"] + report["data"]["held_out_windows"] == 48
    assert report["training"]["weights"] == "int8" and report["training"]["rank"] == 8
    assert report["cache"]["layers"] == [3, 4]
    assert report["verify"]["student_difference"] < 1e-4  # on the file's own weights, not int8
    assert report["verify"]["max_relative_difference"] < 1e-4
    assert (out / "report.html").exists(), done.stderr
    page = (out / "report.html").read_text(encoding="utf-8")
    assert f"{report['training']['tokens']:,}" in page
    assert "adamw8bit" in page and "Where the time went" in page and str(tmp_path) not in page
    card = (out / "README.md").read_text(encoding="utf-8")
    assert "| optimiser | adamw8bit |" in card
    assert "stories260K" in card and str(tmp_path) not in card and str(stories260k) not in card
    figures = re.search(r"\| perplexity, held-out data, window 64 \| (\S+) \| (\S+) \|", card)
    assert figures is not None
    assert float(figures[1]) == pytest.approx(report["before"]["perplexity"], abs=1e-3)
    assert float(figures[2]) == pytest.approx(report["after"]["perplexity"], abs=1e-3)
    assert (out / "pruning_mask.json").read_bytes() == (pruned / "pruning_mask.json").read_bytes()


class StopsAt(Silent):
    def __init__(self, step: int) -> None:
        self._left = step

    def step(self, detail: str = "") -> None:
        self._left -= detail == "step"
        if self._left == 0:
            raise KeyboardInterrupt


@pytest.mark.slow
def test_a_stopped_run_is_resumed_to_the_same_files(
    stories260k: Path, text: Path, tmp_path: Path
) -> None:
    pruned = prune_some(stories260k, PER_LAYER, tmp_path)
    options = package.AdaptOptions(
        teacher=str(stories260k),
        data=(str(text), "self"),
        settings={"batch": 4, "evaluations": 4, "tokens": 4 * WINDOW * 8},
        window=WINDOW,
        windows=12,
        max_cpu_mem="3GB",
    )
    package.adapt(str(pruned), tmp_path / "whole", options)
    with pytest.raises(KeyboardInterrupt):
        package.adapt(str(pruned), tmp_path / "out", options, progress=StopsAt(5))
    assert not (tmp_path / "out").exists() and (tmp_path / "out.run").is_dir()
    said = fail(
        *("adapt", pruned, "--teacher", stories260k, "--data", text, "--out", tmp_path / "out")
    )
    assert "holds an unfinished run; continue it with --resume" in said
    words = ("--data", text, "--data", "self", "--window", "64", "--windows", "12")
    summary = succeed(
        *("adapt", pruned, "--teacher", stories260k, *words, "--batch", "4", "--evaluations", "4"),
        *("--tokens", str(4 * WINDOW * 8), "--max-cpu-mem", "3GB"),
        *("--out", tmp_path / "out", "--resume"),
    )
    assert summary["training"]["steps"] == 8
    assert summary["seconds"] > summary["training"]["seconds"]  # of both runs
    files = [tmp_path / name / "model.safetensors" for name in ("whole", "out")]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert not (tmp_path / "out.run").exists()


class Notes(Silent):
    def __init__(self) -> None:
        self.sweeps: list[str] = []

    def sweep(self, name: str, steps: int, tokens_per_step: int) -> None:
        self.sweeps.append(name)


def test_what_the_teacher_said_is_kept_for_other_runs(
    stories260k: Path, text: Path, tmp_path: Path
) -> None:
    pruned, cache = prune_some(stories260k, UNIFORM, tmp_path), tmp_path / "cache"

    def run(name: str, method: str) -> tuple[dict[str, Any], list[str]]:
        notes = Notes()
        options = package.AdaptOptions(
            teacher=str(stories260k),
            data=(str(text), "self"),
            settings={"batch": 4, "evaluations": 1, "tokens": 500, "method": method},
            window=32,
            windows=8,
            teacher_cache=cache,
            max_cpu_mem="3GB",
        )
        summary = package.adapt(str(pruned), tmp_path / name, options, progress=notes)
        return summary, notes.sweeps

    _, swept = run("one", "lora")
    assert {"asking the teacher", "sampling calibration text"} <= set(swept)
    kept = {path: path.stat().st_mtime_ns for path in cache.rglob("*.safetensors")}
    summary, swept = run("two", "full")
    assert not {"asking the teacher", "sampling calibration text"} & set(swept)
    assert kept == {path: path.stat().st_mtime_ns for path in cache.rglob("*.safetensors")}
    assert summary["training"]["rank"] is None and summary["settings"]["method"] == "full"
    assert summary["verify"]["student_difference"] < 1e-4


def test_a_padded_models_zeros_are_mentioned(stories260k: Path, text: Path, tmp_path: Path) -> None:
    pruned = prune_some(stories260k, PADDED, tmp_path)
    (pruned / "pruning_report.json").write_text('{"layout": "padded"}')
    options = package.AdaptOptions(
        data=(str(text),),
        settings={"loss": "lm", "batch": 4, "tokens": 500, "evaluations": 1},
        window=32,
        windows=8,
        max_cpu_mem="3GB",
    )
    summary = package.adapt(str(pruned), tmp_path / "out", options)
    assert any("zeros that filled layers up" in note for note in summary["notes"])
    assert summary["cache"] is None and summary["teacher"] is None
    assert summary["before"]["kl"] is None


@pytest.mark.slow
def test_the_peak_stays_below_the_smallest_cap_that_is_named(
    stories260k: Path, text: Path, tmp_path: Path
) -> None:
    pruned = prune_some(stories260k, UNIFORM, tmp_path)
    words = ("adapt", pruned, "--teacher", stories260k, "--data", text, *QUICK, "--tokens", "1k")
    refused = frugal_bonsai(*words, "--out", tmp_path / "out", "--max-cpu-mem", "300MB")
    assert refused.returncode == 2
    found = re.search(r"smallest --max-cpu-mem that works is (\d+)MiB", refused.stderr)
    assert found is not None, refused.stderr
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.run").exists()
    cap = int(found.group(1)) + 96  # what is imported beside differs from run to run
    summary = succeed(*words, "--out", tmp_path / "out", "--max-cpu-mem", f"{cap}MiB")
    assert summary["memory"]["host_peak_bytes"] <= cap * 2**20


def test_wrong_options_are_refused_by_name(
    stories260k: Path, gpt1m_bytes: Path, text: Path, tmp_path: Path
) -> None:
    pruned, out = prune_some(stories260k, UNIFORM, tmp_path), tmp_path / "out"

    def said(*words: str | Path) -> str:
        text_of_error = fail("adapt", pruned, "--out", out, "--window", "64", *words)
        assert not out.exists() and not (tmp_path / "out.run").exists()
        return text_of_error

    assert "--loss kl: needs the dense model; add --teacher" in said("--data", text)
    lm = ("--loss", "lm")
    assert "--data self: windows are sampled from the teacher" in said("--data", "self", *lm)
    other = said("--data", text, "--teacher", gpt1m_bytes)
    assert "tokens in its vocabulary" in other and "512" in other
    twice = said("--data", "self", "--data", "self", "--teacher", stories260k)
    assert "--data self: is named twice" in twice
    assert "--tokens: 'many' is not a count" in said("--data", text, *lm, "--tokens", "many")
    both = said("--data", text, *lm, "--tokens", "1k", "--minutes", "1")
    assert "--tokens and --minutes" in both
    (tmp_path / "short.txt").write_text("Once upon a time.")
    assert "short.txt" in said("--data", tmp_path / "short.txt", *lm)
    many = said("--data", text, "--teacher", stories260k, "--top", "513")
    assert "--top: 513 is more than the vocabulary's 512" in many


def test_layers_that_were_dropped_have_no_hidden_states_to_compare(
    stories260k: Path, text: Path, tmp_path: Path
) -> None:
    _, spec = describe(stories260k)
    mask = KeepMask(spec.table).without_layers([2])
    write_mask(tmp_path / "mask.json", "stories260K", spec, mask)
    pruned = tmp_path / "shallow"
    package.shrink(str(stories260k), tmp_path / "mask.json", pruned)
    words = ("adapt", pruned, "--teacher", stories260k, "--data", text, "--out", tmp_path / "out")
    assert "hidden states have no counterpart" in fail(*words, "--loss", "kl+hidden")
