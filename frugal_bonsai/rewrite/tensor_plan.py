"""Plan the tensors of the pruned model before any of them is read.

In: a checkpoint, its :class:`ModelSpec`, a keep mask and the layout's rules. Out: one
:class:`TensorPlan` per output tensor, in the order in which they are stored. The plan follows the
source: its order of tensors, its names in the files, its axes and its dtypes. Holds the indices of
the rows and columns that stay; reads no tensor data.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from frugal_bonsai.checkpoint.file_layout import TensorParts, TensorSpec
from frugal_bonsai.checkpoint.header import TensorEntry
from frugal_bonsai.checkpoint.reader import Checkpoint
from frugal_bonsai.dtypes import DTYPE_BYTES, torch_dtype
from frugal_bonsai.model.biases import bias_of, weight_of
from frugal_bonsai.model.canonical_names import name_in_file
from frugal_bonsai.model.cut import cut_indices, slices_by_tensor
from frugal_bonsai.model.drop import new_names
from frugal_bonsai.model.family import ModelSpec
from frugal_bonsai.model.layout import LayoutRules
from frugal_bonsai.model.units import KeepMask
from frugal_bonsai.rewrite.cut_stream import TensorCut
from frugal_bonsai.rewrite.layouts.padded import padded_counts

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True, eq=False)
class TensorPlan:
    """One tensor of the output.

    Shapes are in canonical axes (weights are ``[out, in]``), unless a name says "stored".

    Attributes:
        name: canonical name in the dense model. Replacements are looked up by it.
        stored_name: name in the output's file; of a part, its name for the writer.
        dtype: safetensors name of the dtype, the source's.
        shape: shape in the output, with the zeros that the layout adds.
        transposed: the file stores the tensor as ``[in, out]``.
        cut: the part of the source's tensor that is kept; None for a bias that the source lacks.
        part_of: tensor of the file of which this is a part: that of all experts of a layer.
        parts: number of parts of one expert in a row.
    """

    name: str
    stored_name: str
    dtype: str
    shape: tuple[int, ...]
    transposed: bool
    cut: TensorCut | None
    part_of: str | None = None
    parts: int = 0

    @property
    def elements(self) -> int:
        """Number of elements in the output."""
        return math.prod(self.shape)

    @property
    def size_bytes(self) -> int:
        """Bytes in the output."""
        return self.elements * DTYPE_BYTES[self.dtype]

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype as torch names it."""
        return torch_dtype(self.dtype)

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Shape in the file."""
        return self.shape[::-1] if self.transposed else self.shape

    @property
    def kept_shape(self) -> tuple[int, ...]:
        """Shape without the zeros that the layout adds: the shape of a replacement."""
        shape = list(self.shape)
        for axis, indices in {} if self.cut is None else self.cut.indices.items():
            shape[axis] = int((indices >= 0).sum())
        return tuple(shape)

    def stored(self, kept: torch.Tensor) -> torch.Tensor:
        """Return a tensor of ``kept_shape`` as the file stores it: with zeros, and transposed."""
        tensor = kept
        for axis, indices in {} if self.cut is None else self.cut.indices.items():
            if len(indices) != tensor.shape[axis]:
                shape = (*tensor.shape[:axis], len(indices), *tensor.shape[axis + 1 :])
                places = (indices >= 0).nonzero().flatten()
                tensor = tensor.new_zeros(shape).index_copy_(axis, places, tensor)
        return tensor.T.contiguous() if self.transposed else tensor


def plan_tensors(
    checkpoint: Checkpoint,
    spec: ModelSpec,
    mask: KeepMask,
    rules: LayoutRules,
    added: Sequence[str],
) -> list[TensorPlan]:
    """Plan the tensors of the pruned model.

    A tied head that the source stores beside its embedding is left out. So are the tensors of
    dropped layers and experts.

    Args:
        checkpoint: the dense model.
        spec: its description.
        mask: the units to keep.
        rules: the layout.
        added: full names of biases that the output has and the source lacks.

    Returns:
        The source's tensors in the source's order, then the added biases, then the carried tensors.

    Raises:
        OptionError: the layout cannot hold the mask's number of attention heads.
    """
    head = spec.family.head
    source_names = [name for name in checkpoint.tensors if not (spec.tied and name == head)]
    renamed = new_names(spec, mask, [*source_names, *added])
    pieces, padded = slices_by_tensor(spec.table), padded_counts(spec, mask, rules)
    plans: dict[str, TensorPlan] = {}
    for name, new_name in renamed.items():
        if name in checkpoint.tensors:
            entry = checkpoint.tensors[name]
            indices = cut_indices(entry.shape, pieces.get(name, []), mask, padded)
            stored_name = name_in_file(spec.family, entry, name, new_name)
            if spec.multimodal is not None:
                stored_name = spec.multimodal.stored_name(stored_name)
            plan = _plan_kept(name, entry, stored_name, indices)
            if entry.stacked:
                plan = replace(plan, stored_name=new_name, part_of=stored_name, parts=entry.stacked)
            plans[name] = plan
        else:
            plans[name] = _plan_bias(name, plans[weight_of(name)])
    carried = [_plan_kept(name, entry, name, {}) for name, entry in checkpoint.carried.items()]
    return [*plans.values(), *carried]


def announced_tensors(plans: Sequence[TensorPlan]) -> tuple[list[TensorSpec], TensorParts]:
    """Return the tensors of the output's files, and the parts of those that hold all experts."""
    parts: dict[str, list[TensorPlan]] = {}
    for plan in plans:
        parts.setdefault(plan.part_of or plan.stored_name, []).append(plan)
    specs = list[TensorSpec]()
    for name, own in parts.items():
        first, shape = own[0], own[0].stored_shape
        if first.part_of is not None:
            shape = (len(own) // first.parts, first.parts * shape[0], *shape[1:])
        specs.append((name, first.dtype, shape))
    whole = {name: own for name, own in parts.items() if own[0].part_of is not None}
    return specs, {
        name: [(plan.stored_name, plan.stored_shape) for plan in own] for name, own in whole.items()
    }


def _plan_kept(
    name: str, entry: TensorEntry, stored_name: str, indices: Mapping[int, torch.Tensor]
) -> TensorPlan:
    """Plan a tensor of the source without its removed rows and columns."""
    return TensorPlan(
        name=name,
        stored_name=stored_name,
        dtype=entry.dtype,
        shape=tuple(len(indices.get(axis, range(size))) for axis, size in enumerate(entry.shape)),
        transposed=entry.transposed,
        cut=TensorCut(name, indices),
    )


def _plan_bias(name: str, weight: TensorPlan) -> TensorPlan:
    """Plan a bias that the source lacks, from the plan of the weight beside it."""
    return TensorPlan(
        name=name,
        stored_name=bias_of(weight.stored_name),
        dtype=weight.dtype,
        shape=weight.shape[:1],
        transposed=False,
        cut=None,
    )
