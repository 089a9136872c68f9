"""Models of torch's two caching allocators: the device's, and that of pinned host memory.

Coarse copies of CUDACachingAllocator and CachingHostAllocator: sizes, rounding, pools, splitting
and reuse are theirs, nothing is really allocated. Addresses are numbers that never repeat.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

MIB = 2**20
_ROUND, _SMALL, _SMALL_SEGMENT, _LARGE_SEGMENT = 512, MIB, 2 * MIB, 20 * MIB
_MIN_LARGE, _ROUND_LARGE = 10 * MIB, 2 * MIB


@dataclass(eq=False)
class Segment:
    """The memory of one cudaMalloc; it belongs to one stream's pool of small or large blocks."""

    address: int
    size: int
    pool: tuple[int, bool]
    blocks: list[Block] = field(default_factory=list)


@dataclass(eq=False)
class Block:
    """A part of a segment."""

    address: int
    size: int
    segment: Segment
    free: bool = True


class DeviceAllocator:
    """Blocks of device memory: a freed one stays in the pool of the stream that it came from."""

    def __init__(self, total_bytes: int) -> None:
        self.total_bytes, self.limit_bytes = total_bytes, total_bytes
        self.reserved = self.max_reserved = self.allocated = 0
        self._segments: list[Segment] = []
        self._next = 1 << 40

    def malloc(self, size: int, stream: int) -> Block:
        """A block of at least this size.

        Raises:
            torch.OutOfMemoryError: the limit is reached, and no cached segment can be given back.
        """
        size = max(_ROUND, -(-size // _ROUND) * _ROUND)
        small = size <= _SMALL
        block = self._best(size, (stream, small)) or self._segment(size, (stream, small))
        left = block.size - size
        if left >= _ROUND if small else left > _SMALL:
            rest = Block(block.address + size, left, block.segment)
            at = block.segment.blocks.index(block)
            block.segment.blocks.insert(at + 1, rest)
            block.size = size
        block.free = False
        self.allocated += block.size
        return block

    def release(self, block: Block) -> None:
        """Give a block back to its pool, joined with free neighbours."""
        self.allocated -= block.size
        block.free = True
        blocks = block.segment.blocks
        at = blocks.index(block)
        for other in (at + 1, at):
            if 0 < other < len(blocks) and blocks[other].free and blocks[other - 1].free:
                blocks[other - 1].size += blocks.pop(other).size

    def empty_cache(self) -> None:
        """Give segments without a used block back to the device."""
        kept = [s for s in self._segments if not all(block.free for block in s.blocks)]
        self.reserved = sum(segment.size for segment in kept)
        self._segments = kept

    def _best(self, size: int, pool: tuple[int, bool]) -> Block | None:
        found = [
            block
            for segment in self._segments
            if segment.pool == pool
            for block in segment.blocks
            if block.free and block.size >= size
        ]
        return min(found, key=lambda block: block.size, default=None)

    def _segment(self, size: int, pool: tuple[int, bool]) -> Block:
        needed = _SMALL_SEGMENT if pool[1] else _LARGE_SEGMENT
        if size >= _MIN_LARGE:
            needed = -(-size // _ROUND_LARGE) * _ROUND_LARGE
        if self.reserved + needed > self.limit_bytes:
            self.empty_cache()
        if self.reserved + needed > self.limit_bytes:
            raise torch.OutOfMemoryError(
                f"CUDA out of memory. Tried to allocate {needed / MIB:.2f} MiB (stand-in device: "
                f"{self.reserved / MIB:.2f} of {self.limit_bytes / MIB:.2f} MiB are reserved)"
            )
        segment = Segment(self._next, needed, pool)
        segment.blocks.append(Block(self._next, needed, segment))
        self._next += needed + MIB
        self._segments.append(segment)
        self.reserved += needed
        self.max_reserved = max(self.max_reserved, self.reserved)
        return segment.blocks[0]


class PinnedAllocator:
    """Pinned host memory: powers of two, which are kept until the cache is emptied."""

    def __init__(self) -> None:
        self.reserved = self.max_reserved = 0
        self._cached: dict[int, int] = {}

    def malloc(self, size: int) -> int:
        """The size of the block that is taken."""
        bucket = 1 << max(0, size - 1).bit_length()
        if self._cached.get(bucket):
            self._cached[bucket] -= 1
            return bucket
        self.reserved += bucket
        self.max_reserved = max(self.max_reserved, self.reserved)
        return bucket

    def release(self, bucket: int) -> None:
        """Keep a block for the next of its size."""
        self._cached[bucket] = self._cached.get(bucket, 0) + 1

    def empty_cache(self) -> None:
        """Give what nobody uses back to the system."""
        self.reserved -= sum(bucket * count for bucket, count in self._cached.items())
        self._cached.clear()
