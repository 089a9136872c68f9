"""Whether what is read again and again should stay in the system's page cache.

In: bytes of a model or store, bytes of memory that are free. Out: a decision. A model that fits is
read from memory at its second sweep. One that does not would push out everything else, this
program's pages of other files too, and be gone before its next visit: it is dropped behind the
reader.
"""

from __future__ import annotations

# The rest is left to whatever else runs, and to this program's own growth.
_SHARE = 0.8


def fits_page_cache(size_bytes: int, free_bytes: int) -> bool:
    """Whether so many bytes can stay in the page cache beside everything else."""
    return size_bytes <= _SHARE * free_bytes


def free_memory_bytes() -> int:
    """Memory that the system could give now, cached files counted as free."""
    import psutil

    return int(psutil.virtual_memory().available)
