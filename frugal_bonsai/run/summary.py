"""The summary of a prune as plain values: what ``--json`` prints, the card is made of, tables show.

In: a prune and the result of its search. Out: a dictionary, and the files beside the weights (card,
mask, report).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from frugal_bonsai.bonsai.search import SearchResult
from frugal_bonsai.checkpoint.commit import write_bytes
from frugal_bonsai.memory.meter import peak_gpu_bytes, peak_resident_bytes
from frugal_bonsai.memory.plan import MemoryPlan
from frugal_bonsai.memory.training import TrainingPlan
from frugal_bonsai.model.family import ModelSpec
from frugal_bonsai.model.layout import PER_LAYER
from frugal_bonsai.model.units import KeepMask
from frugal_bonsai.plain_json import json_text
from frugal_bonsai.report.card import model_card
from frugal_bonsai.report.card_parts import parent_name, without_paths
from frugal_bonsai.rewrite.mask_file import write_mask
from frugal_bonsai.run.open import Model
from frugal_bonsai.run.plan import plan_items, plan_phases, predict, time_model
from frugal_bonsai.run.prepare import PruneRun
from frugal_bonsai.run.provenance import MASK_FILE, REPORT_FILE
from frugal_bonsai.stream.engine import Engine
from frugal_bonsai.version import package_version


def describe_run(run: PruneRun, found: SearchResult, out: Path) -> dict[str, Any]:
    """Return the options of a prune and the result of its search, without figures of the models."""
    model, resolved = run.model, run.resolved
    latency, window = resolved.latency, resolved.window
    return {
        "version": package_version(),
        "model": model.name,
        "family": model.spec.family.title,
        "layout": resolved.rules.layout,
        "tile": resolved.rules.tile,
        "settings": resolved.settings.to_json(),
        "calibration": {
            "source": run.source,
            "window": window,
            "windows": len(run.calibration.windows_NS),
            "written_windows": run.work.written,
            "held_out_windows": len(run.calibration.held_out_NS),
        },
        "eval_text": None if run.eval_text is None else run.eval_text.describe(),
        "kept": found.mask.counts_with_experts(),
        "dense": KeepMask(model.spec.table).counts_with_experts(),
        "layer_sparsity": layer_sparsity(model, found.mask),
        "latency": None if latency is None else latency.describe(found.mask),
        "rounds": found.rounds,
        "forward_tokens": found.forward_tokens,
        "memory": describe_memory(run.memory, run.engine),
        "notes": [
            *resolved.machine.budget.notes,
            *resolved.notes,
            *model.notes,
            *(r["note"] for r in found.rounds if "note" in r),
        ],
        "out": str(out),
        "load": load_line(out, resolved.rules.layout, model.spec),
        "multimodal": model.whole,
        "method": resolved.method,
        "predicted": predict(run),
        "time_model": time_model(run),
    }


def describe_memory(memory: MemoryPlan, engine: Engine) -> dict[str, Any]:
    """Return caps, predicted and measured bytes, and micro-batches as planned and at the end."""
    return {
        **describe_peaks([memory], engine.device),
        "planned_micro_batch": engine.sweep.batches.planned,
        "final_micro_batch": engine.sweep.batches.size,
        "plan": plan_items(memory),
        "phases": plan_phases(memory),
    }


def describe_peaks(
    plans: Sequence[MemoryPlan | TrainingPlan], device: torch.device
) -> dict[str, int | None]:
    """Return caps, predicted and measured bytes of a command.

    Its parts have a plan each, and run one after the other under the same caps.
    """
    budget = plans[0].budget
    predicted = {where: max(p.total_bytes(where) for p in plans) for where in ("host", "gpu")}
    return {
        "host_cap_bytes": budget.host_bytes,
        "host_predicted_bytes": predicted["host"],
        "host_peak_bytes": peak_resident_bytes(),
        "gpu_cap_bytes": budget.gpu_bytes,
        "gpu_predicted_bytes": None if budget.gpu_bytes is None else predicted["gpu"],
        "gpu_peak_bytes": peak_gpu_bytes(device, budget.context_bytes),
    }


def layer_sparsity(model: Model, mask: KeepMask) -> list[float]:
    """Return the share of each layer's parameters that is removed."""
    shares = []
    dropped = mask.dropped_layers()
    for layer, tensors in enumerate(model.spec.layer_tensors):
        if layer in dropped:
            shares.append(1.0)
            continue
        parameters = sum(math.prod(shape) for shape in tensors.values())
        groups = model.spec.table.of_layer(layer)
        removed = sum((g.count - mask.kept(g)) * g.unit_parameters for g in groups)
        removed += sum(g.joint_parameters for g in groups if not mask.kept(g))
        shares.append(removed / parameters)
    return shares


def load_line(out: Path, layout: str, spec: ModelSpec, *, tokenizer: bool = True) -> str:
    """Return a line of Python that loads the output, and runs as it is.

    Args:
        out: Folder of the output, as the user names it.
        layout: Its layout.
        spec: The dense model.
        tokenizer: The folder has a tokenizer, which the line loads too.
    """
    folder = f"({str(out)!r})"
    if layout == PER_LAYER and spec.multimodal is None:
        loaded = ["frugal_bonsai.load_pruned", "frugal_bonsai.load_tokenizer"]
        imports = "import frugal_bonsai"
    else:
        kind = "CausalLM" if spec.multimodal is None else "ImageTextToText"
        names = [f"AutoModelFor{kind}", "AutoTokenizer"][: 1 + tokenizer]
        imports = f"from transformers import {', '.join(names)}"
        loaded = [f"{name}.from_pretrained" for name in names]
    line = f"{imports}; model = {loaded[0]}{folder}"
    return f"{line}; tokenizer = {loaded[1]}{folder}" if tokenizer else line


def write_report(path: Path, summary: Mapping[str, Any]) -> None:
    """Write a summary as standard JSON, for others to read.

    A number that is not finite becomes null. Of models and folders on this machine only the names
    are written.
    """
    write_bytes(path, (json_text(_without_folders(summary), indent=2) + "\n").encode())


def _without_folders(summary: Mapping[str, Any]) -> dict[str, Any]:
    """Return a summary in which no text says where files lie on this machine."""
    public = dict(summary)
    for key in ("model", "teacher", "out", "mask"):
        if isinstance(public.get(key), str):
            public[key] = parent_name(public[key])
    for key in ("notes", "warnings"):
        if key in public:
            public[key] = [without_paths(text) for text in public[key]]
    if "load" in public and "out" in summary:
        out = str(summary["out"])
        public["load"] = public["load"].replace(f"({out!r})", f"({parent_name(out)!r})")
    return public


def write_papers(staged: Path, summary: dict[str, Any], spec: ModelSpec, mask: KeepMask) -> None:
    """Write the card, the mask and the report beside the weights."""
    write_mask(staged / MASK_FILE, parent_name(summary["model"]), spec, mask)
    write_report(staged / REPORT_FILE, summary)
    write_bytes(staged / "README.md", model_card(summary).encode())
