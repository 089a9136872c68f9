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
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from frugal_bonsai.checkpoint.commit import require_no_output, staged_directory
from frugal_bonsai.errors import OptionError, StateError
from frugal_bonsai.memory.budget import Budget
from frugal_bonsai.memory.plan import MemoryPlan, Work, plan_memory
from frugal_bonsai.memory.training import INT8, STREAMED, TrainingPlan, TrainingWork, plan_training
from frugal_bonsai.progress import Progress, Silent
from frugal_bonsai.run.adapt_output import Measured, measure, write_adapted
from frugal_bonsai.run.lessons import (
    Sources,
    describe_lessons,
    make_lessons,
    plan_teacher,
    read_sources,
)
from frugal_bonsai.run.options import AdaptOptions
from frugal_bonsai.run.prepare import (
    Model,
    choose_window,
    measured_base_bytes,
    open_model,
    read_windows,
)
from frugal_bonsai.run.summary import package_version
from frugal_bonsai.sizes import parse_bytes
from frugal_bonsai.text.sources import SELF

if TYPE_CHECKING:
    import torch

    from frugal_bonsai.adapt.settings import AdaptSettings
    from frugal_bonsai.adapt.teacher import TeacherSettings
    from frugal_bonsai.adapt.train import Lessons, Trained

Plans = tuple[MemoryPlan | None, TrainingPlan, MemoryPlan]
# Windows whose logits the verification compares.
_VERIFY_WINDOWS = 2


@dataclass(frozen=True, kw_only=True)
class Adaptation:
    """An adaptation that has been thought through but not begun."""

    pruned: Model
    teacher: Model | None
    settings: AdaptSettings
    asked: TeacherSettings | None
    sources: Sources
    window: int
    eval_name: str | None
    eval_NS: torch.Tensor | None
    device: torch.device
    budget: Budget
    run: Path
    caches: Path
    resume: bool
    progress: Progress


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
        job = _prepare(pruned, options, run, resume=resume, progress=progress, stack=stack)
        for note in job.budget.notes:
            progress.note(note)
        plans = _plan(job, options)
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


def _prepare(
    pruned: str,
    options: AdaptOptions,
    run: Path,
    *,
    resume: bool,
    progress: Progress,
    stack: ExitStack,
) -> Adaptation:
    """Check the options against the models; read the texts."""
    from frugal_bonsai.adapt.adapters import LORA, require_peft
    from frugal_bonsai.adapt.settings import AdaptSettings
    from frugal_bonsai.adapt.teacher import TeacherSettings
    from frugal_bonsai.memory.budget import find_device, make_budget
    from frugal_bonsai.rewrite.shrink import require_tied_head

    given = {name: value for name, value in options.settings.items() if value is not None}
    settings = AdaptSettings(**given)
    if settings.method == LORA:
        require_peft()
    student = stack.enter_context(open_model(pruned))
    require_tied_head(student.checkpoint, student.spec)
    objective = settings.objective(options.temperature)
    if objective.needs_teacher and options.teacher is None:
        raise OptionError(
            f"--loss {settings.loss}: needs the dense model; add --teacher, or take --loss lm"
        )
    teacher = None
    if options.teacher is not None and (objective.needs_teacher or SELF in options.data):
        teacher = stack.enter_context(open_model(options.teacher))
        require_tied_head(teacher.checkpoint, teacher.spec)
        _require_pair(student, teacher)
    asked = None
    if objective.needs_teacher:
        layers = _hidden_layers(student, teacher, options) if objective.hidden else ()
        asked = TeacherSettings(top=options.top, temperature=options.temperature, layers=layers)
    window = choose_window(student.spec, options.window)
    if teacher is not None:
        window = choose_window(teacher.spec, options.window and window)
    eval_name, eval_NS = None, None
    if options.eval_text is not None:
        eval_name, eval_NS = read_windows(
            student, options.eval_text, window, windows=None, option="--eval-text"
        )
    device = find_device(options.device)
    return Adaptation(
        pruned=student,
        teacher=teacher,
        settings=settings,
        asked=asked,
        sources=read_sources(student, options, window),
        window=window,
        eval_name=eval_name,
        eval_NS=eval_NS,
        device=device,
        budget=make_budget(device, options.max_gpu_mem, options.max_cpu_mem),
        run=run,
        caches=run / "teacher" if options.teacher_cache is None else Path(options.teacher_cache),
        resume=resume,
        progress=progress,
    )


def _require_pair(student: Model, teacher: Model) -> None:
    """The teacher's tokens and residual stream must be the student's."""
    for what, own, others in (
        ("tokens in its vocabulary", student.spec.vocabulary, teacher.spec.vocabulary),
        ("hidden channels", student.spec.hidden, teacher.spec.hidden),
    ):
        if own != others:
            raise OptionError(
                f"--teacher {teacher.name}: has {others} {what}, {student.name} has {own}; name "
                f"the dense model that it was pruned from"
            )


def _hidden_layers(student: Model, teacher: Model | None, options: AdaptOptions) -> tuple[int, ...]:
    """Layers whose hidden states are compared."""
    layers = student.spec.layers
    if teacher is not None and teacher.spec.layers != layers:
        raise OptionError(
            f"--loss kl+hidden: {student.name} has {layers} layers, the teacher has "
            f"{teacher.spec.layers}, so hidden states have no counterpart; take --loss kl"
        )
    if options.hidden_layers is not None:
        return tuple(sorted(set(options.hidden_layers)))
    return tuple(sorted({*range(3, layers, 4), layers - 1}))


def _plan(job: Adaptation, options: AdaptOptions) -> Plans:
    """The memory of the teacher's sweeps, of the training, of measuring and writing.

    Raises:
        BudgetError: one of them does not fit.
    """
    from frugal_bonsai.adapt.adapters import LORA

    lora = job.settings.method == LORA
    base = measured_base_bytes(job.pruned.spec, int8=lora and options.weights != "native")
    top = 0 if job.asked is None else job.asked.top
    asked = None
    if job.teacher is not None:
        asked = plan_teacher(
            job.teacher, job.budget, job.sources, job.window, top=top, base_bytes=base
        )
    training = plan_training(
        job.pruned.spec,
        job.budget,
        TrainingWork(
            window=job.window,
            batch=job.settings.batch,
            lora=lora,
            rank=job.settings.rank,
            weights=options.weights,
            top=top,
            hidden_layers=0 if job.asked is None else len(job.asked.layers),
        ),
        base_bytes=base,
    )
    windows = max(16, 0 if job.eval_NS is None else len(job.eval_NS))
    work = Work(window=job.window, windows=1, native_windows=windows, rewrite=True)
    return asked, training, plan_memory(job.pruned.spec, job.budget, work, base_bytes=base)


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
        "model": hash_weights(job.pruned.checkpoint),
        "windows": hashlib.sha256(lessons.windows_NS.numpy().tobytes()).hexdigest(),
        "teacher": None if lessons.cache is None else lessons.cache.identity,
    }
    folder = TrainingFolder(job.run, identity)
    if job.resume and not folder.exists:
        job.progress.note(
            f"--resume: {job.run} holds no training yet, starting with its first step"
        )
    trainer = Trainer(
        student,
        trained.parameters(),
        lessons,
        settings,
        settings.objective(temperature),
        micro_batch=plan.micro_batch,
        together=settings.batch // plan.micro_batch if streamed else 1,
        folder=folder,
        progress=job.progress,
    )
    done = trainer.run(resume=job.resume and folder.exists)
    verify_NS = lessons.windows_NS[lessons.trained :][:_VERIFY_WINDOWS, :VERIFY_TOKENS]
    return done, student.logits(verify_NS).cpu(), scaling, settings


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
