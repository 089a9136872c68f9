"""``prune``: plan -> search -> rewrite -> verify, and the report of it.

In: a model, options, an output folder. Out: a physically smaller checkpoint in that folder, which
appears only when it is complete and verified, and a summary as plain values. The run directory
``OUT.run`` beside it holds the state after every round; it is removed at the end.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from frugal_bonsai.bonsai.state import STATE_FILE
from frugal_bonsai.checkpoint.commit import (
    require_free_space,
    require_no_output,
    staged_directory,
)
from frugal_bonsai.checkpoint.finite import require_finite
from frugal_bonsai.checkpoint.reader import Checkpoint
from frugal_bonsai.errors import StateError
from frugal_bonsai.memory.plan import MemoryPlan, PruneWorkload
from frugal_bonsai.model.canonical_names import describe_checkpoint
from frugal_bonsai.progress import Progress, Silent
from frugal_bonsai.report.words import duration
from frugal_bonsai.run.options import PruneOptions
from frugal_bonsai.run.plan import (
    Prepared,
    plan_prune,
    prepare,
    sampling_note,
)
from frugal_bonsai.run.predict import predict
from frugal_bonsai.run.prepare import (
    Model,
    in_fp32,
    make_engine,
    note_assumed,
    open_model,
    read_windows,
)
from frugal_bonsai.run.summary import Job, Texts, describe, load_line, write_papers
from frugal_bonsai.run.workload import prune_workload
from frugal_bonsai.sizes import parse_bytes
from frugal_bonsai.text.sources import SELF

if TYPE_CHECKING:
    import torch

    from frugal_bonsai.bonsai.calibration import Calibration
    from frugal_bonsai.bonsai.masks.evaluate import Utility
    from frugal_bonsai.bonsai.search import Found
    from frugal_bonsai.stream.engine import Engine

# Windows whose logits the verification compares.
_VERIFY_WINDOWS = 2


def run_folder(out: Path) -> Path:
    """Where a prune to ``out`` keeps its state."""
    return out.with_name(out.name + ".run")


def prune(
    model: str,
    out: str | Path,
    options: PruneOptions | None = None,
    *,
    resume: bool = False,
    utility: Utility | None = None,
    progress: Progress | None = None,
    on_plan: Callable[[MemoryPlan], None] | None = None,
) -> dict[str, Any]:
    """Prune a model into ``out`` and report.

    Args:
        model: folder, hub id or ``example``.
        out: folder that must not exist yet; appears when it is complete.
        options: everything else.
        resume: continue the run that ``OUT.run`` holds.
        utility: a utility of your own instead of -mean NLL: called with one window's logits
            (fp32 ``[S, V]``) and tokens (int64 ``[S]``), higher is better, need not be
            differentiable.
        progress: told of rounds, sweeps and layers.
        on_plan: told of the memory plan before any work.

    Returns:
        The summary, plain values (what ``--json`` prints).

    Raises:
        FrugalBonsaiError: anything that the user can mend; no half-written output is left.
    """
    from frugal_bonsai.model.tied_head import require_tied_head

    out, options, progress = Path(out), options or PruneOptions(), progress or Silent()
    started = time.monotonic()
    require_no_output(out)
    shard_bytes = parse_bytes(options.max_shard_size, option="--max-shard-size")
    with (
        open_model(model, assume_family=options.assume_family) as opened,
        ExitStack() as stack,
    ):
        note_assumed(opened, progress)
        require_tied_head(opened.checkpoint, opened.spec)
        if resume:
            options = _as_begun(options, run_folder(out))
        ready = prepare(opened, options)
        _check_run_folder(run_folder(out), resume=resume)
        stack.callback(_drop_if_unstarted, run_folder(out))
        for note in (*ready.budget.notes, *ready.notes):
            progress.note(note)
        texts = _read_texts(opened, ready, options)
        work = prune_workload(
            opened,
            ready,
            texts.planned_windows,
            eval_windows=texts.eval_windows,
            custom_utility=utility is not None,
        )
        memory = plan_prune(opened, ready, work)
        if on_plan is not None:
            on_plan(memory)
        predicted = predict(opened, ready, work, memory)
        if predicted is not None:
            progress.note(f"predicted: about {duration(predicted['seconds'])}")
        require_free_space(out.parent, memory.total_bytes("disk"), "the working stores")
        # Those of the layers are checked as the working store is written.
        require_finite(opened.checkpoint, opened.spec.other_tensors)
        engine = make_engine(
            opened.checkpoint,
            opened.spec,
            memory,
            ready.device,
            progress,
            arithmetic=ready.settings.arithmetic,
        )
        calibration = _calibrate(opened, ready, work, memory, texts, engine)
        source = texts.source_name
        progress.note(
            f"calibration: {source}, {len(calibration.windows_NS)} windows of {ready.window} "
            f"tokens, {len(calibration.held_out_NS)} held out"
        )
        with engine.native() as stream:
            before = _perplexities(engine, stream, calibration, texts, "dense")
        engine.sweep.forward_tokens = 0  # what the search spends, not what reporting spends
        found = _search(
            opened, ready, memory, engine, calibration, out, resume=resume, utility=utility
        )
        staged = stack.enter_context(staged_directory(out))
        job = Job(
            model=opened,
            ready=ready,
            memory=memory,
            engine=engine,
            calibration=calibration,
            texts=texts,
            progress=progress,
        )
        summary = _rewrite(job, found, staged, shard_bytes, before)
        summary |= {"out": str(out), "load": load_line(out, ready.rules.layout)}
        summary |= {"method": options.method, "predicted": predicted}
        summary |= {"seconds": time.monotonic() - started}
        write_papers(staged, summary, opened.spec, found.mask)
    shutil.rmtree(run_folder(out), ignore_errors=True)
    return summary


def _check_run_folder(folder: Path, *, resume: bool) -> None:
    if (folder / STATE_FILE).exists() and not resume:
        raise StateError(
            f"{folder}: holds an unfinished run; continue it with --resume, or delete that folder"
        )


def _as_begun(options: PruneOptions, folder: Path) -> PruneOptions:
    """A run goes on with the arithmetic that it began with, whatever the machine measures now."""
    from frugal_bonsai.bonsai.state import saved_settings

    begun = saved_settings(folder).get("arithmetic")
    if begun is None or options.settings.get("arithmetic") not in (None, "auto"):
        return options
    return replace(options, settings={**options.settings, "arithmetic": begun})


def _drop_if_unstarted(folder: Path) -> None:
    """A run that has not finished a round leaves nothing behind."""
    if not (folder / STATE_FILE).exists():
        shutil.rmtree(folder, ignore_errors=True)


def _read_texts(model: Model, ready: Prepared, options: PruneOptions) -> Texts:
    from frugal_bonsai.bonsai.calibration import held_out_count

    eval_name, eval_NS = None, None
    if options.eval_text is not None:
        eval_name, eval_NS = read_windows(
            model, options.eval_text, ready.window, windows=None, option="--eval-text"
        )
    if ready.source == SELF:
        return Texts(
            source_name="self (sampled from the model)",
            windows_nS=None,
            eval_name=eval_name,
            eval_NS=eval_NS,
            planned_windows=ready.windows,
        )
    wanted = ready.windows + held_out_count(ready.windows)
    name, windows_nS = read_windows(
        model, ready.source, ready.window, windows=wanted, option="--calibration"
    )
    return Texts(
        source_name=name,
        windows_nS=windows_nS,
        eval_name=eval_name,
        eval_NS=eval_NS,
        planned_windows=min(ready.windows, len(windows_nS)),
    )


def _calibrate(
    model: Model,
    ready: Prepared,
    work: PruneWorkload,
    memory: MemoryPlan,
    texts: Texts,
    engine: Engine,
) -> Calibration:
    from frugal_bonsai.bonsai.calibration import sample_windows, split_windows

    windows_nS = texts.windows_nS
    if windows_nS is None:
        engine.progress.note(sampling_note(model, ready, work, memory))
        first = model.spec.config.get("bos_token_id")
        windows_nS = sample_windows(
            engine,
            work.sampled,
            ready.window,
            first_token=first if isinstance(first, int) else None,
            seed=ready.settings.seed,
        )
    return split_windows(windows_nS, ready.windows, f"--calibration {texts.source_name}")


def _perplexities(
    engine: Engine, stream: Any, calibration: Calibration, texts: Texts, what: str
) -> dict[str, float | None]:
    from frugal_bonsai.evaluation.perplexity import measure_perplexity

    held_out = measure_perplexity(
        engine, stream, calibration.held_out_NS, name=f"{what}: held-out perplexity"
    )
    on_text = None
    if texts.eval_NS is not None:
        on_text = measure_perplexity(
            engine, stream, texts.eval_NS, name=f"{what}: perplexity on {texts.eval_name}"
        ).value
    return {"perplexity": held_out.value, "eval_perplexity": on_text}


def _search(
    model: Model,
    ready: Prepared,
    memory: MemoryPlan,
    engine: Engine,
    calibration: Calibration,
    out: Path,
    *,
    resume: bool,
    utility: Utility | None,
) -> Found:
    from frugal_bonsai.bonsai.search import Search
    from frugal_bonsai.bonsai.state import StateFolder, fingerprint, model_fingerprint

    identity = {
        "settings": ready.settings.to_json(),
        "layout": ready.rules.layout,
        "tile": ready.rules.tile,
        "as_mistral": ready.rules.as_mistral,
        "model": model_fingerprint(model.checkpoint),
        "calibration": fingerprint(calibration.windows_NS.numpy().tobytes()),
        "utility": None if utility is None else getattr(utility, "__qualname__", repr(utility)),
    }
    folder = run_folder(out)
    state = StateFolder(folder, identity)
    if resume and not state.exists:
        engine.progress.note(f"--resume: {folder} holds no finished round, starting with the first")
    search = Search(
        engine,
        ready.settings,
        ready.rules,
        calibration.windows_NS,
        state=state,
        work=folder / "store",
        keep_inputs=memory.keep_inputs,
        keep_refinement=memory.keep_refinement,
        utility=utility,
        unit_milliseconds=None if ready.latency is None else ready.latency.unit,
    )
    return search.run(resume=resume and state.exists)


def _rewrite(
    job: Job, found: Found, staged: Path, shard_bytes: int, before: dict[str, float | None]
) -> dict[str, Any]:
    """Write the pruned model into the staging folder, verify it, measure it."""
    from frugal_bonsai.rewrite.companions import write_companions
    from frugal_bonsai.rewrite.shrink import shrink

    model, ready = job.model, job.ready
    rewritten = shrink(
        model.checkpoint,
        model.spec,
        found.mask,
        staged,
        rules=ready.rules,
        refit=found.refits,
        max_shard_bytes=shard_bytes,
    )
    write_companions(model.folder, staged)
    with Checkpoint.open(staged) as output:
        assume = model.spec.family.assumed
        spec = describe_checkpoint(output, source="the pruned config.json", assume=assume)
        engine = make_engine(output, spec, job.memory, ready.device, job.progress)
        windows_NS = job.calibration.held_out_NS[:_VERIFY_WINDOWS]
        difference = _verify(job, found, engine, windows_NS)
        with engine.native() as stream:
            after = _perplexities(engine, stream, job.calibration, job.texts, "pruned")
        figures = {
            "before": {
                "parameters": model.spec.parameters,
                "block_parameters": model.spec.block_parameters,
                "weight_bytes": model.checkpoint.weight_bytes,
                **before,
            },
            "after": {
                "parameters": spec.parameters,
                "block_parameters": spec.block_parameters,
                "weight_bytes": output.weight_bytes,
                **after,
            },
            "written_as": spec.family.title,
            "sparsity": rewritten.sparsity,
            "verify": {"max_relative_difference": difference, "windows": len(windows_NS)},
        }
    return {**describe(job, found), **figures}


def _verify(job: Job, found: Found, rewritten: Engine, windows_NS: torch.Tensor) -> float:
    """Compare the rewritten model with the masked parent, both in fp32.

    In bf16 the rounding of 32 layers is as large as what a defect may change.
    """
    from frugal_bonsai.rewrite.verify import compare_logits
    from frugal_bonsai.stream.source import CheckpointSource

    spec, parent = job.model.spec, in_fp32(job.engine, job.memory)
    norm = {name: found.refits[name]() for name in spec.norm_tensors if name in found.refits}
    parent.skeleton.replace_norm(norm)
    masked = CheckpointSource(job.model.checkpoint, spec, mask=found.mask, refit=found.refits)
    return compare_logits(parent, masked, in_fp32(rewritten, job.memory), windows_NS)
