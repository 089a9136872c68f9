"""The working copy of a model's layers: one file a layer, row-wise int8 or native.

In: a checkpoint, a keep mask and the refit output projections. Out: files of which each is one
sequential read. Dead units are left out, so that later rounds read and compute less. A store is
derived: it can be built again from checkpoint, mask and refits at any time. Building holds one
tensor at a time (on an accelerator too, where that quantises), reading holds nothing. A store that
fits into free memory stays in the page cache, one that does not is dropped behind the reader.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from frugal_bonsai.checkpoint.commit import output_errors
from frugal_bonsai.checkpoint.files import ReadFile, tensor_bytes
from frugal_bonsai.checkpoint.finite import read_finite
from frugal_bonsai.checkpoint.header import read_header
from frugal_bonsai.checkpoint.page_cache import fits_page_cache, free_memory_bytes
from frugal_bonsai.checkpoint.reader import Checkpoint
from frugal_bonsai.checkpoint.tensor_file import write_tensors
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

    Raises:
        CheckpointError: a layer file is missing or damaged.
    """

    def __init__(self, folder: Path, layers: int) -> None:
        self._files: list[ReadFile] = []
        self._records: list[tuple[Record, ...]] = []
        self._spans: list[tuple[int, int]] = []
        for layer in range(layers):
            path = _layer_file(folder, layer)
            records, span = _lay_out(path)
            self._files.append(ReadFile(path))
            self._records.append(records)
            self._spans.append(span)
        size = sum(end - start for start, end in self._spans)
        drop_behind = not fits_page_cache(size, free_memory_bytes())
        for file in self._files:
            file.drop_behind = drop_behind

    @property
    def layers(self) -> int:
        """Number of layers."""
        return len(self._files)

    def layer_bytes(self, layer: int) -> int:
        """Bytes of one layer as stored."""
        start, end = self._spans[layer]
        return end - start

    def records(self, layer: int) -> tuple[Record, ...]:
        """Where each tensor of a layer lies in the buffer."""
        return self._records[layer]

    def announce(self, layer: int) -> None:
        """Have the system read a layer's file ahead."""
        start, end = self._spans[layer]
        self._files[layer].advise_soon(start, end - start)

    def read(self, layer: int, buffer: torch.Tensor) -> None:
        """One sequential read of a whole layer into a uint8 CPU buffer."""
        start, end = self._spans[layer]
        file = self._files[layer]
        file.advise_sequential(start, end - start)
        file.read_into(tensor_bytes(buffer[: end - start]), start, f"layer {layer}")

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
        folder: created if need be; layer files there are replaced one by one, atomically.
        checkpoint: the dense model.
        spec: its description.
        weights: ``"int8"`` or ``"native"``.
        mask: units that are left out.
        refit: what recovery has changed, kept rows or columns alone; biases that are new.
        device: where weights are quantised, to the same codes everywhere; None is the CPU.
        check_finite: refuse NaN and infinity in the source.
        progress: told of each layer.

    Raises:
        OptionError: ``weights`` is neither.
        CheckpointError: a tensor cannot be read or is not finite.
        OutputError: the folder cannot be written or the disk is full.
    """
    if weights not in (INT8, NATIVE):
        raise OptionError(f"--weights: {weights!r} is not one of {INT8}, {NATIVE}")
    with output_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    mask, refit = mask or KeepMask(spec.table), refit or {}
    read = read_finite if check_finite else Checkpoint.read
    cuts, added = slices_by_tensor(spec.table), added_biases(spec, refit)
    # Small differences decide which experts a token is sent to: a router keeps its precision.
    router = None if spec.family.experts is None else spec.family.experts.router
    if progress:
        progress.sweep("writing the working store", spec.layers, 0)
    for layer in range(spec.layers):
        prefix, tensors = spec.prefix(layer), dict[str, "torch.Tensor"]()
        gone = dropped_expert_tensors(spec, mask, layer)
        for name in spec.layer_tensors[layer]:
            full = prefix + name
            if full in gone:
                continue
            tensors |= _as_stored(
                name,
                refit[full]()
                if full in refit
                else cut_tensor(read(checkpoint, full), cuts.get(full, []), mask),
                NATIVE if name == router else weights,
                torch_dtype(checkpoint.tensors[full].dtype),
                device,
            )
        for full in added:
            if full.startswith(prefix) and full in refit:
                tensors[full.removeprefix(prefix)] = refit[full]()
        # Wide elements first, so that each tensor lies aligned in the layer's bytes.
        write_tensors(
            _layer_file(folder, layer),
            dict(sorted(tensors.items(), key=lambda item: -item[1].element_size())),
        )
        del tensors  # not held while the next layer is collected
        if progress:
            progress.step(f"layer {layer}")
    return LayerStore(folder, spec.layers)


def _as_stored(
    name: str,
    value: torch.Tensor,
    weights: str,
    dtype: torch.dtype,
    device: torch.device | None,
) -> dict[str, torch.Tensor]:
    """A tensor's entries in a layer's file."""
    if weights == INT8 and value.dim() == 2:
        codes, scales = _quantise(value, device)
        return {name: codes, name + _SCALES: scales}
    return {name: value.to(dtype)}


def _quantise(
    weight_OI: torch.Tensor, device: torch.device | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales on the CPU, made on a device."""
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
) -> LayerStore:
    """Write the head as int8, one file a chunk of ``rows`` rows, and open it.

    Args:
        folder: created if need be.
        checkpoint: the dense model.
        spec: its description.
        rows: of a chunk.
        device: where rows are quantised; None is the CPU.

    Raises:
        CheckpointError: the head cannot be read.
        OutputError: the folder cannot be written or the disk is full.
    """
    folder.mkdir(parents=True, exist_ok=True)
    spans = head_spans(spec, rows)
    for chunk, (first, last) in enumerate(spans):
        rows_vH = checkpoint.read_rows(spec.head_tensor, first, last)
        codes, scales = _quantise(rows_vH, device)
        # Wide elements first, as in a layer's file.
        tensors = {HEAD_WEIGHT + _SCALES: scales, HEAD_WEIGHT: codes}
        write_tensors(_layer_file(folder, chunk), tensors)
    return LayerStore(folder, len(spans))


def _layer_file(folder: Path, layer: int) -> Path:
    return folder / f"layer_{layer:05d}.safetensors"


def _lay_out(path: Path) -> tuple[tuple[Record, ...], tuple[int, int]]:
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
