"""events.jsonl and `runs`: what is recorded, what leaves the machine, the line that resumes."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
from commands import fail
from commands_here import here, result
from report.summaries import make_round

from frugal_bonsai.cli.adapt import adapt_command
from frugal_bonsai.cli.prune import prune_command
from frugal_bonsai.progress import Silent
from frugal_bonsai.report.pages.timeline import memory_charts, phase_seconds, time_section
from frugal_bonsai.run.arguments import command_arguments, command_line
from frugal_bonsai.run.events import EventLog, copy_events, read_events, recorded
from frugal_bonsai.run.keywords import adapt_options, prune_options
from frugal_bonsai.run.run_folder import locked, run_folder


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def record(folder: Path, *, resume: bool = False, fails: bool = False) -> None:
    """A run of two sweeps."""
    (folder / "state.json").write_text("{}")
    arguments = command_arguments("prune", "example", folder.with_name("out"), PRUNE)
    with recorded(folder, Silent(), "prune", "/models/mine", arguments, resume=resume) as log:
        log.round(2, 3, 0.25)
        log.sweep("statistics", 6, 512)
        log.step("layer 0")
        log.note("read from /home/someone/secret/model")
        if fails:
            raise KeyboardInterrupt


PRUNE = prune_options({"sparsity": 0.25, "recovery": False, "max_cpu_mem": 2 * 10**9})


def test_a_run_is_recorded_and_what_leaves_the_machine_has_no_paths(tmp_path: Path) -> None:
    record(tmp_path)
    record(tmp_path, resume=True)
    events = read_events(tmp_path)
    assert [e["event"] for e in events[:5]] == ["start", "round", "sweep", "memory", "note"]
    assert [e["resumed"] for e in events if e["event"] == "start"] == [False, True]
    assert events[0]["schema"] == 1 and events[0]["model"] == "mine"
    assert events[3]["host_bytes"] > 10**6
    assert "/home" not in (tmp_path / "events.jsonl").read_text()
    out = tmp_path / "out"
    out.mkdir()
    copy_events(tmp_path, out)
    copied = read_events(out)
    assert copied[-1]["state"] == "finished" and len(copied) == len(events) + 1
    assert "arguments" not in copied[0] and str(tmp_path) not in (out / "events.jsonl").read_text()


def test_a_line_that_was_cut_short_is_left_out(tmp_path: Path) -> None:
    event = {"event": "round", "number": 1, "rounds": 2, "sparsity": 0.25}
    (tmp_path / "events.jsonl").write_text(json.dumps(event) + '\n[]\n{"event": "sw')
    assert read_events(tmp_path) == [{"seconds": 0.0, **event}]


def test_memory_is_read_now_and_then_and_a_full_disk_ends_the_log_alone(tmp_path: Path) -> None:
    clock = Clock()
    log = EventLog(tmp_path / "events.jsonl", Silent(), clock)
    for _ in range(1000):
        clock.now += 0.1
        log.step()
    assert len(read_events(tmp_path)) < 500
    EventLog(tmp_path / "absent" / "events.jsonl", Silent()).note("goes on")


def test_a_failure_before_anything_can_be_resumed_leaves_no_log(tmp_path: Path) -> None:
    with (
        pytest.raises(ValueError, match="early"),
        recorded(tmp_path, Silent(), "adapt", "example", [], resume=False),
    ):
        raise ValueError("early")
    assert list(tmp_path.iterdir()) == []


def _parsed(command: Any, words: list[str], read: Any) -> Any:
    given = command.make_context(words[0], list(words[1:])).params
    for name in ("model", "pruned", "out", "as_json", "threads", "resume", "overwrite", "dry_run"):
        given.pop(name, None)
    return read({key: value for key, value in given.items() if key not in OTHERS})


OTHERS = {"plan_only", "quiet", "verbose", "help_all"}


def test_the_recorded_words_give_the_same_options(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my text.txt").write_text("words")
    words = ["prune", "example", "--out", str(tmp_path / "out"), "--sparsity", "0.3", "--no-trial"]
    words += ["--calibration", "my text.txt", "--max-cpu-mem", "2GB", "--no-report", "--bias"]
    options = _parsed(prune_command, words, prune_options)
    recorded_words = command_arguments("prune", "example", tmp_path / "out", options)
    assert str(tmp_path) not in json.dumps(recorded_words)
    assert {"path": "my text.txt"} in recorded_words
    line = command_line(recorded_words, tmp_path)
    assert _parsed(prune_command, shlex.split(line)[1:], prune_options) == options
    words = ["adapt", "example", "--teacher", "example", "--data", "stdlib", "--data", "self"]
    words += ["--minutes", "3", "--hidden-layers", "1,2", "--loss", "kl+hidden", "--rank", "4"]
    adapt = _parsed(adapt_command, words, adapt_options)
    line = command_line(command_arguments("adapt", "example", tmp_path / "o", adapt), tmp_path)
    assert _parsed(adapt_command, shlex.split(line)[1:], adapt_options) == adapt


def test_runs_names_each_state_and_how_to_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("busy", "stopped", "unborn"):
        run_folder(tmp_path / "out" / name).mkdir(parents=True)
    record(run_folder(tmp_path / "out" / "busy"))
    with pytest.raises(KeyboardInterrupt):
        record(run_folder(tmp_path / "out" / "stopped"), fails=True)
    done = tmp_path / "out" / "done"
    done.mkdir()
    sizes = {"before": {"perplexity": 7.0}, "after": {"perplexity": 9.5}}
    report = {"model": "org/base", "sparsity": 0.3, **sizes}
    (done / "pruning_report.json").write_text(json.dumps(report))
    with locked(run_folder(tmp_path / "out" / "busy")):
        runs = {run["out"]: run for run in result("runs")["runs"]}
        shown = here("runs", "out")
    assert {name: run["state"] for name, run in runs.items()} == {
        "out/busy": "running",
        "out/stopped": "interrupted",
        "out/done": "finished",
    }
    assert runs["out/done"]["progress"] == "30% removed, perplexity 7.00 to 9.50"
    assert runs["out/stopped"]["progress"] == "round 2 of 3, statistics"
    line = (
        "frugal-bonsai prune example --out out/out --max-cpu-mem 2000000000 --sparsity 0.25 "
        "--no-recovery --resume"
    )
    assert runs["out/stopped"]["resume"].split() == line.split()
    assert runs["out/busy"]["resume"] is None
    assert "resume with:" in shown and "interrupted" in shown
    assert "no such folder" in fail("runs", tmp_path / "absent")
    assert "no runs in" in here("runs", done.parent / "unborn.run")


def test_a_run_that_was_stopped_has_a_page(tmp_path: Path) -> None:
    run = run_folder(tmp_path / "half")
    run.mkdir()
    with pytest.raises(KeyboardInterrupt):
        record(run, fails=True)
    round_1 = {**make_round(1, 0.25), "evidence": {"ffn": [[0, 3.0, 0.5]]}}
    state = {"rounds": [round_1], "identity": {"settings": {"seed": 3}}}
    (run / "state.json").write_text(json.dumps(state))
    page = here("report", run, "--format", "md")
    assert "# half: prune of mine, interrupted" in page
    assert "It was in round 2 of 3, statistics." in page and "frugal-bonsai runs" in page
    assert "| 1 | 25.0% | 34.57 |" in page and "| seed | 3 |" in page
    assert "| read from model |" in page and str(tmp_path) not in page and "/home" not in page
    (run / "events.jsonl").unlink()
    assert "there is no log of a run" in fail("report", run)


EVENTS = [
    {"event": "start", "seconds": 0.0},
    {"event": "sweep", "seconds": 2.0, "name": "statistics"},
    {"event": "memory", "seconds": 2.0, "host_bytes": 500 * 2**20},
    {"event": "sweep", "seconds": 5.0, "name": "masked evaluation, masks 1-8 of 8"},
    {"event": "memory", "seconds": 6.0, "host_bytes": 700 * 2**20},
    {"event": "start", "seconds": 0.0},  # resumed
    {"event": "sweep", "seconds": 1.0, "name": "recovery"},
    {"event": "end", "seconds": 4.0},
]


def test_time_and_memory_by_phase() -> None:
    phases = phase_seconds(EVENTS)
    assert {name: seconds for name, (seconds, _) in phases.items()} == {
        "starting": 3.0,
        "statistics": 3.0,
        "masked evaluation": 1.0,
        "recovery": 3.0,
    }
    assert phases["masked evaluation"][1] == 700 * 2**20
    resources = {"compute": 2.0, "elementwise": 0.0, "disk": 0.5, "copy": 0.0}
    phase = {"name": "statistics", "seconds": 2.0, "binds": "compute", **resources}
    section = time_section(EVENTS, {"phases": [phase], "profile": "measured"})
    assert section["rows"][0] == ["statistics", "3 s", "30%", "2 s", "arithmetic"]
    assert ["masked evaluation", "1 s", "10%", "-", "-"] in section["rows"]
    adapting = {"event": "sweep", "seconds": 5.0, "name": "adapting, best held-out perplexity 9.1"}
    alone = time_section([*EVENTS, adapting, {"event": "end", "seconds": 25.0}], None)
    assert alone["head"] == ["phase", "measured", "share"]
    assert alone["rows"][-1] == ["training", "20 s", "65%"]
    assert time_section([], None)["rows"] == []


def test_memory_over_time_is_drawn_against_a_cap_that_is_near() -> None:
    memory = {
        "host_cap_bytes": 2**30,
        "host_predicted_bytes": 800 * 2**20,
        "host_peak_bytes": 750 * 2**20,
        "plan": [{"name": "head", "where": "host", "size_bytes": 600 * 2**20}],
        "phases": [{"name": "statistics: layers", "host_bytes": 600 * 2**20, "gpu_bytes": 0}],
    }
    charts = memory_charts(EVENTS, memory)
    assert charts["memory_host"]["levels"]["cap"] == 1024
    assert charts["memory_host"]["series"]["host memory"] == [[2.0, 500.0], [6.0, 700.0]]
    assert charts["phases"]["marks"] == {"measured": [500.0]}
    assert charts["plan"]["parts"] == {"head": [600.0, 0.0], "work, measured": [0.0, 750.0]}
    far = memory_charts(EVENTS, {**memory, "host_cap_bytes": 2**40})["memory_host"]
    assert "cap" not in far["levels"] and "1.00 TiB" in far["caption"]
