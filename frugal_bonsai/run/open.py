"""The model of a command: found, opened and described.

In: what the user typed. Out: an open :class:`Model`. Reads config and tensor headers, no weights.
Whatever is no model is refused before transformers is imported, which takes seconds.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from frugal_bonsai.checkpoint.gguf_reader import GgufCheckpoint
from frugal_bonsai.checkpoint.locate import find_model, local_model
from frugal_bonsai.checkpoint.quantised import drop_left_over, require_floating
from frugal_bonsai.checkpoint.reader import Checkpoint
from frugal_bonsai.checkpoint.recognise import (
    recognise_contents,
    recognise_file,
    recognise_folder,
)
from frugal_bonsai.checkpoint.recognised import MULTIMODAL, Recognised, require_recognised
from frugal_bonsai.checkpoint.remote import open_headers
from frugal_bonsai.from_gguf.open import open_gguf
from frugal_bonsai.from_gguf.summary import gguf_note
from frugal_bonsai.model.canonical_names import describe_checkpoint
from frugal_bonsai.model.cut import Refit
from frugal_bonsai.model.default_config import require_accepted_config
from frugal_bonsai.model.family import ModelSpec
from frugal_bonsai.model.layout import LayoutRules
from frugal_bonsai.model.loadable import require_loadable
from frugal_bonsai.model.multimodal import Multimodal
from frugal_bonsai.model.text_model import split_text_model, text_family
from frugal_bonsai.model.units import KeepMask
from frugal_bonsai.progress import Progress
from frugal_bonsai.rewrite.companions import write_companions
from frugal_bonsai.run.from_config import config_folder, open_config
from frugal_bonsai.run.text_model_note import text_model_note

if TYPE_CHECKING:
    from frugal_bonsai.rewrite.shrink import RewriteSummary


@dataclass(frozen=True, kw_only=True)
class Model:
    """An open model.

    Attributes:
        name: Name that the user typed.
        checkpoint: Its checkpoint, open for reading.
        spec: Its description, from config and headers.
        multimodal: The whole whose text model this is. None for a plain text model.
        left_over: Keys of ``config.json`` that describe a quantisation which the weights do not
            have. The checkpoint's config is without them.
        difference: Largest relative difference of logits that the check of an assumed family found.
            None where nothing was assumed, or checked.
        from_config: The shapes come from ``config.json`` alone; there are no weights.
    """

    name: str
    checkpoint: Checkpoint
    spec: ModelSpec
    multimodal: Multimodal | None = None
    left_over: tuple[str, ...] = ()
    difference: float | None = None
    from_config: bool = False

    @property
    def notes(self) -> list[str]:
        """Notes for the user about this model."""
        notes = []
        if self.spec.family.assumed is not None:
            from frugal_bonsai.run.assumed import assumption_note  # imports torch

            notes.append(assumption_note(self.spec, self.difference))
        if self.multimodal is not None:
            notes.append(text_model_note(self.spec, self.multimodal))
        if self.from_config:
            notes.append("shapes are from config.json alone: those of transformers' own class")
        if isinstance(self.checkpoint, GgufCheckpoint):
            notes += [gguf_note(self.checkpoint), *self.checkpoint.notes]
        return notes + [
            f"config.json describes a quantisation ({key}), but the weights are plain floating "
            "numbers: the key is ignored, and left out of what is written"
            for key in self.left_over
        ]

    @property
    def folder(self) -> Path:
        """Folder of the tokenizer, the generation settings and the card.

        Of a GGUF file, it is a temporary one that is written at the first use.
        """
        return self.checkpoint.companions

    @property
    def sizes(self) -> dict[str, int]:
        """Parameters of the text model and bytes of all parts, as the summaries report them."""
        sizes = {
            "parameters": self.spec.parameters,
            "block_parameters": self.spec.block_parameters,
            "weight_bytes": self.checkpoint.weight_bytes,
        }
        whole = self.spec.multimodal
        return sizes if whole is None else {**sizes, "carried_bytes": whole.carried_bytes}

    @property
    def whole(self) -> dict[str, Any] | None:
        """The model of several modalities around this text model, as plain values."""
        whole = self.multimodal
        if whole is None:
            return None
        return {
            "model_type": whole.model_type,
            "text_model": self.spec.family.title,
            "parts": list(whole.parts),
            "parameters": whole.carried_parameters,
            "bytes": whole.carried_bytes,
            "carried": self.spec.multimodal is not None,
        }


@contextmanager
def open_model(
    name: str,
    *,
    headers_only: bool = False,
    assume_family: str | None = None,
    text_only: bool = True,
    check_config: bool = True,
    config_alone: bool = False,
) -> Iterator[Model]:
    """Find, open and describe a model.

    Args:
        name: Folder, GGUF file, hub id or ``example``.
        headers_only: Fetch only config and headers of a hub model. Its weights cannot be read.
        assume_family: Family whose table is used for an architecture that has none.
        text_only: Of a model of several modalities, take the text model alone. False carries the
            other parts along: what is written has them too.
        check_config: Ask transformers' class whether it accepts the config. Imports transformers.
        config_alone: Take a model too of which only ``config.json`` is at hand.

    Raises:
        UnsupportedModelError: The model is quantised, an encoder, or of another unsupported kind.
        CheckpointError: It is no model, transformers refuses its config, or a tensor's dtype is not
            a floating point dtype.
    """
    folder = config_folder(name) if config_alone else None
    if folder is None:
        _require_model(name, assume_family, downloads=not headers_only)
    with _open(name, folder, headers_only=headers_only) as checkpoint:
        source, config = str(checkpoint.config_file), checkpoint.config
        found = recognise_contents(name, config, checkpoint.tensors)
        _require_usable(name, found, config, assume_family)
        checkpoint.config = drop_left_over(config)
        left_over = tuple(sorted(config.keys() - checkpoint.config.keys()))
        whole = None
        if found.kind == MULTIMODAL:
            whole = split_text_model(checkpoint, source=source, assume=assume_family)
        spec = describe_checkpoint(checkpoint, source=source, assume=assume_family)
        require_floating(checkpoint.tensors)
        difference = None
        if check_config:
            require_accepted_config(spec, source=source)
            difference = _check_assumed(spec, source)
        if whole is not None and not text_only:
            spec = _carry_along(checkpoint, spec, whole, source, check=check_config)
        yield Model(
            name=name,
            checkpoint=checkpoint,
            spec=spec,
            multimodal=whole,
            left_over=left_over,
            difference=difference,
            from_config=folder is not None,
        )


def _open(name: str, config: Path | None, *, headers_only: bool) -> Checkpoint:
    """Open a folder, a GGUF file, a hub model, or the folder of a config alone."""
    if config is not None:
        return open_config(config)
    path = local_model(name)
    if path is None:
        return open_headers(name) if headers_only else Checkpoint.open(find_model(name))
    return open_gguf(path) if path.is_file() else Checkpoint.open(path)


def _carry_along(
    checkpoint: Checkpoint, spec: ModelSpec, whole: Multimodal, source: str, *, check: bool = True
) -> ModelSpec:
    """Return the description of a text model whose whole is written, and take its other tensors."""
    if check:
        require_loadable(whole, source=source)
    checkpoint.carried = whole.carried
    family = replace(spec.family, head_dim_key=whole.head_dim_key)
    return replace(spec, family=family, multimodal=whole)


def _require_usable(
    name: Path | str, found: Recognised, config: Mapping[str, Any], assume: str | None
) -> None:
    """Refuse what is neither a causal language model nor has a supported one inside it."""
    if found.kind != MULTIMODAL or text_family(config, assume=assume) is None:
        require_recognised(name, found)


def _require_model(name: str, assume: str | None, *, downloads: bool) -> None:
    """Refuse what is no model by its files, or by its headers before its weights are downloaded."""
    path = local_model(name)
    if path is not None:
        require_recognised(path, recognise_file(path) if path.is_file() else recognise_folder(path))
    elif downloads:
        with open_headers(name) as headers:
            found = recognise_contents(name, headers.config, headers.tensors)
            _require_usable(name, found, headers.config, assume)


@contextmanager
def open_output(folder: Path, parent: Model) -> Iterator[Model]:
    """Open a model that was pruned from ``parent``, to measure and verify it.

    Args:
        folder: Folder that the model was written to.
        parent: Model that it was written from; an assumed family is assumed again.
    """
    source, assume = "the pruned config.json", parent.spec.family.assumed
    with Checkpoint.open(folder) as checkpoint:
        whole = None
        if parent.spec.multimodal is not None:
            whole = split_text_model(checkpoint, source=source, assume=assume)
        spec = describe_checkpoint(checkpoint, source=source, assume=assume)
        if whole is not None:
            spec = _carry_along(checkpoint, spec, whole, source)
        yield Model(name=str(folder), checkpoint=checkpoint, spec=spec, multimodal=whole)


@contextmanager
def write_output(
    folder: Path,
    parent: Model,
    mask: KeepMask,
    rules: LayoutRules,
    *,
    refit: Refit | None = None,
    max_shard_bytes: int,
) -> Iterator[tuple[Model, RewriteSummary]]:
    """Write a pruned model with its companions to a staging folder, and open it.

    The arguments are those of :func:`frugal_bonsai.rewrite.shrink.shrink`.
    """
    # Imported here because it imports torch, which an early refusal does not wait for.
    from frugal_bonsai.rewrite.shrink import shrink

    written = shrink(
        parent.checkpoint,
        parent.spec,
        mask,
        folder,
        rules=rules,
        refit=refit,
        max_shard_bytes=max_shard_bytes,
    )
    write_companions(parent.folder, folder, processor=parent.spec.multimodal is not None)
    with open_output(folder, parent) as output:
        yield output, written


def note_model(model: Model, progress: Progress) -> None:
    """Tell the user of an assumed family, and of keys of the config that are left over."""
    for note in model.notes:
        progress.note(note)


def _check_assumed(spec: ModelSpec, source: str) -> float | None:
    """Return what the check of an assumed family finds; None where nothing is assumed."""
    if spec.family.assumed is None:
        return None
    from frugal_bonsai.run.assumed import check_assumption  # imports torch

    return check_assumption(spec, source=source)
