"""Working copy of a model's layers: one file per layer, row-wise int8 or native.

In: a checkpoint, a keep mask and refit tensors. Out: files, each read sequentially in one pass.
Removed units are left out, so that later rounds read and compute less. A store can be built again
from checkpoint, mask and refits at any time.

Memory: building holds one layer as stored and one tensor (on the accelerator too, where it
quantises); reading holds nothing. A store that fits into free memory stays in the page cache; a
larger one is dropped from the cache behind the reader.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from frugal_bonsai.checkpoint.commit import output_errors
from frugal_bonsai.checkpoint.files import ReadFile, tensor_bytes
from frugal_bonsai.checkpoint.finite import read_finite
from frugal_bonsai.checkpoint.header import read_header
from frugal_bonsai.checkpoint.page_cache import fits_page_cache, free_memory_bytes
from frugal_bonsai.checkpoint.reader import Checkpoint
from frugal_bonsai.checkpoint.tensor_file import (
    read_checksums,
    require_checksum,
    write_tensors,
)
from frugal_bonsai.dtypes import torch_dtype
from frugal_bonsai.errors import CheckpointError, OptionError
from frugal_bonsai.int8 import quantise_rows
from frugal_bonsai.model.biases import added_biases
from frugal_bonsai.model.cut import Refit, cut_tensor, slices_by_tensor
from frugal_bonsai.model.drop import dropped_expert_tensors
from frugal_bonsai.model.family import ModelSpec
from frugal_bonsai.model.units import KeepMask
from frugal_bonsai.progress import Progress
from frugal_bonsai.stream.source import HEAD_WEIGHT, Record, head_spans

if TYPE_CHECKING:
    import torch

INT8, NATIVE = "int8", "native"
_SCALES = ".scales"


class LayerStore:
    """The layer files of one folder.

    Attributes:
        folder: the folder.

    Raises:
        CheckpointError: a layer file is missing or damaged.
    """

    def __init__(self, folder: Path, layers: int) -> None:
        self.folder = folder
        self._files: list[ReadFile] = []
        self._records: list[tuple[Record, ...]] = []
        self._spans: list[tuple[int, int]] = []
        self._checks: list[dict[str, tuple[int, int, str]]] = []
        self._checked: set[int] = set()
        for layer in range(layers):
            path = _layer_file(folder, layer)
            records, span = _lay_out(path)
            self._files.append(ReadFile(path))
            self._records.append(records)
            self._spans.append(span)
            self._checks.append(_checks(path, span[0]))
        size = sum(end - start for start, end in self._spans)
        self._drop_behind = drop_behind = not fits_page_cache(size, free_memory_bytes())
        for file in self._files:
            file.drop_behind = drop_behind

    @property
    def layers(self) -> int:
        """Number of layers."""
        return len(self._files)

    def layer_bytes(self, layer: int) -> int:
        """Return the size of one layer as stored."""
        start, end = self._spans[layer]
        return end - start

    def records(self, layer: int) -> tuple[Record, ...]:
        """Return the place of each of a layer's tensors in the buffer."""
        return self._records[layer]

    def announce(self, layer: int) -> None:
        """Ask the system to read a layer's file in the background."""
        start, end = self._spans[layer]
        self._files[layer].advise_soon(start, end - start)

    def read(self, layer: int, buffer: torch.Tensor) -> None:
        """Read a whole layer sequentially into a uint8 CPU buffer.

        Its bytes are compared with their checksums: at the first reading, and at every one if
        the store does not stay in the page cache, so that they come from the disk.

        Raises:
            CheckpointError: the disk fails, or the bytes are not those that were written.
        """
        start, end = self._spans[layer]
        file, view = self._files[layer], tensor_bytes(buffer[: end - start])
        file.advise_sequential(start, end - start)
        file.read_into(view, start, f"layer {layer}")
        if self._drop_behind or layer not in self._checked:
            for name, (first, last, expected) in self._checks[layer].items():
                require_checksum(file.path, name, view[first:last], expected)
            self._checked.add(layer)

    def close(self) -> None:
        """Close the files."""
        for file in self._files:
            file.close()


def build_store(
    folder: Path,
    checkpoint: Checkpoint,
    spec: ModelSpec,
    *,
    weights: str,
    mask: KeepMask | None = None,
    refit: Refit | None = None,
    device: torch.device | None = None,
    check_finite: bool = False,
    progress: Progress | None = None,
) -> LayerStore:
    """Write every layer of a model into a folder and open the store.

    Args:
        folder: created if it does not exist; its layer files are replaced one by one, atomically.
        checkpoint: the dense model.
        spec: its description.
        weights: ``"int8"`` or ``"native"``.
        mask: the remaining units; the others are left out. None keeps all.
        refit: refit tensors, remaining rows or columns only, and biases that the checkpoint lacks.
        device: where weights are quantised, to the same codes on every device; None is the CPU.
        check_finite: refuse NaN and infinity in the source.
        progress: receives each layer.

    Raises:
        OptionError: ``weights`` is neither ``"int8"`` nor ``"native"``.
        CheckpointError: a tensor cannot be read or is not finite.
        OutputError: the folder cannot be written or the disk is full.
    """
    if weights not in (INT8, NATIVE):
        raise OptionError(f"--weights: {weights!r} is not one of {INT8}, {NATIVE}")
    with output_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    builder = _LayerBuilder(
        checkpoint,
        spec,
        mask or KeepMask(spec.table),
        refit or {},
        int8=weights == INT8,
        device=device,
        read=read_finite if check_finite else Checkpoint.read,
    )
    if progress:
        progress.sweep("writing the working store", spec.layers, 0)
    for layer in range(spec.layers):
        write_tensors(_layer_file(folder, layer), builder.entries(layer))
        if progress:
            progress.step(f"layer {layer}")
    return LayerStore(folder, spec.layers)


@dataclass
class _LayerBuilder:
    """Collects the entries of one layer's file after the other."""

    checkpoint: Checkpoint
    spec: ModelSpec
    mask: KeepMask
    refit: Refit
    int8: bool
    device: torch.device | None
    read: Callable[[Checkpoint, str], torch.Tensor]

    def __post_init__(self) -> None:
        self._slices = slices_by_tensor(self.spec.table)
        self._added = added_biases(self.spec, self.refit)

    def entries(self, layer: int) -> dict[str, torch.Tensor]:
        """Return a layer's tensors as stored, by name inside the layer."""
        prefix, entries = self.spec.prefix(layer), dict[str, "torch.Tensor"]()
        dropped = dropped_expert_tensors(self.spec, self.mask, layer)
        for name in self.spec.layer_tensors[layer]:
            if prefix + name not in dropped:
                entries |= self._stored(name, prefix + name)
        for full in self._added:
            if full.startswith(prefix) and full in self.refit:
                entries[full.removeprefix(prefix)] = self.refit[full]()
        # Wide elements first, so that each tensor lies aligned in the layer's bytes.
        return dict(sorted(entries.items(), key=lambda item: -item[1].element_size()))

    def _stored(self, name: str, full: str) -> dict[str, torch.Tensor]:
        """Return a tensor's entries: itself in its source's dtype, or int8 codes and scales."""
        family, value = self.spec.family, self._value(full)
        # Small differences decide an expert's tokens: a router keeps its precision.
        router = family.experts is not None and name in family.experts.router_tensors
        exact = router or name.endswith(family.unquantised)
        if self.int8 and value.dim() == 2 and not exact:
            codes, scales = _quantise(value, self.device)
            return {name: codes, name + _SCALES: scales}
        return {name: value.to(torch_dtype(self.checkpoint.tensors[full].dtype))}

    def _value(self, full: str) -> torch.Tensor:
        """Return a tensor's refit, or the remaining part of the checkpoint's tensor."""
        if full in self.refit:
            return self.refit[full]()
        value = self.read(self.checkpoint, full)
        return cut_tensor(value, self._slices.get(full, []), self.mask)


def _quantise(
    weight_OI: torch.Tensor, device: torch.device | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return codes and scales on the CPU, computed on a device."""
    if device is None:
        return quantise_rows(weight_OI)
    codes_OI, scales_O = quantise_rows(weight_OI.to(device))
    return codes_OI.cpu(), scales_O.cpu()


def build_head_store(
    folder: Path,
    checkpoint: Checkpoint,
    spec: ModelSpec,
    *,
    rows: int,
    device: torch.device | None = None,
    written: bool = False,
) -> LayerStore:
    """Write the head as int8, one file per chunk of rows, and open the store.

    Args:
        folder: created if it does not exist.
        checkpoint: the dense model.
        spec: its description.
        rows: number of rows of a chunk.
        device: where rows are quantised; None is the CPU.
        written: another process has written the folder; it is opened only.

    Raises:
        CheckpointError: the head cannot be read.
        OutputError: the folder cannot be written or the disk is full.
    """
    spans = head_spans(spec, rows)
    if written:
        return LayerStore(folder, len(spans))
    with output_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    for chunk, (first, last) in enumerate(spans):
        rows_vH = checkpoint.read_rows(spec.head_tensor, first, last)
        codes, scales = _quantise(rows_vH, device)
        # Wide elements first, as in a layer's file.
        tensors = {HEAD_WEIGHT + _SCALES: scales, HEAD_WEIGHT: codes}
        write_tensors(_layer_file(folder, chunk), tensors)
    return LayerStore(folder, len(spans))


def _layer_file(folder: Path, layer: int) -> Path:
    return folder / f"layer_{layer:05d}.safetensors"


def _checks(path: Path, first: int) -> dict[str, tuple[int, int, str]]:
    """Return the place of each of a layer's tensors in its bytes, and its checksum."""
    entries, found = read_header(path)[0], read_checksums(path)
    return {
        name: (entries[name].start - first, entries[name].end - first, value)
        for name, value in found.items()
    }


def _lay_out(path: Path) -> tuple[tuple[Record, ...], tuple[int, int]]:
    """Return a layer file's tensors, and the first and last byte that they span."""
    entries, _ = read_header(path)
    if not entries:
        raise CheckpointError(f"{path}: holds no tensors; delete the run directory and start again")
    first = min(entry.start for entry in entries.values())
    last = max(entry.end for entry in entries.values())
    records = []
    for name, entry in entries.items():
        if name.endswith(_SCALES):
            continue
        scales = entries.get(name + _SCALES)
        records.append(
            Record(
                name=name,
                shape=tuple(entry.shape),
                dtype=entry.dtype,
                start=entry.start - first,
                scales_start=None if scales is None else scales.start - first,
            )
        )
    return tuple(records), (first, last)
