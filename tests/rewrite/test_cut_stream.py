"""The pieces in which tensors are cut: their content and their memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from frugal_bonsai.checkpoint.files import ReadFile
from frugal_bonsai.checkpoint.header import read_header
from frugal_bonsai.checkpoint.reader import Checkpoint
from frugal_bonsai.errors import CheckpointError
from frugal_bonsai.rewrite import cut_stream
from frugal_bonsai.rewrite.cut_stream import TensorCut, stream_cuts

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.uint8]


def open_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> Checkpoint:
    save_file(tensors, path)
    return Checkpoint(path.parent, {}, read_header(path)[0])


def joined(checkpoint: Checkpoint, cuts: list[TensorCut]) -> dict[str, torch.Tensor]:
    pieces: dict[str, list[torch.Tensor]] = {}
    for name, rows in stream_cuts(checkpoint, cuts):
        assert rows.is_contiguous()
        pieces.setdefault(name, []).append(rows.clone())
    return {name: torch.cat(rows) if rows[0].dim() else rows[0] for name, rows in pieces.items()}


def expected(tensor: torch.Tensor, indices: dict[int, torch.Tensor]) -> torch.Tensor:
    for axis, taken in indices.items():
        shape = [1 if at == axis else extent for at, extent in enumerate(tensor.shape)]
        # The index -1 is the last one: zeros are put behind the tensor.
        tensor = torch.cat([tensor, tensor.new_zeros(shape)], dim=axis).index_select(
            axis, torch.where(taken < 0, tensor.shape[axis], taken)
        )
    return tensor


def some(extent: int, generator: torch.Generator, zeros: int) -> torch.Tensor:
    """Draw ascending indices with runs of zeros before, between and after them."""
    kept = (torch.rand(extent, generator=generator) < 0.5).nonzero().flatten()
    places = torch.randint(0, len(kept) + 1, (3,), generator=generator).sort().values.tolist()
    parts = torch.tensor_split(kept, places)
    gap = torch.full((zeros,), -1)
    return torch.cat([parts[0], gap, parts[1], gap, parts[2], parts[3], gap])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("piece_bytes", [1, 64, 1000, 2**23])
@pytest.mark.parametrize("zeros", [0, 5])
def test_pieces_make_the_cut_tensor(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    piece_bytes: int,
    zeros: int,
) -> None:
    monkeypatch.setattr(cut_stream, "PIECE_BYTES", piece_bytes)
    generator = torch.Generator().manual_seed(piece_bytes + zeros)
    shapes = {"a": (17, 23), "b": (40,), "c": (5, 7, 6), "d": (1, 9), "e": (33, 2), "f": ()}
    tensors = {
        name: torch.randint(1, 100, shape, generator=generator).to(dtype)
        for name, shape in shapes.items()
    }
    axes: dict[str, tuple[int, ...]] = {
        "a": (0, 1), "b": (0,), "c": (1, 2), "d": (1,), "e": (0,), "f": ()
    }  # fmt: skip
    indices = {
        name: {axis: some(shapes[name][axis], generator, zeros) for axis in chosen}
        for name, chosen in axes.items()
    }
    cuts = [TensorCut(name, taken) for name, taken in indices.items()]
    cuts.append(TensorCut("a", {}))  # as it is
    with open_tensors(tmp_path / "t.safetensors", tensors) as checkpoint:
        found = joined(checkpoint, cuts[:-1])
        assert torch.equal(joined(checkpoint, cuts[-1:])["a"], tensors["a"])
    assert list(found) == list(indices)
    for name, taken in indices.items():
        assert torch.equal(found[name], expected(tensors[name], taken)), name


def test_a_tensor_of_which_nothing_stays_but_zeros(tmp_path: Path) -> None:
    with open_tensors(tmp_path / "t.safetensors", {"a": torch.ones(4, 3)}) as checkpoint:
        found = joined(checkpoint, [TensorCut("a", {0: torch.full((6,), -1)})])
    assert torch.equal(found["a"], torch.zeros(6, 3))


def test_no_read_is_larger_than_a_piece_and_removed_rows_are_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cut_stream, "PIECE_BYTES", 1024)
    sizes: list[int] = []
    read_into = ReadFile.read_into

    def spy(self: ReadFile, view: Any, *rest: Any) -> None:
        sizes.append(len(view))
        read_into(self, view, *rest)

    monkeypatch.setattr(ReadFile, "read_into", spy)
    tensor = torch.randn(1000, 16)
    with open_tensors(tmp_path / "t.safetensors", {"a": tensor}) as checkpoint:
        sizes.clear()
        last = torch.arange(900, 1000)
        assert torch.equal(joined(checkpoint, [TensorCut("a", {0: last})])["a"], tensor[900:])
    assert max(sizes) == 1024 and sum(sizes) == 100 * 64


def test_the_reader_is_at_most_two_pieces_ahead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cut_stream, "PIECE_BYTES", 64)
    tensor = torch.randn(50, 16)
    with open_tensors(tmp_path / "t.safetensors", {"a": tensor}) as checkpoint:
        began: list[int] = []
        rows_into = checkpoint.read_rows_into

        def spy(name: str, start: int, *rest: Any) -> None:
            began.append(start)
            rows_into(name, start, *rest)

        monkeypatch.setattr(checkpoint, "read_rows_into", spy)
        for at, (_, rows) in enumerate(stream_cuts(checkpoint, [TensorCut("a", {})])):
            assert len(began) <= at + 2
            assert torch.equal(rows, tensor[at : at + 1])


def test_a_file_that_has_become_shorter(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    with open_tensors(path, {"a": torch.randn(64, 64)}) as checkpoint:
        path.write_bytes(path.read_bytes()[:-100])
        with pytest.raises(CheckpointError, match="tensor 'a': the file ends"):
            joined(checkpoint, [TensorCut("a", {})])


def test_who_stops_early_is_not_kept_waiting(tmp_path: Path) -> None:
    with open_tensors(tmp_path / "t.safetensors", {"a": torch.randn(64, 64)}) as checkpoint:
        stream = stream_cuts(checkpoint, [TensorCut("a", {})] * 5)
        next(stream)
        stream.close()  # type: ignore[attr-defined]
