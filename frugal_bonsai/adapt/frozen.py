"""A projection whose weight is held as it is stored and never trained.

In: int8 codes and row scales, or a weight in the checkpoint's dtype. Out: a linear layer in the
compute dtype through which gradients flow to its input. The weight is dequantised or converted
for each product, forward and backward, some rows at a time, and let go: only the stored bytes and
32 MiB of rows stay.

Shape suffixes: O output rows, I input columns, o rows of a block.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear

from frugal_bonsai.int8 import dequantise_into
from frugal_bonsai.memory.work import DENSE_BLOCK_BYTES


class FrozenLinear(nn.Linear):
    """``torch.nn.Linear`` over a stored weight; peft puts adapters beside it as beside any other.

    Args:
        inputs: I.
        outputs: O.
        dtype: compute dtype.
        bias_O: in the compute dtype, or None.

    Attributes:
        scales: fp32 ``[O]`` of int8 codes; None for a floating weight.
    """

    def __init__(
        self, inputs: int, outputs: int, *, dtype: torch.dtype, bias_O: torch.Tensor | None
    ) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self._dtype = inputs, outputs, dtype
        self.weight = nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False)
        bias = None if bias_O is None else nn.Parameter(bias_O, requires_grad=False)
        self.register_parameter("bias", bias)
        self.scales: torch.Tensor | None = None

    def load(self, stored_OI: torch.Tensor, scales_O: torch.Tensor | None = None) -> None:
        """Multiply by this weight from now on; it is not copied."""
        self.weight = nn.Parameter(stored_OI, requires_grad=False)
        self.scales = scales_O

    def dense(self) -> torch.Tensor:
        """The weight in the compute dtype, ``[O, I]``."""
        return _dense(self.weight, self.scales, self._dtype)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Inputs ``[..., I]`` to outputs ``[..., O]``."""
        if self.scales is None and self.weight.dtype == self._dtype:
            return linear(input, self.weight, self.bias)
        result: torch.Tensor = _Product.apply(  # type: ignore[no-untyped-call]
            input, self.weight, self.scales, self._dtype
        )
        return result if self.bias is None else result + self.bias


class TrainedLinear(nn.Linear):
    """``torch.nn.Linear`` whose weight is held in fp32 and multiplied in the input's dtype."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Inputs ``[..., I]`` to outputs ``[..., O]``; the weight's gradient is fp32."""
        return linear(input, self.weight.to(input.dtype), self.bias)


class _Product(torch.autograd.Function):
    """input @ weight.T without keeping the dense weight, of which some rows are made at a time."""

    @staticmethod
    def forward(
        ctx: Any,
        input: torch.Tensor,
        stored_OI: torch.Tensor,
        scales_O: torch.Tensor | None,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        ctx.stored_OI, ctx.scales_O, ctx.dtype = stored_OI, scales_O, dtype
        blocks = list(_row_blocks(stored_OI, dtype))
        if len(blocks) == 1:
            return linear(input, _dense(stored_OI, scales_O, dtype))
        result = torch.empty(
            *input.shape[:-1], len(stored_OI), dtype=dtype, device=stored_OI.device
        )
        for rows in blocks:
            result[..., rows] = linear(input, _rows(stored_OI, scales_O, rows, dtype))
        return result

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, None, None, None]:
        if not ctx.needs_input_grad[0]:
            return None, None, None, None
        blocks = list(_row_blocks(ctx.stored_OI, ctx.dtype))
        if len(blocks) == 1:
            return gradient @ _dense(ctx.stored_OI, ctx.scales_O, ctx.dtype), None, None, None
        flat_TO = gradient.reshape(-1, gradient.shape[-1])
        # Summed in fp32: in bf16 each block would round what the others have added.
        sum_TI = torch.zeros(len(flat_TO), ctx.stored_OI.shape[1], device=gradient.device)
        for rows in blocks:
            sum_TI += flat_TO[:, rows] @ _rows(ctx.stored_OI, ctx.scales_O, rows, ctx.dtype)
        return sum_TI.to(ctx.dtype).view(*gradient.shape[:-1], -1), None, None, None


def _row_blocks(stored_OI: torch.Tensor, dtype: torch.dtype) -> Iterator[slice]:
    """Rows that are dense at the same time."""
    outputs, inputs = stored_OI.shape
    step = max(1, DENSE_BLOCK_BYTES // (inputs * dtype.itemsize))
    for start in range(0, outputs, step):
        yield slice(start, min(start + step, outputs))


def _rows(
    stored_OI: torch.Tensor, scales_O: torch.Tensor | None, rows: slice, dtype: torch.dtype
) -> torch.Tensor:
    return _dense(stored_OI[rows], None if scales_O is None else scales_O[rows], dtype)


def _dense(
    stored_OI: torch.Tensor, scales_O: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    if scales_O is None:
        return stored_OI.to(dtype)
    return dequantise_into(torch.empty_like(stored_OI, dtype=dtype), stored_OI, scales_O)
