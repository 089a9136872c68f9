"""Micro-batches that halve when memory runs out, inside a layer, so that no sweep starts again.

In: a number of windows, and a function of some of them. Out: the function was called for all
windows, each exactly once. Holds two numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

from frugal_bonsai.errors import BudgetError
from frugal_bonsai.progress import Progress, Silent

# Error texts that accelerate does not know: torch's allocator on Windows; the driver (pinned
# memory, kernels that load late); workspaces of cuBLAS, cuSOLVER, cuDNN and similar libraries; XPU.
_TEXTS = (
    "DefaultCPUAllocator: not enough memory",
    "error: out of memory",
    "_STATUS_ALLOC_FAILED",
    "OUT_OF_DEVICE_MEMORY",
    "OUT_OF_HOST_MEMORY",
    "OUT_OF_RESOURCES",
)
_WHAT_TO_TRY = (
    "close other programs, lower --max-gpu-mem or --max-cpu-mem below the free memory, use "
    "shorter windows (--window) or fewer of them (--windows)"
)


class MicroBatches:
    """Number of windows that are computed together; it halves when memory runs out.

    Attributes:
        planned: planned number of windows in a micro-batch.
        size: present number.

    Args:
        size: planned number of windows.
        unit: name of the counted items, for notes and errors.
        what: name of the micro-batch, for notes and errors.
        progress: receives a note of each halving.
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

        When memory runs out inside ``body`` the size halves and the same items are tried again, so
        ``body`` must allocate all that it needs before it changes anything. As its last step it may
        pass its results to another ``run``, which never raises its own lack of memory.

        Args:
            count: number of items.
            body: called with a slice of them.
            weight: number of units that an item counts as, such as the tokens of a window.
            most: maximum number of units in a slice, where fewer than planned are faster; a slice
                has at least one item.

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
            f"memory ran out with {weight} {unit} in a {self._what}, the smallest possible number "
            f"({first}); {_WHAT_TO_TRY}"
        )


def is_out_of_memory(error: BaseException) -> bool:
    """Return True for an error by which a device or the host reports a lack of memory."""
    if isinstance(error, MemoryError):  # raised by numpy and Python; accelerate does not know it
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
    """Within the context, turn a lack of memory into a user's error: there is nothing to halve.

    Args:
        what: name of the memory's purpose, for the error.

    Raises:
        BudgetError: memory ran out.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise BudgetError(out_of_memory_text(error, what)) from error


def out_of_memory_text(error: BaseException, what: str = "") -> str:
    """Return the error text of a lack of memory: where, what the system said, what to try."""
    first = str(error).partition("\n")[0] or type(error).__name__
    where = f" in {what}" if what else ""
    return f"memory ran out{where} ({first}); {_WHAT_TO_TRY}"
