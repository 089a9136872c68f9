"""How many rows of a stored weight a CPU makes dense at a time to multiply them.

Dense rows that stay in the cache cost less than a dense layer that is written once and read from
memory by every product, and take megabytes where a layer takes hundreds (measured: docs/results/).
Pure functions of shapes, shared by the sweep and the planner.
"""

from __future__ import annotations

_BLOCK_BYTES = 4 * 2**20
# Fewer rows make the product itself slower. A multiple of what the kernels take at a time: with
# other numbers a row's sums may round differently than in the product with the whole weight.
_LEAST_ROWS = 256


def block_rows(columns: int, element_bytes: int) -> int:
    """Rows of so many columns that are dense at the same time."""
    return max(_LEAST_ROWS, _BLOCK_BYTES // (columns * element_bytes) // _LEAST_ROWS * _LEAST_ROWS)


def multiplied_in_blocks(shape: tuple[int, ...], element_bytes: int) -> bool:
    """Whether a tensor is a weight of more rows than a block has; others are made dense whole."""
    return len(shape) == 2 and shape[0] > block_rows(shape[1], element_bytes)


def block_bytes(shape: tuple[int, ...], element_bytes: int) -> int:
    """What a block of a weight's rows takes."""
    return block_rows(shape[1], element_bytes) * shape[1] * element_bytes
