"""Weights that ``torch.nn.functional.linear`` multiplies as they are stored.

In: a weight as it lies in a layer's buffer, int8 codes with row scales or the checkpoint's dtype.
Out: a tensor that Hugging Face's modules take for their weight. :class:`RowsWeight` makes some rows
dense at a time; ``int8_linear.Int8Weight`` none. Holds a view of the stored bytes and scratch.

Shape suffixes: T tokens, I input columns, O output rows, o rows of a block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import torch

from frugal_bonsai.int8 import dequantise_into
from frugal_bonsai.row_blocks import block_rows
from frugal_bonsai.stream.scratch import Scratch

# With so few tokens MKL is up to twice as fast where the weight is the left factor and the tokens
# come in sixteens; with more there is no difference, and the result has to be turned.
_FEW_TOKENS, _MULTIPLE = 256, 16

_W = TypeVar("_W", bound="StoredWeight")


class StoredWeight(torch.Tensor):
    """A weight ``[O, I]`` as it is stored, which ``torch.nn.functional.linear`` can multiply.

    Everything else sees a plain tensor of what is stored: :func:`dense_weight` gives the weight.

    Args:
        stored_OI: int8 codes or a floating weight, not copied.
        scales_O: fp32, W ~ codes * scales / 127; None for a floating weight.
        scratch: memory for the products.
    """

    scales_O: torch.Tensor | None
    scratch: Scratch

    @staticmethod
    def __new__(
        cls: type[_W], stored_OI: torch.Tensor, scales_O: torch.Tensor | None, scratch: Scratch
    ) -> _W:
        """A view of what is stored that carries its scales."""
        weight: _W = torch.Tensor._make_subclass(cls, stored_OI)
        weight.scales_O, weight.scratch = scales_O, scratch
        return weight

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Products with this weight; everything else sees a plain tensor of what is stored."""
        if func is torch.nn.functional.linear:
            return _linear(*args, **(kwargs or {}))
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    def stored(self) -> torch.Tensor:
        """The plain tensor of what is stored, ``[O, I]``."""
        return self.as_subclass(torch.Tensor)

    def multiply_into(self, input_TI: torch.Tensor, output_TO: torch.Tensor) -> None:
        """Write ``input @ weight.T``, in the input's dtype, into memory that the caller owns."""
        raise NotImplementedError


class RowsWeight(StoredWeight):
    """A weight of which a block of rows is dense at a time, in the input's dtype.

    From 8 tokens on the products are those of the dense weight to the bit, as measured with MKL.
    """

    def multiply_into(self, input_TI: torch.Tensor, output_TO: torch.Tensor) -> None:
        """One product for each block of rows."""
        stored_OI, scales_O = self.stored(), self.scales_O
        rows, columns = stored_OI.shape
        block = block_rows(columns, input_TI.element_size())
        tokens, few = len(input_TI), len(input_TI) <= _FEW_TOKENS
        if few and tokens % _MULTIPLE:
            input_TI = torch.nn.functional.pad(input_TI, (0, 0, 0, -tokens % _MULTIPLE))
        for start in range(0, rows, block):
            here = slice(start, min(start + block, rows))
            dense_oI = self.scratch.take(here.stop - start, columns, input_TI.dtype)
            _dense_into(dense_oI, stored_OI[here], None if scales_O is None else scales_O[here])
            if few:
                output_TO[:, here] = (dense_oI @ input_TI.t())[:, :tokens].t()
            else:
                torch.mm(input_TI, dense_oI.t(), out=output_TO[:, here])


def multiply_into(
    input_TI: torch.Tensor, weight_OI: torch.Tensor, output_TO: torch.Tensor
) -> torch.Tensor:
    """``input @ weight.T`` in memory that the caller owns, whatever the weight is made of."""
    if isinstance(weight_OI, StoredWeight):
        weight_OI.multiply_into(input_TI, output_TO)
        return output_TO
    return torch.mm(input_TI, weight_OI.t(), out=output_TO)


def dense_weight(weight_OI: torch.Tensor) -> torch.Tensor:
    """A streamed weight whole, ``[O, I]``: fp32 where it is stored otherwise, else as it is."""
    if not isinstance(weight_OI, StoredWeight):
        return weight_OI
    out_OI = torch.empty(weight_OI.shape, dtype=torch.float32, device=weight_OI.device)
    return _dense_into(out_OI, weight_OI.stored(), weight_OI.scales_O)


def _dense_into(
    out_OI: torch.Tensor, stored_OI: torch.Tensor, scales_O: torch.Tensor | None
) -> torch.Tensor:
    if scales_O is None:
        return out_OI.copy_(stored_OI)
    return dequantise_into(out_OI, stored_OI, scales_O)


def _linear(
    input: torch.Tensor, weight: StoredWeight, bias: torch.Tensor | None = None
) -> torch.Tensor:
    rows, columns = weight.shape
    input_TI = input.reshape(-1, columns)
    output_TO = input.new_empty(len(input_TI), rows)
    weight.multiply_into(input_TI, output_TO)
    if bias is not None:
        output_TO += bias
    return output_TO.view(*input.shape[:-1], rows)
