"""``inspect``: describe a model from config and headers, or say what is no model."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from frugal_bonsai.checkpoint.locate import EXAMPLE, local_model
from frugal_bonsai.checkpoint.recognise import recognise, recognise_contents
from frugal_bonsai.checkpoint.recognised import MODEL, MULTIMODAL, Recognised
from frugal_bonsai.checkpoint.remote import open_headers
from frugal_bonsai.from_gguf.summary import gguf_facts
from frugal_bonsai.model.family import ModelSpec
from frugal_bonsai.model.layout import UNIFORM, layout_rules
from frugal_bonsai.model.text_model import text_family
from frugal_bonsai.run.open import open_model


def inspect(model: str, *, assume_family: str | None = None) -> dict[str, Any]:
    """Describe a model: family, shapes, units, parameters and size; or say what it is instead.

    Args:
        model: Folder, GGUF file, hub id or ``example``; or any file or folder.
        assume_family: Family whose table is used for an architecture that has none.

    Returns:
        Plain values (what ``inspect --json`` prints). ``kind`` is ``"model"``, or the kind of what
        is no model; then ``what`` and ``advice`` say what it is and what to do.
    """
    found = _recognise(model)
    if not _takes(model, found, assume_family):
        return {"model": model, **found.to_json()}
    with open_model(model, headers_only=True, assume_family=assume_family) as opened:
        spec, checkpoint = opened.spec, opened.checkpoint
        dtypes: Counter[str] = Counter()
        for entry in checkpoint.tensors.values():
            dtypes[entry.dtype] += entry.size_bytes
        rules = layout_rules(spec, UNIFORM)
        return {
            "model": model,
            "kind": MODEL,
            "notes": opened.notes,
            "family": spec.family.title,
            "layers": spec.layers,
            "hidden": spec.hidden,
            "heads": spec.heads,
            "kv_heads": spec.kv_heads,
            "head_dim": spec.head_dim,
            "whole_attention": spec.whole_attention,
            "intermediate": spec.intermediate,
            "experts": spec.experts,
            "experts_chosen": spec.experts_chosen,
            "vocabulary": spec.vocabulary,
            "positions": spec.positions,
            "tied": spec.tied,
            "dtypes": dict(dtypes),
            "gguf": gguf_facts(checkpoint),
            **opened.sizes,
            "multimodal": opened.whole,
            "groups": [_describe_units(spec, kind) for kind in spec.table.kinds],
            "layouts": {
                UNIFORM: {"tile": rules.tile, "attention_counts": list(rules.attention_counts)}
            },
        }


def _takes(model: str, found: Recognised, assume: str | None) -> bool:
    """Return whether the other commands take it: a language model, or one inside a whole."""
    if found.kind != MULTIMODAL:
        return found.kind == MODEL
    with open_headers(model) as headers:
        return text_family(headers.config, assume=assume) is not None


def _recognise(model: str) -> Recognised:
    """Recognise a file, a folder or a model on the hub."""
    path = Path(model).expanduser()
    if model != EXAMPLE and path.is_file():
        return recognise(path)  # other commands refuse files that are no GGUF
    folder = local_model(model)
    if folder is not None:
        return recognise(folder)
    with open_headers(model) as headers:
        return recognise_contents(model, headers.config, headers.tensors)


def _describe_units(spec: ModelSpec, kind: str) -> dict[str, Any]:
    """Return the units of one kind; those of a layer's experts are counted together."""
    groups = [group for group in spec.table.groups if group.kind == kind]
    counts = [sum(g.count for g in groups if g.layer == layer) for layer in range(spec.layers)]
    return {
        "kind": kind,
        "units_per_layer": counts,
        "parameters_per_unit": [group.unit_parameters for group in groups],
    }
