"""The provenance of a model: its dense ancestor, its licence, and what each rewrite did.

In: a model's folder with its card and the reports of earlier runs. Out: plain values. Reads a few
small files; what is missing or damaged is left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from frugal_bonsai.errors import WRONG_VALUES
from frugal_bonsai.from_gguf.summary import gguf_facts
from frugal_bonsai.plain_json import read_json
from frugal_bonsai.report.card_parts import is_hub_id, parent_name
from frugal_bonsai.run.open import Model

MASK_FILE, REPORT_FILE = "pruning_mask.json", "pruning_report.json"
ADAPT_REPORT_FILE = "adaptation_report.json"
_FIGURES = ("block_parameters", "perplexity", "eval_perplexity")
_GGUF_FACTS = {"file", "dtype", "quantised", "architecture", "quantisation"}
_LICENCE_KEYS = ("license", "license_name", "license_link")


def read_provenance(model: Model) -> dict[str, Any]:
    """Return where a model comes from.

    Returns:
        ``dense``: name of the dense ancestor, the model itself if it was never rewritten;
        ``base_model``: hub id of the ancestor, or None; ``license``: keys of the card's head;
        ``steps``: earlier rewrites, the first one first; ``gguf``: facts about the GGUF file that
        the dense weights were read from, if they were.
    """
    card, earlier = _card_head(model.folder), _earlier(model.folder)
    steps = list(earlier.get("steps", ()))
    dense = earlier.get("dense") or parent_name(model.name)
    base = earlier.get("base_model")
    named = card.get("base_model")
    for name in (dense, model.name, named[0] if isinstance(named, list) and named else named):
        if base is None and isinstance(name, str) and is_hub_id(name):
            base = name
    licence = {key: card[key] for key in _LICENCE_KEYS if isinstance(card.get(key), str)}
    found = {"dense": dense, "base_model": base, "license": licence, "steps": steps}
    facts = gguf_facts(model.checkpoint) or earlier.get("gguf")
    return {**found, "gguf": facts} if facts else found


def with_step(provenance: Mapping[str, Any], command: str, summary: Mapping[str, Any]) -> Any:
    """Return a provenance with one more step: what a command did, and its figures."""
    figures = {key: [summary[when].get(key) for when in ("before", "after")] for key in _FIGURES}
    step = {"command": command, "model": parent_name(summary["model"]), **figures}
    return {**provenance, "steps": [*provenance["steps"], step]}


def last_command(report: Mapping[str, Any]) -> str | None:
    """Return the command that wrote a report; None if it records no steps."""
    found = report.get("provenance")
    steps = _checked(found).get("steps") if isinstance(found, dict) else None
    return None if not steps else str(steps[-1]["command"])


def _earlier(folder: Path) -> Mapping[str, Any]:
    """Return the provenance that the run which wrote a model has recorded."""
    for name, command in ((ADAPT_REPORT_FILE, "adapt"), (REPORT_FILE, "prune")):
        report = read_report(folder / name)
        if isinstance(report.get("provenance"), dict):
            return _checked(report["provenance"])
        if {"model", "before", "after"} <= report.keys():  # of a version that recorded none
            dense = str(report.get("teacher") or report["model"])
            start = {"dense": parent_name(dense), "steps": []}
            try:
                return _checked(with_step(start, command, report))
            except WRONG_VALUES:
                return {}
    mask = read_report(folder / MASK_FILE).get("model")
    if isinstance(mask, dict) and isinstance(mask.get("name"), str):
        step = {"command": "shrink", "model": mask["name"]}
        return {"dense": mask["name"], "steps": [step]}
    return {}


def _checked(provenance: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a provenance from a file; empty if it is not as :func:`read_provenance` makes it."""
    steps = provenance.get("steps")
    texts = [provenance.get("dense"), provenance.get("base_model") or ""]
    if not isinstance(steps, list) or not all(isinstance(step, dict) for step in steps):
        return {}
    texts += [step.get(key) for step in steps for key in ("command", "model")]
    pairs = [step.get(key) for step in steps for key in _FIGURES]
    sound = all(isinstance(text, str) for text in texts) and all(map(_is_pair, pairs))
    gguf = provenance.get("gguf")
    sound &= gguf is None or (isinstance(gguf, dict) and gguf.keys() >= _GGUF_FACTS)
    return provenance if sound else {}


def _is_pair(pair: Any) -> bool:
    """Return whether a value is what :func:`with_step` writes: a figure before and after."""
    if pair is None:
        return True
    return (
        isinstance(pair, list)
        and len(pair) == 2
        and all(isinstance(figure, int | float | None) for figure in pair)
    )


def read_report(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file; empty if there is none that can be read."""
    try:
        found = read_json(path)
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _card_head(folder: Path) -> dict[str, Any]:
    """Return the YAML head of a model's card; empty if there is none that can be read."""
    from huggingface_hub import metadata_load
    from yaml import YAMLError  # type: ignore[import-untyped]

    try:
        return dict(metadata_load(folder / "README.md") or {})
    except (OSError, YAMLError, *WRONG_VALUES):
        return {}
