"""What options and paths show to be impossible is refused before torch is imported."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from commands import python

from frugal_bonsai.errors import OutputError
from frugal_bonsai.run.output import require_output_file, require_output_folder

REFUSED = """
import contextlib, io, json, sys, time
from frugal_bonsai.cli import main
began, errors = time.monotonic(), io.StringIO()
try:
    with contextlib.redirect_stderr(errors):
        main()
except SystemExit as ended:
    seconds = time.monotonic() - began
    print(json.dumps([ended.code, "torch" in sys.modules, seconds, errors.getvalue()]))
"""


def refuse(*words: str | Path) -> str:
    """Run a command that must end at once, in a Python that has imported nothing; its text."""
    code, torch_is_here, seconds, text = json.loads(python(REFUSED, *words))
    assert code == 2 and not torch_is_here, text
    assert seconds < 5, "well below a second on a machine that does nothing else"
    return str(text)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--sparsity", "50"), "did you mean 0.5?"),
        (("--step", "5"), "did you mean 0.05?"),
        (("--max-gpu-mem", "24"), "did you mean 24GB?"),
        (("--max-shard-size", "5"), "did you mean 5GB?"),
        (("--window", "4096"), "512"),
        (("--window", "1"), "--window: 1 is not at least 2"),
        (("--device", "gpu"), "--device: 'gpu' is not cpu"),
        (("--calibration", "no/such/file.txt"), "--calibration: source 'no/such/file.txt'"),
        (("--eval-text", "missing.txt"), "--eval-text: source 'missing.txt'"),
        (("--profile", "missing.toml"), "missing.toml"),
        (("--no-recovery", "--refine", "2"), "--refine"),
    ],
)
def test_options_of_prune(tmp_path: Path, words: tuple[str, ...], expected: str) -> None:
    assert expected in refuse("prune", "example", "--out", tmp_path / "out", *words)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("out", [".", "..", "/", "folder/.."])
def test_an_output_without_a_name(out: str) -> None:
    with pytest.raises(OutputError, match=r"--out .*: ends in no name; .* such as .*pruned"):
        require_output_folder(Path(out), "example", overwrite=True)
    with pytest.raises(OutputError, match=r"ends in no name; .* such as .*model\.gguf"):
        require_output_file(Path(out), "example", overwrite=False)


def test_an_output_that_is_a_symbolic_link(tmp_path: Path) -> None:
    (tmp_path / "place").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "place")
    with pytest.raises(OutputError, match=r"link: is a symbolic link, .* name the place"):
        require_output_folder(tmp_path / "link", "example", overwrite=True)


def test_an_unfinished_run_and_an_output_that_exists(tmp_path: Path) -> None:
    run = tmp_path / "out.run"
    run.mkdir()
    (run / "state.json").write_text("{}", encoding="utf-8")
    assert "--resume" in refuse("prune", "example", "--out", tmp_path / "out")
    (run / "state.json").rename(run / "best.safetensors")
    words = ("--teacher", "example", "--data", "stdlib", "--out", tmp_path / "out")
    assert "--resume" in refuse("adapt", "example", *words)
    assert "is not empty" in refuse("prune", "example", "--out", tmp_path)
    words = ("--mask", tmp_path / "none.json", "--out", tmp_path / "new")
    assert "none.json" in refuse("shrink", "example", *words)
    assert "exists" in refuse("export", "example", "--out", run / "best.safetensors")


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="a folder that no user may write to")
def test_an_output_where_nothing_can_be_written() -> None:
    assert "written" in refuse("prune", "example", "--out", "/proc/frugal/out")
    assert "written" in refuse("export", "example", "--out", "/proc/model.gguf")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--teacher", "example", "--data", "missing.txt"), "--data: source 'missing.txt'"),
        (("--data", "stdlib"), "--teacher"),
        (("--teacher", "example", "--data", "stdlib", "--batch", "0"), "--batch"),
        (("--teacher", "a/b/c", "--data", "stdlib"), "'a/b/c'"),
        (("--teacher", "example", "--data", "stdlib", "--max-cpu-mem", "8"), "8GB"),
    ],
)
def test_options_of_adapt(tmp_path: Path, words: tuple[str, ...], expected: str) -> None:
    assert expected in refuse("adapt", "example", "--out", tmp_path / "out", *words)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("eval", "example", "--text", "missing.txt"), "--text: source 'missing.txt'"),
        (("eval", "example", "--text", "stdlib", "--max-cpu-mem", "8"), "8GB"),
        (("eval", "example", "--text", "stdlib", "--window", "4096"), "512"),
        (("eval", "example", "--text", "stdlib", "--device", "gpu"), "--device: 'gpu' is not cpu"),
        (("eval", "a/b/c", "--text", "stdlib"), "'a/b/c'"),
        (("eval", "example", "--text", "stdlib", "--runtime", "llama.cpp"), "takes a GGUF file"),
        (("bench", "example", "a/b/c"), "'a/b/c'"),
        (("bench", "example", "example", "--new-tokens", "0"), "--new-tokens"),
        (("bench", "example", "example", "--runtime", "llama.cpp"), "takes a GGUF file"),
        (("bench", "example", "example", "--device", "gpu"), "--device: 'gpu' is not cpu"),
        (("profile", "--dir", "missing"), "--dir missing: is no folder"),
        (("profile", "--device", "gpu"), "--device: 'gpu' is not cpu"),
    ],
)
def test_options_of_eval_bench_and_profile(words: tuple[str, ...], expected: str) -> None:
    assert expected in refuse(*words)


def test_profile_replaces_no_other_file(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text("[tool]", encoding="utf-8")
    assert "exists and is no hardware profile" in refuse("profile", "--out", tmp_path / "mine.toml")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--max-shard-size", "5"), "did you mean 5GB?"),
        (("--max-shard-size", "5GB"), "mask.json"),
    ],
)
def test_options_of_shrink(tmp_path: Path, words: tuple[str, ...], expected: str) -> None:
    mask = tmp_path / "mask.json"
    mask.write_text("{}", encoding="utf-8")
    assert expected in refuse("shrink", "example", "--mask", mask, "--out", tmp_path / "o", *words)
    assert list(tmp_path.iterdir()) == [mask]
