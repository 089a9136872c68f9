"""Matrix products of int8 weights without dequantising them.

In: inputs in the compute dtype, and a weight's int8 codes and row scales. Out: the products. Each
token's input is written as two int8 digits, x ~ step * (d1 + d2 / 254) with step = max|x| / 127 of
that token. This is 16 bits; one digit alone (the dynamic rounding of LLM.int8(), Dettmers et al.
2022, section 2) is 8 bits, too few to rank units by. The integer products are exact and each token
has its own step, so no token's result depends on other tokens. Holds the digits and sums of a block
of tokens.

Shape suffixes: T tokens, I input columns, O output rows, D the two digits.
"""

from __future__ import annotations

import torch

from frugal_bonsai.int8 import PRODUCT_TOKENS, product_tokens
from frugal_bonsai.stream.scratch import Scratch
from frugal_bonsai.stream.stored_weight import StoredWeight

# The first digit leaves at most half a step; the second divides this half into 127 parts.
_SECOND_DIGIT = 254.0
# The kernel of a GPU needs more than 16 rows, and multiples of 8 in the other sizes.
_LEAST_ROWS, GPU_MULTIPLE = 32, 8


class Int8Weight(StoredWeight):
    """A weight of int8 codes ``[O, I]`` that are multiplied without dequantising."""

    def multiply_into(self, input_TI: torch.Tensor, output_TO: torch.Tensor) -> None:
        """Compute the products of a block of tokens at a time, both digits together."""
        assert self.scales_O is not None
        codes_OI = self.stored()
        scales_O = (self.scales_O / 127.0).to(torch.float32)
        # A GPU has memory for all tokens, and blocks would not make it faster.
        block = PRODUCT_TOKENS if input_TI.device.type == "cpu" else max(1, len(input_TI))
        for start in range(0, len(input_TI), block):
            block_TI, out_TO = input_TI[start : start + block], output_TO[start : start + block]
            _multiply_block(block_TI, codes_OI, scales_O, out_TO, self.scratch)


def tokens_at_once(weight_OI: torch.Tensor) -> int | None:
    """Return the largest number of tokens to multiply together; None if more are no slower."""
    if not isinstance(weight_OI, Int8Weight) or weight_OI.device.type != "cpu":
        return None
    return product_tokens(len(weight_OI))


def _multiply_block(
    input_TI: torch.Tensor,
    codes_OI: torch.Tensor,
    scales_O: torch.Tensor,
    output_TO: torch.Tensor,
    scratch: Scratch,
) -> None:
    """Write ``input @ (codes * scales).T`` into ``output_TO``."""
    tokens, columns = input_TI.shape
    input_TI = input_TI.float()
    floats_2TI = scratch.take(2 * tokens, columns, torch.float32).view(2, tokens, columns)
    scaled_TI, whole_TI = floats_2TI[0], floats_2TI[1]
    largest_T1 = torch.abs(input_TI, out=scaled_TI).amax(1, keepdim=True)
    # A token of zeros has digits of zero for any step.
    step_T1 = largest_T1.clamp_min_(torch.finfo(torch.float32).tiny).div_(127.0)
    torch.div(input_TI, step_T1, out=scaled_TI)
    padded = max(tokens, _LEAST_ROWS)
    digits_DTI = scratch.take(2 * padded, columns, torch.int8).view(2, padded, columns)
    digits_DTI[:, tokens:].zero_()
    digits_DTI[0, :tokens].copy_(torch.round(scaled_TI, out=whole_TI))
    rest_TI = scaled_TI.sub_(whole_TI)
    digits_DTI[1, :tokens].copy_(rest_TI.mul_(_SECOND_DIGIT).round_())
    # Both digits in one product, because the kernel packs the weight at every call.
    sums_DTO = scratch.take(2 * padded, len(codes_OI), torch.int32)
    torch._int_mm(digits_DTI.flatten(0, 1), codes_OI.t(), out=sums_DTO)
    # Converted in place: a copy would be as large as the sums.
    floats_DTO = sums_DTO.view(torch.float32).copy_(sums_DTO).view(2, padded, -1)[:, :tokens]
    float_TO = output_TO if output_TO.dtype == torch.float32 else floats_DTO[0]
    torch.add(floats_DTO[0], floats_DTO[1], alpha=1.0 / _SECOND_DIGIT, out=float_TO)
    float_TO.mul_(step_T1).mul_(scales_O)
    if float_TO is not output_TO:
        output_TO.copy_(float_TO)
