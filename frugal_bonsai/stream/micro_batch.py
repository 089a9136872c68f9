"""Micro-batches that halve when memory runs out, inside the layer and never the sweep again.

In: how many windows there are, and what is to be done with some of them. Out: it has been done for
all of them, each exactly once. Holds two numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from frugal_bonsai.errors import BudgetError
from frugal_bonsai.progress import Progress, Silent

# Beside those that accelerate knows: torch's allocator on Windows; the driver's own (of pinned
# memory, of kernels that load late); workspaces of cuBLAS, cuSOLVER, cuDNN and their like; XPU's.
_TEXTS = (
    "DefaultCPUAllocator: not enough memory",
    "error: out of memory",
    "_STATUS_ALLOC_FAILED",
    "OUT_OF_DEVICE_MEMORY",
    "OUT_OF_HOST_MEMORY",
    "OUT_OF_RESOURCES",
)
_WHAT_TO_TRY = (
    "close other programs, lower --max-gpu-mem or --max-cpu-mem below what is really free, use "
    "shorter windows (--window) or fewer of them (--windows)"
)


class MicroBatches:
    """How many windows are computed together; fewer after memory has run out.

    Attributes:
        planned: windows of a micro-batch as planned.
        size: as it is now.

    Args:
        size: windows of a micro-batch.
        unit: what is counted, for notes and errors.
        what: what is halved, for notes and errors.
        progress: told of each halving.
    """

    def __init__(
        self,
        size: int,
        *,
        unit: str = "windows",
        what: str = "micro-batch",
        progress: Progress | None = None,
    ) -> None:
        self.planned = self.size = size
        self._unit, self._what, self._progress = unit, what, progress or Silent()

    def run(
        self,
        count: int,
        body: Callable[[slice], None],
        *,
        weight: int = 1,
        most: int | None = None,
    ) -> None:
        """Call ``body`` for every item once, in slices of at most ``size``, in order.

        When memory runs out inside ``body`` the size halves and the same items are tried again,
        so ``body`` must change nothing before everything that it allocates is there. It may hand
        its results to a further ``run`` of their own, as its last step: that one never passes its
        own lack of memory on.

        Args:
            count: of items.
            body: is given some of them.
            weight: an item counts as so many units (a window as its tokens).
            most: units of a slice, where fewer than planned are faster; one item at least.

        Raises:
            BudgetError: memory ran out with a single item.
        """
        done = 0
        while done < count:
            size = self.size if most is None else min(self.size, most)
            items = slice(done, min(done + max(1, size // weight), count))
            failed = False
            try:
                body(items)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                if items.stop - items.start == 1:
                    raise self._refusal(error, weight) from error
                failed = True
            # Outside the except block: the error holds the frames, and these the activations.
            if failed:
                self._halve(items.stop - items.start, weight)
            else:
                done = items.stop

    def _halve(self, items: int, weight: int) -> None:
        from accelerate.utils.memory import clear_device_cache

        self.size = items // 2 * weight
        clear_device_cache(garbage_collection=True)
        self._progress.note(
            f"memory ran out with {items * weight} {self._unit} in a {self._what}; going on with "
            f"{self.size}"
        )

    def _refusal(self, error: Exception, weight: int) -> BudgetError:
        first = str(error).partition("\n")[0]
        unit = self._unit if weight > 1 else self._unit.removesuffix("s")
        return BudgetError(
            f"memory ran out with {weight} {unit} in a {self._what}, the fewest there can "
            f"be ({first}); {_WHAT_TO_TRY}"
        )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a device's or the host's memory ran out."""
    from accelerate.utils.memory import should_reduce_batch_size

    if isinstance(error, MemoryError):  # numpy's and Python's own, which accelerate does not know
        return True
    if not isinstance(error, RuntimeError):
        return False
    return (
        isinstance(error, torch.OutOfMemoryError)
        or should_reduce_batch_size(error)
        or any(text in str(error) for text in _TEXTS)
    )


@contextmanager
def memory_for(what: str) -> Iterator[None]:
    """Within it, a lack of memory is a user's error: there is nothing to halve.

    Raises:
        BudgetError: memory ran out.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        first = str(error).partition("\n")[0]
        raise BudgetError(f"memory ran out in {what} ({first}); {_WHAT_TO_TRY}") from error
