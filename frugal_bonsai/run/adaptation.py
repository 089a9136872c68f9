"""Prepare an adaptation: check its options, open its models, read its texts.

In: the user's options. Out: an :class:`Adaptation`, which adapt_plan.py plans and adapt.py runs.
Reads headers and text, no weights. Holds the token windows of the texts.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch

from frugal_bonsai.adaptation.settings import AdaptSettings
from frugal_bonsai.adaptation.teacher import DEFAULT_TOP, TeacherSettings, require_possible
from frugal_bonsai.bonsai.calibration import window_count
from frugal_bonsai.errors import OptionError, UnsupportedModelError
from frugal_bonsai.memory.budget import Budget, find_device, make_budget
from frugal_bonsai.model.tied_head import require_tied_head
from frugal_bonsai.progress import Progress
from frugal_bonsai.run.open import Model, open_model
from frugal_bonsai.run.options import AdaptOptions
from frugal_bonsai.run.texts import Text, choose_window, read_eval_text, read_windows
from frugal_bonsai.sizes import parse_bytes
from frugal_bonsai.text.sources import SELF


@dataclass(frozen=True, kw_only=True)
class Texts:
    """The texts of a training, before anything is computed.

    Attributes:
        names: name of each text in reports.
        windows: token windows of each text; None for ``self``.
        sampled: number of windows to sample from the teacher.
    """

    names: tuple[str, ...]
    windows: tuple[torch.Tensor | None, ...]
    sampled: int

    @property
    def count(self) -> int:
        """Number of windows of all texts."""
        return self.sampled + sum(len(text) for text in self.windows if text is not None)


@dataclass(frozen=True, kw_only=True)
class Adaptation:
    """An adaptation that is checked but has not begun.

    Attributes:
        options: the user's.
        settings: of the training; resolved once the memory is planned.
        pruned: the pruned model.
        teacher: the dense model; None if neither loss nor data need it.
        teacher_settings: what is kept of its answers; None if the loss does not need them.
        texts: token windows of the training texts.
        window: S, tokens of a window.
        eval_text: the text of ``--eval-text``, or None.
        device: device to compute on.
        budget: caps on memory.
        shard_bytes: largest shard of the output.
        folder: run directory.
        resume: whether to continue the training in the run directory.
        progress: gets sweeps, steps and notes.
    """

    options: AdaptOptions
    settings: AdaptSettings
    pruned: Model
    teacher: Model | None
    teacher_settings: TeacherSettings | None
    texts: Texts
    window: int
    eval_text: Text | None
    device: torch.device
    budget: Budget
    shard_bytes: int
    folder: Path
    resume: bool
    progress: Progress

    @property
    def cache_root(self) -> Path:
        """Folder of the teacher's caches and of sampled windows."""
        kept = self.options.teacher_cache
        return self.folder / "teacher" if kept is None else Path(kept)


def prepare_adaptation(
    pruned: str,
    options: AdaptOptions,
    folder: Path,
    *,
    stack: ExitStack,
    progress: Progress,
    resume: bool = False,
    headers_only: bool = False,
) -> Adaptation:
    """Check the options against the models, and read the texts.

    Args:
        pruned: folder or hub id of the pruned model.
        options: all other options.
        folder: run directory.
        stack: closes the models.
        progress: gets sweeps, steps and notes.
        resume: whether to continue the training in the run directory.
        headers_only: fetch only config and headers of hub models; enough for a plan, not for a run.

    Raises:
        FrugalBonsaiError: an option cannot work with these models, or a model or text cannot be
            read.
    """
    shard_bytes = parse_bytes(options.max_shard_size, option="--max-shard-size")
    student = _open(pruned, stack, headers_only=headers_only, text_only=options.text_only)
    _require_trainable(student)
    teacher = _open_teacher(student, options, stack, headers_only=headers_only)
    window = choose_window((teacher or student).spec, options.window)
    eval_text = read_eval_text(student, options.eval_text, window)
    device = find_device(options.device)
    budget = make_budget(device, options.caps)
    progress.caps(budget.host_bytes, budget.gpu_bytes)
    return Adaptation(
        options=options,
        settings=options.training(),
        pruned=student,
        teacher=teacher,
        teacher_settings=_teacher_settings(options, student, teacher),
        texts=_read_texts(student, options, window),
        window=window,
        eval_text=eval_text,
        device=device,
        budget=budget,
        shard_bytes=shard_bytes,
        folder=folder,
        resume=resume,
        progress=progress,
    )


def _open(name: str, stack: ExitStack, *, headers_only: bool, text_only: bool = True) -> Model:
    model = stack.enter_context(open_model(name, headers_only=headers_only, text_only=text_only))
    require_tied_head(model.checkpoint, model.spec)
    return model


def _open_teacher(
    student: Model, options: AdaptOptions, stack: ExitStack, *, headers_only: bool
) -> Model | None:
    """Open the dense model, if the loss or the data need it; raise if it does not match."""
    needed = options.objective().needs_teacher or SELF in options.data
    if options.teacher is None or not needed:
        return None
    teacher = _open(options.teacher, stack, headers_only=headers_only)
    _require_pair(student, teacher)
    return teacher


def _require_trainable(student: Model) -> None:
    """Raise for layers that neither the plan nor the adapters support."""
    if student.spec.experts:
        raise UnsupportedModelError(
            f"{student.name}: adapt does not train a {student.spec.family.model_type}, whose "
            "layers have experts; prune with recovery, which refits every expert, and do without "
            "adapt"
        )
    if not student.spec.family.attention_parts:
        raise UnsupportedModelError(
            f"{student.name}: adapt does not train a {student.spec.family.model_type}: "
            f"{student.spec.whole_attention}; prune with recovery, which refits the output "
            "projections, and do without adapt"
        )


def _require_pair(student: Model, teacher: Model) -> None:
    """Raise unless both models have the same vocabulary and the same hidden size."""
    for what, own, others in (
        ("tokens in its vocabulary", student.spec.vocabulary, teacher.spec.vocabulary),
        ("hidden channels", student.spec.hidden, teacher.spec.hidden),
    ):
        if own != others:
            raise OptionError(
                f"--teacher {teacher.name}: has {others} {what}, but {student.name} has {own}; "
                f"name the dense model that it was pruned from"
            )


def _teacher_settings(
    options: AdaptOptions, student: Model, teacher: Model | None
) -> TeacherSettings | None:
    """Return what the loss needs of the teacher's answers.

    Raises:
        OptionError: hidden states are compared, and the models differ in their number of layers; or
            more tokens or layers are named than there are.
    """
    objective = options.objective()
    if not objective.needs_teacher:
        return None
    count, layers = student.spec.layers, tuple[int, ...]()
    if objective.hidden:
        if teacher is not None and teacher.spec.layers != count:
            raise OptionError(
                f"--loss kl+hidden: {student.name} has {count} layers, but the teacher has "
                f"{teacher.spec.layers}, so hidden states have no counterpart; choose --loss kl"
            )
        chosen = options.hidden_layers
        layers = tuple(sorted({*range(3, count, 4), count - 1} if chosen is None else set(chosen)))
    vocabulary = student.spec.vocabulary  # the teacher has the same
    chosen_top = min(DEFAULT_TOP, vocabulary) if options.top is None else options.top
    kept = TeacherSettings(top=chosen_top, temperature=options.temperature, layers=layers)
    require_possible(kept, student.spec)
    return kept


def _read_texts(student: Model, options: AdaptOptions, window: int) -> Texts:
    """Read and tokenise the texts, and count the windows of ``self``."""
    texts: list[tuple[str, torch.Tensor | None]] = [
        ("self (sampled from the teacher)", None)
        if source == SELF
        else read_windows(student, source, window, windows=options.windows, option="--data")
        for source in options.data
    ]
    return Texts(
        names=tuple(name for name, _ in texts),
        windows=tuple(windows_nS for _, windows_nS in texts),
        sampled=window_count(window, options.windows) if SELF in options.data else 0,
    )
