"""The options of ``prune`` and ``plan``: where, under which caps, on which text, and how."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from frugal_bonsai.errors import OptionError
from frugal_bonsai.model.layout import UNIFORM


@dataclass(frozen=True, kw_only=True)
class PruneOptions:
    """Everything that a user may say to ``prune`` but MODEL, the output folder and ``--resume``.

    Attributes:
        method: one of ``bonsai.methods.METHODS``.
        settings: fields of ``PruneSettings`` that the user names; None is "as the method has it".
        assume_family: the family that an architecture without a table is like.
        layout: ``uniform``, ``per-layer`` or ``padded``.
        as_mistral: a Llama may get a head count that its config class refuses, and is then written
            as the Mistral that computes the same.
        tile: FFN tile; None lets the layout choose.
        calibration: text source; None is wikitext2, or stdlib for ``example``.
        eval_text: text whose perplexity is reported before and after.
        window: tokens; None is 2,048 or the model's positions.
        windows: calibration windows; None takes 65,536 tokens of them, at least 32 windows.
        max_gpu_mem: cap on device memory.
        max_cpu_mem: cap on resident memory.
        max_shard_size: of the output.
        device: None takes a GPU where there is one.
        profile: hardware profile (TOML): ``plan`` plans for that machine; ``prune`` takes its rates
            for the time that it predicts.
    """

    method: str = "default"
    settings: Mapping[str, Any] = field(default_factory=dict)
    assume_family: str | None = None
    layout: str = UNIFORM
    as_mistral: bool = False
    tile: int | None = None
    calibration: str | None = None
    eval_text: str | None = None
    window: int | None = None
    windows: int | None = None
    max_gpu_mem: str | int | None = None
    max_cpu_mem: str | int | None = None
    max_shard_size: str | int = "5GB"
    device: str | None = None
    profile: str | Path | None = None

    def __post_init__(self) -> None:
        if self.windows is not None and self.windows < 1:
            raise OptionError(f"--windows: {self.windows} is not at least 1")


@dataclass(frozen=True, kw_only=True)
class AdaptOptions:
    """Everything that a user may say to ``adapt`` but PRUNED, the output and ``--resume``.

    Attributes:
        teacher: the dense model: folder, hub id or ``example``; None for ``loss="lm"`` on texts.
        data: text sources to train on; ``self`` is sampled from the teacher.
        settings: fields of ``AdaptSettings`` that the user names; None is the default.
        weights: how frozen weights are held: ``"int8"``, ``"native"`` or, read anew for each step,
            ``"streamed"``; None lets the plan choose.
        top: followers of each token that the teacher's cache keeps.
        temperature: that the teacher's logits are divided by.
        hidden_layers: layers whose hidden states ``kl+hidden`` compares; None is every fourth and
            the last.
        teacher_cache: folder that keeps caches for other runs; None deletes it at the end.
        window: tokens; None is 2,048 or the models' positions.
        windows: of each source; None takes all of a text, 65,536 tokens of ``self``.
        eval_text: text whose perplexity is reported before and after.
        max_gpu_mem: cap on device memory.
        max_cpu_mem: cap on resident memory.
        max_shard_size: of the output.
        device: None takes a GPU where there is one.
    """

    teacher: str | None = None
    data: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    weights: str | None = None
    top: int = 64
    temperature: float = 1.0
    hidden_layers: tuple[int, ...] | None = None
    teacher_cache: str | Path | None = None
    window: int | None = None
    windows: int | None = None
    eval_text: str | None = None
    max_gpu_mem: str | int | None = None
    max_cpu_mem: str | int | None = None
    max_shard_size: str | int = "5GB"
    device: str | None = None

    def __post_init__(self) -> None:
        if not self.data:
            raise OptionError("--data: name at least one text source, or self")
        if self.windows is not None and self.windows < 2:
            raise OptionError(f"--windows: {self.windows} is not at least 2 (one is held out)")
        if self.weights not in (None, "int8", "native", "streamed"):
            raise OptionError(f"--weights: {self.weights!r} is not one of int8, native, streamed")
