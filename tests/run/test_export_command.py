"""``frugal-bonsai export``: as a user runs it."""

from __future__ import annotations

from pathlib import Path

import pytest
from commands import fail, frugal_bonsai, succeed
from export.llama_cpp import complete, needs_llama_cpp


def test_an_export_of_what_prune_wrote(tmp_path: Path) -> None:
    pruned, out = tmp_path / "pruned", tmp_path / "new" / "pruned.gguf"
    quick = ("--windows", "4", "--window", "64", "--method", "local-only", "--no-recovery")
    options = ("--sparsity", "0.2", "--layout", "per-layer", "--max-cpu-mem", "2GB", *quick)
    succeed("prune", "example", "--out", pruned, *options)
    result = succeed("export", pruned, "--format", "gguf", "--dtype", "f16", "--out", out)
    assert result["architecture"] == "deci" and result["tokenizer"] == "gpt2 (gpt-2)"
    assert result["file_bytes"] == out.stat().st_size
    assert result["out"] == str(out) and result["notes"] == []
    assert [path.name for path in out.parent.iterdir()] == [out.name]


@needs_llama_cpp
def test_the_table_and_the_file(tmp_path: Path) -> None:
    done = frugal_bonsai("export", "example", "--dtype", "q8_0", "--out", tmp_path / "m.gguf", "-q")
    assert done.returncode == 0, done.stderr
    assert "llama" in done.stdout and f"saved: {tmp_path / 'm.gguf'}" in done.stdout
    [answer] = complete(tmp_path / "m.gguf", [("Return the", 5)])
    assert len(answer.text) > 3


def test_what_is_refused_leaves_nothing(tmp_path: Path) -> None:
    out = tmp_path / "m.gguf"
    out.write_text("keep me")
    assert "m.gguf: exists; name another file" in fail("export", "example", "--out", out)
    assert out.read_text() == "keep me"
    assert "is a folder; name a file" in fail("export", "example", "--out", tmp_path)
    assert sorted(tmp_path.iterdir()) == [out]


def test_a_disk_without_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("frugal_bonsai.checkpoint.commit.shutil.disk_usage", lambda _: usage)
    text = fail("export", "example", "--out", tmp_path / "m.gguf")
    assert "the GGUF file needs" in text
    assert list(tmp_path.iterdir()) == []
