"""What every command does first: open the model, find the text, make the plan.

In: the user's options. Out: an open checkpoint, token windows, a budget, a plan, an engine. Reads
headers and text, no weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from frugal_bonsai.checkpoint.locate import find_model
from frugal_bonsai.checkpoint.reader import Checkpoint
from frugal_bonsai.checkpoint.remote import open_headers
from frugal_bonsai.dtypes import FLOATING
from frugal_bonsai.errors import CheckpointError, OptionError
from frugal_bonsai.model.canonical_names import describe_checkpoint
from frugal_bonsai.model.family import ModelSpec
from frugal_bonsai.progress import Progress
from frugal_bonsai.sizes import MIB

# Characters to read for a token: generous for text (about four), enough for byte vocabularies too.
CHARACTERS_PER_TOKEN = 8
DEFAULT_SOURCE, EXAMPLE_SOURCE = "wikitext2", "stdlib"
DEFAULT_WINDOW = 2048
# The FFN tile that matrix products like.
CPU_TILE, GPU_TILE = 64, 128
# What comes after a process's size is measured: scipy's solvers (22 MiB), the search's own modules
# (3), torch's lazy imports, the pool's threads.
LATE_BYTES = 28 * MIB


@dataclass(frozen=True, kw_only=True)
class Model:
    """An open model.

    Attributes:
        name: what the user typed.
        checkpoint: open for reading.
        spec: from config and headers.
    """

    name: str
    checkpoint: Checkpoint
    spec: ModelSpec

    @property
    def folder(self) -> Path:
        """Where the checkpoint lies."""
        return self.checkpoint.folder


@contextmanager
def open_model(
    name: str, *, headers_only: bool = False, assume_family: str | None = None
) -> Iterator[Model]:
    """Find, open and describe a model: a folder, a hub id, or ``example``.

    Args:
        name: what the user typed.
        headers_only: of a hub model only config and headers are fetched; its weights are not read.
        assume_family: the family that an architecture without a table is like.
    """
    with open_headers(name) if headers_only else Checkpoint.open(find_model(name)) as checkpoint:
        source = str(checkpoint.folder / "config.json")
        spec = describe_checkpoint(checkpoint, source=source, assume=assume_family)
        _require_floating(checkpoint)
        yield Model(name=name, checkpoint=checkpoint, spec=spec)


def note_assumed(model: Model, progress: Progress) -> None:
    """Say loudly that a table is taken on the user's word."""
    if model.spec.family.assumed is not None:
        progress.note(assumption(model))


def assumption(model: Model) -> str:
    """What is taken on the user's word."""
    family = model.spec.family
    return (
        f"ASSUMED: model_type {family.model_type!r} has no table of its own and is taken for a "
        f"{family.assumed}: the names of its tensors agree, their meaning was not checked; compare "
        "`frugal-bonsai eval` with a perplexity that you know"
    )


def _require_floating(checkpoint: Checkpoint) -> None:
    """Refuse weights that are quantised or no numbers to compute with."""
    for name, entry in checkpoint.tensors.items():
        if entry.dtype not in FLOATING:
            raise CheckpointError(
                f"{entry.file}: tensor {name!r} has dtype {entry.dtype}, expected one of "
                f"{', '.join(FLOATING)}; use the checkpoint in its original precision"
            )


def choose_window(spec: ModelSpec, window: int | None) -> int:
    """S: the user's, else 2,048 or what the model allows.

    That is its positions, and a sliding window that is a little shorter than 2,048 (Phi-3-mini's
    has 2,047 tokens): longer windows would need explicit masks, which fused attention is slower
    with and holds copies of keys for.

    Raises:
        OptionError: shorter than two tokens or longer than the model's positions.
    """
    if window is None:
        return min(DEFAULT_WINDOW, spec.positions, _sliding_window(spec))
    if not 2 <= window <= spec.positions:
        raise OptionError(
            f"--window: {window} tokens is outside 2..{spec.positions} (the model's positions)"
        )
    return window


def _sliding_window(spec: ModelSpec) -> int:
    """The longest window that a sliding window of all layers leaves without a mask of its own.

    A multiple of 64. One that is shorter than half of what is usual is left to its masks.
    """
    sliding = spec.config.get("sliding_window")
    everywhere = {"sliding_attention"} == {
        *(spec.config.get("layer_types") or ["sliding_attention"])
    }
    used = everywhere and spec.config.get("use_sliding_window", True)
    if not isinstance(sliding, int) or not used or sliding <= DEFAULT_WINDOW // 2:
        return DEFAULT_WINDOW
    return (sliding - 1) // 64 * 64


def read_windows(
    model: Model, source: str, window: int, *, windows: int | None, option: str
) -> tuple[str, Any]:
    """The name of a text and its first windows, int64 ``[n, S]``.

    Args:
        model: whose tokenizer is used.
        source: file, JSON lines, hub data set or ``stdlib``.
        window: S.
        windows: at most this many; None takes all.
        option: option that named the source, for error texts.
    """
    from frugal_bonsai.text.sources import load_text
    from frugal_bonsai.text.windows import cut_windows, load_tokenizer, tokenise

    characters = None if windows is None else windows * window * CHARACTERS_PER_TOKEN
    text = load_text(source, characters=characters)
    tokens_T = tokenise(text.text, load_tokenizer(model.folder))
    what = f"{option} {text.name}"
    return text.name, cut_windows(tokens_T, window, limit=windows, what=what)


def make_engine(
    checkpoint: Checkpoint,
    spec: ModelSpec,
    plan: Any,
    device: Any,
    progress: Any,
    *,
    arithmetic: str = "float",
    dtype: Any = None,
) -> Any:
    """An engine within a plan's limits; the caps are enforced in the allocators.

    Args:
        checkpoint: the model.
        spec: its description.
        plan: the memory plan.
        device: where it computes.
        progress: told of each layer visit.
        arithmetic: of masked evaluation.
        dtype: compute dtype; None takes the device's own.
    """
    from frugal_bonsai.memory.budget import enforce_gpu_cap, enforce_host_cap
    from frugal_bonsai.stream.engine import Engine, compute_dtype

    enforce_host_cap(plan.budget.host_bytes, plan.total_bytes("host"))
    if plan.budget.gpu_bytes is not None:
        enforce_gpu_cap(device, plan.budget)
    return Engine(
        checkpoint,
        spec,
        device=device,
        dtype=compute_dtype(device) if dtype is None else dtype,
        limits=plan.limits,
        arithmetic=arithmetic,
        progress=progress,
    )


def in_fp32(engine: Any, plan: Any) -> Any:
    """The engine itself where it computes in fp32, else another of the same model that does."""
    import torch

    if engine.dtype == torch.float32:
        return engine
    model = engine.checkpoint, engine.spec
    return make_engine(*model, plan, engine.device, engine.progress, dtype=torch.float32)


def measured_base_bytes(spec: ModelSpec, *, training: bool = False) -> int:
    """What this process holds before the model: everything that will be imported, imported.

    The peak counts, because a cap on resident memory counts it too.

    Args:
        spec: of the model.
        training: bitsandbytes will be used, or imported by peft.
    """
    import torch

    from frugal_bonsai.int8 import has_bitsandbytes
    from frugal_bonsai.memory.meter import peak_resident_bytes
    from frugal_bonsai.stream.skeleton import build_empty_model

    build_empty_model(spec)
    if training:
        has_bitsandbytes()
    torch.nn.functional.linear(torch.ones(64, 64), torch.ones(64, 64))
    return peak_resident_bytes() + LATE_BYTES
