"""``--dry-run`` says what a command would write, and writes nothing; ``--overwrite`` replaces."""

from __future__ import annotations

from pathlib import Path

import pytest
from commands import fail
from commands_here import here, result

PRUNE = ("prune", "example", "--sparsity", "0.2", "--method", "magnitude")
TEXT = ("--window", "64", "--windows", "8", "--max-cpu-mem", "3GB")


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that prune wrote."""
    out = tmp_path_factory.mktemp("pruned") / "out"
    result(*PRUNE, *TEXT, "--out", out)
    return out


def listing(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_the_dry_run_of_prune_predicts_what_is_written(pruned: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    values = result(*PRUNE, *TEXT, "--out", out, "--dry-run")
    assert listing(tmp_path) == []
    assert values["windows"] == 8 and values["rounds"] == 1
    run, output = values["writes"]
    assert run["path"] == f"{out}.run" and "removed at the end" in run["contents"]
    assert output["path"] == str(out)
    written = sum(path.stat().st_size for path in pruned.iterdir())
    assert output["size_bytes"] == pytest.approx(written, rel=0.05)
    text = here(*PRUNE, *TEXT, "--out", out, "--dry-run")
    assert "would write:" in text and text.rstrip().endswith("dry run: nothing was written")


def test_the_dry_run_of_shrink_has_the_units_of_the_mask(pruned: Path, tmp_path: Path) -> None:
    words = ("shrink", "example", "--mask", pruned / "pruning_mask.json", "--out", tmp_path / "out")
    values = result(*words, "--dry-run")
    assert listing(tmp_path) == []
    written = result(*words)
    for key in ("kept", "dense", "sparsity", "layout", "family"):
        assert values[key] == written[key]
    weights = (tmp_path / "out" / "model.safetensors").stat().st_size
    [output] = values["writes"]
    assert weights < output["size_bytes"] < weights + 2**20
    assert "dry run: nothing was written" in here(*words, "--overwrite", "--dry-run")


def test_the_dry_run_of_export_has_the_tensors_of_the_file(pruned: Path, tmp_path: Path) -> None:
    words = ("export", pruned, "--out", tmp_path / "m.gguf", "--dtype", "q8_0")
    values = result(*words, "--dry-run")
    assert listing(tmp_path) == []
    written = result(*words)
    assert values["architecture"] == written["architecture"]
    assert values["tokenizer"] == written["tokenizer"]
    [file] = values["writes"]
    for kind, count in written["tensors"].items():
        assert f"{count} {kind}" in file["contents"]
    assert file["size_bytes"] == pytest.approx(written["file_bytes"], rel=0.05)
    assert "nothing was written" in here(*words, "--overwrite", "--dry-run")


def test_a_dry_run_refuses_what_the_command_refuses(pruned: Path, tmp_path: Path) -> None:
    assert "add --overwrite" in fail(*PRUNE, "--out", pruned, "--dry-run")
    cap = ("--max-cpu-mem", "100MB")
    assert "--max-cpu-mem" in fail(*PRUNE, *cap, "--out", tmp_path / "out", "--dry-run")
    words = ("adapt", "example", "--teacher", "example", "--data", "stdlib")
    assert "add --overwrite" in fail(*words, "--out", pruned, "--dry-run")


def test_overwrite_replaces_an_output_when_the_new_one_is_complete(
    pruned: Path, tmp_path: Path
) -> None:
    out, mask = tmp_path / "out", pruned / "pruning_mask.json"
    words = ("shrink", "example", "--mask", mask, "--out", out)
    result(*words)
    (out / "left over").write_text("of the old output", encoding="utf-8")
    assert "add --overwrite" in fail(*words)
    assert "layout" in fail(*words, "--layout", "triangular", "--overwrite")
    assert (out / "left over").exists(), "an error leaves the old output"
    values = result(*words, "--layout", "padded", "--overwrite")
    assert values["layout"] == "padded" and not (out / "left over").exists()
    assert listing(tmp_path)[0] == "out" and not list(tmp_path.glob(".*")), "no temporary is left"


def test_overwrite_replaces_a_gguf_file_and_no_other(pruned: Path, tmp_path: Path) -> None:
    file, other = tmp_path / "m.gguf", tmp_path / "notes.txt"
    result("export", pruned, "--out", file)
    first = file.stat().st_size
    assert "add --overwrite" in fail("export", pruned, "--out", file)
    assert result("export", pruned, "--out", file, "--dtype", "q8_0", "--overwrite")
    assert file.stat().st_size < first
    other.write_text("mine", encoding="utf-8")
    assert "another kind of file" in fail("export", pruned, "--out", other, "--overwrite")
    assert other.read_text(encoding="utf-8") == "mine"


def test_overwrite_replaces_no_folder_of_others_and_no_model_that_is_read(
    pruned: Path, tmp_path: Path
) -> None:
    (tmp_path / "thesis.txt").write_text("mine", encoding="utf-8")
    assert "this program did not write it" in fail(*PRUNE, "--out", tmp_path, "--overwrite")
    assert listing(tmp_path) == ["thesis.txt"]
    words = ("prune", pruned, *PRUNE[2:], *TEXT, "--overwrite")
    assert f"holds {pruned}, which is read" in fail(*words, "--out", pruned)
    words = ("adapt", "example", "--teacher", pruned, "--data", "stdlib", "--overwrite")
    assert f"holds {pruned}, which is read" in fail(*words, "--out", pruned)
