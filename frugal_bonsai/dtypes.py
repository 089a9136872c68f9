"""The dtypes of the safetensors format: their names, sizes and torch counterparts.

In: the format's own name (``"BF16"``) or a torch dtype. Out: the other one, or bytes per element.
Reads no files and holds no tensors. torch is imported at first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# The format's name -> (torch's attribute name, bytes per element).
_DTYPES = {
    "BOOL": ("bool", 1),
    "U8": ("uint8", 1),
    "I8": ("int8", 1),
    "F8_E4M3": ("float8_e4m3fn", 1),
    "F8_E5M2": ("float8_e5m2", 1),
    "F8_E8M0": ("float8_e8m0fnu", 1),  # scales of MXFP4 and MXFP8
    "I16": ("int16", 2),
    "U16": ("uint16", 2),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "I32": ("int32", 4),
    "U32": ("uint32", 4),
    "F32": ("float32", 4),
    "I64": ("int64", 8),
    "U64": ("uint64", 8),
    "F64": ("float64", 8),
}
DTYPE_BYTES = {name: size_bytes for name, (_, size_bytes) in _DTYPES.items()}
TORCH_NAMES = {name: torch_name for name, (torch_name, _) in _DTYPES.items()}
_FORMAT_NAMES = {torch_name: name for name, torch_name in TORCH_NAMES.items()}
# Dtypes of weights that can be pruned.
FLOATING = ("BF16", "F16", "F32")


def torch_dtype(name: str) -> torch.dtype:
    """Return the torch dtype of a safetensors dtype name (``"BF16"``)."""
    import torch

    dtype: torch.dtype = getattr(torch, TORCH_NAMES[name])
    return dtype


def dtype_name(dtype: torch.dtype) -> str:
    """Return the safetensors name of a torch dtype.

    Raises:
        ValueError: the format has no such dtype.
    """
    wanted = str(dtype).removeprefix("torch.")
    if wanted not in _FORMAT_NAMES:
        raise ValueError(f"safetensors has no dtype for {dtype}")
    return _FORMAT_NAMES[wanted]
