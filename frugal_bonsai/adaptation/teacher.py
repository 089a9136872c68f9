"""Ask the dense model once and write its answers to disk.

In: an engine of the dense model, and token windows. Out: a folder of shards. A shard has, for each
token but the last of each of its windows, the log-probabilities (fp16) and numbers (int32) of the K
most likely next tokens and the mass of all other tokens (fp32), and the hidden states behind chosen
layers (fp16). Each shard is written by one sweep; an interrupted cache is continued.
teacher_cache.py reads it. Holds one shard.

Shape suffixes: N windows, S tokens, K kept tokens, H hidden channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from frugal_bonsai.accelerator import sum_dtype
from frugal_bonsai.adaptation.teacher_cache import (
    CACHE_FILE,
    CHECKS,
    HIDDEN,
    IDS,
    REST,
    VALUES,
    VERSION,
    TeacherCache,
    hash_weights,
    hash_windows,
    read_shards,
    window_checksums,
)
from frugal_bonsai.checkpoint.commit import output_errors, require_free_space, write_json
from frugal_bonsai.checkpoint.reader import Checkpoint
from frugal_bonsai.checkpoint.tensor_file import write_tensors
from frugal_bonsai.errors import CheckpointError, OptionError
from frugal_bonsai.memory.work import SHARD_BYTES
from frugal_bonsai.model.family import ModelSpec
from frugal_bonsai.stream.engine import Engine
from frugal_bonsai.stream.hidden import HiddenStates
from frugal_bonsai.stream.layers import LayerStream

DEFAULT_TOP = 64


@dataclass(frozen=True, kw_only=True)
class TeacherSettings:
    """The part of the teacher's outputs that is kept.

    Attributes:
        top: number K of the most likely next tokens to keep.
        temperature: the teacher's logits are divided by it.
        layers: layers whose output hidden states are kept.
    """

    top: int = DEFAULT_TOP
    temperature: float = 1.0
    layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.top < 1:
            raise OptionError(f"--top: {self.top} is not at least 1")
        if not 0.0 < self.temperature <= 100.0:
            raise OptionError(f"--temperature: {self.temperature} is not above 0 and up to 100")

    def window_bytes(self, window: int, hidden: int) -> int:
        """Return the bytes that a window of a shard needs in memory.

        These are the values in fp32, and the tensors that are written.
        """
        return (window - 1) * (self.top * (4 + 4 + 2) + 4) + len(self.layers) * window * hidden * 2

    def file_bytes(self, window: int, hidden: int) -> int:
        """Return the bytes of a window on disk."""
        return (window - 1) * (self.top * (2 + 4) + 4) + len(self.layers) * window * hidden * 2


def identify(
    checkpoint: Checkpoint, windows_NS: torch.Tensor, settings: TeacherSettings, dtype: torch.dtype
) -> dict[str, Any]:
    """Return what a cache belongs to: hashes of the weights and windows, and the settings."""
    return {
        "model": hash_weights(checkpoint),
        "windows": hash_windows(windows_NS),
        "shape": list(windows_NS.shape),
        "top": settings.top,
        "temperature": settings.temperature,
        "layers": list(settings.layers),
        "dtype": str(dtype).removeprefix("torch."),
    }


def build_teacher(
    folder: Path,
    engine: Engine,
    windows_NS: torch.Tensor,
    settings: TeacherSettings,
    identity: dict[str, Any],
) -> TeacherCache:
    """Write the shards that a cache lacks, and open it.

    Args:
        folder: of the cache; created if it does not exist.
        engine: the dense model's.
        windows_NS: int64 ``[N, S]``.
        settings: what is kept.
        identity: what :func:`identify` returns.

    Raises:
        OptionError: more tokens than the vocabulary has, or a layer that the model does not have.
        StateError: the folder holds the cache of another teacher, text or setting.
        OutputError: the folder cannot be written or the disk is full.
    """
    require_possible(settings, engine.spec)
    window, hidden = windows_NS.shape[1], engine.spec.hidden
    if not folder.exists():
        needed = len(windows_NS) * settings.file_bytes(window, hidden)
        require_free_space(folder.parent, needed, "the teacher's cache")
    with output_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    shards = read_shards(folder, identity) if (folder / CACHE_FILE).exists() else []
    done = sum(shard["windows"] for shard in shards)
    fits = max(1, SHARD_BYTES // settings.window_bytes(window, hidden))
    step = min(engine.sweep.limits.windows_in_flight, fits)
    if done < len(windows_NS):
        with engine.native() as stream:
            for start in range(done, len(windows_NS), step):
                shard_NS = windows_NS[start : start + step]
                file = f"windows_{start:06d}.safetensors"
                answers = _ask(engine, stream, shard_NS, settings)
                answers[CHECKS] = window_checksums(answers)
                write_tensors(folder / file, answers)
                del answers
                shards.append({"file": file, "windows": len(shard_NS)})
                described = {"version": VERSION, "identity": identity, "shards": shards}
                write_json(folder / CACHE_FILE, described)
    return TeacherCache(folder, identity)


def require_possible(settings: TeacherSettings, spec: ModelSpec) -> None:
    """Raise if the model has fewer tokens or layers than the settings name.

    Raises:
        OptionError: names the option and what the model has.
    """
    if settings.top > spec.vocabulary:
        raise OptionError(
            f"--top: {settings.top} is more than the vocabulary's {spec.vocabulary} tokens"
        )
    for layer in settings.layers:
        if not 0 <= layer < spec.layers:
            raise OptionError(f"--hidden-layers: {layer} is outside 0..{spec.layers - 1}")


def _ask(
    engine: Engine, stream: LayerStream, windows_NS: torch.Tensor, settings: TeacherSettings
) -> dict[str, torch.Tensor]:
    """Return the tensors of a shard, on the CPU, from one sweep over its windows."""
    tensors: dict[str, torch.Tensor] = {}

    def keep(layer: int, hidden: HiddenStates) -> None:
        if layer in settings.layers:
            states_NSH = _half_states(hidden, (*windows_NS.shape, engine.spec.hidden), layer)
            tensors[HIDDEN.format(layer=layer)] = states_NSH

    hidden = engine.sweep.run(stream, windows_NS, name="asking the teacher", after_layer=keep)
    with torch.inference_mode():
        return tensors | _top_tokens(engine, hidden, settings)


def _half_states(hidden: HiddenStates, shape: tuple[int, ...], layer: int) -> torch.Tensor:
    """Return hidden states as fp16 ``[N, S, H]`` on the CPU.

    Raises:
        OptionError: a value is too large for fp16.
    """
    states_NSH = torch.empty(shape, dtype=torch.float16, device="cpu")
    for window in range(shape[0]):
        states_NSH[window] = hidden.read(slice(window, window + 1))[0]
    if not bool(states_NSH.isfinite().all()):
        raise OptionError(
            f"--hidden-layers: the teacher's hidden states behind layer {layer} are beyond the "
            f"range of fp16 (65,504); leave that layer out"
        )
    return states_NSH


def _top_tokens(
    engine: Engine, hidden: HiddenStates, settings: TeacherSettings
) -> dict[str, torch.Tensor]:
    """Return a shard's most likely tokens and the mass of all others, on the CPU.

    Raises:
        CheckpointError: a probability is not finite.
    """
    values_NSK, ids_NSK = engine.head.top(hidden, settings.top, settings.temperature)
    kept_NS = values_NSK.exp().sum(-1, dtype=sum_dtype(values_NSK.device))
    if not bool(values_NSK[..., 0].isfinite().all()):
        raise CheckpointError(
            f"{engine.checkpoint.folder}: the teacher's probabilities are not finite in "
            f"{engine.dtype}; is this the model that was pruned?"
        )
    return {
        VALUES: values_NSK.half().cpu(),
        IDS: ids_NSK.cpu(),
        REST: (1.0 - kept_NS).clamp_(0.0, 1.0).float().cpu(),
    }
