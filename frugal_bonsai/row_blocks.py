"""The size of the blocks of rows in which a CPU makes stored weights dense.

In: shapes. Out: rows and bytes of a block; the sweep and the memory plan share them. A block that
stays in the cache is faster than a dense layer that is read from memory, and needs megabytes
instead of hundreds of megabytes (measured: docs/results/). Holds no tensors.
"""

from __future__ import annotations

_BLOCK_BYTES = 4 * 2**20
# Blocks of fewer rows make slower products. A multiple of the kernels' own block, because with
# other numbers a row's sums may round differently than in the product with the whole weight.
_LEAST_ROWS = 256


def block_rows(columns: int, element_bytes: int) -> int:
    """Return the number of rows of a block, for a weight of this many columns."""
    return max(_LEAST_ROWS, _BLOCK_BYTES // (columns * element_bytes) // _LEAST_ROWS * _LEAST_ROWS)


def multiplied_in_blocks(shape: tuple[int, ...], element_bytes: int) -> bool:
    """Return whether a tensor is a weight that is made dense in several blocks."""
    return len(shape) == 2 and shape[0] > block_rows(shape[1], element_bytes)


def block_bytes(shape: tuple[int, ...], element_bytes: int) -> int:
    """Return the bytes of a block of a weight's rows."""
    return block_rows(shape[1], element_bytes) * shape[1] * element_bytes
