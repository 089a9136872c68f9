"""Decide whether files that are read repeatedly should stay in the system's page cache.

In: the bytes of a model or store, and the free memory. Out: a decision. A model that fits is read
from memory from its second sweep on. A larger one would evict everything else from the cache, and
its own pages before they are read again, so the reader drops its pages behind itself.
"""

from __future__ import annotations

# Share of the free memory that the cache may use. The rest is for other programs and for this
# program's growth.
_SHARE = 0.8


def fits_page_cache(size_bytes: int, free_bytes: int) -> bool:
    """Return whether files of this size can stay in the page cache."""
    return size_bytes <= _SHARE * free_bytes


def free_memory_bytes() -> int:
    """Return the bytes of memory that the system can give now; cached files count as free."""
    import psutil

    return int(psutil.virtual_memory().available)
