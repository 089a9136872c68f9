"""The options of ``prune``, ``plan``, ``adapt``, ``eval`` and ``bench``, for both interfaces."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from frugal_bonsai.adaptation.settings import AdaptSettings, Objective
from frugal_bonsai.checkpoint.locate import EXAMPLE
from frugal_bonsai.errors import OptionError
from frugal_bonsai.evaluation.llama_cpp import LLAMA_CPP
from frugal_bonsai.memory.budget import Caps, parse_caps
from frugal_bonsai.model.layout import UNIFORM
from frugal_bonsai.text.sources import SELF, STDLIB, WIKITEXT

TRANSFORMERS = "transformers"
RUNTIMES = (TRANSFORMERS, LLAMA_CPP)


@dataclass(frozen=True, kw_only=True)
class CommandOptions:
    """Options that both commands have.

    Attributes:
        window: Tokens of a window. None takes 2,048, or the model's positions if they are fewer.
        windows: Number of windows to use.
        eval_text: Text whose perplexity is reported before and after.
        max_gpu_mem: Cap on device memory: bytes, or text such as ``"24GB"``.
        max_cpu_mem: Cap on resident memory, likewise.
        max_shard_size: Largest shard of the output, likewise.
        device: Device that computes. None takes a GPU if there is one.
        text_only: Of a model of several modalities, write the text model alone. False carries the
            other parts along.
        report: Write the page ``report.html`` into the output, if matplotlib is installed.
    """

    window: int | None = None
    windows: int | None = None
    eval_text: str | None = None
    max_gpu_mem: str | int | None = None
    max_cpu_mem: str | int | None = None
    max_shard_size: str | int = "5GB"
    device: str | None = None
    text_only: bool = False
    report: bool = True

    @property
    def caps(self) -> Caps:
        """The memory caps in bytes.

        Raises:
            OptionError: A cap is not a size.
        """
        return parse_caps(self.max_gpu_mem, self.max_cpu_mem)


@dataclass(frozen=True, kw_only=True)
class PruneOptions(CommandOptions):
    """Options of ``prune`` and ``plan``, except MODEL, the output folder and ``--resume``.

    ``windows`` is the number of calibration windows. None takes 65,536 tokens of them, at least 32
    windows.

    Attributes:
        method: One of ``bonsai.methods.METHODS``.
        settings: Fields of ``PruneSettings`` that the user names. None keeps the method's value.
        assume_family: Family whose table is used for an architecture that has none.
        layout: ``uniform``, ``per-layer`` or ``padded``.
        as_mistral: A Llama may get a head count that its config class refuses. It is then written
            as the Mistral that computes the same.
        tile: FFN tile. None lets the layout choose.
        calibration: Text source. None takes wikitext2, or stdlib for ``example``.
        profile: Hardware profile (TOML). ``plan`` plans for its machine; ``prune`` predicts its
            time with its rates.
        eval_tasks: Tasks of lm-evaluation-harness, as a list or separated by commas, that both
            models are scored on at the end.
        task_data: Local items of these tasks: folders, or ``TASK=FILE``. None are read from the
            hub.
        eval_limit: Number of items of each task. None takes all.
    """

    method: str = "default"
    settings: Mapping[str, Any] = field(default_factory=dict)
    assume_family: str | None = None
    layout: str = UNIFORM
    as_mistral: bool = False
    tile: int | None = None
    calibration: str | None = None
    profile: str | Path | None = None
    eval_tasks: str | Sequence[str] | None = None
    task_data: Sequence[str] = ()
    eval_limit: int | None = None

    def __post_init__(self) -> None:
        if self.windows is not None and self.windows < 1:
            raise OptionError(f"--windows: {self.windows} is not at least 1")
        for option, value in (("--task-data", self.task_data), ("--eval-limit", self.eval_limit)):
            if value and not self.eval_tasks:
                raise OptionError(f"{option} is for --eval-tasks; name tasks, or omit it")

    def source_for(self, model: str) -> str:
        """Return the calibration source of a model, as named or by default."""
        return self.calibration or (STDLIB if model == EXAMPLE else WIKITEXT)


@dataclass(frozen=True, kw_only=True)
class AdaptOptions(CommandOptions):
    """Options of ``adapt``, except PRUNED, the output folder and ``--resume``.

    ``windows`` is the number of windows of each source. None takes the whole text, and 65,536
    tokens of ``self``.

    Attributes:
        teacher: Dense model: folder, GGUF file, hub id or ``example``. None for ``loss="lm"`` on
            texts.
        data: Text sources to train on. ``self`` is sampled from the teacher.
        settings: Fields of ``AdaptSettings`` that the user names. None keeps the default.
        weights: Form of the frozen weights: ``"int8"``, ``"native"``, or ``"streamed"``, which
            reads them again in each step. None lets the plan choose.
        top: Number of most likely next tokens that the teacher's cache keeps. None takes 64, or
            the vocabulary if it is smaller.
        temperature: Divisor of the teacher's logits.
        hidden_layers: Layers whose hidden states ``kl+hidden`` compares. None takes every fourth
            and the last.
        teacher_cache: Folder that keeps caches for other runs. None deletes them at the end.
    """

    teacher: str | None = None
    data: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    weights: str | None = None
    top: int | None = None
    temperature: float = 1.0
    hidden_layers: tuple[int, ...] | None = None
    teacher_cache: str | Path | None = None

    def __post_init__(self) -> None:
        if not self.data:
            raise OptionError("--data: name at least one text source, or self")
        if self.windows is not None and self.windows < 2:
            raise OptionError(f"--windows: {self.windows} is not at least 2 (one is held out)")
        if self.weights not in (None, "int8", "native", "streamed"):
            raise OptionError(f"--weights: {self.weights!r} is not one of int8, native, streamed")
        if self.data.count(SELF) > 1:
            raise OptionError(
                "--data self: is named twice; name it once and set the number of windows with "
                "--windows"
            )
        if SELF in self.data and self.teacher is None:
            raise OptionError("--data self: windows are sampled from the teacher; add --teacher")

    def training(self) -> AdaptSettings:
        """Return the settings of the training.

        Raises:
            OptionError: A setting has an invalid value.
        """
        given = {name: value for name, value in self.settings.items() if value is not None}
        return AdaptSettings(**given)

    def objective(self) -> Objective:
        """Return the terms of the loss.

        Raises:
            OptionError: They need the dense model, and none is named.
        """
        settings = self.training()
        objective = settings.objective(self.temperature)
        if objective.needs_teacher and self.teacher is None:
            raise OptionError(
                f"--loss {settings.loss}: needs the dense model; add --teacher, or choose --loss lm"
            )
        return objective


@dataclass(frozen=True, kw_only=True)
class EvalOptions:
    """Options of ``eval``, except MODEL. At least ``text`` or ``tasks`` must be named.

    Attributes:
        text: File, JSON lines, hub data set or ``stdlib``. None measures no perplexity.
        tasks: Tasks of lm-evaluation-harness, as a list or separated by commas.
        task_data: Local items of tasks: folders, or ``TASK=FILE``. None are read from the hub.
        limit: Number of items of each task. None takes all.
        window: Tokens of a window. None takes 2,048 or the model's positions. Requests of tasks
            are truncated to it; None truncates them to the model's positions.
        windows: Largest number of windows. None takes the whole text.
        stride: Tokens between the starts of two windows of the text, less than ``window``; each
            token counts once. None is ``window``: without overlap.
        weights: ``native`` streams the checkpoint itself, ``int8`` a quantised working copy.
        runtime: ``streamed``, or ``llama.cpp`` for a GGUF file, which takes no caps.
        max_gpu_mem: Cap on device memory: bytes, or text such as ``"24GB"``.
        max_cpu_mem: Cap on resident memory, likewise.
        device: Device that computes. None takes a GPU if there is one.
        assume_family: Family whose table is used for an architecture that has none.
    """

    text: str | None = None
    tasks: str | Sequence[str] = ()
    task_data: Sequence[str] = ()
    limit: int | None = None
    window: int | None = None
    windows: int | None = None
    stride: int | None = None
    weights: str = "native"
    runtime: str = "streamed"
    max_gpu_mem: str | int | None = None
    max_cpu_mem: str | int | None = None
    device: str | None = None
    assume_family: str | None = None

    @property
    def caps(self) -> Caps:
        """The memory caps in bytes.

        Raises:
            OptionError: A cap is not a size.
        """
        return parse_caps(self.max_gpu_mem, self.max_cpu_mem)


@dataclass(frozen=True, kw_only=True)
class BenchOptions:
    """Options of ``bench``, except the two models.

    Attributes:
        runtime: ``transformers`` or ``llama.cpp``.
        prompt_tokens: Random tokens of the prompt.
        new_tokens: Tokens generated after it.
        repeat: Counted runs of each model.
        threads: Number of CPU threads. None takes the runtime's default.
        device: Device that computes (transformers). None takes a GPU if there is one.
        dtype: Dtype (transformers; a GGUF file has its own). None takes fp32 on a CPU, bf16 on a
            GPU.
        seed: Seed of the prompt.
    """

    runtime: str = TRANSFORMERS
    prompt_tokens: int = 256
    new_tokens: int = 64
    repeat: int = 5
    threads: int | None = None
    device: str | None = None
    dtype: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.runtime not in RUNTIMES:
            raise OptionError(f"--runtime: {self.runtime!r} is not one of {', '.join(RUNTIMES)}")
        for name in ("prompt_tokens", "new_tokens", "repeat"):
            if getattr(self, name) < 1:
                option = f"--{name.replace('_', '-')}"
                raise OptionError(f"{option}: {getattr(self, name)} is not at least 1")
        if self.runtime == LLAMA_CPP and (self.device or self.dtype):
            raise OptionError("--device and --dtype are for --runtime transformers")
