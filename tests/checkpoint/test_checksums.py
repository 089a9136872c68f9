"""A bit that flips in a file of this program is found; nothing wrong is used."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny_models import Tiny, random_mask, tiny_llama

from frugal_bonsai.adaptation.teacher_cache import CHECKS, TeacherCache, window_checksums
from frugal_bonsai.bonsai.round_log import RoundLog
from frugal_bonsai.bonsai.state import PruneState, StateFolder
from frugal_bonsai.checkpoint.header import read_header
from frugal_bonsai.checkpoint.tensor_file import open_tensors, read_tensor, write_tensors
from frugal_bonsai.errors import CheckpointError, OutputError, StateError
from frugal_bonsai.stream.disk_spill import DiskSpill
from frugal_bonsai.stream.store import LayerStore, build_head_store, build_store

CPU = torch.device("cpu")


def flip(path: Path, at: int, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1 << bit
    path.write_bytes(data)


@pytest.fixture
def tiny(tmp_path: Path) -> Tiny:
    return tiny_llama(tmp_path / "m")


def test_every_bit_of_a_file_counts(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    tensors = {"a": torch.arange(5, dtype=torch.float64), "b": torch.arange(3).half()}
    write_tensors(path, tensors, {"step": "17"})
    whole = path.read_bytes()
    with open_tensors(path) as file:
        assert all(torch.equal(file.read(name), tensors[name]) for name in tensors)
    unnoticed = 0
    for at in range(len(whole)):
        flip(path, at, at % 8)
        try:
            with open_tensors(path) as file:
                assert all(torch.equal(file.read(name), tensors[name]) for name in tensors)
            assert read_header(path)[1]["step"] == "17"
            unnoticed += 1
        except CheckpointError as error:
            assert str(path) in str(error)
        path.write_bytes(whole)
    assert unnoticed <= len("checksums")  # the key itself: such a file looks like an older one


def test_files_without_checksums_are_read(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_tensors(path, {"a": torch.ones(2)})
    _, metadata = read_header(path)
    path.write_bytes(path.read_bytes().replace(b"checksums", b"something"))
    assert len(metadata["checksums"]) == 32 and read_tensor(path, "a").tolist() == [1.0, 1.0]


def test_a_store_is_compared_at_its_first_reading(tiny: Tiny, tmp_path: Path) -> None:
    folder = tmp_path / "store"
    store = build_store(folder, tiny.checkpoint, tiny.spec, weights="int8")
    buffer = torch.empty(max(map(store.layer_bytes, range(3))), dtype=torch.uint8)
    path = folder / "layer_00001.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 4]))
    store.read(0, buffer)
    with pytest.raises(CheckpointError, match=r"layer_00001\.safetensors: tensor .* checksum"):
        store.read(1, buffer)
    path.write_bytes(whole)
    store.read(1, buffer)
    flip(path, len(whole) - 1)
    store.read(1, buffer)  # from the page cache, which is memory
    store._drop_behind = True  # a store that is larger is read from the disk each time
    with pytest.raises(CheckpointError, match="differs from its checksum"):
        store.read(1, buffer)
    path.write_bytes(whole[:-10])
    with pytest.raises(CheckpointError, match=r"layer_00001\.safetensors: .*truncated"):
        LayerStore(folder, 3)


def test_a_head_store_is_compared(tiny: Tiny, tmp_path: Path) -> None:
    store = build_head_store(tmp_path / "head", tiny.checkpoint, tiny.spec, rows=30)
    flip(tmp_path / "head/layer_00001.safetensors", -3)
    buffer = torch.empty(store.layer_bytes(0), dtype=torch.uint8)
    store.read(0, buffer)
    with pytest.raises(CheckpointError, match=r"layer_00001\.safetensors: tensor 'weight'"):
        store.read(1, buffer)


def test_hidden_states_on_disk_are_compared(tmp_path: Path) -> None:
    spill = DiskSpill(4, 3, 5, device=CPU, dtype=torch.float32, folder=tmp_path)
    values = torch.rand(4, 3, 5)
    spill.write(slice(0, 3), values[:3])
    spill.write(slice(3, 4), values[3:])
    assert torch.equal(spill.read(slice(0, 4)), values)
    spill._file.seek(2 * 3 * 5 * 4 + 7)
    spill._file.write(b"\xff")
    assert torch.equal(spill.read(slice(0, 2)), values[:2])
    with pytest.raises(OutputError, match="hidden states of window 2 come back from the disk"):
        spill.read(slice(1, 4))
    spill._file.truncate(70)
    with pytest.raises(OutputError, match="ends early"):
        spill.read(slice(1, 4))


def test_a_state_is_compared(tiny: Tiny, tmp_path: Path) -> None:
    folder = StateFolder(tmp_path, {"a": 1})
    folder.save(PruneState(mask=random_mask(tiny.spec), forward_tokens=1234))
    path = tmp_path / "state.json"
    saved = json.loads(path.read_text())
    path.write_text(path.read_text().replace("1234", "1235"))
    with pytest.raises(StateError, match=r"state\.json: is damaged \(it differs from its checksum"):
        folder.load(tiny.spec.table)
    del saved["checksum"]  # of an earlier version
    path.write_text(json.dumps(saved))
    assert folder.load(tiny.spec.table).forward_tokens == 1234


def test_a_line_of_a_log_is_compared(tmp_path: Path) -> None:
    path = tmp_path / "round.jsonl"
    log = RoundLog(path)
    log.append("a", [0.25], 4)
    log.append("a", [0.5], 4)
    path.write_text(path.read_text().replace("0.5", "0.7"))
    assert RoundLog(path).find("a").values == [0.25]
    path.write_text('{"key": "a", "values": [3.0], "tokens": 1}\n')  # of an earlier version
    assert RoundLog(path).find("a").values == [3.0]


def test_a_teachers_answers_are_compared(tmp_path: Path) -> None:
    answers = {
        "log_probabilities": -torch.rand(3, 4, 2).half(),
        "ids": torch.randint(9, (3, 4, 2), dtype=torch.int32),
        "rest": torch.rand(3, 4),
    }
    answers[CHECKS] = window_checksums(answers)
    path = tmp_path / "windows_000000.safetensors"
    write_tensors(path, answers)
    shards = [{"file": path.name, "windows": 3}]
    (tmp_path / "teacher.json").write_text(
        json.dumps({"version": 1, "identity": {"layers": []}, "shards": shards})
    )
    entry = read_header(path)[0]["ids"]
    flip(path, entry.start + entry.size_bytes // 2)
    cache = TeacherCache(tmp_path, {"layers": []})
    assert torch.equal(cache.read([0, 2]).top.rest_T, answers["rest"][[0, 2]])
    with pytest.raises(CheckpointError, match=r"windows_000000.*answers for window 1 differ"):
        cache.read([0, 1])
    cache.close()
