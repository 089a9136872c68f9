"""``--dry-run`` of ``prune``, ``shrink`` and ``export``: what would be written, and nothing else.

In: what the command takes. Out: plain values. Makes the command's own checks, reads config and
tensor headers, and writes nothing. The dry run of ``adapt`` is its plan, in adapt_plan.py.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from frugal_bonsai.bonsai.state import saved_progress
from frugal_bonsai.memory.disk import OUT, RUN, DiskPlan
from frugal_bonsai.model.drop import removed_parameters
from frugal_bonsai.model.layout import UNIFORM, layout_rules
from frugal_bonsai.model.tied_head import require_tied_head
from frugal_bonsai.model.units import KeepMask
from frugal_bonsai.rewrite.mask_file import read_mask
from frugal_bonsai.rewrite.shrink import require_legal
from frugal_bonsai.rewrite.tensor_plan import plan_tensors
from frugal_bonsai.run.early import check_export, check_prune, check_shrink
from frugal_bonsai.run.machine import no_gpu_advice
from frugal_bonsai.run.open import open_model
from frugal_bonsai.run.options import PruneOptions
from frugal_bonsai.run.plan import describe_plan, plan_fitting
from frugal_bonsai.run.prepare import require_run_room
from frugal_bonsai.run.prune_tasks import check_tasks
from frugal_bonsai.run.resolve import resolve
from frugal_bonsai.run.run_folder import run_folder
from frugal_bonsai.run.workload import copied_bytes

_NO_TEXT = "the calibration text was not read: a short text has fewer windows than planned here"


def dry_prune(
    model: str,
    out: str | Path,
    options: PruneOptions | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Return the plan of a prune on this machine, and what it would write.

    The arguments are those of :func:`frugal_bonsai.prune`.

    Returns:
        What :func:`frugal_bonsai.plan` returns, with ``writes``: path, bytes and contents of the
        run directory and of the output.

    Raises:
        FrugalBonsaiError: The prune would be refused before it reads text or weights.
    """
    out, options = Path(out), options or PruneOptions()
    check_prune(model, out, options, resume=resume, overwrite=overwrite)
    check_tasks(options)
    folder, family = run_folder(out), options.assume_family
    with open_model(
        model, headers_only=True, assume_family=family, text_only=options.text_only
    ) as opened:
        begun, finished = saved_progress(folder) if resume else ({}, 0)
        resolved = resolve(opened, options, begun=begun)
        planned = plan_fitting(opened, resolved, resolved.windows)
        require_run_room(planned, {RUN: folder, OUT: out}, finished)
        values = describe_plan(planned)
        writes = _disk_writes(planned.memory.disk, {RUN: folder, OUT: out})
        advice = no_gpu_advice(options, resolved.machine.device)
    notes = [*values["notes"], _NO_TEXT]
    return {"advice": advice, **values, "notes": notes, "writes": writes}


def dry_shrink(
    model: str,
    mask: str | Path,
    out: str | Path,
    *,
    layout: str = UNIFORM,
    as_mistral: bool = False,
    text_only: bool = False,
    max_shard_size: str | int = "5GB",
    assume_family: str | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Return what a shrink would keep and write; the arguments are those of ``shrink``.

    Raises:
        FrugalBonsaiError: The shrink would be refused before it reads weights.
    """
    out, mask = Path(out), Path(mask)
    check_shrink(
        model,
        mask,
        out,
        max_shard_size=max_shard_size,
        assume_family=assume_family,
        text_only=text_only,
        overwrite=overwrite,
    )
    with open_model(
        model, headers_only=True, assume_family=assume_family, text_only=text_only
    ) as opened:
        spec, keep = opened.spec, read_mask(mask, opened.spec)
        rules = layout_rules(spec, layout, tile=1, as_mistral=as_mistral)
        require_legal(spec, keep, rules)
        plans = plan_tensors(opened.checkpoint, spec, keep, rules, ())
        size_bytes = sum(plan.size_bytes for plan in plans) + copied_bytes(opened)
        return {
            "model": opened.name,
            "family": spec.family.title,
            "layout": rules.layout,
            "sparsity": removed_parameters(spec, keep) / spec.block_parameters,
            "dense": KeepMask(spec.table).counts_with_experts(),
            "kept": keep.counts_with_experts(),
            "writes": [_write(out, size_bytes, f"{len(plans)} tensors, tokenizer, card, mask")],
            "notes": opened.notes,
        }


def dry_export(
    model: str, out: str | Path, *, dtype: str = "f16", overwrite: bool = False
) -> dict[str, Any]:
    """Return the contents of the file that an export would write; takes what ``export`` takes.

    Raises:
        FrugalBonsaiError: The export would be refused before it reads weights.
    """
    out = Path(out)
    check_export(model, out, overwrite=overwrite)
    from frugal_bonsai.export.gguf_file import plan_gguf

    with open_model(model, headers_only=True) as opened:
        require_tied_head(opened.checkpoint, opened.spec)
        planned = plan_gguf(opened.checkpoint, opened.spec, dtype=dtype)
        facts = asdict(planned.describe(planned.size_bytes))
        contents = ", ".join(f"{count} {kind}" for kind, count in facts["formats"].items())
        return {
            "model": opened.name,
            "family": opened.spec.family.title,
            "architecture": facts["architecture"],
            "tokenizer": facts["tokenizer"],
            "writes": [_write(out, planned.size_bytes, f"{contents} tensors, tokenizer")],
            "notes": [*opened.notes, *facts["notes"]],
        }


def _disk_writes(plan: DiskPlan, folders: dict[str, Path]) -> list[dict[str, Any]]:
    """Return the most that each folder holds: its path, bytes and files."""
    found = []
    for name, path in folders.items():
        items = [item for item in plan.peak([name]).items if item.folder == name]
        contents = ", ".join(item.name for item in items)
        if name == RUN:
            contents = f"{contents}; removed at the end"
        found.append(_write(path, sum(item.size_bytes for item in items), contents))
    return found


def _write(path: Path, size_bytes: int, contents: str) -> dict[str, Any]:
    """Return what would be written to a path, as plain values."""
    return {"path": str(path), "size_bytes": size_bytes, "contents": contents}
