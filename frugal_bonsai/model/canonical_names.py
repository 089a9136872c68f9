"""One order of names and axes for all checkpoints of a family.

In: a checkpoint's tensors as its files have them. Out: the same under the names that Hugging Face's
causal model gives its parameters, weights as ``[out, in]``. Checkpoints differ: the base model's
have no prefix, older ones hold buffers that nothing reads, GPT-2 stores its weights the other way
round. What is written again takes the files' own names and axes. Reads nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from frugal_bonsai.checkpoint.header import TensorEntry
from frugal_bonsai.checkpoint.reader import Checkpoint
from frugal_bonsai.model.family import ModelSpec, describe_model
from frugal_bonsai.model.family_lookup import find_family
from frugal_bonsai.model.family_schema import Family


def describe_checkpoint(
    checkpoint: Checkpoint, *, source: str = "config.json", assume: str | None = None
) -> ModelSpec:
    """Arrange an open checkpoint's tensors and describe the model.

    Args:
        checkpoint: its ``tensors`` are the arranged ones from then on.
        source: file name for error texts.
        assume: the family that an architecture without a table is like, as the user says.

    Raises:
        UnsupportedModelError: unknown ``model_type``, or a kind of it that is not supported.
        CheckpointError: a tensor is missing or has another shape than the config says.
    """
    family = find_family(checkpoint.config, source=source, assume=assume)
    checkpoint.rearrange(arrange(family, checkpoint.tensors))
    return describe_model(checkpoint.config, checkpoint.shapes, source=source, assume=assume)


def arrange(family: Family, tensors: Mapping[str, TensorEntry]) -> dict[str, TensorEntry]:
    """The tensors by the model's own names; see the module's text."""
    base = family.embedding.split(".")[0] + "."
    bare = family.embedding not in tensors and family.embedding.removeprefix(base) in tensors
    own_names = {stored: own for own, stored in family.stored_as.items()}
    arranged = {}
    for stored, entry in tensors.items():
        if stored.endswith(family.unread):
            continue
        name = own_names.get(stored, family.own_name(stored))
        if bare and name != family.head:
            name = base + name
        arranged[name] = entry
        if name.endswith(family.transposed) and len(entry.shape) == 2:
            arranged[name] = replace(entry, shape=entry.shape[::-1], transposed=True)
    return arranged
