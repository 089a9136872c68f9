"""Canonical tensor names and axes for all checkpoints of a family.

In: the tensors of a checkpoint as its files name and orient them. Out: the same tensors under the
parameter names of Hugging Face's causal language model, weights as ``[out, in]``; and, for the
rewriter, the way back to the files' names. Checkpoints of one family differ: a base model's names
lack the prefix, old ones hold buffers that no model reads, a tied weight may have the head's name
alone, GPT-2 stores its weights as ``[in, out]``, and the experts of a layer may lie in one tensor.
This module reads no tensor data.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from frugal_bonsai.checkpoint.header import TensorEntry
from frugal_bonsai.checkpoint.reader import Checkpoint
from frugal_bonsai.errors import CheckpointError
from frugal_bonsai.model.family import ModelSpec, describe_model
from frugal_bonsai.model.family_lookup import find_family
from frugal_bonsai.model.family_schema import Family

# Behind the last layer; models have one to three.
_MOST_FURTHER_LAYERS = 100


def describe_checkpoint(
    checkpoint: Checkpoint, *, source: str = "config.json", assume: str | None = None
) -> ModelSpec:
    """Give an open checkpoint's tensors their canonical names and describe the model.

    Args:
        checkpoint: an open checkpoint; its ``tensors`` are replaced by the canonical ones.
        source: file name for error texts.
        assume: name of the family whose table to use for an architecture without one, as the user
            says.

    Raises:
        UnsupportedModelError: unknown ``model_type``, or a variant of it that is not supported.
        CheckpointError: a tensor is missing, or its shape contradicts the config.
    """
    family = _with_further_layers(
        find_family(checkpoint.config, source=source, assume=assume), checkpoint.config, source
    )
    checkpoint.config = _with_global_keys(family, checkpoint.config)
    may_be_tied = checkpoint.config.get("tie_word_embeddings") is not False
    tensors = canonical_tensors(family, checkpoint.tensors, may_be_tied=may_be_tied)
    checkpoint.rename_tensors(tensors)
    checkpoint.config = _with_stated_width(family, checkpoint.config, checkpoint.shapes)
    return describe_model(checkpoint.config, checkpoint.shapes, source=source, assume=assume)


def _with_further_layers(family: Family, config: Mapping[str, Any], source: str) -> Family:
    """Return the family without the layers behind the last one, which no model reads."""
    first = config.get(family.layers_key)
    if family.further_layers_key is None or not isinstance(first, int):
        return family
    count = config.get(family.further_layers_key) or 0
    if not isinstance(count, int) or not 0 <= count <= _MOST_FURTHER_LAYERS:
        raise CheckpointError(
            f"{source}: {family.further_layers_key} is {count!r}, expected a whole number of at "
            f"most {_MOST_FURTHER_LAYERS}; correct the value"
        )
    last = first + count
    further = tuple(family.layer_prefix.format(layer=layer) for layer in range(first, last))
    return replace(family, unread=(*family.unread, *further))


def _with_global_keys(family: Family, config: dict[str, Any]) -> dict[str, Any]:
    """Return the config with the sizes of layers of full attention under their global keys.

    transformers saves them in ``per_layer_config``, which then has the widths of pruned layers
    alone.
    """
    overrides, types = config.get("per_layer_config"), config.get("layer_types") or ()
    if not family.full_attention_keys or not isinstance(overrides, Mapping):
        return config
    changed = {key: value for key, value in config.items() if key != "per_layer_config"}
    widths = {}
    for layer, sizes in overrides.items():
        if int(layer) < len(types) and types[int(layer)] == "full_attention":
            own = {key: sizes[key] for key in family.full_attention_keys if key in sizes}
            changed |= {family.full_attention_keys[key]: value for key, value in own.items()}
        widths[layer] = {k: v for k, v in sizes.items() if k not in family.full_attention_keys}
    widths = {layer: sizes for layer, sizes in widths.items() if sizes}
    return changed | {"per_layer_config": widths} if widths else changed


def _with_stated_width(
    family: Family, config: dict[str, Any], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Any]:
    """Return the config with the width of layer 0's FFN, where configs state another."""
    output = family.layer_prefix.format(layer=0) + family.ffn_output + ".weight"
    stated = all(config.get(key) == value for key, value in family.stated.items())
    if stated or output not in shapes:
        return config  # an output, whose layers may differ in width
    changed = config | {family.ffn_key: shapes[output][1]} | dict(family.stated)
    return {key: value for key, value in changed.items() if family.stated.get(key, key) is not None}


def canonical_tensors(
    family: Family, tensors: Mapping[str, TensorEntry], *, may_be_tied: bool = False
) -> dict[str, TensorEntry]:
    """Return the tensors under their canonical names, without those that no model reads.

    Args:
        family: the model's family.
        tensors: the tensors by their names in the files.
        may_be_tied: the config does not rule out that head and embedding share one weight. A head
            without an embedding is then the embedding: programs that store a shared weight once
            may store it under either name.
    """
    base = family.embedding.split(".")[0] + "."
    bare = not any(name.startswith(base) for name in tensors)
    canonical = {stored: own for own, stored in family.stored_as.items()}
    renamed = {}
    for stored, entry in _unstacked(family, tensors).items():
        if not family.is_read(stored):
            continue
        name = canonical.get(stored, family.own_name(stored))
        if bare and name != family.head:
            name = base + name
        renamed[name] = entry
        if name.endswith(family.transposed) and len(entry.shape) == 2:
            renamed[name] = replace(entry, shape=entry.shape[::-1], transposed=True)
    if may_be_tied and family.embedding not in renamed and family.head in renamed:
        renamed = {
            family.embedding if name == family.head else name: entry
            for name, entry in renamed.items()
        }
    return renamed


def _unstacked(family: Family, tensors: Mapping[str, TensorEntry]) -> dict[str, TensorEntry]:
    """Return the tensors with those of all experts of a layer divided among the experts."""
    stacks = {stack.tensor: stack for stack in family.experts.stacks} if family.experts else {}
    divided: dict[str, TensorEntry] = {}
    for name, entry in tensors.items():
        found = next((tensor for tensor in stacks if name.endswith(f".{tensor}")), None)
        if found is None or len(entry.shape) < 2:
            divided[name] = entry
            continue
        stack, prefix = stacks[found], name.removesuffix(found)
        count, parts, (experts, rows, *rest) = entry.size_bytes, len(stack.parts), entry.shape
        size, shape = count // (experts * parts), (rows // parts, *rest)
        for at in range(experts * parts):
            expert, part = divmod(at, parts)
            start = entry.start + at * size
            divided[prefix + stack.parts[part].format(expert=expert)] = replace(
                entry,
                shape=shape[::-1] if stack.transposed else shape,
                start=start,
                end=start + size,
                transposed=stack.transposed and len(shape) == 2,
                stacked=parts,
            )
    return divided


def name_in_file(family: Family, entry: TensorEntry, name: str, new_name: str) -> str:
    """Return the name under which an output file stores a tensor, in the style of the source.

    Args:
        family: the model's family.
        entry: the tensor's place in the source; its ``name`` is the name in the file.
        name: canonical name in the source.
        new_name: canonical name in the output. It differs from ``name`` where layers or experts are
            renumbered.
    """
    if entry.stacked and family.experts is not None:
        name, new_name = map(family.experts.stacked_name, (name, new_name))
    if not name.endswith(entry.name):  # the files use other words inside the layers
        name, new_name = family.file_name(name), family.file_name(new_name)
    if not name.endswith(entry.name):  # another name altogether, outside the layers
        return entry.name
    # The files may omit the base model's prefix.
    return new_name[len(name) - len(entry.name) :]
