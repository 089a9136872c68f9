"""``adapt``: ask the teacher -> train the student -> merge -> verify, and the report of it.

In: a pruned model, its dense teacher, text, options, an output folder. Out: a checkpoint of the
same layout in that folder, which appears only when it is complete and verified, and a summary as
plain values. Teacher, student and output are held one after the other, never together. ``OUT.run``
beside it holds the teacher's cache and the training's state; it is removed at the end.
"""

from __future__ import annotations

import gc
import shutil
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from frugal_bonsai.checkpoint.commit import require_no_output, staged_directory
from frugal_bonsai.errors import StateError
from frugal_bonsai.memory.plan import MemoryPlan
from frugal_bonsai.memory.training import TrainingPlan
from frugal_bonsai.memory.training_items import INT8, STREAMED
from frugal_bonsai.progress import Progress, Silent
from frugal_bonsai.run.adapt_output import Measured, measure, write_adapted
from frugal_bonsai.run.adapt_plan import plan_adaptation
from frugal_bonsai.run.adaptation import Adaptation, prepare_adaptation
from frugal_bonsai.run.options import AdaptOptions
from frugal_bonsai.run.training_data import (
    describe_lessons,
    make_lessons,
)
from frugal_bonsai.sizes import parse_bytes
from frugal_bonsai.version import package_version

if TYPE_CHECKING:
    import torch

    from frugal_bonsai.adapt.settings import AdaptSettings
    from frugal_bonsai.adapt.teacher import TeacherSettings
    from frugal_bonsai.adapt.train import Trained
    from frugal_bonsai.adapt.training_data import Lessons

# Windows whose logits the verification compares.
_VERIFY_WINDOWS = 2


def adapt_pruned(
    pruned: str,
    out: str | Path,
    options: AdaptOptions,
    *,
    resume: bool = False,
    progress: Progress | None = None,
    on_plan: Callable[[TrainingPlan], None] | None = None,
) -> dict[str, Any]:
    """Adapt a pruned model to its dense teacher and report.

    Args:
        pruned: folder of the pruned model, any layout; or any other model that is supported.
        out: folder that must not exist yet; appears when it is complete.
        options: everything else.
        resume: continue the run that ``OUT.run`` holds.
        progress: told of sweeps, steps, measurements.
        on_plan: told of the training's memory plan before any work.

    Returns:
        The summary, plain values (what ``--json`` prints).

    Raises:
        FrugalBonsaiError: anything that the user can mend; no half-written output is left.
    """
    out, progress, started = Path(out), progress or Silent(), time.monotonic()
    require_no_output(out)
    shard_bytes = parse_bytes(options.max_shard_size, option="--max-shard-size")
    run = out.with_name(out.name + ".run")
    if run.exists() and not resume:
        raise StateError(
            f"{run}: holds an unfinished run; continue it with --resume, or delete that folder"
        )
    with ExitStack() as stack:
        job = prepare_adaptation(
            pruned, options, run, resume=resume, progress=progress, stack=stack
        )
        for note in job.budget.notes:
            progress.note(note)
        plans = plan_adaptation(job, options)
        if on_plan is not None:
            on_plan(plans[1])
        lessons = _lessons(job, plans[0])
        held_out_NS = lessons.windows_NS[lessons.trained :]
        before = measure(job.pruned, plans[2], job, None, what="pruned")
        trained, expected, scaling, settings = _train(job, plans[1], lessons)
        gc.collect()
        staged = stack.enter_context(staged_directory(out))
        written = write_adapted(
            job,
            plans[2],
            staged,
            shard_bytes=shard_bytes,
            scaling=scaling,
            held_out_NS=held_out_NS,
            verify_NS=held_out_NS[:_VERIFY_WINDOWS],
            expected_NSV=expected,
            native=plans[1].weights != INT8,
        )
        summary = {
            "version": package_version(),
            "model": job.pruned.name,
            "teacher": None if job.teacher is None else job.teacher.name,
            "family": job.pruned.spec.family.model_type,
            "settings": settings.to_json(),
            "data": describe_lessons(job.sources, lessons),
            "cache": _describe_cache(lessons, job.asked),
            "training": _describe_training(trained, plans[1]),
        }
        summary |= _figures(job, trained, before, written)
        summary |= written.papers(summary, plans, out, seconds=time.monotonic() - started)
    if lessons.cache is not None:
        lessons.cache.close()
    shutil.rmtree(run, ignore_errors=True)
    return summary


def _lessons(job: Adaptation, plan: MemoryPlan | None) -> Lessons:
    lessons = make_lessons(
        job.teacher,
        plan,
        job.sources,
        job.asked,
        folder=job.caches,
        window=job.window,
        seed=job.settings.seed,
        device=job.device,
        progress=job.progress,
    )
    gc.collect()  # the teacher's buffers
    job.progress.note(
        f"data: {', '.join(job.sources.names)}: {lessons.trained} windows of {job.window} tokens, "
        f"{lessons.held_out} held out"
    )
    return lessons


def _train(
    job: Adaptation, plan: TrainingPlan, lessons: Lessons
) -> tuple[Trained, torch.Tensor, float, AdaptSettings]:
    """Train; how it went, the student's logits to verify with, the adapters' scale."""
    import hashlib

    from frugal_bonsai.adapt.adapters import LORA, Adapters, Projections
    from frugal_bonsai.adapt.state import TrainingFolder
    from frugal_bonsai.adapt.streamed import StreamedStudent
    from frugal_bonsai.adapt.student import Student
    from frugal_bonsai.adapt.teacher import hash_weights
    from frugal_bonsai.adapt.train import Trainer
    from frugal_bonsai.rewrite.verify import VERIFY_TOKENS
    from frugal_bonsai.stream.engine import compute_dtype

    spec, temperature = job.pruned.spec, 1.0
    settings = job.settings.for_width(spec.hidden)
    if job.asked is not None:
        temperature = job.asked.temperature
    _enforce(job, plan)
    streamed = plan.weights == STREAMED
    student = (StreamedStudent if streamed else Student)(
        job.pruned.checkpoint,
        spec,
        device=job.device,
        dtype=compute_dtype(job.device),
        head_tokens=plan.head_tokens,
    )
    trained: Adapters | Projections
    scaling = 1.0
    if settings.method == LORA:
        alpha = 2.0 * plan.rank if settings.alpha is None else settings.alpha
        settings, scaling = replace(settings, rank=plan.rank, alpha=alpha), alpha / plan.rank
        if isinstance(student, StreamedStudent):
            student.place_frozen()
        else:
            student.load_frozen(int8=plan.weights == INT8)
        trained = Adapters(student, rank=plan.rank, alpha=alpha, seed=settings.seed)
    else:
        student.load_trained()
        trained = Projections(student)
    identity = {
        "settings": settings.to_json(),
        "weights": plan.weights,
        "optimiser": plan.optimiser,
        "model": hash_weights(job.pruned.checkpoint),
        "windows": hashlib.sha256(lessons.windows_NS.numpy().tobytes()).hexdigest(),
        "teacher": None if lessons.cache is None else lessons.cache.identity,
    }
    folder = TrainingFolder(job.run, identity)
    if job.resume and not folder.exists:
        job.progress.note(
            f"--resume: {job.run} holds no training yet, starting with its first step"
        )
    with closing(student):
        trainer = Trainer(
            student,
            trained.parameters(),
            lessons,
            settings,
            settings.objective(temperature),
            micro_batch=plan.micro_batch,
            together=settings.batch // plan.micro_batch if streamed else 1,
            optimiser=plan.optimiser,
            folder=folder,
            progress=job.progress,
        )
        done = trainer.run(resume=job.resume and folder.exists)
        verify_NS = lessons.windows_NS[lessons.trained :][:_VERIFY_WINDOWS, :VERIFY_TOKENS]
        return done, student.logits(verify_NS).cpu(), scaling, settings


def _enforce(job: Adaptation, plan: TrainingPlan) -> None:
    """The caps hold in the allocators too."""
    from frugal_bonsai.memory.budget import enforce_gpu_cap, enforce_host_cap

    enforce_host_cap(job.budget.host_bytes, plan.total_bytes("host"))
    if job.budget.gpu_bytes is not None:
        enforce_gpu_cap(job.device, job.budget)


def _describe_cache(lessons: Lessons, asked: TeacherSettings | None) -> dict[str, Any] | None:
    if lessons.cache is None or asked is None:
        return None
    return {
        "top": asked.top,
        "temperature": asked.temperature,
        "layers": list(asked.layers),
        "size_bytes": lessons.cache.size_bytes,
        "rest_mass": lessons.cache.rest_mass(),
    }


def _describe_training(trained: Trained, plan: TrainingPlan) -> dict[str, Any]:
    return {
        "weights": plan.weights,
        "rank": plan.rank or None,
        "optimiser": plan.optimiser,
        "micro_batch": plan.micro_batch,
        "steps": trained.steps,
        "tokens": trained.tokens,
        "seconds": trained.seconds,
        "best_step": trained.best_step,
        "stopped": trained.stopped,
        "history": trained.history,
    }


def _figures(job: Adaptation, trained: Trained, before: Measured, after: Any) -> dict[str, Any]:
    """Before and after, as far as they are known before the papers."""
    spec = job.pruned.spec
    sizes = {
        "parameters": spec.parameters,
        "block_parameters": spec.block_parameters,
        "weight_bytes": job.pruned.checkpoint.weight_bytes,
    }
    first, best = trained.before, trained.after
    return {
        "eval_text": None
        if job.eval_NS is None
        else {"name": job.eval_name, "window": job.window, "windows": len(job.eval_NS)},
        "before": {
            **sizes,
            "perplexity": first["perplexity"],
            "eval_perplexity": before.on_text,
            "kl": first["kl"],
            "kl_upper": first["kl_upper"],
        },
        "after": {
            **after.sizes,
            "perplexity": after.measured.held_out,
            "eval_perplexity": after.measured.on_text,
            "kl": best["kl"],
            "kl_upper": best["kl_upper"],
        },
        "verify": after.verify,
        "layout": after.layout,
    }
