"""A model of which only ``config.json`` is at hand: its shapes are those of transformers' class.

In: a folder or a ``config.json``. Out: a :class:`Checkpoint` whose tensors have names, dtypes and
shapes, and no bytes. Builds the architecture without memory (torch's meta device).
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from frugal_bonsai.checkpoint.folder import CONFIG_FILE, read_config
from frugal_bonsai.checkpoint.header import TensorEntry
from frugal_bonsai.checkpoint.reader import Checkpoint
from frugal_bonsai.dtypes import DTYPE_BYTES
from frugal_bonsai.model.default_config import config_errors, with_floats

# Endings of files that hold weights, in formats that are read and in those that are refused.
_WEIGHTS = (".safetensors", ".safetensors.index.json", ".gguf", ".bin", ".pt", ".pth", ".nemo")
_DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


def config_folder(model: str) -> Path | None:
    """Return the folder of a model of which only the config is at hand; None for other models.

    Args:
        model: A ``config.json``, or a folder that has one and no weights.
    """
    path = Path(model).expanduser()
    if path.is_file():
        return path.parent if path.name == CONFIG_FILE else None
    if not (path / CONFIG_FILE).is_file():
        return None
    return None if any(file.name.endswith(_WEIGHTS) for file in path.iterdir()) else path


def open_config(folder: Path) -> Checkpoint:
    """Return a checkpoint of shapes.

    Raises:
        CheckpointError: transformers has no such architecture, or does not accept the config.
    """
    config = read_config(folder)
    dtype = _DTYPES.get(str(config.get("dtype") or config.get("torch_dtype")), "BF16")
    tensors, start = {}, 0
    for name, shape in _shapes(folder, config).items():
        size_bytes = DTYPE_BYTES[dtype] * math.prod(shape)
        tensors[name] = TensorEntry(
            name=name,
            dtype=dtype,
            shape=shape,
            file=folder / CONFIG_FILE,
            start=start,
            end=start + size_bytes,
        )
        start += size_bytes
    return Checkpoint(folder, config, tensors)


def _shapes(folder: Path, config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor that a checkpoint of this config has, by its name there."""
    import torch
    import transformers
    from transformers.core_model_loading import revert_weight_conversion
    from transformers.initialization import no_init_weights

    with config_errors(config, str(folder / CONFIG_FILE)):
        described = transformers.AutoConfig.for_model(**dict(with_floats(config)))
        own = getattr(transformers, (config.get("architectures") or [""])[0], None)
        with torch.device("meta"), no_init_weights():
            build = transformers.AutoModelForCausalLM.from_config if own is None else own
            model = build(described)
        model.tie_weights()
        once = {name for name, _ in model.named_parameters()}
        tied = {name for name, _ in model.named_parameters(remove_duplicate=False)} - once
        state = {name: value for name, value in model.state_dict().items() if name not in tied}
        found = revert_weight_conversion(model, state)
    return {name: tuple(value.shape) for name, value in found.items()}
