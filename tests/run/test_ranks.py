"""``prune`` on several ranks: the bytes of one rank, and a clear end whatever ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from commands import ENVIRONMENT, fail
from launches import Rank, launch
from tiny_models import save_byte_tokenizer, tiny_llama

from frugal_bonsai.ranks.launch import HOST_NAME

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="ranks are forked")

# Two rounds, with windows so long that a round has several micro-batches.
OPTIONS = (
    *("--calibration", "stdlib", "--windows", "8", "--window", "512"),
    *("--masks", "4", "--mask-windows", "8", "--certainty", "1"),
    *("--sparsity", "0.4", "--step", "0.2", "--layout", "per-layer", "--no-report"),
    *("--self-windows", "2", "--refine", "0"),
)
FILES = ("model.safetensors", "pruning_mask.json")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks") / "model"
    tiny_llama(folder, vocab_size=320, max_position_embeddings=512)
    save_byte_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def alone(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The bytes that one process writes."""
    folder = tmp_path_factory.mktemp("alone")
    done = launch(folder, "prune", model, "--out", "out", *OPTIONS, ranks=1)
    assert done.codes == [0], done.errors
    assert done.errors[0].count("trial: ") > 4 and "writing text" in done.errors[0]
    return _bytes(folder / "out")


def _bytes(out: Path) -> dict[str, bytes]:
    found = {name: (out / name).read_bytes() for name in FILES}
    rounds = json.loads((out / "pruning_report.json").read_text(encoding="utf-8"))["rounds"]
    for each in rounds:
        del each["seconds"]
    return {**found, "rounds": json.dumps(rounds).encode()}


def _left(folder: Path) -> list[str]:
    """What a launch has left in its folder beside what its ranks printed."""
    return sorted(path.name for path in folder.iterdir() if "-" not in path.name)


@pytest.mark.parametrize("ranks", [4])  # the launchers and a resume have 2
def test_ranks_write_the_bytes_of_one(
    ranks: int, model: Path, alone: dict[str, bytes], tmp_path: Path
) -> None:
    ended = launch(tmp_path, "prune", model, "--out", "out", *OPTIONS, ranks=ranks)
    assert ended.codes == [0] * ranks, ended.errors
    assert _bytes(tmp_path / "out") == alone
    assert f"{ranks} ranks on 1 host share masks, candidates and written text" in ended.errors[0]
    assert ended.outputs[1:] == ended.errors[1:] == [""] * (ranks - 1)
    assert _left(tmp_path) == ["out"]


def test_hosts_without_a_common_folder_write_the_bytes_of_one(
    model: Path, alone: dict[str, bytes], tmp_path: Path
) -> None:
    """The second host has its own folder, with a leader and another rank."""
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    there.mkdir()
    ranks = [Rank(here), *[Rank(there, {HOST_NAME: "other-host"})] * 2]
    ended = launch(tmp_path, "prune", model, "--out", "out", *OPTIONS, ranks=ranks)
    assert ended.codes == [0, 0, 0], ended.errors
    assert _bytes(here / "out") == alone
    assert "3 ranks on 2 hosts share masks, candidates and written text" in ended.errors[0]
    assert _left(here) == ["out"] and _left(there) == []


def test_a_worker_that_dies_ends_the_run_and_one_rank_resumes_it(
    model: Path, alone: dict[str, bytes], tmp_path: Path
) -> None:
    words = ("prune", model, "--out", "out", *OPTIONS)
    log = tmp_path / "out.run" / "round.jsonl"
    ended = launch(tmp_path, *words, ranks=2, killed=(1,), once=log)
    assert ended.codes == [2, -9] and ended.seconds < 20, ended.errors
    assert "frugal-bonsai: rank 1 (" in ended.errors[0]
    assert (
        "ended unexpectedly; what was done is kept: repeat the command with --resume"
        in (ended.errors[0])
    )
    assert (tmp_path / "out.run" / "state.json").exists()
    assert not (tmp_path / "out.run" / "store").exists()
    assert not (tmp_path / "out.run" / "lock").exists()
    assert launch(tmp_path, *words, "--resume", ranks=1).codes == [0]
    assert _bytes(tmp_path / "out") == alone


def test_rank_0_that_dies_ends_its_workers_and_two_ranks_resume_a_run_of_one(
    model: Path, alone: dict[str, bytes], tmp_path: Path
) -> None:
    words = ("prune", model, "--out", "out", *OPTIONS)
    log = tmp_path / "out.run" / "round.jsonl"
    ended = launch(tmp_path, *words, ranks=2, killed=(0,), once=log)
    assert ended.codes[0] == -9 and ended.codes[1] == 2 and ended.seconds < 20, ended.errors
    assert "frugal-bonsai: rank 1 (" in ended.errors[1]
    assert launch(tmp_path, *words, "--resume", ranks=1, killed=(0,), once=log).codes == [-9]
    ended = launch(tmp_path, *words, "--resume", ranks=2)
    assert ended.codes == [0, 0], ended.errors
    assert _bytes(tmp_path / "out") == alone


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_end_all_ranks(number: int, model: Path, tmp_path: Path) -> None:
    words = ("prune", model, "--out", "out", *OPTIONS)
    log = tmp_path / "out.run" / "round.jsonl"
    ended = launch(tmp_path, *words, ranks=2, killed=(0, 1), signal=number, once=log)
    assert ended.codes[0] == 130 and ended.codes[1] in (0, 130) and ended.seconds < 20, ended.errors
    assert "frugal-bonsai: stopped; what was done is in out.run" in ended.errors[0]
    assert ended.errors[1].strip() == ""
    run = tmp_path / "out.run"
    assert not (run / "store").exists() and not (run / "lock").exists()


def test_an_error_of_a_worker_ends_the_run_and_rank_0_says_it(model: Path, tmp_path: Path) -> None:
    """The model of the second host is another one."""
    here, there = tmp_path / "here", tmp_path / "there"
    for folder, changes in ((here, {}), (there, {"intermediate_size": 48})):
        folder.mkdir()
        tiny_llama(folder / "model", vocab_size=320, max_position_embeddings=512, **changes)
        save_byte_tokenizer(folder / "model")
    ranks = [Rank(here), Rank(there, {HOST_NAME: "other-host"})]
    ended = launch(tmp_path, "prune", "./model", "--out", "out", *OPTIONS, ranks=ranks)
    assert ended.codes[0] == 2, ended.errors
    assert (
        "frugal-bonsai: rank 1 (other-host): ./model: config or tensor headers differ"
        in (ended.errors[0])
    )
    assert ended.errors[1] == ""


def test_a_cap_that_cannot_hold_the_plan_of_rank_0_is_refused(model: Path, tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    for folder, cap in ((here, "4GiB"), (there, "300MiB")):
        folder.mkdir()
        (folder / "run.toml").write_text(f'max-cpu-mem = "{cap}"\n', encoding="utf-8")
    ranks = [Rank(here), Rank(there, {HOST_NAME: "other-host"})]
    words = ("prune", model, "--out", "out", "--config", "run.toml", *OPTIONS)
    ended = launch(tmp_path, *words, ranks=ranks)
    assert ended.codes[0] == 2, ended.errors
    assert (
        "rank 1 (other-host): --max-cpu-mem: 300.00 MiB here cannot hold the plan of rank 0"
        in (ended.errors[0])
    )


def test_an_error_of_rank_0_ends_quiet_workers(model: Path, tmp_path: Path) -> None:
    ended = launch(tmp_path, "prune", model, "--out", "out", "--window", "1", ranks=2)
    assert ended.codes == [2, 0], ended.errors
    assert "--window" in ended.errors[0] and ended.errors[1] == ""


def test_other_commands_run_in_one_process(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    for words in (("inspect", "example"), ("eval", "example"), ("runs",)):
        assert f"{words[0]}: runs in one process, 2 were launched" in fail(*words)
    monkeypatch.setenv("WORLD_SIZE", "two")
    assert "environment variable WORLD_SIZE: 'two' is not a number" in fail("runs")


@pytest.mark.parametrize(
    "launcher",
    [
        ("torch.distributed.run", "--nproc-per-node", "2"),
        ("accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"),
    ],
    ids=["torchrun", "accelerate launch"],
)
def test_launchers(
    launcher: tuple[str, ...], model: Path, alone: dict[str, bytes], tmp_path: Path
) -> None:
    module, *more = launcher
    words = [sys.executable, "-m", module, *more, "-m", "frugal_bonsai", "prune", str(model)]
    done = subprocess.run(
        [*words, "--out", "out", *OPTIONS],
        cwd=tmp_path,
        env={**ENVIRONMENT, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "2 ranks on 1 host share masks, candidates and written text" in done.stderr
    # Texts are written in other groups here, and the weights fitted to them are others.
    mask = "pruning_mask.json"
    assert (tmp_path / "out" / mask).read_bytes() == alone[mask]
