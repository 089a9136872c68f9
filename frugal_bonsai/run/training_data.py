"""Make the training data: sample windows from the teacher, hold some out, cache its answers.

In: a prepared adaptation. Out: windows to train on, held-out windows, and the teacher's cache. The
teacher's engine is freed before :func:`make_training_data` returns.
"""

from __future__ import annotations

import torch

from frugal_bonsai.adaptation.teacher import build_teacher, identify
from frugal_bonsai.adaptation.teacher_cache import cache_folder, hash_text, hash_weights
from frugal_bonsai.adaptation.training_data import TrainingData
from frugal_bonsai.bonsai.calibration import split_windows
from frugal_bonsai.bonsai.written_text import sample_windows
from frugal_bonsai.checkpoint.commit import output_errors
from frugal_bonsai.checkpoint.tensor_file import read_tensor, write_tensors
from frugal_bonsai.memory.plan import MemoryPlan
from frugal_bonsai.run.adaptation import Adaptation
from frugal_bonsai.run.engine import make_engine
from frugal_bonsai.stream.engine import Engine

# Windows that are sampled together, because their keys and values are held.
SAMPLED_TOGETHER = 128


def make_training_data(job: Adaptation, plan: MemoryPlan | None) -> TrainingData:
    """Sample windows, hold some out, and cache the teacher's answers.

    The plan is the teacher's, and None if nothing needs it.
    """
    engine: Engine | None = None
    if job.teacher is not None and plan is not None:
        teacher = job.teacher
        engine = make_engine(teacher, plan, job.device, job.progress)
    splits = []
    for name, text_nS in zip(job.texts.names, job.texts.windows, strict=True):
        if text_nS is None:
            assert engine is not None
            text_nS = _sampled_windows(job, engine)
        splits.append(split_windows(text_nS, len(text_nS), f"--data {name}"))
    held_out = [split.held_out_NS for split in splits]
    windows_NS = torch.cat([*(split.windows_NS for split in splits), *held_out])
    cache, settings = None, job.teacher_settings
    if settings is not None:
        assert engine is not None
        identity = identify(engine.checkpoint, windows_NS, settings, engine.dtype)
        folder = cache_folder(job.cache_root, identity)
        cache = build_teacher(folder, engine, windows_NS, settings, identity)
    data = TrainingData(windows_NS=windows_NS, held_out=sum(map(len, held_out)), cache=cache)
    job.progress.note(
        f"data: {', '.join(job.texts.names)}: {data.trained} windows of {job.window} tokens, "
        f"{data.held_out} held out"
    )
    return data


def _sampled_windows(job: Adaptation, engine: Engine) -> torch.Tensor:
    """Return windows sampled from the teacher, from disk if an earlier run sampled the same."""
    folder, count, seed = job.cache_root, job.texts.sampled, job.settings.seed
    identity = f"{hash_weights(engine.checkpoint)} {count} {job.window} {seed} {engine.dtype}"
    file = folder / f"self_{hash_text(identity)[:16]}.safetensors"
    if file.exists():
        return read_tensor(file, "windows")
    parts = []
    for at, start in enumerate(range(0, count, SAMPLED_TOGETHER)):
        together = min(SAMPLED_TOGETHER, count - start)
        parts.append(sample_windows(engine, together, job.window, seed=seed * 1_000_003 + at))
    windows_NS = torch.cat(parts)
    with output_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    write_tensors(file, {"windows": windows_NS})
    return windows_NS
