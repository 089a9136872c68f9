"""Weights that ``torch.nn.functional.linear`` multiplies as they are stored.

In: a weight as it lies in a layer's buffer, either int8 codes with row scales or the checkpoint's
dtype. Out: a tensor that Hugging Face's modules accept as their weight. :class:`RowsWeight` makes
one block of rows dense at a time, ``int8_linear.Int8Weight`` multiplies the codes themselves. No
gradients: adaptation/stored_linear.py has them. Holds a view of the stored bytes, and scratch
memory.

Shape suffixes: T tokens, I input columns, O output rows, o rows of a block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

import torch

from frugal_bonsai.int8 import dequantise_into
from frugal_bonsai.row_blocks import block_rows
from frugal_bonsai.stream.scratch import Scratch

# Up to this many tokens MKL is up to twice as fast with the weight as the left factor and with a
# multiple of sixteen tokens. With more tokens it makes no difference, and the result would have to
# be transposed.
_FEW_TOKENS, _MULTIPLE = 256, 16

_W = TypeVar("_W", bound="StoredWeight")


class StoredWeight(torch.Tensor):
    """A stored weight ``[O, I]`` that ``torch.nn.functional.linear`` can multiply.

    All other operations see the stored elements as a plain tensor. :func:`dense_weight` returns the
    weight itself.

    Args:
        stored_OI: int8 codes or a floating weight; not copied.
        scales_O: fp32, W ~ codes * scales / 127; None for a floating weight.
        scratch: memory that the products reuse.
    """

    scales_O: torch.Tensor | None
    scratch: Scratch

    @staticmethod
    def __new__(
        cls: type[_W], stored_OI: torch.Tensor, scales_O: torch.Tensor | None, scratch: Scratch
    ) -> _W:
        """Return a view of the stored elements that carries the scales."""
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
        """Multiply if the call is a linear layer; else call the function on the plain tensor."""
        if func is torch.nn.functional.linear:
            return _linear(*args, **(kwargs or {}))
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    def stored(self) -> torch.Tensor:
        """Return the stored elements ``[O, I]`` as a plain tensor."""
        return self.as_subclass(torch.Tensor)

    def multiply_into(self, input_TI: torch.Tensor, output_TO: torch.Tensor) -> None:
        """Write ``input @ weight.T`` in the input's dtype into ``output_TO``."""
        raise NotImplementedError


class RowsWeight(StoredWeight):
    """A weight that is multiplied in blocks of rows, each made dense in the input's dtype.

    With 8 tokens or more the products equal those of the dense weight to the bit (measured with
    MKL).
    """

    def multiply_into(self, input_TI: torch.Tensor, output_TO: torch.Tensor) -> None:
        """Compute one product for each block of rows."""
        dtype, tokens, few = input_TI.dtype, len(input_TI), len(input_TI) <= _FEW_TOKENS
        if few and tokens % _MULTIPLE:
            input_TI = torch.nn.functional.pad(input_TI, (0, 0, 0, -tokens % _MULTIPLE))
        rows = block_rows(self.shape[1], dtype.itemsize)
        blocks = dense_blocks(
            self.stored(), self.scales_O, rows, lambda o, i: self.scratch.take(o, i, dtype)
        )
        for here, dense_oI in blocks:
            if few:
                output_TO[:, here] = (dense_oI @ input_TI.t())[:, :tokens].t()
            else:
                torch.mm(input_TI, dense_oI.t(), out=output_TO[:, here])


def dense_blocks(
    stored_OI: torch.Tensor,
    scales_O: torch.Tensor | None,
    rows: int,
    allocate: Callable[[int, int], torch.Tensor],
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Yield a stored weight as dense blocks of rows, in order.

    Args:
        stored_OI: int8 codes or a floating weight.
        scales_O: fp32 row scales of int8 codes; None for a floating weight.
        rows: number of rows of a block; the last block may have fewer.
        allocate: returns memory for a block of this many rows and columns, in the dtype wanted; may
            return the same memory again.

    Yields:
        The rows of a block, and their dense values ``[o, I]``.
    """
    for start in range(0, len(stored_OI), rows):
        here = slice(start, min(start + rows, len(stored_OI)))
        dense_oI = allocate(here.stop - start, stored_OI.shape[1])
        yield (
            here,
            _dense_into(dense_oI, stored_OI[here], None if scales_O is None else scales_O[here]),
        )


def multiply_into(
    input_TI: torch.Tensor, weight_OI: torch.Tensor, output_TO: torch.Tensor
) -> torch.Tensor:
    """Write ``input @ weight.T`` into ``output_TO`` and return it, for a plain or stored weight."""
    if isinstance(weight_OI, StoredWeight):
        weight_OI.multiply_into(input_TI, output_TO)
        return output_TO
    return torch.mm(input_TI, weight_OI.t(), out=output_TO)


def dense_weight(weight_OI: torch.Tensor) -> torch.Tensor:
    """Return a weight ``[O, I]`` as a plain tensor: a stored one in fp32, any other unchanged."""
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
