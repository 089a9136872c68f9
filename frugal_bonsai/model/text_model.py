"""Find the text model inside a checkpoint of several modalities.

In: an open checkpoint whose config has a text model's in it (Gemma 3, Mistral 3, Qwen2.5-VL, LLaVA
and others). Out: the same checkpoint with the text model's config and tensors alone, under the
names of a plain text checkpoint, and a :class:`Multimodal`, which leads back to the whole. Holds
configs and headers, no weights.

The tensors are found by structure: the prefix in front of the names of a family. So old checkpoints
(``language_model.model.layers``) and new ones (``model.language_model.layers``) are read alike. The
config is read by transformers, which knows the defaults of each architecture.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from frugal_bonsai.checkpoint.reader import Checkpoint
from frugal_bonsai.errors import CheckpointError
from frugal_bonsai.model.default_config import config_errors
from frugal_bonsai.model.families import FAMILIES, TEXT_MODELS
from frugal_bonsai.model.family_lookup import find_family
from frugal_bonsai.model.family_schema import Family
from frugal_bonsai.model.multimodal import TEXT_KEY, Multimodal

# An architecture of images whose config names tokens and a part for sounds, too.
_HEARS = "gemma4"
# Keys of rope_parameters that tell positions of images from those of text.
_IMAGE_ROPE = ("mrope_section", "mrope_interleaved", "type")
# Keys that a whole model states for all its parts.
_SHARED_KEYS = ("bos_token_id", "eos_token_id", "pad_token_id")


def text_family(config: Mapping[str, Any], *, assume: str | None = None) -> Family | None:
    """Return the family of the text model inside a model of several modalities.

    Args:
        config: ``config.json`` of the whole.
        assume: name of the family that the user assumes for an unknown text model.

    Returns:
        The family, or None if there is no such text model or the other parts are not for images.
    """
    hears = any("audio" in key for key in config) and config.get("model_type") != _HEARS
    if config.get("is_encoder_decoder") or hears:
        return None
    text_type = _text_type(config)
    if text_type is None:
        return None
    own = FAMILIES.get(text_type) or TEXT_MODELS.get(text_type)
    return own or (None if assume is None else FAMILIES.get(assume))


def split_text_model(
    checkpoint: Checkpoint, *, source: str = "config.json", assume: str | None = None
) -> Multimodal:
    """Replace the config and the tensors of an open checkpoint by those of its text model.

    Args:
        checkpoint: an open checkpoint, for whose config :func:`text_family` returns a family.
        source: file name for error texts.
        assume: name of the family that the user assumes for an unknown text model.

    Returns:
        The whole.

    Raises:
        CheckpointError: the text model's tensors cannot be told from others, or transformers does
            not accept the config.
    """
    config, tensors = checkpoint.config, checkpoint.tensors
    with config_errors(config, source):
        text = _text_config(config)
        may_be_tied = _may_be_tied(config, text)
    family = find_family(text, source=source, assume=assume)
    prefixes = _find_prefixes(family, tensors, source)
    names = {
        name: plain + name.removeprefix(stored)
        for name in tensors
        for plain, stored in prefixes.items()
        if name.startswith(stored)
    }
    # A tied weight may be stored under either name, and an untied one under both.
    stored_twice = {family.head, family.embedding} <= set(names.values())
    text["tie_word_embeddings"] = may_be_tied and not stored_twice
    whole = Multimodal(
        config=config,
        text=text,
        head_dim_key=TEXT_MODELS.get(str(_text_type(config)), family).head_dim_key,
        nested=isinstance(config.get(TEXT_KEY), Mapping),
        prefixes=prefixes,
        tensors=tensors,
        carried={name: entry for name, entry in tensors.items() if name not in names},
    )
    checkpoint.config = dict(text)
    checkpoint.rename_tensors(
        {plain: replace(tensors[name], name=plain) for name, plain in names.items()}
    )
    return whole


def _text_type(config: Mapping[str, Any]) -> str | None:
    """Return the architecture of the text model, by ``config.json`` alone."""
    nested = config.get(TEXT_KEY)
    if isinstance(nested, Mapping) and nested.get("model_type"):
        return str(nested["model_type"])
    # Old checkpoints of Qwen2-VL have the text model's keys beside those of the whole.
    text_type = f"{config.get('model_type')}_text"
    return text_type if text_type in FAMILIES or text_type in TEXT_MODELS else None


def _text_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config of the text model with its defaults, as a plain checkpoint states it."""
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CLASSES

    config = copy.deepcopy(dict(config))  # transformers changes nested values
    nested = config.get(TEXT_KEY)
    if isinstance(nested, Mapping) and nested.get("model_type"):
        found = AutoConfig.for_model(**nested)
    else:
        found = AutoConfig.for_model(**config).get_text_config()
    text: dict[str, Any] = found.to_diff_dict()
    family = TEXT_MODELS.get(text["model_type"])
    if family is not None:
        rope = {k: v for k, v in text["rope_parameters"].items() if k not in _IMAGE_ROPE}
        text |= {"model_type": family.model_type, "rope_parameters": rope}
    text |= {key: config[key] for key in _SHARED_KEYS if config.get(key) is not None}
    dtype = config.get("dtype") or config.get("torch_dtype")
    if dtype is not None:
        text["dtype"] = dtype
    if text["model_type"] in CLASSES:
        text["architectures"] = [CLASSES[text["model_type"]]]
    return text


def _may_be_tied(config: Mapping[str, Any], text: Mapping[str, Any]) -> bool:
    """Return whether whole or text model share one weight between head and embedding."""
    from transformers import CONFIG_MAPPING, AutoConfig

    if text.get("tie_word_embeddings") or config.get("tie_word_embeddings"):
        return True
    if config["model_type"] not in CONFIG_MAPPING:
        return False
    return bool(AutoConfig.for_model(**copy.deepcopy(dict(config))).tie_word_embeddings)


def _find_prefixes(family: Family, names: Collection[str], source: str) -> dict[str, str]:
    """Return prefix of a plain checkpoint's names -> prefix in the files, of the base and the head.

    Raises:
        CheckpointError: no prefix or several lead to the family's names.
    """
    base = family.embedding.partition(".")[0] + "."
    first = family.layer_prefix.format(layer=0)
    layers = [family.file_name(first + mixer.output) for mixer in family.mixers]
    endings = [layer.removeprefix(base) + ".weight" for layer in layers]
    ending = next((e for e in endings if any(n.endswith("." + e) for n in names)), endings[0])
    found = [name.removesuffix(ending) for name in names if name.endswith("." + ending)]
    # A layer of another part may have the same names, but it has no token embedding.
    embedding = family.embedding.removeprefix(base)
    found = [prefix for prefix in found if prefix + embedding in names] or found
    heads = [name for name in names if f".{name}".endswith("." + family.head)]
    if len(found) != 1 or len(heads) > 1:
        raise CheckpointError(
            f"{source}: the tensors of the text model ({family.model_type}) cannot be told from "
            f"others: found {len(found)} tensors named like {ending!r} and {len(heads)} named "
            f"like {family.head!r}, expected one and at most one; does config.json belong to these "
            "weights?"
        )
    return dict(((base, found[0]), *((family.head, name) for name in heads)))
