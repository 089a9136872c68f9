from __future__ import annotations

import errno
import json
import os
import sys
from collections.abc import Iterator
from io import FileIO
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from frugal_bonsai.checkpoint import commit, files, writer
from frugal_bonsai.checkpoint.commit import (
    require_free_space,
    staged_directory,
    write_bytes,
    write_json,
)
from frugal_bonsai.checkpoint.file_layout import plan_shards
from frugal_bonsai.checkpoint.header import read_header
from frugal_bonsai.checkpoint.reader import Checkpoint
from frugal_bonsai.checkpoint.tensor_file import write_tensors
from frugal_bonsai.checkpoint.writer import ShardedWriter
from frugal_bonsai.dtypes import dtype_name
from frugal_bonsai.errors import OutputError

TENSORS = {
    "a": torch.arange(10, dtype=torch.float32).view(5, 2),
    "b": torch.arange(6, dtype=torch.float32),
    "c": torch.tensor(3.5),
    "d": torch.zeros(0, 3),
}
INDEX = "model.safetensors.index.json"


def specs(tensors: dict[str, torch.Tensor]) -> list[tuple[str, str, tuple[int, ...]]]:
    return [(name, dtype_name(t.dtype), tuple(t.shape)) for name, t in tensors.items()]


def write_all(folder: Path, tensors: dict[str, torch.Tensor], max_shard_bytes: int) -> None:
    with ShardedWriter(folder, specs(tensors), max_shard_bytes=max_shard_bytes) as out:
        for name in reversed(tensors):
            out.write(name, tensors[name])
        out.finish()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Make files accept 200 bytes and then report a full disk."""

    class Full(FileIO):
        def write(self, data: bytes) -> int:  # type: ignore[override]
            if self.tell() + len(data) > 200:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return super().write(data)

    monkeypatch.setattr(writer, "FileIO", Full)
    yield


class TestShardedWriter:
    def test_a_single_file_is_byte_for_byte_the_packages(self, tmp_path: Path) -> None:
        write_all(tmp_path, TENSORS, 10**9)
        save_file(TENSORS, tmp_path / "expected", {"format": "pt"})

        assert names(tmp_path) == ["expected", "model.safetensors"]
        written = (tmp_path / "model.safetensors").read_bytes()
        assert written == (tmp_path / "expected").read_bytes()

    def test_mixed_dtypes_are_byte_for_byte_the_packages(self, tmp_path: Path) -> None:
        mixed = {
            "a": torch.arange(3, dtype=torch.bfloat16),
            "b": torch.arange(3, dtype=torch.float64),
            "c": torch.tensor([True, False, True]),
            "d": torch.arange(3, dtype=torch.float32),
        }
        write_all(tmp_path, mixed, 10**9)
        save_file(mixed, tmp_path / "expected", {"format": "pt"})

        written = (tmp_path / "model.safetensors").read_bytes()
        assert written == (tmp_path / "expected").read_bytes()

    def test_shards_fill_in_order(self, tmp_path: Path) -> None:
        write_all(tmp_path, TENSORS, 30)  # a: 40 bytes, b: 24, c: 4, d: 0

        one, two = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
        assert names(tmp_path) == [one, two, INDEX]
        assert json.loads((tmp_path / INDEX).read_text()) == {
            "metadata": {"total_size": 68},
            "weight_map": {"a": one, "b": two, "c": two, "d": two},
        }
        assert list(load_file(tmp_path / one)) == ["a"]
        (tmp_path / "config.json").write_text("{}")
        with Checkpoint.open(tmp_path) as checkpoint:
            for name, value in TENSORS.items():
                assert torch.equal(checkpoint.read(name), value)

    def test_a_large_tensor_gets_a_shard_of_its_own(self) -> None:
        tensors = [("s", "U8", (1,)), ("large", "U8", (50,)), ("t", "U8", (1,)), ("u", "U8", (9,))]
        plan = plan_shards(tensors, 10)
        assert [[name for name, _, _ in shard] for shard in plan] == [["s"], ["large"], ["t", "u"]]

    def test_what_it_tells(self, tmp_path: Path) -> None:
        with ShardedWriter(tmp_path, specs(TENSORS), max_shard_bytes=30) as out:
            assert out.total_bytes == 68
            assert [path.name for path in out.files] == [
                "model-00001-of-00002.safetensors",
                "model-00002-of-00002.safetensors",
            ]

    def test_no_tensors(self, tmp_path: Path) -> None:
        write_all(tmp_path, {}, 10)
        assert load_file(tmp_path / "model.safetensors") == {}

    def test_strided_and_gradient_tensors(self, tmp_path: Path) -> None:
        value = torch.arange(12.0).view(3, 4).t().requires_grad_()
        write_all(tmp_path, {"w": value}, 100)
        assert torch.equal(load_file(tmp_path / "model.safetensors")["w"], value.detach())

    def test_contiguous_tensors_are_not_copied(self) -> None:
        value = torch.arange(4, dtype=torch.int32)
        view = torch.frombuffer(files.data_bytes(value), dtype=torch.int32)
        value[0] = 99
        assert view.tolist() == [99, 1, 2, 3]

    def test_final_names_appear_with_finish(self, tmp_path: Path) -> None:
        with ShardedWriter(tmp_path, specs(TENSORS), max_shard_bytes=30) as out:
            for name, value in TENSORS.items():
                out.write(name, value)
            assert all(name.startswith(".model-") for name in names(tmp_path))
            out.finish()
        assert INDEX in names(tmp_path)

    def test_wrong_writes(self, tmp_path: Path) -> None:
        with ShardedWriter(tmp_path, specs(TENSORS), max_shard_bytes=30) as out:
            with pytest.raises(ValueError, match="tensor 'x' was not announced"):
                out.write("x", torch.zeros(1))
            with pytest.raises(ValueError, match=r"'b': got BF16 \(6,\), announced F32 \(6,\)"):
                out.write("b", torch.zeros(6, dtype=torch.bfloat16))
            with pytest.raises(ValueError, match=r"'b': got F32 \(2, 3\), announced F32 \(6,\)"):
                out.write("b", torch.zeros(2, 3))
            out.write("b", TENSORS["b"])
            with pytest.raises(ValueError, match="'b' was already written"):
                out.write("b", TENSORS["b"])
            with pytest.raises(ValueError, match=r"never written: \['a', 'c', 'd'\]"):
                out.finish()
        assert names(tmp_path) == []
        with pytest.raises(ValueError, match="writer is closed"):
            out.write("a", TENSORS["a"])

    def test_rows_of_several_tensors_in_turn(self, tmp_path: Path) -> None:
        tensors = {"a": torch.randn(5, 3), "b": torch.randn(4).bfloat16(), "c": torch.ones(0, 2)}
        with ShardedWriter(tmp_path, specs(tensors), max_shard_bytes=70) as out:
            out.append("a", tensors["a"][:2])
            out.append("b", tensors["b"][:1])
            with pytest.raises(ValueError, match=r"never written: \['a', 'b', 'c'\]"):
                out.finish()
        assert names(tmp_path) == []
        with ShardedWriter(tmp_path, specs(tensors), max_shard_bytes=70) as out:
            out.append("a", tensors["a"][:2])
            out.append("b", tensors["b"])
            out.append("a", tensors["a"][2:4])
            out.append("a", tensors["a"][4:])
            out.write("c", tensors["c"])
            out.finish()
        found = {
            name: t
            for path in tmp_path.glob("*.safetensors")
            for name, t in load_file(path).items()
        }
        assert found.keys() == tensors.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())

    def test_wrong_rows(self, tmp_path: Path) -> None:
        with ShardedWriter(tmp_path, specs({"a": torch.zeros(5, 3)}), max_shard_bytes=70) as out:
            with pytest.raises(ValueError, match=r"'a': got rows F32 \(1, 4\), announced F32"):
                out.append("a", torch.zeros(1, 4))
            with pytest.raises(ValueError, match=r"'a': got rows BF16"):
                out.append("a", torch.zeros(1, 3, dtype=torch.bfloat16))
            out.append("a", torch.zeros(4, 3))
            with pytest.raises(ValueError, match=r"\(5, 3\), of which 12 bytes are missing"):
                out.append("a", torch.zeros(2, 3))
            with pytest.raises(ValueError, match="'a' was written in part"):
                out.write("a", torch.zeros(5, 3))
            out.append("a", torch.zeros(1, 3))
            with pytest.raises(ValueError, match="'a' was already written"):
                out.append("a", torch.zeros(1, 3))

    def test_a_tensor_copied_from_a_file(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        tensors = {"a": torch.randn(300, 3), "b": torch.randn(7)}
        save_file(tensors, tmp_path / "source")
        entries, _ = read_header(tmp_path / "source")
        (tmp_path / "out").mkdir()
        with ShardedWriter(tmp_path / "out", specs(tensors), max_shard_bytes=10**6) as out:
            with pytest.raises(ValueError, match=r"'b': 3600 bytes for 28, of which 0 are written"):
                out.copy("b", entries["a"])
            with monkeypatch.context() as patched:
                patched.setattr(files, "_PAGE_BYTES", 1)
                patched.setattr(files, "_COPY", None)
                assert not out.copy("a", entries["a"])  # nothing written, to be written
                patched.setattr(files, "_COPY", lambda *_: 0)
                assert not out.copy("a", entries["a"])  # as if the file had become shorter
            if not out.copy("a", entries["a"]):  # Windows, macOS
                out.write("a", tensors["a"])
            with pytest.raises(ValueError, match="'a' was already written"):
                out.copy("a", entries["a"])
            out.write("b", tensors["b"])
            out.finish()
        found = load_file(tmp_path / "out" / "model.safetensors")
        assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())

    def test_a_disk_that_is_full_while_copying(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def full(*_: object) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

        save_file({"a": torch.ones(5)}, tmp_path / "source")
        entries, _ = read_header(tmp_path / "source")
        (tmp_path / "out").mkdir()
        monkeypatch.setattr(files, "_PAGE_BYTES", 1)
        monkeypatch.setattr(files, "_COPY", full)
        announced = [("a", "F32", (5,))]
        with (
            pytest.raises(OutputError, match=r"model\.safetensors: the disk is full"),
            ShardedWriter(tmp_path / "out", announced, max_shard_bytes=10**6) as out,
        ):
            out.copy("a", entries["a"])
        assert names(tmp_path / "out") == []

    def test_wrong_plans(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"given twice: \['a'\]"):
            ShardedWriter(tmp_path, [("a", "U8", (1,))] * 2, max_shard_bytes=1)
        with pytest.raises(ValueError, match="must be positive"):
            ShardedWriter(tmp_path, [], max_shard_bytes=0)
        with pytest.raises(ValueError, match="dtype 'Q4'"):
            ShardedWriter(tmp_path, [("a", "Q4", (1,))], max_shard_bytes=1)
        assert names(tmp_path) == []

    def test_an_exception_leaves_nothing_and_takes_nothing(self, tmp_path: Path) -> None:
        (tmp_path / "model.safetensors").write_text("of the user")
        with (
            pytest.raises(KeyboardInterrupt),
            ShardedWriter(tmp_path, specs(TENSORS), max_shard_bytes=10**9) as out,
        ):
            out.write("a", TENSORS["a"])
            raise KeyboardInterrupt
        assert names(tmp_path) == ["model.safetensors"]
        assert (tmp_path / "model.safetensors").read_text() == "of the user"

    def test_full_disk(self, tmp_path: Path, full_disk: None) -> None:
        with (
            pytest.raises(OutputError) as caught,
            ShardedWriter(tmp_path, [("w", "U8", (1000,))], max_shard_bytes=2000) as out,
        ):
            out.write("w", torch.zeros(1000, dtype=torch.uint8))
        assert str(tmp_path / "model.safetensors") in str(caught.value)
        assert "the disk is full" in str(caught.value)
        assert "free space or write elsewhere" in str(caught.value)
        assert names(tmp_path) == []

    def test_full_disk_at_the_index(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(path: Path, value: object) -> None:
            with commit.output_errors(path):
                raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(writer, "write_json", refuse)
        with pytest.raises(OutputError, match=rf"{INDEX}: the disk is full"):
            write_all(tmp_path, TENSORS, 30)
        assert names(tmp_path) == []

    def test_no_folder(self, tmp_path: Path) -> None:
        with pytest.raises(OutputError, match=r"model.safetensors: cannot be written .*check that"):
            ShardedWriter(tmp_path / "gone", [], max_shard_bytes=1)

    @pytest.mark.skipif(sys.platform == "win32", reason="Windows has no resource module")
    def test_a_limit_that_the_system_sets(self, tmp_path: Path) -> None:
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        value = torch.zeros(3_000_000, dtype=torch.uint8)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, hard))
        try:
            with pytest.raises(OutputError, match=r"disk is full or a size limit was met \(File"):
                write_all(tmp_path, {"w": value}, 10**9)
            with pytest.raises(OutputError, match=r"x: the disk is full or a size limit"):
                write_tensors(tmp_path / "x", {"w": value})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert names(tmp_path) == []


class TestFiles:
    def test_tensors(self, tmp_path: Path) -> None:
        write_tensors(tmp_path / "state", TENSORS, {"round": "3"})
        entries, metadata = read_header(tmp_path / "state")
        assert list(metadata) == ["round", "checksums"] and metadata["round"] == "3"
        save_file(TENSORS, tmp_path / "expected", {"round": "3"})
        expected = read_header(tmp_path / "expected")[0]
        assert list(entries) == list(expected)
        for name, value in load_file(tmp_path / "expected").items():
            assert torch.equal(load_file(tmp_path / "state")[name], value)

    def test_tensors_in_any_order_of_dtypes(self, tmp_path: Path) -> None:
        mixed = {"z": torch.tensor([1, 2], dtype=torch.int8), "a": torch.tensor([2.5])}
        write_tensors(tmp_path / "state", mixed)
        read = load_file(tmp_path / "state")
        assert read["z"].tolist() == [1, 2]
        assert read["a"].tolist() == [2.5]

    def test_bytes_and_json_replace(self, tmp_path: Path) -> None:
        for value in ({"a": 1}, {"é": [1, 2]}):
            write_json(tmp_path / "x", value)
            assert json.loads((tmp_path / "x").read_text(encoding="utf-8")) == value
        write_bytes(tmp_path / "x", b"\0\1")
        assert (tmp_path / "x").read_bytes() == b"\0\1"
        assert names(tmp_path) == ["x"]

    def test_the_old_file_stays_when_writing_fails(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        write_bytes(tmp_path / "x", b"old")

        def fail(descriptor: int) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(os, "fsync", fail)
        with pytest.raises(OutputError, match=r"x: the disk is full"):
            write_bytes(tmp_path / "x", b"new")
        assert names(tmp_path) == ["x"]
        assert (tmp_path / "x").read_bytes() == b"old"

    def test_no_permission(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(self: Path, *_: object) -> None:
            raise PermissionError(errno.EACCES, "Permission denied")

        monkeypatch.setattr(Path, "open", fail)
        with pytest.raises(OutputError, match=r"may not be written .*check the permissions of"):
            write_bytes(tmp_path / "x", b"")

    def test_other_failures_keep_the_systems_text(self, tmp_path: Path) -> None:
        with (
            pytest.raises(OutputError, match=r"cannot be written \(Input/output error\); check"),
            commit.output_errors(tmp_path),
        ):
            raise OSError(errno.EIO, "Input/output error")


class TestStagedDirectory:
    @pytest.mark.parametrize("prepare", ["nothing", "empty", "no parent"])
    def test_appears_when_the_block_ends(self, tmp_path: Path, prepare: str) -> None:
        out = tmp_path / "new" / "out" if prepare == "no parent" else tmp_path / "out"
        if prepare == "empty":
            out.mkdir()
        with staged_directory(out) as staging:
            assert staging.parent == out.parent
            assert staging.name.startswith(".out.partial-")
            (staging / "file").write_text("x")
            assert not out.exists() or not names(out)
        assert names(out) == ["file"]
        assert names(out.parent) == ["out"]

    @pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit, ValueError])
    def test_any_exception_leaves_nothing(self, tmp_path: Path, kind: type[BaseException]) -> None:
        with pytest.raises(kind), staged_directory(tmp_path / "out") as staging:
            (staging / "file").write_text("x")
            raise kind
        assert names(tmp_path) == []

    def test_an_output_that_exists(self, tmp_path: Path) -> None:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "file").write_text("of the user")
        with (
            pytest.raises(OutputError, match=r"out: the output directory exists and is not empty"),
            staged_directory(tmp_path / "out"),
        ):
            raise AssertionError("not reached")
        assert names(tmp_path) == ["out"]
        with (
            pytest.raises(OutputError, match=r"file: exists and is no directory"),
            staged_directory(tmp_path / "out" / "file"),
        ):
            raise AssertionError("not reached")

    def test_an_output_that_appears_meanwhile(self, tmp_path: Path) -> None:
        out = tmp_path / "out"
        with pytest.raises(OutputError, match="not empty"), staged_directory(out):
            out.mkdir()
            (out / "file").write_text("of another")
        assert names(tmp_path) == ["out"]
        assert names(out) == ["file"]

    def test_a_parent_that_is_a_file(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        with (
            pytest.raises(OutputError, match=r"out: .*file is a file, not a folder"),
            staged_directory(tmp_path / "file" / "out"),
        ):
            raise AssertionError("not reached")

    def test_a_parent_without_permission(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(self: Path, *_: object, **__: object) -> None:
            raise PermissionError(errno.EACCES, "Permission denied")

        monkeypatch.setattr(Path, "mkdir", fail)
        with (
            pytest.raises(OutputError, match=r"out: may not be written \(Permission denied\)"),
            staged_directory(tmp_path / "out"),
        ):
            raise AssertionError("not reached")


def test_free_space(tmp_path: Path) -> None:
    require_free_space(tmp_path / "not" / "yet", 1, "the output")
    with pytest.raises(OutputError) as caught:
        require_free_space(tmp_path / "not" / "yet", 2**60, "the output")
    text = str(caught.value)
    assert "the output needs 1048576.00 TiB, the disk has " in text
    assert "another disk" in text
