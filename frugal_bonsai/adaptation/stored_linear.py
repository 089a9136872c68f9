"""A linear layer that multiplies its weight in the form in which it is stored.

In: int8 codes with row scales, a frozen weight in the checkpoint's dtype, or a trained fp32 weight.
Out: products in the compute dtype, with gradients for the input (and for a trained weight). A
stored weight is made dense for each product, forward and backward, in blocks of rows. Holds the
stored bytes and at most 32 MiB of dense rows.

Shape suffixes: O output rows, I input columns, o rows of a block, T tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear

from frugal_bonsai.memory.work import DENSE_BLOCK_BYTES
from frugal_bonsai.stream.stored_weight import dense_blocks


class StoredLinear(nn.Linear):
    """``torch.nn.Linear`` over a stored weight; :meth:`load` comes before the first product.

    It is a ``torch.nn.Linear`` so that peft can wrap it.

    Args:
        inputs: I.
        outputs: O.
        dtype: compute dtype.
        bias_O: in the compute dtype, or None.

    Attributes:
        scales: row scales of int8 codes, fp32 ``[O]``; None for a floating weight.
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

    def load(
        self,
        stored_OI: torch.Tensor,
        scales_O: torch.Tensor | None = None,
        *,
        trained: bool = False,
    ) -> None:
        """Use this weight, without a copy.

        Args:
            stored_OI: int8 codes or a floating weight.
            scales_O: fp32 row scales of int8 codes.
            trained: whether the weight, which is floating, gets gradients in its own dtype.
        """
        self.weight = nn.Parameter(stored_OI, requires_grad=trained)
        self.scales = scales_O

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Return ``[..., O]`` for inputs ``[..., I]`` in the compute dtype."""
        if self.weight.requires_grad or self.weight.dtype == self._dtype:
            return linear(input, self.weight.to(self._dtype), self.bias)
        result: torch.Tensor = _Product.apply(  # type: ignore[no-untyped-call]
            input, self.weight, self.scales, self._dtype
        )
        return result if self.bias is None else result + self.bias


class _Product(torch.autograd.Function):
    """``input @ weight.T`` that saves the stored weight for the backward pass, not a dense one."""

    @staticmethod
    def forward(
        ctx: Any,
        input: torch.Tensor,
        stored_OI: torch.Tensor,
        scales_O: torch.Tensor | None,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        ctx.stored = stored_OI, scales_O, dtype
        outputs = len(stored_OI)
        result = None
        for rows, dense_oI in _blocks(*ctx.stored):
            if len(dense_oI) == outputs:
                return linear(input, dense_oI)
            if result is None:
                result = input.new_empty(*input.shape[:-1], outputs, dtype=dtype)
            result[..., rows] = linear(input, dense_oI)
        assert result is not None
        return result

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, None, None, None]:
        if not ctx.needs_input_grad[0]:
            return None, None, None, None
        stored_OI, _, dtype = ctx.stored
        flat_TO = gradient.reshape(-1, gradient.shape[-1])
        sum_TI = None
        for rows, dense_oI in _blocks(*ctx.stored):
            if len(dense_oI) == len(stored_OI):
                return gradient @ dense_oI, None, None, None
            if sum_TI is None:  # in fp32: in bf16 each block would round the sum of all before it
                sum_TI = gradient.new_zeros(len(flat_TO), stored_OI.shape[1], dtype=torch.float32)
            sum_TI += flat_TO[:, rows] @ dense_oI
        assert sum_TI is not None
        return sum_TI.to(dtype).view(*gradient.shape[:-1], -1), None, None, None


def _blocks(
    stored_OI: torch.Tensor, scales_O: torch.Tensor | None, dtype: torch.dtype
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Yield blocks of rows in the compute dtype; each is overwritten by the next one."""
    outputs, inputs = stored_OI.shape
    rows = min(outputs, max(1, DENSE_BLOCK_BYTES // (inputs * dtype.itemsize)))
    room_oI = torch.empty(rows, inputs, dtype=dtype, device=stored_OI.device)
    return dense_blocks(stored_OI, scales_O, rows, lambda rows, _: room_oI[:rows])
