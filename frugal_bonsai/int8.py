"""Row-wise int8: quantise once, dequantise into a reused buffer at every layer visit.

In: a weight matrix. Out: int8 codes and one fp32 scale a row, W ~ codes * scales / 127
(LLM.int8(), Dettmers et al. 2022, section 3.1, without outliers). Holds one row block in fp32.

Shape suffixes: O output rows, I input columns.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# Tokens that the int8 products of stream/int8_linear.py hold at a time on a CPU: with fewer the
# weight is packed too often, with more the sums leave the cache (measured: 128 takes 10% longer).
PRODUCT_TOKENS = 256

# Activations of a projection that is multiplied so: with more the passes over them leave the cache,
# and freed blocks go back to the system, which clears them page by page (measured: 10% of a sweep).
_PRODUCT_BYTES = 8 * 2**20

# Rows are quantised in blocks, so that the fp32 product never holds more than this; as many bytes
# again hold what it is rounded from and to.
QUANTISED_BLOCK_BYTES, QUANTISED_COPIES = 8 * 2**20, 4


def product_scratch_bytes(tokens: int, rows: int, columns: int) -> int:
    """What int8 products of so many tokens hold for weights of at most ``rows`` and ``columns``.

    Two digits of each input in int8 and in fp32, two sums of each output in int32.
    """
    return tokens * (2 * (1 + 4) * columns + 2 * 4 * rows)


def product_tokens(widest: int) -> int:
    """Tokens that a CPU computes together where its products are int8.

    Args:
        widest: rows or columns of the widest projection, whichever are more.
    """
    return max(PRODUCT_TOKENS, _PRODUCT_BYTES // (4 * widest))


def has_bitsandbytes() -> bool:
    """Whether bitsandbytes can be imported here (it has no wheel for some platforms)."""
    logger = logging.getLogger("bitsandbytes")
    level = logger.level
    # It warns of kernels of its 4-bit path, which nothing here needs.
    logger.setLevel(logging.ERROR)
    try:
        import bitsandbytes  # noqa: F401  # the import is the question
    except ImportError:
        return False
    finally:
        logger.setLevel(level)
    return True


def quantise_rows(weight_OI: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise a matrix row by row to int8, where it lies.

    The codes and scales of ``bitsandbytes.functional.int8_vectorwise_quant`` to the bit, which is
    the oracle of the test: on a CPU that takes twice as long, and its import 2 s and 46 MiB.

    Args:
        weight_OI: floating ``[O, I]``; goes through fp16, as bitsandbytes asks.

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
    """Write codes * scales / 127 into ``out_OI`` in place and return it.

    ``bitsandbytes.functional.int8_vectorwise_dequant`` allocates an fp32 copy and is ten times
    slower; it is the oracle of the test.
    """
    out_OI.copy_(codes_OI)
    return out_OI.mul_((scales_O / 127.0)[:, None])
