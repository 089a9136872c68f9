"""``prune``: prepare, search, rewrite, verify, report.

In: a model, options, an output folder. Out: a physically smaller checkpoint in that folder, which
appears only when it is complete and verified, and a summary as plain values. The run directory
``OUT.run`` beside it holds the state, from the first scores on, and is removed at the end.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from frugal_bonsai.bonsai.fingerprint import fingerprint, model_fingerprint
from frugal_bonsai.bonsai.masks.pairs import Utility, utility_name
from frugal_bonsai.bonsai.search import Search, SearchResult
from frugal_bonsai.bonsai.settings import STATE_FILE
from frugal_bonsai.bonsai.state import (
    StateFolder,
    saved_progress,
)
from frugal_bonsai.checkpoint.commit import remove_folder, staged_directory
from frugal_bonsai.evaluation.perplexity import measure_texts
from frugal_bonsai.memory.disk import OUT, RUN
from frugal_bonsai.memory.plan import MemoryPlan
from frugal_bonsai.memory.work import VERIFY_WINDOWS
from frugal_bonsai.model.tied_head import require_tied_head
from frugal_bonsai.progress import Progress
from frugal_bonsai.ranks.group import Group
from frugal_bonsai.ranks.launch import launched
from frugal_bonsai.report.bar import choose_progress
from frugal_bonsai.rewrite.verify import compare_logits
from frugal_bonsai.run.arguments import command_arguments
from frugal_bonsai.run.early import check_prune
from frugal_bonsai.run.engine import in_fp32, make_engine
from frugal_bonsai.run.events import copy_events, recorded
from frugal_bonsai.run.keywords import prune_options
from frugal_bonsai.run.open import Model, note_model, open_model, write_output
from frugal_bonsai.run.options import PruneOptions
from frugal_bonsai.run.output import replaceable
from frugal_bonsai.run.prepare import PruneRun, prepare_run
from frugal_bonsai.run.provenance import read_provenance, with_step
from frugal_bonsai.run.prune_tasks import add_task_scores, check_tasks
from frugal_bonsai.run.ranks import STORE, led, remove_token, start_workers, work
from frugal_bonsai.run.report import write_page_beside
from frugal_bonsai.run.run_folder import empty, locked, run_folder
from frugal_bonsai.run.settings_file import write_prune_settings
from frugal_bonsai.run.summary import describe_run, write_papers
from frugal_bonsai.run.texts import bytes_per_token
from frugal_bonsai.run.warnings import (
    calibration_warning,
    figure_warnings,
    note_warnings,
    pruned_before_warning,
    unfamiliar_text_warning,
)
from frugal_bonsai.stream.engine import Engine
from frugal_bonsai.stream.source import CheckpointSource

WORSE = "train it with adapt, calibrate with more text, or remove less (--sparsity)"


@dataclass(frozen=True, kw_only=True)
class _Request:
    """The arguments of a prune, the time at which it started, and the ranks if there are more."""

    model: str
    options: PruneOptions
    out: Path
    folder: Path
    resume: bool
    overwrite: bool
    utility: Utility | None
    started: float
    group: Group | None = None


def prune(
    model: str,
    out: str | Path,
    options: PruneOptions | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    utility: Utility | None = None,
    progress: Progress | bool | None = None,
    on_plan: Callable[[MemoryPlan], None] | None = None,
    **named: Any,
) -> dict[str, Any]:
    """Prune a model into ``out`` and report.

    Args:
        model: Folder, GGUF file, hub id or ``example``.
        out: Folder that must not exist yet. It appears when it is complete.
        options: All other options as one object, instead of keywords.
        resume: Continue the run that ``OUT.run`` holds.
        overwrite: Replace ``out`` at the end, if it is a folder that this program wrote.
        utility: Utility that replaces -mean NLL. Called with the logits (fp32 ``[S, V]``) and the
            tokens (int64 ``[S]``) of one window; higher is better; need not be differentiable.
        progress: Told of rounds, sweeps and layers. None shows a bar in notebooks, False nothing.
        on_plan: Told of the memory plan before any work.
        named: All other options by name: those of ``frugal-bonsai prune``, with underscores.

    Returns:
        The summary as plain values (what ``--json`` prints). Empty on the ranks of a launch that
        work for rank 0.

    Raises:
        FrugalBonsaiError: The user can mend it; no half-written output is left.
    """
    started, launch = time.monotonic(), launched()
    out, options = Path(out), prune_options(named, options)
    if launch is not None and launch.rank:
        work(launch, model, out, options, utility)
        return {}
    request = _Request(
        model=model,
        options=options,
        out=out,
        folder=run_folder(out),
        resume=resume,
        overwrite=overwrite,
        utility=utility,
        started=started,
    )
    with led(launch) as group:
        return _prune(replace(request, group=group), choose_progress(progress), on_plan)


def _prune(
    request: _Request, progress: Progress, on_plan: Callable[[MemoryPlan], None] | None
) -> dict[str, Any]:
    """Check a prune, lock its folder, open the model, and run."""
    model, out, options = request.model, request.out, request.options
    folder, resume = request.folder, request.resume
    check_prune(model, out, options, resume=resume, overwrite=request.overwrite)
    check_tasks(options)
    family, text_only = options.assume_family, options.text_only
    arguments = command_arguments("prune", model, out, options)
    with (
        locked(folder),
        recorded(folder, progress, "prune", model, arguments, resume=resume) as progress,
        open_model(model, assume_family=family, text_only=text_only) as opened,
    ):
        note_model(opened, progress)
        require_tied_head(opened.checkpoint, opened.spec)
        summary = _run(request, opened, progress, on_plan)
        empty(folder)
        if options.report:
            write_page_beside(out, progress)
    return summary


def _run(
    request: _Request,
    opened: Model,
    progress: Progress,
    on_plan: Callable[[MemoryPlan], None] | None,
) -> dict[str, Any]:
    """Run a prune in its folder, where it leaves nothing but what a resume could use."""
    folder = request.folder
    begun, finished = saved_progress(folder) if request.resume else ({}, 0)
    try:
        run = prepare_run(
            opened,
            request.options,
            {RUN: folder, OUT: request.out},
            begun=begun,
            finished=finished,
            custom_utility=request.utility is not None,
            progress=progress,
            on_plan=on_plan,
        )
        return _search_and_write(run, request)
    finally:
        remove_folder(folder / STORE)
        remove_token(folder)
        if not (folder / STATE_FILE).exists():
            empty(folder)


def _search_and_write(run: PruneRun, request: _Request) -> dict[str, Any]:
    """Search, write the pruned model with its papers to the output, and return the summary."""
    provenance, settings = read_provenance(run.model), run.resolved.settings
    warned = (
        pruned_before_warning(run.model.name, provenance),
        calibration_warning(run.model.spec, settings, *run.calibration.windows_NS.shape),
    )
    warnings = note_warnings(run.engine.progress, warned)
    before = _measure(run, run.model, run.engine, "dense")
    warnings += note_warnings(run.engine.progress, [_unfamiliar(run, before["perplexity"])])
    found = _search(run, request)
    with staged_directory(request.out, replaces=replaceable(request.overwrite)) as staged:
        summary = describe_run(run, found, request.out) | {"before": before}
        summary |= _write(run, found, staged)
        if request.utility is not None:
            summary["settings"]["utility"] = utility_name(request.utility)
        worse = figure_warnings(before, summary["after"], advice=WORSE)
        summary["warnings"] = [*warnings, *worse]
        summary["provenance"] = with_step(provenance, "prune", summary)
        add_task_scores(summary, run, request.options, staged)
        summary["seconds"] = time.monotonic() - request.started
        write_papers(staged, summary, run.model.spec, found.mask)
        write_prune_settings(staged, run, request.options)
        copy_events(request.folder, staged)
    return summary


def _unfamiliar(run: PruneRun, perplexity: float | None) -> str | None:
    """Return a warning if the dense model predicts the held-out windows badly."""
    if perplexity is None:
        return None
    size = bytes_per_token(run.model, run.calibration.held_out_NS, None)
    return unfamiliar_text_warning(perplexity, size)


def _search(run: PruneRun, request: _Request) -> SearchResult:
    """Search for the units to keep, in rounds that the run directory resumes from."""
    resolved, calibration = run.resolved, run.calibration
    folder, utility, group = request.folder, request.utility, request.group
    identity = {
        "settings": resolved.settings.to_json(),
        "layout": resolved.rules.layout,
        "tile": resolved.rules.tile,
        "as_mistral": resolved.rules.as_mistral,
        "model": model_fingerprint(run.model.checkpoint),
        "calibration": fingerprint(calibration.windows_NS.numpy().tobytes()),
        "utility": None if utility is None else utility_name(utility),
    }
    state = StateFolder(folder, identity)
    shared = None if group is None else start_workers(group, run, identity, state)
    if request.resume and not state.exists:
        run.engine.progress.note(f"--resume: {folder} holds no state, starting anew")
    run.engine.sweep.forward_tokens = 0  # count what the search spends, not the reports
    search = Search(
        run.engine,
        resolved.settings,
        resolved.rules,
        calibration.windows_NS,
        state=state,
        work=folder / STORE,
        keep_inputs=run.memory.keep_inputs,
        keep_updates=run.memory.keep_updates,
        written_together=run.work.written_together,
        utility=utility,
        unit_milliseconds=None if resolved.latency is None else resolved.latency.unit,
        shared=shared,
    )
    return search.run(resume=request.resume and state.exists)


def _write(run: PruneRun, found: SearchResult, staged: Path) -> dict[str, Any]:
    """Write the pruned model to the staging folder, verify it, and return its figures."""
    rules, shard_bytes = run.resolved.rules, run.resolved.shard_bytes
    with write_output(
        staged, run.model, found.mask, rules, refit=found.refits, max_shard_bytes=shard_bytes
    ) as (output, rewritten):
        parent = run.engine
        engine = make_engine(output, run.memory, parent.device, parent.progress, disk=parent.disk)
        windows_NS = run.calibration.held_out_NS[:VERIFY_WINDOWS]
        difference = _verify(run, found, engine, windows_NS)
        return {
            "after": _measure(run, output, engine, "pruned", written=True),
            "written_as": output.spec.family.title,
            "sparsity": rewritten.sparsity,
            "verify": {"max_relative_difference": difference, "windows": len(windows_NS)},
        }


def _verify(
    run: PruneRun, found: SearchResult, rewritten: Engine, windows_NS: torch.Tensor
) -> float:
    """Compare the rewritten model with the masked parent, both in fp32.

    In bf16 the rounding of 32 layers is as large as the change that a defect makes.
    """
    spec, parent = run.model.spec, in_fp32(run.engine, run.memory)
    norm = {name: found.refits[name]() for name in spec.norm_tensors if name in found.refits}
    parent.skeleton.replace_norm(norm)
    masked = CheckpointSource(run.model.checkpoint, spec, mask=found.mask, refit=found.refits)
    return compare_logits(parent, masked, in_fp32(rewritten, run.memory), windows_NS)


def _measure(
    run: PruneRun, model: Model, engine: Engine, what: str, *, written: bool = False
) -> dict[str, Any]:
    """Return the sizes and perplexities of the dense or the pruned model."""
    held_out_NS, text = run.calibration.held_out_NS, run.eval_text
    return {**model.sizes, **measure_texts(engine, held_out_NS, text, what, written=written)}
