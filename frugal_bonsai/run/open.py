"""The model of a command: found, opened and described.

In: what the user typed. Out: an open :class:`Model`. Reads config and tensor headers, no weights;
does not import torch, so that ``inspect`` starts at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from frugal_bonsai.checkpoint.locate import find_model
from frugal_bonsai.checkpoint.reader import Checkpoint
from frugal_bonsai.checkpoint.remote import open_headers
from frugal_bonsai.dtypes import FLOATING
from frugal_bonsai.errors import CheckpointError
from frugal_bonsai.model.canonical_names import describe_checkpoint
from frugal_bonsai.model.family import ModelSpec
from frugal_bonsai.progress import Progress


@dataclass(frozen=True, kw_only=True)
class Model:
    """An open model.

    Attributes:
        name: Name that the user typed.
        checkpoint: Its checkpoint, open for reading.
        spec: Its description, from config and headers.
    """

    name: str
    checkpoint: Checkpoint
    spec: ModelSpec

    @property
    def folder(self) -> Path:
        """Folder of the checkpoint."""
        return self.checkpoint.folder

    @property
    def sizes(self) -> dict[str, int]:
        """Parameters and bytes, as the summaries report them."""
        return {
            "parameters": self.spec.parameters,
            "block_parameters": self.spec.block_parameters,
            "weight_bytes": self.checkpoint.weight_bytes,
        }


@contextmanager
def open_model(
    name: str, *, headers_only: bool = False, assume_family: str | None = None
) -> Iterator[Model]:
    """Find, open and describe a model.

    Args:
        name: Folder, hub id or ``example``.
        headers_only: Fetch only config and headers of a hub model. Its weights cannot be read.
        assume_family: Family whose table is used for an architecture that has none.

    Raises:
        CheckpointError: A tensor's dtype is not a floating point dtype.
    """
    with open_headers(name) if headers_only else Checkpoint.open(find_model(name)) as checkpoint:
        source = str(checkpoint.folder / "config.json")
        spec = describe_checkpoint(checkpoint, source=source, assume=assume_family)
        _require_floating(checkpoint)
        yield Model(name=name, checkpoint=checkpoint, spec=spec)


@contextmanager
def open_output(folder: Path, parent: Model) -> Iterator[Model]:
    """Open a model that was pruned from ``parent``, to measure and verify it.

    Args:
        folder: Folder that the model was written to.
        parent: Model that it was written from; an assumed family is assumed again.
    """
    with Checkpoint.open(folder) as checkpoint:
        assume = parent.spec.family.assumed
        spec = describe_checkpoint(checkpoint, source="the pruned config.json", assume=assume)
        yield Model(name=str(folder), checkpoint=checkpoint, spec=spec)


def note_assumed(model: Model, progress: Progress) -> None:
    """Tell the user if the model's family is assumed."""
    if model.spec.family.assumed is not None:
        progress.note(assumption(model))


def assumption(model: Model) -> str:
    """Return the warning about a family that the user named with ``--assume-family``."""
    family = model.spec.family
    return (
        f"ASSUMED: model_type {family.model_type!r} has no table of its own and is taken for a "
        f"{family.assumed}: the names of its tensors agree, their meaning was not checked; compare "
        "`frugal-bonsai eval` with a perplexity that you know"
    )


def _require_floating(checkpoint: Checkpoint) -> None:
    """Raise for weights that are quantised or not numbers to compute with."""
    for name, entry in checkpoint.tensors.items():
        if entry.dtype not in FLOATING:
            raise CheckpointError(
                f"{entry.file}: tensor {name!r} has dtype {entry.dtype}, expected one of "
                f"{', '.join(FLOATING)}; use the checkpoint in its original precision"
            )
