"""``shrink``: rewrite a model with a mask from elsewhere.

In: a dense model, a mask file, an output folder. Out: the pruned model in that folder, which
appears when it is complete, with its mask, report and page, and a summary as plain values. Reads no
text, runs no forward pass and uses no GPU. Holds one tensor. A mask has no refitted weights, so the
result is the masked parent.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from frugal_bonsai.checkpoint.commit import staged_directory, write_bytes
from frugal_bonsai.model.layout import UNIFORM, LayoutRules, layout_rules
from frugal_bonsai.model.units import KeepMask
from frugal_bonsai.progress import Progress
from frugal_bonsai.report.bar import choose_progress
from frugal_bonsai.report.card_parts import parent_name
from frugal_bonsai.report.mask_card import mask_card
from frugal_bonsai.rewrite.mask_file import read_mask, write_mask
from frugal_bonsai.run.early import check_shrink
from frugal_bonsai.run.open import Model, note_model, open_model, write_output
from frugal_bonsai.run.output import replaceable
from frugal_bonsai.run.provenance import MASK_FILE, REPORT_FILE, read_provenance, with_step
from frugal_bonsai.run.report import write_page_beside
from frugal_bonsai.run.run_folder import locked, run_folder
from frugal_bonsai.run.summary import layer_sparsity, load_line, write_report
from frugal_bonsai.run.warnings import note_warnings, pruned_before_warning
from frugal_bonsai.sizes import parse_bytes
from frugal_bonsai.text.windows import has_tokenizer
from frugal_bonsai.version import package_version

NO_REFITS = (
    "a mask holds no weights: projections that recovery refitted are not in it, so this is the "
    "masked parent, worse than what prune wrote with recovery"
)


def shrink(
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
    report: bool = True,
    progress: Progress | bool | None = None,
) -> dict[str, Any]:
    """Write the pruned model that a mask file describes.

    Args:
        model: Dense model: folder, GGUF file, hub id or ``example``.
        mask: Mask file, such as the ``pruning_mask.json`` that a prune writes.
        out: Folder that must not exist yet.
        layout: Layout of the output.
        as_mistral: A Llama whose head count its config class refuses is written as a Mistral.
        text_only: Of a model of several modalities, write the text model alone.
        max_shard_size: Largest shard of the output: bytes, or text such as ``"5GB"``.
        assume_family: Family whose table is used for an architecture that has none.
        overwrite: Replace ``out`` at the end, if it is a folder that this program wrote.
        report: Write the page ``report.html`` into the output, if matplotlib is installed.
        progress: Told of notes. None prints them in notebooks, False nowhere.

    Returns:
        The summary as plain values (what ``--json`` prints).

    Raises:
        FrugalBonsaiError: The user can mend it; no half-written output is left.
    """
    out, progress, started = Path(out), choose_progress(progress), time.monotonic()
    check_shrink(
        model,
        Path(mask),
        out,
        max_shard_size=max_shard_size,
        assume_family=assume_family,
        text_only=text_only,
        overwrite=overwrite,
    )
    shard_bytes = parse_bytes(max_shard_size, option="--max-shard-size")
    with (
        locked(run_folder(out)),
        open_model(model, assume_family=assume_family, text_only=text_only) as opened,
    ):
        note_model(opened, progress)
        # The mask has the FFN widths, so the layout's finest tile is used.
        rules = layout_rules(opened.spec, layout, tile=1, as_mistral=as_mistral)
        with staged_directory(out, replaces=replaceable(overwrite)) as staged:
            summary = _shrink(opened, Path(mask), staged, out, rules, shard_bytes, progress)
            summary["seconds"] = time.monotonic() - started
            write_report(staged / REPORT_FILE, summary)
        if report:
            write_page_beside(out, progress)
    return summary


def _shrink(
    model: Model,
    mask: Path,
    staged: Path,
    out: Path,
    rules: LayoutRules,
    shard_bytes: int,
    progress: Progress,
) -> dict[str, Any]:
    """Write the masked model with its mask and card to ``staged``, and return the summary."""
    spec, keep = model.spec, read_mask(mask, model.spec)
    progress.note(NO_REFITS)
    provenance = read_provenance(model)
    warnings = note_warnings(progress, [pruned_before_warning(model.name, provenance)])
    with write_output(staged, model, keep, rules, max_shard_bytes=shard_bytes) as (output, written):
        write_mask(staged / MASK_FILE, parent_name(model.name), spec, keep)
        summary = {
            "version": package_version(),
            "model": model.name,
            "family": spec.family.title,
            "written_as": output.spec.family.title,
            "kept": keep.counts_with_experts(),
            "dense": KeepMask(spec.table).counts_with_experts(),
            "before": model.sizes,
            "after": output.sizes,
            "sparsity": written.sparsity,
            "layer_sparsity": layer_sparsity(model, keep),
            "mask": mask.name,
            "multimodal": model.whole,
            "layout": rules.layout,
            "out": str(out),
            "load": load_line(out, rules.layout, spec, tokenizer=has_tokenizer(model.folder)),
            "notes": [NO_REFITS, *model.notes],
            "warnings": warnings,
        }
        summary["provenance"] = with_step(provenance, "shrink", summary)
        write_bytes(staged / "README.md", mask_card(summary).encode())
    return summary
