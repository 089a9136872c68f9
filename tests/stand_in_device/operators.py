"""Operations of torch as the stand-in sees them: which need care, how they run on a CPU.

Nothing here knows of the stand-in's tensors.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch

aten = torch.ops.aten
COPIES = (aten.copy_.default, aten._to_copy.default)
INDEXING = (
    aten.index.Tensor,
    aten.index_put_.default,
    aten.index_put.default,
    aten._index_put_impl_.default,
    aten._unsafe_index.Tensor,
)
# What a device answers only once it has done all work before.
WAITING = (
    aten._local_scalar_dense.default,
    aten.nonzero.default,
    aten.is_nonzero.default,
    aten.equal.default,
    aten.masked_select.default,
    aten._unique2.default,
    aten.unique_dim.default,
)


INDEXED = (torch.Tensor.__getitem__, torch.Tensor.__setitem__)
SCALARS = (
    torch.Tensor.__float__,
    torch.Tensor.__int__,
    torch.Tensor.__bool__,
    torch.Tensor.__index__,
    torch.Tensor.item,
    torch.Tensor.tolist,
)
# torch's C++ reads memory here, or makes views that inference mode does not allow of this class,
# before anything is dispatched. Where gradients flow only the first is so.
GUARDED = {
    *INDEXED,
    *SCALARS,
    torch.Tensor.numpy,
    torch.Tensor.contiguous,
    torch.Tensor.copy_,
    torch.nn.functional.scaled_dot_product_attention,
}
# Frames between an operation's dispatch and what has called it.
_DISPATCHING = ("run", "__torch_dispatch__", "_fn", "inner", "_op_dk")
_WITHIN_TORCH = ("_engine_run_backward", "decompose", "__torch_function__")
CONTIGUOUS, META = torch.contiguous_format, torch.device("meta")
UP, DOWN = "host to device", "device to host"


def is_there(tensor: Any, kwargs: dict[str, Any], here: bool) -> bool:
    """``to`` of what is there already gives the tensor itself."""
    dtype = kwargs.get("dtype")
    stays = kwargs.get("device") is None or here
    return stays and dtype in (None, tensor.dtype) and kwargs.get("memory_format") is None


def compute(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The operation on the CPU, also where the CPU lacks it."""
    if func in (aten.addmm.dtype, aten.addmm.dtype_out):
        added, left, right, dtype, *_ = (*args, *([kwargs["out_dtype"]] if len(args) < 4 else []))
        result = torch.addmm(added.to(dtype), left.to(dtype), right.to(dtype))
        return kwargs["out"].copy_(result) if "out" in kwargs else result
    if func is aten._int_mm.default and (
        len(args[0]) <= 16 or args[0].shape[1] % 8 or args[1].shape[1] % 8
    ):
        raise RuntimeError(f"_int_mm of {[tuple(a.shape) for a in args]}: not on this device")
    return func(*args, **kwargs)


def line_of_the_package() -> str:
    """The innermost line of frugal_bonsai that is being run: ``stream/head.py:93 nll``."""
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename.replace("\\", "/")
        if "/frugal_bonsai/" in name:
            inside = name.rpartition("/frugal_bonsai/")[2]
            return f"{inside}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back  # type: ignore[assignment]
    return "outside the package"


def leaves_of(value: Any) -> list[Any]:
    """The values in nested lists, tuples and dictionaries, in order."""
    if isinstance(value, (list, tuple)):
        return [leaf for one in value for leaf in leaves_of(one)]
    if isinstance(value, dict):
        return [leaf for one in value.values() for leaf in leaves_of(one)]
    return [value]


def mapped(change: Callable[[Any], Any], value: Any) -> Any:
    """The same with every leaf changed."""
    if isinstance(value, tuple):
        changed = [mapped(change, one) for one in value]
        return type(value)(*changed) if hasattr(value, "_fields") else type(value)(changed)
    if isinstance(value, list):
        return [mapped(change, one) for one in value]
    if isinstance(value, dict):
        return {key: mapped(change, one) for key, one in value.items()}
    return change(value)


def asked_by_torch_itself() -> bool:
    """True where torch's C++ made the call: in a gradient or in a part of another operation."""
    frame = sys._getframe(2)
    while frame is not None and frame.f_code.co_name in _DISPATCHING:
        frame = frame.f_back  # type: ignore[assignment]
    return frame is not None and frame.f_code.co_name in _WITHIN_TORCH


def has_gradient(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.requires_grad and torch.is_grad_enabled()


def attention_in_parts(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """Attention that gradients flow through: torch's C++ would make its mask on another device."""
    assert not dropout_p
    if enable_gqa:
        times = query.shape[1] // key.shape[1]
        key, value = (one.repeat_interleave(times, dim=1) for one in (key, value))
    scores = query @ key.transpose(-2, -1) * (scale or query.shape[-1] ** -0.5)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril().to(query.device)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, -torch.inf)
    elif attn_mask is not None:
        scores = scores + attn_mask
    return scores.softmax(-1) @ value


def has_size(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dim() > 0
