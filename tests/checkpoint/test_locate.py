from __future__ import annotations

from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)

from frugal_bonsai.checkpoint import locate
from frugal_bonsai.checkpoint.locate import find_model
from frugal_bonsai.errors import CheckpointError


def made(kind: type[Exception], text: str = "said so") -> Exception:
    """Make an error of the hub without the response that its constructor requires."""
    error = kind.__new__(kind)
    error.args = (text,)
    return error


def hub(monkeypatch: pytest.MonkeyPatch, answer: str | Exception) -> list[dict[str, Any]]:
    """Replace the network by a fixed answer; return the list of requests."""
    asked: list[dict[str, Any]] = []

    def snapshot_download(repo_id: str, **options: Any) -> str:
        asked.append({"repo_id": repo_id, **options})
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return asked


def test_local_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_model(str(tmp_path)) == tmp_path
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert find_model("org/name") == Path("org/name")  # goes before the hub


def test_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    (tmp_path / "model").mkdir()
    assert find_model("~/model") == tmp_path / "model"


def test_example_is_embedded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locate, "__file__", str(tmp_path / "checkpoint" / "locate.py"))
    with pytest.raises(
        CheckpointError, match=r"example: the embedded example model is not in this"
    ):
        find_model("example")
    (tmp_path / "example").mkdir()
    (tmp_path / "example" / "config.json").write_text("{}")
    assert find_model("example") == tmp_path.resolve() / "example"


def test_a_file_is_told_to_be_a_folder(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"")
    with pytest.raises(CheckpointError, match="is a file; name the folder that holds") as caught:
        find_model(str(path))
    assert f"({tmp_path})" in str(caught.value)


@pytest.mark.parametrize(
    "model",
    ["nothing-here", "/no/such/folder", "../a/b", "a/b/c", "", "x" * 5000, "~nobody/x", "a\0b"],
)
def test_neither_folder_nor_id(model: str) -> None:
    with pytest.raises(CheckpointError, match="neither a local folder") as caught:
        find_model(model)
    assert "nor a hub id of the form org/name, nor 'example'; check the spelling" in str(
        caught.value
    )


def test_hub_id(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    asked = hub(monkeypatch, str(tmp_path))
    assert find_model("org/some-Model_1.5") == tmp_path
    assert asked[0]["repo_id"] == "org/some-Model_1.5"


def test_only_what_pruning_needs_is_downloaded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from huggingface_hub.utils import filter_repo_objects

    monkeypatch.chdir(tmp_path)
    asked = hub(monkeypatch, str(tmp_path))
    find_model("org/name")
    wanted = [
        "config.json",
        "generation_config.json",
        "merges.txt",
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer.model",
        "chat_template.jinja",
        "README.md",  # the licence
    ]
    unwanted = [
        "consolidated.safetensors",
        "modeling_custom.py",
        "onnx/config.json",
        "original/consolidated.00.pth",
        "pytorch_model.bin",
    ]
    kept = filter_repo_objects(
        wanted + unwanted,
        allow_patterns=asked[0]["allow_patterns"],
        ignore_patterns=asked[0]["ignore_patterns"],
    )
    assert list(kept) == wanted


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (made(GatedRepoError), "access is gated; accept its terms"),
        (made(RepositoryNotFoundError), "no such repository, or it is private; check the spelling"),
        (HFValidationError("bad id"), "this is no valid id (bad id); check the spelling"),
        (made(LocalEntryNotFoundError), "the hub cannot be reached and the model is not in the"),
        (made(HfHubHTTPError), "the download failed (HfHubHTTPError: said so); try again"),
        (made(HfHubHTTPError.__bases__[0]), "the download failed ("),
        (OSError(28, "No space left on device"), "the download failed (OSError: [Errno 28] No"),
    ],
)
def test_failed_downloads(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: Exception, expected: str
) -> None:
    monkeypatch.chdir(tmp_path)
    hub(monkeypatch, error)
    with pytest.raises(CheckpointError) as caught:
        find_model("org/name")
    assert "MODEL 'org/name' is no local folder, so it was looked up on" in str(caught.value)
    assert expected in str(caught.value)


def test_offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        CheckpointError, match="cannot be reached and the model is not in the cache"
    ):
        find_model("org/name")
