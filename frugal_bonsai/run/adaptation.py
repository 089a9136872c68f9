"""An adaptation before it begins: its options checked, its models open, its text read.

In: what the user says. Out: an :class:`Adaptation`, which adapt_plan.py plans and ``adapt`` runs.
Reads headers and text, no weights.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from frugal_bonsai.errors import OptionError, UnsupportedModelError
from frugal_bonsai.memory.budget import Budget
from frugal_bonsai.progress import Progress
from frugal_bonsai.run.options import AdaptOptions
from frugal_bonsai.run.prepare import (
    Model,
    choose_window,
    open_model,
    read_windows,
)
from frugal_bonsai.run.training_data import Sources, read_sources
from frugal_bonsai.text.sources import SELF

if TYPE_CHECKING:
    import torch

    from frugal_bonsai.adapt.settings import AdaptSettings
    from frugal_bonsai.adapt.teacher import TeacherSettings


@dataclass(frozen=True, kw_only=True)
class Adaptation:
    """An adaptation that has been thought through but not begun."""

    pruned: Model
    optimisers: tuple[str, ...]
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


def prepare_adaptation(
    pruned: str,
    options: AdaptOptions,
    run: Path,
    *,
    resume: bool,
    progress: Progress,
    stack: ExitStack,
    headers_only: bool = False,
) -> Adaptation:
    """Check the options against the models; read the texts.

    Args:
        pruned: folder, hub id.
        options: everything else that the user says.
        run: the run directory.
        resume: whether it is to be continued.
        progress: told of sweeps.
        stack: closes the models.
        headers_only: of hub models only config and headers are fetched; nothing can be run then.
    """
    from frugal_bonsai.adapt.adapters import LORA, require_peft
    from frugal_bonsai.adapt.optimiser import allowed_optimisers
    from frugal_bonsai.adapt.settings import AdaptSettings
    from frugal_bonsai.adapt.teacher import TeacherSettings
    from frugal_bonsai.memory.budget import find_device, make_budget
    from frugal_bonsai.model.tied_head import require_tied_head

    given = {name: value for name, value in options.settings.items() if value is not None}
    settings = AdaptSettings(**given)
    if settings.method == LORA:
        require_peft()
    student = stack.enter_context(open_model(pruned, headers_only=headers_only))
    require_tied_head(student.checkpoint, student.spec)
    objective = settings.objective(options.temperature)
    if objective.needs_teacher and options.teacher is None:
        raise OptionError(
            f"--loss {settings.loss}: needs the dense model; add --teacher, or take --loss lm"
        )
    _require_trainable(student)
    teacher = None
    if options.teacher is not None and (objective.needs_teacher or SELF in options.data):
        teacher = stack.enter_context(open_model(options.teacher, headers_only=headers_only))
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
        optimisers=allowed_optimisers(settings.optimiser),
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


def _require_trainable(student: Model) -> None:
    """Mixtures of experts can be asked, not taught: neither plan nor adapters know a router."""
    if student.spec.experts:
        raise UnsupportedModelError(
            f"{student.name}: adapt does not train a {student.spec.family.model_type}, whose "
            "layers have experts; prune with recovery, which refits every expert, and leave it out"
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
