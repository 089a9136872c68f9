"""Row-wise int8 quantisation of weights.

In: a weight matrix. Out: int8 codes and one fp32 scale per row, W ~ codes * scales / 127
(LLM.int8(), Dettmers et al. 2022, section 3.1, without outliers); and the weight again. Holds one
block of rows in fp32.

Shape suffixes: O output rows, I input columns.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# Tokens that an int8 product of stream/int8_linear.py holds at a time on a CPU. With fewer tokens
# the weight is packed too often (measured: 128 tokens take 10% longer); with more the sums do not
# fit into the cache.
PRODUCT_TOKENS = 256

# Bytes of a projection's activations that a CPU computes together in int8. Larger ones do not fit
# into the cache, and their memory goes back to the system, which clears it page by page (measured:
# 10% of a sweep).
_PRODUCT_BYTES = 8 * 2**20

# Bytes of a block of rows in fp32 that is quantised at a time, and how many tensors of this size
# are held meanwhile.
QUANTISED_BLOCK_BYTES, QUANTISED_COPIES = 8 * 2**20, 4


def product_scratch_bytes(tokens: int, rows: int, columns: int) -> int:
    """Return the bytes that int8 products hold for weights of at most ``rows`` and ``columns``.

    These are two digits of each input, in int8 and in fp32, and two int32 sums of each output.
    """
    return tokens * (2 * (1 + 4) * columns + 2 * 4 * rows)


def product_tokens(widest: int) -> int:
    """Return the number of tokens that a CPU computes together with int8 products.

    Args:
        widest: largest number of rows or columns of a projection.
    """
    return max(PRODUCT_TOKENS, _PRODUCT_BYTES // (4 * widest))


def has_bitsandbytes() -> bool:
    """Whether bitsandbytes can be imported here (it has no wheel for some platforms)."""
    logger = logging.getLogger("bitsandbytes")
    level = logger.level
    # It warns about kernels for 4-bit weights, which are not used here.
    logger.setLevel(logging.ERROR)
    try:
        import bitsandbytes  # noqa: F401  # the import is the test
    except ImportError:
        return False
    finally:
        logger.setLevel(level)
    return True


def quantise_rows(weight_OI: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise a matrix row by row to int8, on its device.

    Codes and scales equal those of ``bitsandbytes.functional.int8_vectorwise_quant`` to the bit (a
    test compares them). That function takes twice as long on a CPU, and importing it takes 2 s and
    46 MiB.

    Args:
        weight_OI: floating ``[O, I]``; converted to fp16 first, as bitsandbytes requires.

    Returns:
        Codes int8 ``[O, I]`` and scales fp32 ``[O]``, on the weight's device. A row of zeros has
        scale 0 and codes 0.
    """
    import torch

    rows, columns = weight_OI.shape
    codes_OI = torch.empty(rows, columns, dtype=torch.int8, device=weight_OI.device)
    scales_O = torch.empty(rows, dtype=torch.float32, device=weight_OI.device)
    block = max(1, QUANTISED_BLOCK_BYTES // (4 * max(1, columns)))
    for start in range(0, rows, block):
        here = slice(start, start + block)
        codes_OI[here], scales_O[here] = _quantise_block(weight_OI[here].half())
    return codes_OI, scales_O


def _quantise_block(block_OI: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    import torch

    scales_O = block_OI.abs().amax(dim=1).float()
    factor_O = torch.where(scales_O > 0, 127.0 / scales_O, torch.zeros_like(scales_O))
    return torch.round(block_OI * factor_O[:, None]).to(torch.int8), scales_O


def dequantise_into(
    out_OI: torch.Tensor, codes_OI: torch.Tensor, scales_O: torch.Tensor
) -> torch.Tensor:
    """Write codes * scales / 127 into ``out_OI`` and return it.

    The values equal those of ``bitsandbytes.functional.int8_vectorwise_dequant`` (a test compares
    them), which allocates an fp32 copy and is ten times slower.
    """
    out_OI.copy_(codes_OI)
    return out_OI.mul_((scales_O / 127.0)[:, None])
