"""Headers without weights: local, from the cache, or downloaded."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import (
    LocalEntryNotFoundError,
    NotASafetensorsRepoError,
    RemoteEntryNotFoundError,
)

from frugal_bonsai.checkpoint.locate import find_model
from frugal_bonsai.checkpoint.reader import Checkpoint
from frugal_bonsai.checkpoint.remote import open_headers
from frugal_bonsai.errors import CheckpointError, UnsupportedModelError

EXAMPLE = find_model("example")


class Hub:
    """Answer in place of the network, and count the requests."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, cached: Path | None) -> None:
        self.asked: list[str] = []
        self._cached = cached
        self.metadata: Any = self._headers_of_the_example()
        for name in ("snapshot_download", "hf_hub_download", "get_safetensors_metadata"):
            monkeypatch.setattr(huggingface_hub, name, getattr(self, name))

    def _headers_of_the_example(self) -> Any:
        def info(entry: Any) -> Any:
            offsets = (entry.start, entry.end)
            return SimpleNamespace(dtype=entry.dtype, shape=list(entry.shape), data_offsets=offsets)

        with Checkpoint.open(EXAMPLE) as checkpoint:
            tensors = {name: info(entry) for name, entry in checkpoint.tensors.items()}
        return SimpleNamespace(
            files_metadata={"model.safetensors": SimpleNamespace(tensors=tensors)}
        )

    def snapshot_download(self, repo_id: str, *, local_files_only: bool) -> str:
        assert local_files_only
        if self._cached is None:
            error = LocalEntryNotFoundError.__new__(LocalEntryNotFoundError)
            raise error
        return str(self._cached)

    def hf_hub_download(self, repo_id: str, filename: str) -> str:
        self.asked.append(filename)
        return str(EXAMPLE / filename)

    def get_safetensors_metadata(self, repo_id: str) -> Any:
        self.asked.append("headers")
        if isinstance(self.metadata, Exception):
            raise self.metadata
        return self.metadata


def test_what_is_here_is_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub(monkeypatch, cached=None)
    with open_headers("example") as found, open_headers(str(EXAMPLE)) as same:
        assert found.shapes == same.shapes and found.config["model_type"] == "llama"
    assert hub.asked == []


def test_what_is_in_the_cache_is_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub(monkeypatch, cached=EXAMPLE)
    with open_headers("org/name") as found:
        assert found.folder == EXAMPLE
    assert hub.asked == []


def test_of_a_hub_model_only_config_and_headers_are_fetched(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hub = Hub(monkeypatch, cached=None)
    with open_headers("org/name") as found, Checkpoint.open(EXAMPLE) as whole:
        assert found.config == whole.config
        assert found.shapes == whole.shapes and found.weight_bytes == whole.weight_bytes
        assert {e.dtype for e in found.tensors.values()} == {"BF16"}
    assert hub.asked == ["config.json", "headers"]


def test_a_download_that_was_stopped_half_way_does_not_count(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_bytes((EXAMPLE / "config.json").read_bytes())
    hub = Hub(monkeypatch, cached=tmp_path)
    with open_headers("org/name") as found:
        assert found.tensors
    assert hub.asked == ["config.json", "headers"]


def test_a_repository_without_safetensors(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub(monkeypatch, cached=None)
    hub.metadata = NotASafetensorsRepoError("'org/name' is not a safetensors repo")
    names = ["config.json", "pytorch_model.bin"]
    monkeypatch.setattr(huggingface_hub, "list_repo_files", lambda _: names)
    with pytest.raises(CheckpointError, match=r"no safetensors.*pytorch_model.*save_pretrained"):
        open_headers("org/name")
    names.append("m-Q4_K_M.gguf")
    with pytest.raises(CheckpointError, match=r"no safetensors[^$]*hf download org/name m-Q4_K_M"):
        open_headers("org/name")


@pytest.mark.parametrize(
    ("files", "pieces"),
    [
        ({"adapter_config.json": '{"base_model_name_or_path": "org/base"}'}, ["org/base", "merge"]),
        (
            {"b-q4.gguf": "GGUF", "a-q4.gguf": "GGUF"},
            ["GGUF files (a-q4.gguf, b-q4.gguf)", "hf download org/name a"],
        ),
        ({"model_index.json": "{}", "vae/config.json": "{}"}, ["diffusion pipeline"]),
        ({"weights.bin": ""}, ["no config.json", "weights.bin"]),
    ],
    ids=["adapter", "gguf", "diffusion", "unknown"],
)
def test_a_repository_without_a_config_is_recognised(
    files: dict[str, str], pieces: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    Hub(monkeypatch, cached=None)

    def download(_: str, name: str) -> str:
        if name not in files:
            raise RemoteEntryNotFoundError.__new__(RemoteEntryNotFoundError)
        return str(tmp_path / name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub, "list_repo_files", lambda _: list(files))
    with pytest.raises(CheckpointError if "vae" not in str(files) else UnsupportedModelError) as e:
        open_headers("org/name")
    for piece in ["org/name", *pieces]:
        assert piece in str(e.value)


def test_what_is_no_model() -> None:
    with pytest.raises(CheckpointError, match="neither a local folder"):
        open_headers("no-such-folder")
