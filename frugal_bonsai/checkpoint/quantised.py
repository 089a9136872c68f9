"""Recognise quantised weights, and a description of quantisation that is left over.

In: ``config.json`` and the entries of the tensors. Out: the method's name, or None for plain
floating weights. Programs leave ``quantization_config`` behind when they merge or dequantise a
model, so the tensors decide. Reads no tensor data.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from frugal_bonsai.checkpoint.header import TensorEntry
from frugal_bonsai.dtypes import FLOATING
from frugal_bonsai.errors import CheckpointError

CONFIG_KEY = "quantization_config"
# Keys under which programs describe quantisation: MLX writes the second one.
_KEYS = (CONFIG_KEY, "quantization", "compression_config")
# Endings of the tensors that a method stores beside or in place of a weight. The first that occurs
# names the method if the config does not. Later methods share endings with earlier ones.
_SIGNS = (
    (".absmax", "bitsandbytes"),
    (".SCB", "bitsandbytes"),
    (".g_idx", "gptq"),
    (".qzeros", "awq"),
    (".qweight", "gptq or awq"),
    (".weight_packed", "compressed-tensors"),
    (".weight_scale_inv", "fp8"),
    (".weight_scale", "fp8 or compressed-tensors"),
    ("_proj_blocks", "mxfp4"),
    (".W_q", "hqq"),
    (".codebooks", "aqlm"),
    (".weight._data", "quanto"),
)
# Method -> how transformers loads such a model dequantised: arguments of ``from_pretrained``, and
# a call on the model.
_DEQUANTISE = {
    "bitsandbytes": ("", ".dequantize()"),
    "fp8": ("quantization_config=t.FineGrainedFP8Config(dequantize=True)", ""),
    "mxfp4": ("quantization_config=t.Mxfp4Config(dequantize=True)", ""),
    "compressed-tensors": (
        "quantization_config=t.CompressedTensorsConfig(run_compressed=False)",
        "",
    ),
}


def quantised_by(config: Mapping[str, Any], tensors: Mapping[str, TensorEntry]) -> str | None:
    """Return the method that quantised the weights; None for plain floating weights.

    A weight of another dtype in a model whose config says nothing of quantisation is no sign of a
    method. The tensor is refused by name elsewhere.
    """
    names = {entry.name for entry in tensors.values()}
    sign = next((kind for end, kind in _SIGNS if any(name.endswith(end) for name in names)), None)
    stated = _stated_method(config)
    packed = any(entry.dtype not in FLOATING for entry in tensors.values())
    if sign is None and not (packed and stated):
        return None
    return stated or sign


def require_floating(tensors: Mapping[str, TensorEntry]) -> None:
    """Check that all weights are numbers to compute with.

    Raises:
        CheckpointError: a tensor has another dtype, as quantised weights do.
    """
    for name, entry in tensors.items():
        if entry.dtype not in FLOATING:
            raise CheckpointError(
                f"{entry.file}: tensor {name!r} has dtype {entry.dtype}, expected one of "
                f"{', '.join(FLOATING)}; use the checkpoint in its original precision"
            )


def drop_left_over(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config of plain floating weights without its descriptions of quantisation."""
    return {key: value for key, value in config.items() if key not in _KEYS}


def dequantise_advice(folder: str, method: str) -> str:
    """Return what to do with a quantised model, as the end of a sentence."""
    advice = "use the unquantised checkpoint that it was made from"
    if method not in _DEQUANTISE:
        return advice
    options, call = _DEQUANTISE[method]
    arguments = ", ".join(filter(None, ("a", "dtype=torch.bfloat16", options)))
    command = save_plain(
        folder,
        folder + "-bf16",
        f"m = t.AutoModelForCausalLM.from_pretrained({arguments}){call}",
        "t.AutoTokenizer.from_pretrained(a)",
    )
    return f"{advice}, or dequantise it once with\n  {command}"


def save_plain(source: str, out: str, load: str, tokenizer: str) -> str:
    """Return a command that saves a dequantised model with its tokenizer.

    transformers does not save a model that it has dequantised, so its weights are copied into a
    new one.

    Args:
        source: folder of the model, ``a`` in the command.
        out: folder to write, ``b`` in the command.
        load: statement that loads the model as ``m``; transformers is ``t``.
        tokenizer: expression that loads the tokenizer.
    """
    return (
        f'python -c "import torch, transformers as t; a, b = {source!r}, {out!r}; {load}; '
        "c = m.config; vars(c).pop('quantization_config', 0); "
        "n = t.AutoModelForCausalLM.from_config(c, dtype=m.dtype); "
        f'n.load_state_dict(m.state_dict()); n.save_pretrained(b); {tokenizer}.save_pretrained(b)"'
    )


def _stated_method(config: Mapping[str, Any]) -> str | None:
    """Return the method that the config states, in words for the user."""
    for key in _KEYS:
        stated = config.get(key)
        if isinstance(stated, Mapping):
            return str(stated.get("quant_method") or ("mlx" if key == _KEYS[1] else "unknown"))
    return None
