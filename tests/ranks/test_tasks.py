"""A task is shared item by item, and leaves nothing in the store."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import pytest
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from frugal_bonsai.errors import RankError
from frugal_bonsai.ranks.group import Group
from frugal_bonsai.ranks.launch import launched
from frugal_bonsai.ranks.message import Message
from frugal_bonsai.ranks.tasks import Tasks, Work


class Doubler:
    """Doubles an item; prepares and opens once a task."""

    def __init__(self) -> None:
        self.prepared: list[str] = []
        self.opened = 0
        self.done: list[int] = []

    def prepare(self, message: Message, task: str) -> None:
        self.prepared.append(task)

    @contextmanager
    def open(self, message: Message) -> Iterator[Work]:
        self.opened += 1
        yield lambda item: self.done.append(item) or [item * message.values["factor"]]


@pytest.fixture
def groups() -> list[Group]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    found = []
    for rank in range(3):
        store = TCPStore("127.0.0.1", port, 3, rank == 0, timedelta(seconds=20), False)
        launch = launched({"RANK": str(rank), "WORLD_SIZE": "3"})
        assert launch is not None
        found.append(Group(launch, store))
    return found


def test_results_come_in_order_and_nothing_stays(groups: list[Group]) -> None:
    handlers = [Doubler(), Doubler()]

    def serve(group: Group, handler: Doubler) -> None:
        with pytest.raises(RankError, match="rank 0 ended the run"):
            Tasks(group).serve(handler)

    threads = [
        threading.Thread(target=serve, args=pair) for pair in zip(groups[1:], handlers, strict=True)
    ]
    for thread in threads:
        thread.start()
    tasks, keys = Tasks(groups[0]), groups[0]._store.num_keys()
    own: list[int] = []
    for factor, items in ((2, 20), (3, 1), (5, 0)):
        work = lambda item, factor=factor: own.append(item) or [item * factor]  # noqa: E731
        shared = list(tasks.share(Message({"factor": factor}), items, work))
        assert [values for values, _ in shared] == [[item * factor] for item in range(items)]
        assert groups[0]._store.num_keys() == keys
    for group in groups[1:]:
        group.ended = True
    for thread in threads:
        thread.join(timeout=10)
        assert not thread.is_alive()
    everywhere = [*own, *handlers[0].done, *handlers[1].done]
    assert sorted(everywhere) == sorted([*range(20), 0])
    assert [handler.prepared for handler in handlers] == [["task/0", "task/1", "task/2"]] * 2
