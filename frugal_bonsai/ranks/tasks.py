"""Tasks that ranks share: a list of items, taken one by one from a counter.

In: a message that says what to do, a number of items, a function for one item. Out: the results in
the order of the items, on rank 0. A quick rank takes more items than a slow one. Rank 0 takes
items too. The store holds one task at a time.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

from frugal_bonsai.ranks.group import Group
from frugal_bonsai.ranks.message import Message

Work = Callable[[int], Any]


class Handler(Protocol):
    """What a worker does with a task."""

    def prepare(self, message: Message, task: str) -> None:
        """Make ready for the items; called on every worker, also on one that gets none."""

    def open(self, message: Message) -> AbstractContextManager[Work]:
        """Return the function that turns an item into a result that JSON can hold."""


class Tasks:
    """The tasks of a run, numbered from 0, as a rank sees them.

    Args:
        group: The ranks.
    """

    def __init__(self, group: Group) -> None:
        self.group, self._number = group, 0

    @contextmanager
    def posted(self, message: Message, items: int = 0) -> Iterator[str]:
        """Post a task as rank 0; at the end wait until all workers have done with it.

        Args:
            message: What to do.
            items: Number of items.

        Yields:
            The key of the task.

        Raises:
            RankError: A rank failed.
        """
        task = self._next()
        self.group.put(
            task, Message({**message.values, "items": items}, message.tensors).to_bytes()
        )
        yield task
        self.group.wait_count(f"{task}/left", len(self.group.workers))
        self.group.remove(task)
        for name in ("taken", "left"):
            self.group.forget(f"{task}/{name}")

    def share(self, message: Message, items: int, work: Work) -> Iterator[tuple[Any, bool]]:
        """Share a task as rank 0: yield each item's result in order, and whether it is its own.

        Args:
            message: What to do.
            items: Number of items.
            work: Does one item on this rank.

        Raises:
            RankError: A rank failed.
        """
        own: dict[int, Any] = {}
        done, taken = 0, 0
        with self.posted(message, items) as task:
            while done < items:
                if taken < items:
                    taken = self._take(task)
                    if taken < items:
                        own[taken] = work(taken)
                    self.group.check()
                while done < items:
                    if done in own:
                        yield own.pop(done), True
                    elif taken >= items or self.group.has(f"{task}/{done}"):
                        yield json.loads(self.group.get(f"{task}/{done}")), False
                        self.group.remove(f"{task}/{done}")
                    else:
                        break
                    done += 1

    def serve(self, handler: Handler) -> None:
        """Work as a worker on the tasks that rank 0 posts, one after the other; returns never.

        Raises:
            RankError: Rank 0 ended the run, or a rank failed.
        """
        while True:
            task = self._next()
            message = Message.from_bytes(self.group.get(task))
            handler.prepare(message, task)
            items = message.values["items"]
            item = self._take(task) if items else 0
            if item < items:
                with handler.open(message) as work:
                    while item < items:
                        self.group.put(f"{task}/{item}", json.dumps(work(item)).encode())
                        item = self._take(task)
            self.group.count(f"{task}/left")

    def _next(self) -> str:
        self._number += 1
        return f"task/{self._number - 1}"

    def _take(self, task: str) -> int:
        """Return the number of an item that nobody else takes; too large if there is none left."""
        return self.group.count(f"{task}/taken") - 1
