"""Load a pruned model of any layout without remote code.

In: a folder. Out: a model of transformers. A model of the ``per-layer`` layout is built by a class
of this package. The copy of that class in the folder is not run. Holds the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from frugal_bonsai.checkpoint.folder import CONFIG_FILE, find_tensors, read_config
from frugal_bonsai.checkpoint.quantised import CONFIG_KEY, drop_left_over, quantised_by
from frugal_bonsai.checkpoint.recognise import (
    recognise_contents,
    recognise_file,
    recognise_folder,
)
from frugal_bonsai.checkpoint.recognised import MULTIMODAL, require_recognised
from frugal_bonsai.errors import CheckpointError, UnsupportedModelError
from frugal_bonsai.rewrite.layouts.bundled import MODULE, BundledModel, find_bundled

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load_pruned(path: str | Path, **kwargs: Any) -> PreTrainedModel:
    """Load a pruned model, or a dense one, from a folder.

    Args:
        path: folder with ``config.json`` and safetensors weights.
        kwargs: arguments of ``from_pretrained`` (``dtype``, ``device_map``, ``attn_implementation``
            and others), except ``trust_remote_code``, which is not needed.

    Returns:
        The causal language model, or the model of images and text around it, in evaluation mode.

    Raises:
        CheckpointError: the folder, the config, the weights or one of the weights is missing.
        UnsupportedModelError: the layers differ in width, and transformers is too old for that or
            has no causal language model of the architecture.
    """
    folder = Path(path)
    found = recognise_file(folder) if folder.is_file() else recognise_folder(folder)
    require_recognised(folder, found)
    if "gguf" in found.details:
        raise CheckpointError(
            f"{folder}: is a GGUF file; load_pruned reads folders of safetensors, such as `prune` "
            "and `shrink` write from it"
        )
    config = read_config(folder)
    tensors = find_tensors(folder)
    multimodal = recognise_contents(folder, config, tensors).kind == MULTIMODAL
    model_class = _model_class(config, multimodal=multimodal, source=str(folder / CONFIG_FILE))
    if drop_left_over(config) != config and quantised_by(config, tensors) is None:
        kwargs.setdefault("config", _plain_config(folder, model_class))
    model, info = model_class.from_pretrained(folder, output_loading_info=True, **kwargs)
    missing = sorted(info["missing_keys"])
    if missing:
        raise CheckpointError(
            f"{folder}: the weights lack {len(missing)} tensors that the config asks for, the "
            f"first is {missing[0]!r}; does config.json belong to these weights?"
        )
    loaded: PreTrainedModel = model
    return loaded


def _bundled(config: Mapping[str, Any], *, source: str) -> BundledModel | None:
    """Return the bundled model that a config needs, or None if transformers' class suffices."""
    model_type = config.get("model_type")
    if config.get("per_layer_config"):
        return find_bundled(model_type, source=source)
    if str(config.get("auto_map", {}).get("AutoModelForCausalLM")).startswith(MODULE):
        return find_bundled(model_type, source=source)
    return None


def _plain_config(folder: Path, model_class: Any) -> Any:
    """Return the config without the description of a quantisation that the weights do not have."""
    from transformers import AutoConfig

    config = getattr(model_class, "config_class", AutoConfig).from_pretrained(folder)
    vars(config).pop(CONFIG_KEY, None)
    return config


def _model_class(config: Mapping[str, Any], *, multimodal: bool, source: str) -> Any:
    """Return the class whose ``from_pretrained`` builds this model."""
    bundled = _bundled(config, source=source)
    if bundled is None:
        from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

        return AutoModelForImageTextToText if multimodal else AutoModelForCausalLM
    # Imported by name: the bundled file is independent and not type-checked with the package.
    try:
        module = import_module(f"frugal_bonsai.rewrite.layouts.{MODULE}")
    except ImportError as error:  # transformers is too old
        raise UnsupportedModelError(f"{source}: {error}") from error
    return getattr(module, bundled.model_class)
