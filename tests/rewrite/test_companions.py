"""The small files that are copied with the model, and those that are not."""

from __future__ import annotations

from pathlib import Path

from frugal_bonsai.rewrite.companions import write_companions


def test_companions(tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    wanted = {
        "added_tokens.json",
        "additional_chat_templates/tools.jinja",
        "chat_template.jinja",
        "generation_config.json",
        "merges.txt",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
        "vocab.json",
    }
    left = {
        "README.md",
        "config.json",
        "model.safetensors",
        "model.safetensors.index.json",
        "modeling_custom.py",
        "tokenization_custom.py",
        "pytorch_model.bin",
    }
    for name in wanted | left:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes(name.encode())
    (source / "tokenizer.json").rename(source / "blob")
    (source / "tokenizer.json").symlink_to("blob")
    out.mkdir()
    assert write_companions(source, out) == tuple(sorted(wanted))
    found = {p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file()}
    assert found == wanted
    assert all((out / name).read_bytes() == name.encode() for name in wanted)
    assert not (out / "tokenizer.json").is_symlink()


def test_no_companions(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert write_companions(tmp_path, tmp_path / "out") == ()
