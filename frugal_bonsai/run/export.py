"""``export``: write a dense or pruned model as one file for another runtime.

In: a model, a path. Out: the file, which appears when it is complete, and a summary as plain
values. Runs no forward pass and needs no GPU. Holds a block of rows of one tensor.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from frugal_bonsai.report.card_parts import parent_name
from frugal_bonsai.report.words import plural
from frugal_bonsai.run.early import check_export
from frugal_bonsai.run.open import open_model
from frugal_bonsai.run.output import replaceable_file
from frugal_bonsai.run.run_folder import locked, run_folder
from frugal_bonsai.version import package_version

# Tensors that a note names.
_NAMED = 3


def export_gguf(
    model: str, out: str | Path, *, dtype: str = "f16", overwrite: bool = False
) -> dict[str, Any]:
    """Write a model as one GGUF file, for llama.cpp and programs built on it.

    Args:
        model: Folder, GGUF file, hub id or ``example``; dense or pruned, any layout.
        out: Path of a file that does not exist.
        dtype: Number format of the matrices: ``f32``, ``bf16``, ``f16``, ``q8_0``, ``q5_1``,
            ``q5_0``, ``q4_1`` or ``q4_0``.
        overwrite: Replace a GGUF file at ``out``, when the new one is complete.

    Returns:
        The summary as plain values (the output of ``--json``).

    Raises:
        FrugalBonsaiError: Something that the user can mend; no half-written file is left.
    """
    out, started = Path(out), time.monotonic()
    check_export(model, out, overwrite=overwrite)
    # torch and transformers are imported after the checks that need neither.
    from frugal_bonsai.export.gguf_file import write_gguf
    from frugal_bonsai.model.tied_head import require_tied_head

    with locked(run_folder(out)), open_model(model) as opened:
        require_tied_head(opened.checkpoint, opened.spec)
        written = write_gguf(
            opened.checkpoint,
            opened.spec,
            out,
            name=parent_name(opened.name),
            dtype=dtype,
            replaces=replaceable_file(overwrite),
        )
        notes = [*opened.notes, *written.notes]
        if written.fallbacks:
            notes.append(_fallback_note(written.fallbacks, dtype))
        return {
            "version": package_version(),
            "model": opened.name,
            "family": opened.spec.family.model_type,
            "format": "gguf",
            "architecture": written.architecture,
            "tokenizer": written.tokenizer,
            "dtype": dtype,
            "tensors": written.formats,
            "parameters": opened.spec.parameters,
            "weight_bytes": opened.checkpoint.weight_bytes,
            "file_bytes": written.size_bytes,
            "notes": notes,
            "out": str(out),
            "seconds": time.monotonic() - started,
        }


def _fallback_note(names: list[str], dtype: str) -> str:
    """Return the note that counts and names the tensors which are larger than asked for."""
    rest = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return (
        f"f16 instead of {dtype}, whose blocks need rows in multiples of 32: "
        f"{plural(len(names), 'tensor')} ({', '.join(names[:_NAMED])}{rest}); for a smaller file "
        "prune with --tile 32 or a multiple of it"
    )
