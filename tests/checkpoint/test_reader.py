from __future__ import annotations

import json
import math
import subprocess
import sys
import threading
import tracemalloc
from pathlib import Path

import pytest
import torch
from hostile.files import file_bytes, tensor
from hostile.folders import FOLDERS, GOOD_FOLDER, INDEX, ONE, TWO, files
from safetensors.torch import load_file, save_file

from frugal_bonsai.checkpoint import files as reading
from frugal_bonsai.checkpoint.finite import read_finite, require_finite
from frugal_bonsai.checkpoint.reader import Checkpoint
from frugal_bonsai.dtypes import DTYPE_BYTES, TORCH_NAMES, dtype_name, torch_dtype
from frugal_bonsai.errors import CheckpointError

TENSORS = {
    "rows": torch.arange(60, dtype=torch.float32).view(10, 2, 3),
    "half": torch.arange(12, dtype=torch.bfloat16).view(4, 3),
    "scalar": torch.tensor(7, dtype=torch.int64),
    "none": torch.zeros(0, 5, dtype=torch.float16),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Write a small checkpoint with the safetensors package."""
    save_file(TENSORS, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    return tmp_path


@pytest.fixture(params=["preadv", "seek"])
def platform(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Test with positioned reads, and with seek and read as on Windows."""
    if request.param == "seek":
        monkeypatch.setattr(reading, "_PREADV", None)
        monkeypatch.setattr(reading, "_FADVISE", None)
    elif reading._PREADV is None:
        pytest.skip("this system has no preadv")
    return str(request.param)


def test_opens_from_headers_alone(folder: Path) -> None:
    with Checkpoint.open(folder) as checkpoint:
        assert checkpoint.folder == folder
        assert checkpoint.config == {"model_type": "llama"}
        assert checkpoint.shapes == {name: tuple(t.shape) for name, t in TENSORS.items()}
        assert checkpoint.weight_bytes == 60 * 4 + 12 * 2 + 8
        assert {e.dtype for e in checkpoint.tensors.values()} == {"F32", "BF16", "I64", "F16"}


@pytest.mark.parametrize("name", TENSORS)
def test_reads_what_the_package_reads(folder: Path, platform: str, name: str) -> None:
    with Checkpoint.open(folder) as checkpoint:
        read = read_finite(checkpoint, name)
    assert read.dtype == TENSORS[name].dtype
    assert read.shape == TENSORS[name].shape
    assert torch.equal(read, load_file(folder / "model.safetensors")[name])


def test_reads_in_parts(folder: Path, platform: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "MAX_READ_BYTES", 7)
    with Checkpoint.open(folder) as checkpoint:
        assert torch.equal(checkpoint.read("rows"), TENSORS["rows"])


def test_own_memory(folder: Path) -> None:
    with Checkpoint.open(folder) as checkpoint:
        checkpoint.read("rows").zero_()
        assert torch.equal(checkpoint.read("rows"), TENSORS["rows"])


def test_read_into_is_a_view_of_the_buffer(folder: Path, platform: str) -> None:
    buffer = torch.full((300,), 255, dtype=torch.uint8)
    with Checkpoint.open(folder) as checkpoint:
        read = checkpoint.read_into("rows", buffer)
        assert torch.equal(read, TENSORS["rows"])
        assert read.data_ptr() == buffer.data_ptr()
        assert (buffer[240:] == 255).all()
        assert torch.equal(checkpoint.read_into("half", buffer), TENSORS["half"])
        assert torch.equal(checkpoint.read_into("half", buffer[8:]), TENSORS["half"])


@pytest.mark.parametrize(
    ("buffer", "text"),
    [
        (torch.empty(10, dtype=torch.uint8), "buffer has 10 bytes, tensor 'rows' 240"),
        (torch.empty(300, dtype=torch.int8), "contiguous one-dimensional uint8"),
        (torch.empty(2, 300, dtype=torch.uint8), "contiguous one-dimensional uint8"),
        (torch.empty(600, dtype=torch.uint8)[::2], "contiguous one-dimensional uint8"),
        (torch.empty(300, dtype=torch.uint8)[1:], "buffer is not aligned for F32"),
    ],
)
def test_unfit_buffers(folder: Path, buffer: torch.Tensor, text: str) -> None:
    with Checkpoint.open(folder) as checkpoint, pytest.raises(ValueError, match=text):
        checkpoint.read_into("rows", buffer)


def test_rows(folder: Path, platform: str) -> None:
    with Checkpoint.open(folder) as checkpoint:
        assert torch.equal(checkpoint.read_rows("rows", 3, 7), TENSORS["rows"][3:7])
        assert checkpoint.read_rows("rows", 4, 4).shape == (0, 2, 3)
        with pytest.raises(IndexError, match="rows 8:11 of 'rows', which has 10"):
            checkpoint.read_rows("rows", 8, 11)
        with pytest.raises(IndexError, match="'scalar' is a scalar"):
            checkpoint.read_rows("scalar", 0, 1)


@pytest.mark.parametrize("rows", [[], [3], [9, 0, 4, 5, 6, 0, 9], list(range(10)), [2] * 20])
def test_gathered_rows(folder: Path, platform: str, rows: list[int]) -> None:
    rows_K = torch.tensor(rows, dtype=torch.int64)
    with Checkpoint.open(folder) as checkpoint:
        assert torch.equal(checkpoint.gather_rows("rows", rows_K), TENSORS["rows"][rows_K])


@pytest.mark.parametrize("rows", [[0, 10], [-1, 2]])
def test_gathered_rows_out_of_range(folder: Path, rows: list[int]) -> None:
    with Checkpoint.open(folder) as checkpoint, pytest.raises(IndexError, match="which has 10"):
        checkpoint.gather_rows("rows", torch.tensor(rows))


def test_neighbouring_rows_are_one_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    inner = reading.ReadFile.read_into

    def counted(self: reading.ReadFile, view: memoryview, start: int, what: str) -> None:
        sizes.append(len(view) // 24)
        inner(self, view, start, what)

    monkeypatch.setattr(reading.ReadFile, "read_into", counted)
    with Checkpoint.open(folder) as checkpoint:
        checkpoint.gather_rows("rows", torch.tensor([5, 1, 4, 9, 1, 0, 3]))
    assert sizes == [2, 3, 1]


def test_threads_read_side_by_side(folder: Path, platform: str) -> None:
    wrong: list[str] = []

    def sweep(checkpoint: Checkpoint, name: str) -> None:
        for _ in range(200):
            if not torch.equal(checkpoint.read(name), TENSORS[name]):
                wrong.append(name)

    with Checkpoint.open(folder) as checkpoint:
        threads = [threading.Thread(target=sweep, args=(checkpoint, name)) for name in TENSORS]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


def test_closed(folder: Path) -> None:
    checkpoint = Checkpoint.open(folder)
    checkpoint.read("scalar")
    checkpoint.close()
    checkpoint.close()
    with pytest.raises(ValueError, match="is closed"):
        checkpoint.read("scalar")


def test_unknown_tensor(folder: Path) -> None:
    with (
        Checkpoint.open(folder) as checkpoint,
        pytest.raises(
            CheckpointError, match=r"has no tensor 'x' \(it has 4, the first is 'scalar'"
        ),
    ):
        checkpoint.read("x")


def test_file_cut_after_it_was_opened(folder: Path, platform: str) -> None:
    checkpoint = Checkpoint.open(folder)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[: checkpoint.tensors["rows"].end - 5])
    with pytest.raises(CheckpointError, match=r"tensor 'rows': the file ends .* 5 of 240 bytes"):
        checkpoint.read("rows")


def test_file_gone_after_it_was_opened(folder: Path) -> None:
    checkpoint = Checkpoint.open(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model.safetensors: cannot be opened .*check that"):
        checkpoint.read("rows")


def test_failing_disk(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(reading, "_PREADV", fail)
    with (
        Checkpoint.open(folder) as checkpoint,
        pytest.raises(
            CheckpointError, match=r"'rows': cannot be read at byte .*Input/output error"
        ),
    ):
        checkpoint.read("rows")


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16", "F64", "F8_E4M3", "F8_E5M2"])
def test_values_that_are_not_finite(tmp_path: Path, dtype: str) -> None:
    values = torch.ones(3, 4)
    values[0, 1] = values[2, 3] = float("nan")
    if dtype != "F8_E4M3":  # has no infinity
        values[1, 1] = float("-inf")
    bad = 2 if dtype == "F8_E4M3" else 3
    save_file({"w": values.to(torch_dtype(dtype))}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")

    with Checkpoint.open(tmp_path) as checkpoint:
        checkpoint.read("w")
        text = rf"model.safetensors: tensor 'w': {bad} of 12 values are NaN or"
        with pytest.raises(CheckpointError, match=text):
            read_finite(checkpoint, "w")
        with pytest.raises(CheckpointError, match=text):
            require_finite(checkpoint, ["w"])


def test_values_of_all_shapes_are_checked(tmp_path: Path) -> None:
    tensors = {"scalar": torch.tensor(2.0), "empty": torch.ones(0, 3), "row": torch.ones(4)}
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    with Checkpoint.open(tmp_path) as checkpoint:
        require_finite(checkpoint, tensors)
    save_file({"scalar": torch.tensor(math.nan)}, tmp_path / "model.safetensors")
    with (
        Checkpoint.open(tmp_path) as checkpoint,
        pytest.raises(CheckpointError, match=r"'scalar': 1 of 1 values"),
    ):
        require_finite(checkpoint, ["scalar"])


def test_dtype_names_go_both_ways() -> None:
    assert TORCH_NAMES.keys() == DTYPE_BYTES.keys()
    for name, size_bytes in DTYPE_BYTES.items():
        assert dtype_name(torch_dtype(name)) == name
        assert torch_dtype(name).itemsize == size_bytes
    with pytest.raises(ValueError, match=r"safetensors has no dtype for torch.complex64"):
        dtype_name(torch.complex64)


def test_sharded(tmp_path: Path) -> None:
    GOOD_FOLDER(tmp_path)
    with Checkpoint.open(tmp_path) as checkpoint:
        assert list(checkpoint.tensors) == ["a", "b"]
        assert checkpoint.tensors["b"].file == tmp_path / TWO
        assert torch.equal(checkpoint.read("b"), torch.zeros(2))


def test_shards_may_be_links_as_in_the_hubs_cache(tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    GOOD_FOLDER(snapshot)
    try:
        for name in (ONE, TWO):
            (snapshot / name).rename(tmp_path / "blobs" / name)
            (snapshot / name).symlink_to(tmp_path / "blobs" / name)
    except OSError:
        pytest.skip("links need a privilege here")
    with Checkpoint.open(snapshot) as checkpoint:
        assert checkpoint.shapes == {"a": (2,), "b": (2,)}


def test_single_file_goes_before_an_index(tmp_path: Path) -> None:
    GOOD_FOLDER(tmp_path)
    files({"model.safetensors": file_bytes({"z": tensor()}, bytes(8))})(tmp_path)
    with Checkpoint.open(tmp_path) as checkpoint:
        assert list(checkpoint.tensors) == ["z"]


@pytest.mark.parametrize("name", FOLDERS)
def test_each_way_a_folder_can_be_wrong_has_its_own_text(tmp_path: Path, name: str) -> None:
    fill, expected = FOLDERS[name]
    fill(tmp_path)

    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(tmp_path)

    assert str(tmp_path) in str(caught.value)
    for piece in expected:
        assert piece in str(caught.value)


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="gone: no such folder"):
        Checkpoint.open(tmp_path / "gone")
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"file: is a file, expected the folder"):
        Checkpoint.open(tmp_path / "file")
    with pytest.raises(CheckpointError, match=r"cannot be opened|no such folder"):
        Checkpoint.open(tmp_path / ("x" * 5000))


def test_the_line_that_converts_pickles_is_python(tmp_path: Path) -> None:
    FOLDERS["pickled weights"][0](tmp_path)
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(tmp_path)
    line = str(caught.value).splitlines()[-1].strip()
    assert line.startswith('python -c "')
    compile(line.removeprefix('python -c "').removesuffix('"'), "line", "exec")


def test_reading_into_a_buffer_allocates_nothing(folder: Path) -> None:
    buffer = torch.empty(240, dtype=torch.uint8)
    with Checkpoint.open(folder) as checkpoint:
        checkpoint.read_into("rows", buffer)
        tracemalloc.start()
        for _ in range(50):
            checkpoint.read_into("rows", buffer)
        peak_bytes = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak_bytes < 20_000  # views and error texts, nothing that grows with reads


MEMORY_CODE = """
import resource, sys
from pathlib import Path
import torch
from frugal_bonsai.checkpoint.reader import Checkpoint
def peak_bytes():
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else used * 1024
buffer = torch.ones(60_000_000, dtype=torch.uint8)
with Checkpoint.open(Path(sys.argv[1])) as checkpoint:
    before = peak_bytes()
    for name in checkpoint.tensors:
        tensor = checkpoint.read_into(name, buffer)
        assert tensor.shape == (30_000, 1_000) and int(tensor[-1, -1]) == 0
    checkpoint.gather_rows(name, torch.arange(0, 30_000, 7))
    print(peak_bytes() - before)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no resource module")
def test_memory_does_not_follow_the_file(tmp_path: Path) -> None:
    size_bytes = 60_000_000
    header = {
        f"w{i}": {
            "dtype": "BF16",
            "shape": [30_000, 1_000],
            "data_offsets": [i * size_bytes, (i + 1) * size_bytes],
        }
        for i in range(5)
    }
    start = file_bytes(header)
    with (tmp_path / "model.safetensors").open("wb") as file:  # sparse: 300 MB that lie nowhere
        file.write(start)
        file.truncate(len(start) + 5 * size_bytes)
    (tmp_path / "config.json").write_text(json.dumps({}))

    done = subprocess.run(
        [sys.executable, "-c", MEMORY_CODE, str(tmp_path)],
        check=True,
        capture_output=True,
        text=True,
    )

    # 4,286 rows of 2,000 bytes, twice, and what the allocator rounds up.
    assert int(done.stdout) < 32_000_000


def test_real_models(shared: Path) -> None:
    for folder in sorted((shared / "models").iterdir()):
        expected = load_file(folder / "model.safetensors")
        with Checkpoint.open(folder) as checkpoint:
            assert checkpoint.tensors.keys() == expected.keys()
            for name, value in expected.items():
                assert torch.equal(read_finite(checkpoint, name), value)
            assert INDEX not in {entry.file.name for entry in checkpoint.tensors.values()}
