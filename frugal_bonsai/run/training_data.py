"""What a student learns from: windows of text, and what the teacher says of them.

In: the options of ``adapt``, the dense model. Out: windows to train on and held-out ones, and the
teacher's cache. The teacher's engine is gone when this returns: what it held is free again.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from frugal_bonsai.errors import OptionError
from frugal_bonsai.memory.budget import Budget
from frugal_bonsai.memory.plan import MemoryPlan, SweepWorkload, plan_memory
from frugal_bonsai.progress import Progress
from frugal_bonsai.run.options import AdaptOptions
from frugal_bonsai.run.prepare import Model, make_engine, read_windows
from frugal_bonsai.text.sources import SELF

if TYPE_CHECKING:
    import torch

    from frugal_bonsai.adapt.teacher import TeacherCache, TeacherSettings
    from frugal_bonsai.adapt.training_data import Lessons
    from frugal_bonsai.stream.engine import Engine

# Windows that are sampled together: their keys and values are held.
_SAMPLED_TOGETHER = 128


@dataclass(frozen=True, kw_only=True)
class Sources:
    """Texts before anything is computed.

    Attributes:
        names: as they are reported.
        texts: token windows of each, None for ``self``.
        sampled: windows that are sampled from the teacher.
    """

    names: tuple[str, ...]
    texts: tuple[torch.Tensor | None, ...]
    sampled: int

    @property
    def windows(self) -> int:
        """Of all sources together."""
        return self.sampled + sum(len(text) for text in self.texts if text is not None)


def read_sources(student: Model, options: AdaptOptions, window: int) -> Sources:
    """Read and tokenise the texts.

    Raises:
        OptionError: ``self`` twice, or without a teacher.
        CalibrationError: a text cannot be read or is too short.
    """
    from frugal_bonsai.bonsai.calibration import window_count

    names, texts = [], list["torch.Tensor | None"]()
    if options.data.count(SELF) > 1:
        raise OptionError("--data self: is named twice; --windows says how many are sampled")
    for source in options.data:
        if source != SELF:
            name, windows_nS = read_windows(
                student, source, window, windows=options.windows, option="--data"
            )
            names.append(name)
            texts.append(windows_nS)
            continue
        if options.teacher is None:
            raise OptionError("--data self: windows are sampled from the teacher; add --teacher")
        names.append("self (sampled from the teacher)")
        texts.append(None)
    sampled = window_count(window, options.windows) if SELF in options.data else 0
    return Sources(names=tuple(names), texts=tuple(texts), sampled=sampled)


def plan_teacher(
    teacher: Model,
    budget: Budget,
    sources: Sources,
    window: int,
    *,
    top: int,
    base_bytes: int,
) -> MemoryPlan:
    """The memory of sampling and of the sweeps that fill the cache; 0 for no cache."""
    work = SweepWorkload(
        window=window,
        measured=(sources.windows,) if top else (),
        sampled=min(sources.sampled, _SAMPLED_TOGETHER),
        top=top,
    )
    return plan_memory(teacher.spec, budget, work, base_bytes=base_bytes)


def make_lessons(
    teacher: Model | None,
    plan: MemoryPlan | None,
    sources: Sources,
    settings: TeacherSettings | None,
    *,
    folder: Path,
    window: int,
    seed: int,
    device: torch.device,
    progress: Progress,
) -> Lessons:
    """Sample what is to be sampled, ask the teacher, split off held-out windows.

    Args:
        teacher: the dense model; None where nothing of it is needed.
        plan: its memory.
        sources: the texts.
        settings: of the cache; None where the loss does not ask the teacher.
        folder: where cache and sampled windows lie.
        window: S.
        seed: of sampling.
        device: where to compute.
        progress: told of sweeps.
    """
    import torch

    from frugal_bonsai.adapt.training_data import Lessons
    from frugal_bonsai.bonsai.calibration import split_windows

    engine: Engine | None = None
    if teacher is not None and plan is not None:
        engine = make_engine(teacher.checkpoint, teacher.spec, plan, device, progress)
    trained, held_out = [], []
    for name, text_nS in zip(sources.names, sources.texts, strict=True):
        if text_nS is None:
            assert engine is not None
            text_nS = _sampled(engine, sources.sampled, window, folder=folder, seed=seed)
        split = split_windows(text_nS, len(text_nS), f"--data {name}")
        trained.append(split.windows_NS)
        held_out.append(split.held_out_NS)
    windows_NS = torch.cat([*trained, *held_out])
    cache = None
    if settings is not None:
        assert engine is not None
        cache = _cache(engine, windows_NS, settings, folder)
    return Lessons(windows_NS=windows_NS, held_out=sum(map(len, held_out)), cache=cache)


def _sampled(engine: Engine, count: int, window: int, *, folder: Path, seed: int) -> torch.Tensor:
    """Windows that the teacher writes; read again where a run before has sampled the same."""
    import torch

    from frugal_bonsai.adapt.teacher import hash_weights
    from frugal_bonsai.bonsai.calibration import sample_windows
    from frugal_bonsai.checkpoint.commit import output_errors
    from frugal_bonsai.checkpoint.tensor_file import read_tensor, write_tensors

    said = f"{hash_weights(engine.checkpoint)} {count} {window} {seed} {engine.dtype}"
    file = folder / f"self_{hashlib.sha256(said.encode()).hexdigest()[:16]}.safetensors"
    if file.exists():
        return read_tensor(file, "windows")
    first = engine.spec.config.get("bos_token_id")
    parts = []
    for at, start in enumerate(range(0, count, _SAMPLED_TOGETHER)):
        parts.append(
            sample_windows(
                engine,
                min(_SAMPLED_TOGETHER, count - start),
                window,
                first_token=first if isinstance(first, int) else None,
                seed=seed * 1_000_003 + at,
            )
        )
    windows_NS = torch.cat(parts)
    with output_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    write_tensors(file, {"windows": windows_NS})
    return windows_NS


def _cache(
    engine: Engine, windows_NS: torch.Tensor, settings: TeacherSettings, folder: Path
) -> TeacherCache:
    from frugal_bonsai.adapt.teacher import build_teacher, cache_folder, identify
    from frugal_bonsai.checkpoint.commit import require_free_space

    identity = identify(engine.checkpoint, windows_NS, settings, engine.dtype)
    place = cache_folder(folder, identity)
    window, hidden = windows_NS.shape[1], engine.spec.hidden
    needed = len(windows_NS) * settings.window_bytes(window, hidden)
    if not place.exists():
        require_free_space(folder, needed, "the teacher's cache")
    return build_teacher(place, engine, windows_NS, settings, identity)


def describe_lessons(sources: Sources, lessons: Lessons) -> dict[str, Any]:
    """Plain values."""
    return {
        "sources": list(sources.names),
        "window": int(lessons.windows_NS.shape[1]),
        "windows": lessons.trained,
        "held_out_windows": lessons.held_out,
    }
