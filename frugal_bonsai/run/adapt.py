"""``adapt``: cache the teacher's answers, train the student, merge, verify, report.

In: a pruned model, its dense teacher, text, options, an output folder. Out: a checkpoint of the
same layout in that folder, which appears when it is complete and verified, and a summary as plain
values. Teacher, student and output are held one after the other, never together. ``OUT.run`` beside
the output holds the teacher's cache and the training's state, and is removed at the end.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, closing
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from frugal_bonsai.adaptation.adapters import add_adapters, trained_projections
from frugal_bonsai.adaptation.settings import FULL
from frugal_bonsai.adaptation.state import TrainingFolder
from frugal_bonsai.adaptation.student import TRAINED, StreamedStudent, Student
from frugal_bonsai.adaptation.teacher_cache import hash_weights, hash_windows
from frugal_bonsai.adaptation.train import Trained, Trainer
from frugal_bonsai.adaptation.training_data import TrainingData
from frugal_bonsai.checkpoint.commit import staged_directory
from frugal_bonsai.memory.disk import CACHE, OUT, RUN
from frugal_bonsai.memory.training import TrainingPlan
from frugal_bonsai.memory.training_items import STREAMED
from frugal_bonsai.memory.work import VERIFY_TOKENS, VERIFY_WINDOWS
from frugal_bonsai.progress import Progress
from frugal_bonsai.report.bar import choose_progress
from frugal_bonsai.run.adapt_output import (
    describe_adaptation,
    measure,
    write_adapted,
    write_papers,
)
from frugal_bonsai.run.adapt_plan import AdaptPlans, plan_adaptation
from frugal_bonsai.run.adaptation import Adaptation, prepare_adaptation
from frugal_bonsai.run.arguments import command_arguments
from frugal_bonsai.run.disk_room import require_room
from frugal_bonsai.run.early import check_adapt
from frugal_bonsai.run.engine import enforce_caps
from frugal_bonsai.run.events import copy_events, recorded
from frugal_bonsai.run.keywords import adapt_options
from frugal_bonsai.run.options import AdaptOptions
from frugal_bonsai.run.output import replaceable
from frugal_bonsai.run.report import write_page_beside
from frugal_bonsai.run.run_folder import empty, locked, run_folder
from frugal_bonsai.run.settings_file import write_adapt_settings
from frugal_bonsai.run.training_data import make_training_data
from frugal_bonsai.stream.engine import compute_dtype


def adapt(
    pruned: str,
    out: str | Path,
    options: AdaptOptions | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress | bool | None = None,
    on_plan: Callable[[TrainingPlan], None] | None = None,
    **named: Any,
) -> dict[str, Any]:
    """Adapt a pruned model to its dense teacher and report.

    Args:
        pruned: folder of the pruned model, in any layout; or any other supported model.
        out: folder that must not exist yet; appears when it is complete.
        options: all other options as one object, instead of keywords.
        resume: continue the run that ``OUT.run`` holds.
        overwrite: replace ``out`` at the end, if it is a folder that this program wrote.
        progress: gets sweeps, steps and measurements. None shows a bar in notebooks, False nothing.
        on_plan: gets the training's memory plan before any work.
        named: all other options by name: those of ``frugal-bonsai adapt``, with underscores.

    Returns:
        The summary as plain values (the output of ``--json``).

    Raises:
        FrugalBonsaiError: any error that the user can fix; no incomplete output is left.
    """
    out, progress, started = Path(out), choose_progress(progress), time.monotonic()
    options = adapt_options(named, options)
    check_adapt(pruned, out, options, resume=resume, overwrite=overwrite)
    folder = run_folder(out)
    arguments = command_arguments("adapt", pruned, out, options)
    with (
        locked(folder),
        recorded(folder, progress, "adapt", pruned, arguments, resume=resume) as progress,
        ExitStack() as stack,
    ):
        job = prepare_adaptation(
            pruned, options, folder, stack=stack, progress=progress, resume=resume
        )
        plans = _plan(job, out, on_plan)
        resolved = job.settings.resolve(hidden=job.pruned.spec.hidden, rank=plans.training.rank)
        job = replace(job, settings=resolved)
        data = make_training_data(job, plans.teacher)
        gc.collect()  # the teacher
        staged = partial(staged_directory, out, replaces=replaceable(overwrite))
        summary = _train_and_write(job, plans, data, out, stack, staged, started)
        stack.close()  # the output appears
        if data.cache is not None:
            data.cache.close()
        empty(folder)
        if options.report:
            write_page_beside(out, progress)
    return summary


def _train_and_write(
    job: Adaptation,
    plans: AdaptPlans,
    data: TrainingData,
    out: Path,
    stack: ExitStack,
    stage: Callable[[], AbstractContextManager[Path]],
    started: float,
) -> dict[str, Any]:
    """Train, write the merged model with its papers to a staging folder, return the summary.

    ``stage`` opens the staging folder, which ``stack`` holds.
    """
    before = measure(job.pruned, plans.writing, job, None, what="pruned")
    trained = _train(job, plans.training, data)
    student_NSV = _student_logits(job, plans.training, data.held_out_NS)
    gc.collect()  # the student
    staged = stack.enter_context(stage())
    written = write_adapted(
        job, plans.writing, staged, held_out_NS=data.held_out_NS, student_NSV=student_NSV
    )
    summary = describe_adaptation(job, plans, data, trained, before, written, out)
    summary["seconds"] = time.monotonic() - started + trained.earlier_seconds
    write_papers(staged, summary)
    write_adapt_settings(staged, job, plans)
    copy_events(job.folder, staged)
    return summary


def _plan(job: Adaptation, out: Path, on_plan: Callable[[TrainingPlan], None] | None) -> AdaptPlans:
    """Plan memory and files, and tell the user of them; refuse what the disks have no room for."""
    for note in job.budget.notes:
        job.progress.note(note)
    plans = plan_adaptation(job)
    if on_plan is not None:
        on_plan(plans.training)
    folders = {RUN: job.folder, OUT: out}
    if not job.cache_root.exists() or job.folder in job.cache_root.parents:
        folders[CACHE] = job.cache_root  # else the cache itself checks what it lacks
    require_room(plans.disk, folders, "this adaptation", held=job.folder, resumed=job.resume)
    return plans


def _train(job: Adaptation, plan: TrainingPlan, data: TrainingData) -> Trained:
    """Train the student; its best parameters are in the run directory then."""
    enforce_caps(plan, job.device)
    identity = {
        "settings": asdict(job.settings),
        "weights": plan.weights,
        "optimiser": plan.optimiser,
        "model": hash_weights(job.pruned.checkpoint),
        "windows": hash_windows(data.windows_NS),
        "teacher": None if data.cache is None else data.cache.identity,
    }
    folder = TrainingFolder(job.folder, identity)
    if job.resume and not folder.exists:
        job.progress.note(
            f"--resume: {job.folder} holds no training yet, starting with the first step"
        )
    student, parameters = _make_student(job, plan, plan.weights, compute_dtype(job.device))
    with closing(student):
        trainer = Trainer(
            student,
            parameters,
            data,
            job.settings,
            job.options.objective(),
            micro_batch=plan.micro_batch,
            together=job.settings.batch // plan.micro_batch if plan.weights == STREAMED else 1,
            optimiser=plan.optimiser,
            folder=folder,
            progress=job.progress,
        )
        return trainer.run(resume=job.resume and folder.exists)


def _student_logits(job: Adaptation, plan: TrainingPlan, windows_NS: torch.Tensor) -> torch.Tensor:
    """Return the trained student's fp32 logits for the first tokens of some windows, on the CPU.

    The best parameters are loaded into a new student of the checkpoint's own weights, so that
    neither a GPU's bf16 nor int8 weights show in the logits.
    """
    gc.collect()  # the student that was trained, and its optimiser
    student, parameters = _make_student(job, plan, STREAMED, torch.float32)
    with closing(student):
        TrainingFolder(job.folder, {}).load_best(parameters)
        return student.logits(windows_NS[:VERIFY_WINDOWS, :VERIFY_TOKENS]).cpu()


def _make_student(
    job: Adaptation, plan: TrainingPlan, weights: str, dtype: torch.dtype
) -> tuple[Student, dict[str, nn.Parameter]]:
    """Return a student with its weights loaded in this form, and its trained parameters."""
    settings = job.settings
    form = TRAINED if settings.method == FULL else weights
    student = (StreamedStudent if form == STREAMED else Student)(
        job.pruned.checkpoint,
        job.pruned.spec,
        device=job.device,
        dtype=dtype,
        head_tokens=plan.head_tokens,
    )
    student.load(form)
    if form == TRAINED:
        return student, trained_projections(student)
    assert settings.rank is not None and settings.alpha is not None
    return student, add_adapters(
        student, rank=settings.rank, alpha=settings.alpha, seed=settings.seed
    )
