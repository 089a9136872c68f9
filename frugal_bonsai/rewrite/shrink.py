"""The rewriter: original-precision weights through a keep mask, tensor by tensor.

In: a :class:`Checkpoint`, its :class:`ModelSpec`, a :class:`KeepMask` and refitted projections.
Out: safetensors (sharded with an index where large), ``config.json`` of the layout and what it
needs beside it, in a folder that the caller stages and commits. Values are not recomputed: what is
kept is kept bit for bit, in the source's dtype. Holds a few megabytes of the tensor that is being
read, and the whole of one that is refitted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from frugal_bonsai.checkpoint.reader import Checkpoint
from frugal_bonsai.checkpoint.writer import ShardedWriter, require_free_space
from frugal_bonsai.dtypes import DTYPE_BYTES, torch_dtype
from frugal_bonsai.errors import CheckpointError, OptionError
from frugal_bonsai.model.biases import added_biases, output_bias, weight_of, with_bias_keys
from frugal_bonsai.model.cut import cut_shape, padded_indices, slices_by_tensor
from frugal_bonsai.model.drop import new_names, removed_parameters, with_kept_layers
from frugal_bonsai.model.family import ModelSpec
from frugal_bonsai.model.layout import LayoutRules
from frugal_bonsai.model.units import KeepMask, UnitGroup, UnitSlice
from frugal_bonsai.rewrite.companions import write_companions
from frugal_bonsai.rewrite.cut_stream import TensorCut, stream_cuts
from frugal_bonsai.rewrite.layouts import WRITE_CONFIG
from frugal_bonsai.rewrite.layouts.padded import padded_counts
from frugal_bonsai.rewrite.layouts.widths import require_units

if TYPE_CHECKING:
    import torch

__all__ = ["Refit", "RewriteSummary", "shrink", "write_companions"]

Refit = Mapping[str, "Callable[[], torch.Tensor]"]

_COMPARE_BYTES = 2**24  # read at a time where two tensors are compared


@dataclass(frozen=True, kw_only=True)
class RewriteSummary:
    """What the rewrite made of the model.

    Attributes:
        parameters_before: all parameters of the source, a tied head counted once.
        parameters_after: the same of the output.
        block_parameters_before: parameters inside the layers.
        block_parameters_after: the same of the output, zeros that a layout adds included.
        removed_parameters: parameters of the removed units and of what else goes with whole layers,
            less those of biases that are added.
        bytes_before: bytes of all tensors in the source's files.
        bytes_after: the same of the output.
        kept: kept units per kind, one number a layer.
        files: names of the files written, sorted.
    """

    parameters_before: int
    parameters_after: int
    block_parameters_before: int
    block_parameters_after: int
    removed_parameters: int
    bytes_before: int
    bytes_after: int
    kept: Mapping[str, tuple[int, ...]]
    files: tuple[str, ...]

    @property
    def sparsity(self) -> float:
        """Share of the block parameters that is not computed with any more."""
        return self.removed_parameters / self.block_parameters_before


def shrink(
    checkpoint: Checkpoint,
    spec: ModelSpec,
    mask: KeepMask,
    folder: Path,
    *,
    rules: LayoutRules,
    refit: Refit | None = None,
    max_shard_bytes: int = 5 * 10**9,
) -> RewriteSummary:
    """Write the pruned model's weights and config.

    A tied model stays tied: a head that the source stores beside the embedding it is tied to is
    left out.

    Args:
        checkpoint: the dense model.
        spec: its description.
        mask: the units to keep.
        folder: an existing directory, best one from ``staged_directory``: after an error it holds
            an incomplete model.
        rules: the layout and its legal unit counts.
        refit: name of a projection's weight, or of the final norm's -> a function that returns what
            replaces it, floating, kept rows or columns alone; called once, one after the other, at
            the end.
        max_shard_bytes: tensor bytes of one shard.

    Returns:
        The summary.

    Raises:
        OptionError: a mask that the model or the layout cannot hold, or a refit tensor that is
            unknown, of a wrong shape or not finite.
        CheckpointError: a tensor cannot be read, or a tied head differs from its embedding.
        OutputError: the disk is full or refuses.
    """
    folder, refit = Path(folder), refit or {}
    _require_legal(spec, mask, rules)
    _require_sliced(spec, refit)
    added = added_biases(spec, refit)
    renamed = new_names(spec, mask, [*_tensors_to_write(checkpoint, spec), *added])
    names = [name for name in renamed if name not in added]
    pieces, padded = slices_by_tensor(spec.table), padded_counts(spec, mask, rules)
    shapes = {
        name: cut_shape(checkpoint.tensors[name].shape, pieces.get(name, []), mask, padded)
        for name in names
    }
    cuts = {
        name: _cut(name, checkpoint.tensors[name].shape, pieces.get(name, []), mask, padded)
        for name in names
    }
    dtypes = {name: checkpoint.tensors[name].dtype for name in names}
    for name in added:
        shapes[name], dtypes[name] = shapes[weight_of(name)][:1], dtypes[weight_of(name)]
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    after_bytes = sum(sizes[name] * DTYPE_BYTES[dtypes[name]] for name in shapes)
    require_free_space(folder, after_bytes, "the pruned model")
    described = with_kept_layers(with_bias_keys(spec, added), mask)
    WRITE_CONFIG[rules.layout](described, mask, rules, folder)
    # In the source's own names and axes, which is what reads the source.
    stored = {name: _Stored.of(name, renamed[name], checkpoint, spec) for name in shapes}
    announced = [(stored[n].name, dtypes[n], stored[n].turned(shapes[n])) for n in shapes]
    with ShardedWriter(folder, announced, max_shard_bytes=max_shard_bytes) as writer:
        kept = [cuts[name] for name in names if name not in refit]
        # What nothing is cut from goes past this process's memory, where the system can do that.
        streamed = [
            cut
            for cut in kept
            if cut.indices or not writer.copy(stored[cut.name].name, checkpoint.tensors[cut.name])
        ]
        for name, rows in stream_cuts(checkpoint, streamed):
            writer.append(stored[name].name, rows)
        for name in refit:
            dtype = torch_dtype(dtypes[name])
            if name in added:
                writer.write(stored[name].name, _refitted(name, refit[name](), shapes[name], dtype))
                continue
            shape = cut_shape(checkpoint.tensors[name].shape, pieces.get(name, []), mask)
            tensor = _refitted(name, refit[name](), shape, dtype)
            writer.write(stored[name].name, stored[name].turn(_with_zeros(tensor, cuts[name])))
        for name in added:
            if name not in refit:
                writer.write(stored[name].name, _zeros(shapes[name], torch_dtype(dtypes[name])))
        writer.finish()
    in_layers = {
        *added,
        *(spec.prefix(at) + name for at in range(spec.layers) for name in spec.layer_tensors[at]),
    }
    block_parameters = sum(sizes[name] for name in in_layers & shapes.keys())
    return RewriteSummary(
        parameters_before=spec.parameters,
        parameters_after=block_parameters + sum(sizes[name] for name in spec.other_tensors),
        block_parameters_before=spec.block_parameters,
        block_parameters_after=block_parameters,
        removed_parameters=removed_parameters(spec, mask) - sum(sizes[name] for name in added),
        bytes_before=checkpoint.weight_bytes,
        bytes_after=after_bytes,
        kept={kind: tuple(counts) for kind, counts in mask.counts().items()},
        files=tuple(sorted(path.name for path in folder.iterdir())),
    )


@dataclass(frozen=True)
class _Stored:
    """How a tensor stands in the files."""

    name: str
    transposed: bool

    @classmethod
    def of(cls, name: str, renamed: str, checkpoint: Checkpoint, spec: ModelSpec) -> _Stored:
        """As in the source, numbers anew; what the source lacks has the model's names."""
        entry = checkpoint.tensors.get(name)
        if entry is None:
            return cls(renamed, False)
        if not name.endswith(entry.name):  # the files have other words for parts of it
            name, renamed = spec.family.file_name(name), spec.family.file_name(renamed)
        # They may leave out the model's first word; other names that differ are no layer's.
        bare = renamed[len(name) - len(entry.name) :] if name.endswith(entry.name) else entry.name
        return cls(bare, entry.transposed)

    def turned(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """A shape in the file's order of axes."""
        return shape[::-1] if self.transposed else shape

    def turn(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor in the file's order of axes."""
        return tensor.T.contiguous() if self.transposed else tensor


def _cut(
    name: str,
    shape: tuple[int, ...],
    pieces: list[tuple[UnitGroup, UnitSlice]],
    mask: KeepMask,
    padded: Mapping[str, int] | None,
) -> TensorCut:
    """What of a tensor is written."""
    indices = {}
    for axis in sorted({piece.axis for _, piece in pieces}):
        on_axis = [(group, piece) for group, piece in pieces if piece.axis == axis]
        taken = padded_indices(shape[axis], on_axis, mask, padded)
        if len(taken) != shape[axis] or bool((taken < 0).any()):
            indices[axis] = taken
    return TensorCut(name, indices)


def _with_zeros(tensor: torch.Tensor, cut: TensorCut) -> torch.Tensor:
    """A tensor of kept rows and columns alone, with the zeros that the layout adds."""
    for axis, indices in cut.indices.items():
        if len(indices) != tensor.shape[axis]:
            shape = list(tensor.shape)
            shape[axis] = len(indices)
            places = (indices >= 0).nonzero().flatten()
            tensor = tensor.new_zeros(shape).index_copy_(axis, places, tensor)
    return tensor


def _require_legal(spec: ModelSpec, mask: KeepMask, rules: LayoutRules) -> None:
    """Each layer keeps a number of units that the layout can hold."""
    require_units(spec, mask)
    dropped = mask.dropped_layers()
    for group in spec.table.groups:
        if group.layer in dropped:
            continue
        count, legal = mask.kept(group), rules.legal_counts(group.kind, group.count)
        if group.expert is not None and not count:
            continue  # the whole expert goes
        if count not in legal:
            below = [n for n in legal if n < count][-1:]
            above = [n for n in legal if n > count][:1]
            raise OptionError(
                f"{rules.layout} layout: layer {group.layer} keeps {count} of {group.count} "
                f"{group.kind} units, which is not a legal number; the nearest are "
                f"{' and '.join(str(n) for n in below + above)}"
            )


def _require_sliced(spec: ModelSpec, refit: Refit) -> None:
    """Only tensors that units own a part of, output projections' biases and the final norm."""
    names = {*slices_by_tensor(spec.table), *map(output_bias, spec.table.groups)}
    for name in refit:
        if name not in names and name not in spec.norm_tensors:
            raise OptionError(
                f"refit tensor {name!r}: is neither the final norm nor a projection of this model "
                f"that pruning cuts; expected a name such as {min(names)!r}"
            )


def _tensors_to_write(checkpoint: Checkpoint, spec: ModelSpec) -> list[str]:
    """The source's tensors in its order, without a tied head's second copy."""
    names = list(checkpoint.tensors)
    head = spec.family.head
    require_tied_head(checkpoint, spec)
    if spec.tied and head in checkpoint.tensors:
        names.remove(head)
    return names


def require_tied_head(checkpoint: Checkpoint, spec: ModelSpec) -> None:
    """Refuse a tied model whose file holds another head than its embedding.

    Raises:
        CheckpointError: they differ; transformers would use both.
    """
    head, embedding = spec.family.head, spec.family.embedding
    if not spec.tied or head not in checkpoint.tensors:
        return
    if not _same_bytes(checkpoint, head, embedding):
        raise CheckpointError(
            f"{checkpoint.tensors[head].file}: tensor {head!r} differs from {embedding!r}, "
            "though config.json says tie_word_embeddings; set that to false to keep both"
        )


def _same_bytes(checkpoint: Checkpoint, name: str, other: str) -> bool:
    """Whether two tensors of two dimensions are equal bit for bit, some rows at a time."""
    import torch

    first, second = checkpoint.tensors[name], checkpoint.tensors[other]
    if (first.dtype, first.shape) != (second.dtype, second.shape):
        return False
    rows = first.shape[0]
    step = max(1, _COMPARE_BYTES * rows // max(1, first.size_bytes))
    return all(
        torch.equal(
            checkpoint.read_rows(name, start, min(start + step, rows)).view(torch.uint8),
            checkpoint.read_rows(other, start, min(start + step, rows)).view(torch.uint8),
        )
        for start in range(0, rows, step)
    )


def _zeros(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A bias that is there because the architecture gives its projections one together."""
    import torch

    return torch.zeros(shape, dtype=dtype)


def _refitted(
    name: str, tensor: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype
) -> torch.Tensor:
    """A refit tensor, checked and cast to the source's dtype."""
    if tuple(tensor.shape) != shape or not tensor.is_floating_point():
        raise OptionError(
            f"refit tensor {name!r}: found {tensor.dtype} {list(tensor.shape)}, expected floating "
            f"{list(shape)}, the kept part of the tensor"
        )
    cast = tensor.detach().to("cpu").to(dtype)
    bad = cast.numel() - int(cast.isfinite().sum())
    if bad:
        raise OptionError(
            f"refit tensor {name!r}: {bad} of {cast.numel()} values are NaN or infinite in "
            f"{dtype}; raise --ridge, or leave recovery out (--no-recovery)"
        )
    return cast
