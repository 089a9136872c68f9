"""Write the pruned model: the source's own weights without the removed units.

In: a :class:`Checkpoint`, its :class:`ModelSpec`, a :class:`KeepMask` and replaced tensors
(refitted projections, biases). Out: safetensors files (with an index when there are several), the
layout's ``config.json`` and the files that this config needs, in a folder that the caller stages
and commits. Kept values are copied bit for bit in the source's dtype; no value is computed here.
Holds a few megabytes of the tensor that is being copied, and one replaced tensor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from frugal_bonsai.checkpoint.commit import require_free_space
from frugal_bonsai.checkpoint.reader import Checkpoint
from frugal_bonsai.checkpoint.writer import ShardedWriter
from frugal_bonsai.errors import OptionError
from frugal_bonsai.model.biases import added_biases, output_bias, with_bias_keys
from frugal_bonsai.model.cut import Refit, slices_by_tensor
from frugal_bonsai.model.drop import removed_parameters, with_kept_layers
from frugal_bonsai.model.family import ModelSpec
from frugal_bonsai.model.layout import LayoutRules
from frugal_bonsai.model.tied_head import require_tied_head
from frugal_bonsai.model.units import KeepMask
from frugal_bonsai.rewrite.companions import companion_bytes
from frugal_bonsai.rewrite.cut_stream import stream_cuts
from frugal_bonsai.rewrite.layouts import WRITE_CONFIG
from frugal_bonsai.rewrite.layouts.widths import require_units
from frugal_bonsai.rewrite.tensor_plan import TensorPlan, announced_tensors, plan_tensors

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class RewriteSummary:
    """Sizes of the model before and after.

    Attributes:
        parameters_before: all parameters of the source, a tied head counted once.
        parameters_after: the same of the output.
        block_parameters_before: parameters inside the layers.
        block_parameters_after: the same of the output, with the zeros that a layout adds.
        removed_parameters: parameters of the removed units and of whatever else dropped layers
            hold, less those of added biases.
        bytes_before: bytes of all tensors in the source's files.
        bytes_after: the same of the output.
        kept: kind -> number of kept units in each layer.
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
        """Share of the block parameters that the output no longer computes with."""
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

    A tied model stays tied: a head that the source stores beside its embedding is left out.

    Args:
        checkpoint: the dense model.
        spec: its description.
        mask: the units to keep.
        folder: an existing directory, best one from ``staged_directory``. After an error it holds
            an incomplete model.
        rules: the layout and its legal unit counts.
        refit: replacements by full tensor name: of weights that pruning cuts, of biases of output
            projections, or of the final norm. Each function returns a floating tensor of the kept
            rows and columns, and is called once, after all other tensors are written.
        max_shard_bytes: largest number of tensor bytes in one file.

    Returns:
        The summary.

    Raises:
        OptionError: the model or the layout cannot hold the mask, or a replaced tensor is unknown,
            removed, of a wrong shape or not finite.
        CheckpointError: a tensor cannot be read, or a tied head differs from its embedding.
        OutputError: the disk is full or refuses.
    """
    folder, refit = Path(folder), refit or {}
    require_legal(spec, mask, rules)
    _require_replaceable(spec, refit)
    require_tied_head(checkpoint, spec)
    added = added_biases(spec, refit)
    plans = plan_tensors(checkpoint, spec, mask, rules, added)
    _require_planned(plans, refit)
    needed_bytes = sum(plan.size_bytes for plan in plans)
    needed_bytes += companion_bytes(checkpoint.companions, processor=spec.multimodal is not None)
    require_free_space(folder, needed_bytes, "the pruned model")
    described = with_kept_layers(with_bias_keys(spec, added), mask)
    WRITE_CONFIG[rules.layout](described, mask, rules, folder)
    specs, parts = announced_tensors(plans)
    with ShardedWriter(folder, specs, max_shard_bytes=max_shard_bytes, parts=parts) as writer:
        _write_kept(writer, checkpoint, [plan for plan in plans if plan.name not in refit])
        _write_replaced(writer, plans, refit)
        writer.finish()
    return _summarise(checkpoint, spec, mask, folder, plans)


def _write_kept(writer: ShardedWriter, checkpoint: Checkpoint, plans: Sequence[TensorPlan]) -> None:
    """Write the tensors that were not refitted, cut to the kept units, and zeros for biases."""
    import torch

    streamed = []
    for plan in plans:
        if plan.cut is None:
            writer.write(plan.stored_name, torch.zeros(plan.shape, dtype=plan.torch_dtype))
        # The system copies an unchanged tensor from file to file, past this process's memory.
        elif plan.cut.indices or not writer.copy(plan.stored_name, checkpoint.entry(plan.name)):
            streamed.append(plan.cut)
    stored_names = {plan.name: plan.stored_name for plan in plans}
    for name, rows in stream_cuts(checkpoint, streamed):
        writer.append(stored_names[name], rows)


def _write_replaced(writer: ShardedWriter, plans: Sequence[TensorPlan], refit: Refit) -> None:
    """Write the replaced tensors, one at a time."""
    by_name = {plan.name: plan for plan in plans}
    for name, replacement in refit.items():
        plan = by_name[name]
        writer.write(plan.stored_name, plan.stored(_cast(plan, replacement())))


def _cast(plan: TensorPlan, tensor: torch.Tensor) -> torch.Tensor:
    """Return a replacement in the source's dtype, on the CPU, after checking it."""
    name, dtype = plan.name, plan.torch_dtype
    if tuple(tensor.shape) != plan.kept_shape or not tensor.is_floating_point():
        raise OptionError(
            f"refit tensor {name!r}: found {tensor.dtype} {list(tensor.shape)}, expected floating "
            f"{list(plan.kept_shape)}, the kept part of the tensor"
        )
    cast = tensor.detach().to("cpu").to(dtype)
    bad = cast.numel() - int(cast.isfinite().sum())
    if bad:
        raise OptionError(
            f"refit tensor {name!r}: {bad} of {cast.numel()} values are NaN or infinite in "
            f"{dtype}; raise --ridge, or prune with --no-recovery"
        )
    return cast


def _summarise(
    checkpoint: Checkpoint,
    spec: ModelSpec,
    mask: KeepMask,
    folder: Path,
    plans: Sequence[TensorPlan],
) -> RewriteSummary:
    """Count the parameters and bytes of source and output."""
    elements = {plan.name: plan.elements for plan in plans}
    added = sum(plan.elements for plan in plans if plan.cut is None)
    in_layers = added + sum(
        elements.get(spec.prefix(layer) + name, 0)
        for layer, tensors in enumerate(spec.layer_tensors)
        for name in tensors
    )
    return RewriteSummary(
        parameters_before=spec.parameters,
        parameters_after=in_layers + sum(elements[name] for name in spec.other_tensors),
        block_parameters_before=spec.block_parameters,
        block_parameters_after=in_layers,
        removed_parameters=removed_parameters(spec, mask) - added,
        bytes_before=checkpoint.weight_bytes,
        bytes_after=sum(plan.size_bytes for plan in plans),
        kept={kind: tuple(counts) for kind, counts in mask.counts().items()},
        files=tuple(sorted(path.name for path in folder.iterdir())),
    )


def require_legal(spec: ModelSpec, mask: KeepMask, rules: LayoutRules) -> None:
    """Check that every kept layer keeps numbers of units that the layout can hold.

    Raises:
        OptionError: A layer does not.
    """
    require_units(spec, mask)
    dropped = mask.dropped_layers()
    for group in spec.table.groups:
        count, legal = mask.kept(group), rules.legal_counts(group.kind, group.count)
        expert_is_dropped = group.expert is not None and not count
        if group.layer in dropped or expert_is_dropped or count in legal:
            continue
        below = [n for n in legal if n < count][-1:]
        above = [n for n in legal if n > count][:1]
        raise OptionError(
            f"{rules.layout} layout: layer {group.layer} keeps {count} of {group.count} "
            f"{group.kind} units, which is not a legal number; the nearest are "
            f"{' and '.join(str(n) for n in below + above)}"
        )


def _require_replaceable(spec: ModelSpec, refit: Refit) -> None:
    """Check that every name is a weight that is cut, an output projection's bias or final norm."""
    names = {*slices_by_tensor(spec.table), *map(output_bias, spec.table.groups)}
    for name in refit:
        if name not in names and name not in spec.norm_tensors:
            raise OptionError(
                f"refit tensor {name!r}: is neither the final norm nor a projection of this model "
                f"that pruning cuts; expected a name such as {min(names)!r}"
            )


def _require_planned(plans: Sequence[TensorPlan], refit: Refit) -> None:
    """Check that the mask keeps every replaced tensor."""
    planned = {plan.name for plan in plans}
    for name in refit:
        if name not in planned:
            raise OptionError(
                f"refit tensor {name!r}: belongs to a layer or an expert that the mask removes; "
                "replace tensors of kept layers and experts only"
            )
