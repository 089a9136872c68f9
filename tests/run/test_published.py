"""An output may be published: no file in it says where files lie here, and none has a secret."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_models import save_byte_tokenizer, tiny_llama

from frugal_bonsai.run.adapt import adapt
from frugal_bonsai.run.options import AdaptOptions, PruneOptions
from frugal_bonsai.run.prune import prune
from frugal_bonsai.run.report import report_page
from frugal_bonsai.run.settings_file import _public
from frugal_bonsai.run.shrink import shrink

TOKEN = "hf_0123456789abcdef"


def test_outputs_have_no_local_paths_and_no_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.setenv(name, TOKEN)
    monkeypatch.setenv("HF_ENDPOINT", f"https://user:{TOKEN}@hub.example")
    private = tmp_path / "private folder"
    model, text = private / "dense", private / "some text.txt"
    tiny_llama(model, vocab_size=259)
    save_byte_tokenizer(model)
    text.write_text("Some words, again and again, until there are enough. " * 100)
    quick = {"max_cpu_mem": "4GB", "device": "cpu", "window": 32}
    chosen = PruneOptions(
        settings={"sparsity": 0.4, "step": 0.4, "masks": 4, "mask_windows": 4},
        layout="per-layer",
        calibration=str(text),
        eval_text=str(text),
        windows=8,
        **quick,  # type: ignore[arg-type]
    )
    prune(str(model), tmp_path / "pruned", chosen)
    trained = AdaptOptions(
        teacher=str(model),
        data=(str(text),),
        settings={"tokens": 512},
        teacher_cache=private / "cache",
        windows=16,
        **quick,  # type: ignore[arg-type]
    )
    adapt(str(tmp_path / "pruned"), tmp_path / "adapted", trained)
    mask = tmp_path / "pruned" / "pruning_mask.json"
    shrink(str(model), mask, tmp_path / "shrunk", layout="per-layer")
    for name in ("pruned", "adapted", "shrunk"):
        for path in (tmp_path / name).rglob("*"):
            data = path.read_bytes() if path.is_file() else b""
            for secret in (tmp_path.parent, "private folder", TOKEN, Path.home()):
                assert str(secret).encode() not in data, f"{path} has {secret}"
        assert "private folder" not in report_page(tmp_path / name, kind="json")
    settings = (tmp_path / "pruned" / "run.toml").read_text()
    assert 'model = "dense"\n' in settings and 'calibration = "some text.txt"\n' in settings
    assert "# calibration was on the machine of this run; give its path on the" in settings


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("/home/me/model", "model"),
        ("~/model", "model"),
        (r"C:\Users\me\model", "model"),
        ("models/dense", "models/dense"),
        ("org/name", "org/name"),
        (["arc=/data/arc.jsonl", "stdlib"], ["arc=arc.jsonl", "stdlib"]),
        (0.5, 0.5),
    ],
)
def test_absolute_paths_are_cut_to_their_names(value: object, expected: object) -> None:
    assert _public(value) == expected
