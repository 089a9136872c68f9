"""The end of ``adapt``: adapters merged into the weights, the output written, verified, measured.

In: the pruned model and the best parameters on disk. Out: a checkpoint of the same layout in a
staging folder, with its papers. The student is gone by then: the weights are read, changed and
written one at a time.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from frugal_bonsai.checkpoint.commit import output_errors, write_bytes, write_json
from frugal_bonsai.checkpoint.reader import Checkpoint
from frugal_bonsai.errors import VerifyError
from frugal_bonsai.memory.plan import MemoryPlan
from frugal_bonsai.model.canonical_names import describe_checkpoint
from frugal_bonsai.model.layout import PER_LAYER, UNIFORM, layout_rules
from frugal_bonsai.model.units import KeepMask
from frugal_bonsai.report.adapt_card import adapt_card
from frugal_bonsai.run.adapt_plan import Plans, named_plans
from frugal_bonsai.run.plan import plan_items
from frugal_bonsai.run.prepare import Model, in_fp32, make_engine
from frugal_bonsai.run.summary import MASK_FILE, REPORT_FILE, load_line

if TYPE_CHECKING:
    import torch

    from frugal_bonsai.run.adaptation import Adaptation

ADAPT_REPORT_FILE = "adaptation_report.json"


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Perplexities of one model; None where there is no such text."""

    held_out: float | None
    on_text: float | None


@dataclass(frozen=True, kw_only=True)
class Written:
    """What stands in the staging folder."""

    staged: Path
    layout: str
    sizes: Mapping[str, int]
    measured: Measured
    verify: Mapping[str, Any]
    notes: tuple[str, ...]

    def papers(
        self, summary: Mapping[str, Any], plans: Plans, out: Path, *, seconds: float
    ) -> dict[str, Any]:
        """Write card and report; the rest of the summary."""
        rest = {
            "memory": _describe_memory(plans),
            "notes": list(self.notes),
            "out": str(out),
            "load": load_line(out, self.layout),
            "seconds": seconds,
        }
        whole = {**summary, **rest}
        write_json(self.staged / ADAPT_REPORT_FILE, whole)
        write_bytes(self.staged / "README.md", adapt_card(whole).encode())
        return rest


def measure(
    model: Model,
    plan: MemoryPlan,
    job: Adaptation,
    held_out_NS: torch.Tensor | None,
    *,
    what: str,
) -> Measured:
    """Perplexities of a model, streamed, on the held-out windows and on the user's text."""
    from frugal_bonsai.evaluation.perplexity import measure_perplexity

    if held_out_NS is None and job.eval_NS is None:
        return Measured(held_out=None, on_text=None)
    engine = make_engine(model.checkpoint, model.spec, plan, job.device, job.progress)
    held_out = on_text = None
    with engine.native() as stream:
        if held_out_NS is not None:
            held_out = measure_perplexity(
                engine, stream, held_out_NS, name=f"{what}: held-out perplexity"
            ).value
        if job.eval_NS is not None:
            on_text = measure_perplexity(
                engine, stream, job.eval_NS, name=f"{what}: perplexity on {job.eval_name}"
            ).value
    return Measured(held_out=held_out, on_text=on_text)


def write_adapted(
    job: Adaptation,
    plan: MemoryPlan,
    staged: Path,
    *,
    shard_bytes: int,
    scaling: float,
    held_out_NS: torch.Tensor,
    verify_NS: torch.Tensor,
    expected_NSV: torch.Tensor,
    native: bool,
) -> Written:
    """Write the adapted model into the staging folder, verify it, measure it.

    Args:
        job: the adaptation.
        plan: of measuring and writing.
        staged: an empty folder.
        shard_bytes: tensor bytes of one shard.
        scaling: of the adapters' product.
        held_out_NS: windows to measure on.
        verify_NS: windows whose logits are compared.
        expected_NSV: the student's logits of their first tokens.
        native: the student computed with the checkpoint's own weights, so that its logits must be
            the output's but for the rounding of what is stored.

    Raises:
        VerifyError: the output computes something else.
    """
    from frugal_bonsai.adapt.merge import merged_weights
    from frugal_bonsai.adapt.state import BEST_FILE
    from frugal_bonsai.rewrite.companions import write_companions
    from frugal_bonsai.rewrite.shrink import shrink
    from frugal_bonsai.rewrite.verify import compare_logits
    from frugal_bonsai.stream.source import CheckpointSource

    model, everything = job.pruned, KeepMask(job.pruned.spec.table)
    layout = _layout_of(model)
    rules = layout_rules(model.spec, layout, tile=1)
    with merged_weights(model.checkpoint, job.run / BEST_FILE, scaling=scaling) as merged:
        shrink(
            model.checkpoint,
            model.spec,
            everything,
            staged,
            rules=rules,
            refit=merged,
            max_shard_bytes=shard_bytes,
        )
        write_companions(model.folder, staged)
        _carry_papers(model.folder, staged)
        with Checkpoint.open(staged) as output:
            spec = describe_checkpoint(output, source="the adapted config.json")
            adapted = Model(name=str(staged), checkpoint=output, spec=spec)
            parent = make_engine(model.checkpoint, model.spec, plan, job.device, job.progress)
            engine = make_engine(output, spec, plan, job.device, job.progress)
            source = CheckpointSource(model.checkpoint, model.spec, mask=everything, refit=merged)
            exact = (in_fp32(parent, plan), source, in_fp32(engine, plan))
            difference = compare_logits(*exact, verify_NS)
            del exact
            rounding = _rounding(engine, verify_NS, expected_NSV)
            del parent, engine
            _require_rounding(rounding, output, native=native)
            measured = measure(adapted, plan, job, held_out_NS, what="adapted")
            sizes = {
                "parameters": spec.parameters,
                "block_parameters": spec.block_parameters,
                "weight_bytes": output.weight_bytes,
            }
    return Written(
        staged=staged,
        layout=layout,
        sizes=sizes,
        measured=measured,
        verify={
            "max_relative_difference": difference,
            "student_difference": rounding,
            "windows": len(verify_NS),
        },
        notes=(*job.budget.notes, *_padding_note(model.folder)),
    )


def _layout_of(model: Model) -> str:
    """Layers of different widths need the bundled model file; all others plain transformers."""
    config = model.checkpoint.config
    differs = config.get("per_layer_config") or config.get("auto_map")
    return PER_LAYER if differs else UNIFORM


def _rounding(engine: Any, verify_NS: torch.Tensor, expected_NSV: torch.Tensor) -> float:
    """Largest difference of the output's logits from the student's, relative to the largest."""
    import torch

    tokens_NS = verify_NS[:, : expected_NSV.shape[1]]
    with engine.native() as stream:
        hidden = engine.sweep.run(stream, tokens_NS, name="verify: student")
    largest = torch.zeros(())
    with torch.inference_mode():
        for window in range(len(tokens_NS)):
            found_SV = engine.head.logits(hidden.read(slice(window, window + 1)))[0].cpu()
            largest = torch.maximum(largest, (found_SV - expected_NSV[window]).abs().max())
    return float(largest) / max(float(expected_NSV.abs().max()), 1e-30)


def _require_rounding(rounding: float, output: Checkpoint, *, native: bool) -> None:
    """A student of native weights must be what was written, but for the stored dtype's rounding."""
    from frugal_bonsai.dtypes import torch_dtype
    from frugal_bonsai.rewrite.verify import TOLERANCE

    stored = {torch_dtype(entry.dtype) for entry in output.tensors.values()}
    allowed = max(TOLERANCE[dtype] for dtype in stored)
    if native and not rounding <= allowed:
        raise VerifyError(
            f"the adapted model's logits differ from the student's by {rounding:.2e} of the "
            f"largest logit, allowed are {allowed:.0e}; nothing was written. This is a defect: "
            f"please report it with the model's config.json"
        )


def _carry_papers(source: Path, staged: Path) -> None:
    """How the model was pruned stays beside it."""
    for name in (MASK_FILE, REPORT_FILE):
        if (source / name).is_file():
            with output_errors(staged / name):
                shutil.copyfile(source / name, staged / name)


def _padding_note(folder: Path) -> tuple[str, ...]:
    """Zeros that a padded layout filled its layers up with are weights like any other here."""
    try:
        layout = json.loads((folder / REPORT_FILE).read_text(encoding="utf-8"))["layout"]
    except (OSError, ValueError, KeyError, TypeError):
        return ()
    if layout != "padded":
        return ()
    return ("padded layout: the zeros that filled layers up have been trained, they are units now",)


def _describe_memory(plans: Plans) -> dict[str, Any]:
    """Caps, what the plans predicted for each part of the run, and what was measured."""
    from frugal_bonsai.memory.meter import peak_gpu_bytes, peak_resident_bytes

    budget, gpu = plans[1].budget, plans[1].budget.gpu_bytes is not None
    parts = named_plans(plans)
    import torch

    device = torch.device(budget.device)
    return {
        "host_cap_bytes": budget.host_bytes,
        "host_predicted_bytes": max(plan.total_bytes("host") for _, plan in parts),
        "host_peak_bytes": peak_resident_bytes(),
        "gpu_cap_bytes": budget.gpu_bytes,
        "gpu_predicted_bytes": max(p.total_bytes("gpu") for _, p in parts) if gpu else None,
        "gpu_peak_bytes": peak_gpu_bytes(device, budget.context_bytes),
        "plans": {
            name: {
                "host_bytes": plan.total_bytes("host"),
                "gpu_bytes": plan.total_bytes("gpu"),
                "items": plan_items(plan),
            }
            for name, plan in parts
        },
    }
