"""``export``: write a dense or pruned model as one file for another runtime.

In: a model, a path. Out: the file, which appears when it is complete, and a summary as plain
values. Runs no forward pass and needs no GPU. Holds one tensor of the checkpoint and a part of its
converted values.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from frugal_bonsai.report.card_parts import parent_name
from frugal_bonsai.run.early import check_export
from frugal_bonsai.run.open import open_model
from frugal_bonsai.version import package_version


def export_gguf(model: str, out: str | Path, *, dtype: str = "f16") -> dict[str, Any]:
    """Write a model as one GGUF file, for llama.cpp and programs built on it.

    Args:
        model: Folder, hub id or ``example``; dense or pruned, any layout.
        out: Path of a file that does not exist.
        dtype: Number format of the matrices: ``f16``, ``bf16``, ``f32`` or ``q8_0``.

    Returns:
        The summary as plain values (the output of ``--json``).

    Raises:
        FrugalBonsaiError: Something that the user can mend; no half-written file is left.
    """
    from frugal_bonsai.export.gguf_file import write_gguf
    from frugal_bonsai.model.tied_head import require_tied_head

    out, started = Path(out), time.monotonic()
    check_export(model, out)
    with open_model(model) as opened:
        require_tied_head(opened.checkpoint, opened.spec)
        written = write_gguf(
            opened.checkpoint, opened.spec, out, name=parent_name(opened.name), dtype=dtype
        )
        notes = [*opened.notes, *written.notes]
        if dtype == "q8_0" and "f16" in written.formats:
            notes.append(
                f"{written.formats['f16']} tensors are f16: q8_0 needs rows in multiples of 32 "
                "(prune with --tile 32 or a multiple of it)"
            )
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
