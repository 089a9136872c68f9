"""Rank 0's side of a search that several ranks share: masks, candidates, written text.

In: the ranks, the state of a round. Out: utilities, losses and tokens, the same to the bit as those
of one rank, in the same order. Decisions, state and output stay with rank 0. What the others do is
in worker.py. Holds a round's masks in the ranks' store while they are evaluated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from frugal_bonsai.bonsai.masks.evaluate import SharePairs
from frugal_bonsai.bonsai.masks.pairs import Pairs
from frugal_bonsai.bonsai.reconstruction.rounds import Measured
from frugal_bonsai.bonsai.state import PruneState, StateFolder
from frugal_bonsai.bonsai.written_text import Texts
from frugal_bonsai.memory.work import texts_at_once
from frugal_bonsai.model.units import KeepMask
from frugal_bonsai.ranks.division import divide
from frugal_bonsai.ranks.files import list_files, send_files
from frugal_bonsai.ranks.group import Group
from frugal_bonsai.ranks.message import Message
from frugal_bonsai.ranks.tasks import Tasks
from frugal_bonsai.stream.engine import Engine
from frugal_bonsai.stream.store import LayerStore

MASKS, CANDIDATES, TEXTS, FILES = "masks", "candidates", "texts", "files"


class SharedSearch:
    """Shares the masks, candidates and written text of a search among ranks.

    Args:
        group: The ranks.
        folder: The run directory with the state.
        engine: Rank 0's device, and the progress, which is told how many ranks share the work.
    """

    def __init__(self, group: Group, folder: StateFolder, engine: Engine) -> None:
        self._tasks, self._folder, self._progress = Tasks(group), folder, engine.progress
        self._group, self._device = group, engine.device
        self._receivers: int | None = None
        self._sent: int | None = None

    @property
    def ranks(self) -> int:
        """Number of ranks."""
        return self._group.launch.ranks

    def pairs_of(self, state: PruneState, number: int, store: LayerStore) -> SharePairs:
        """Return the function that shares the pairs of round ``number``."""

        def share(
            pairs: Pairs, waves: list[slice], grid: int, work: Callable[[slice], list[float]]
        ) -> Iterator[tuple[list[float], bool]]:
            items = list(divide(waves, grid, self.ranks))
            self._meet(state, number)
            values = self._round(MASKS, state, number) | {
                "store": str(store.folder.resolve()),
                "slices": [[part.start, part.stop] for part in items],
            }
            message = Message(values, pairs.tensors())
            yield from self._tasks.share(message, len(items), lambda item: work(items[item]))

        return share

    def candidates(
        self,
        state: PruneState,
        number: int,
        masks: list[KeepMask],
        work: Callable[[KeepMask], Measured],
    ) -> Iterator[Measured]:
        """Yield the losses of candidates of round ``number`` in order.

        Args:
            state: State before the round.
            number: The round.
            masks: The candidates.
            work: Measures a candidate on this rank.
        """
        self._meet(state, number)
        cuts = torch.stack([mask.keep_N for mask in masks])
        tensors = {"keep": state.mask.keep_N, "cuts": cuts}
        message = Message(self._round(CANDIDATES, state, number), tensors)
        found = self._tasks.share(message, len(masks), lambda item: vars(work(masks[item])))
        for values, _ in found:
            yield Measured(**values)

    def texts(
        self, texts: Texts, work: Callable[[slice], list[list[int]]]
    ) -> Iterator[list[list[int]]]:
        """Yield the tokens of texts that the dense model writes, in order."""
        self._assign()
        grid = texts_at_once(self._device.type, texts.together)
        items = list(divide(texts.batches, grid, self.ranks))
        slices = [[part.start, part.stop] for part in items]
        values = {"kind": TEXTS, "slices": slices, "window": texts.window}
        tensors = {"prompts": texts.prompts_tP, "draws": texts.draws_tS}
        found = self._tasks.share(Message(values, tensors), len(items), lambda i: work(items[i]))
        for tokens, _ in found:
            yield tokens

    def _round(self, kind: str, state: PruneState, number: int) -> dict[str, Any]:
        return {"kind": kind, "number": number, "refitted": state.refit_mask is not None}

    def _meet(self, state: PruneState, number: int) -> None:
        """Wait for all ranks, and send a round's files to hosts that do not see the run directory.

        Raises:
            RankError: A rank failed, or has not come.
        """
        self._assign()
        if not self._receivers or self._sent == number:
            return
        folder = self._folder.round_folder(number - 1)
        files = list_files(folder)
        values = self._round(FILES, state, number) | {"files": files}
        with self._tasks.posted(Message(values)) as task:
            send_files(self._group, task, folder, files, self._receivers)
        self._sent = number

    def _assign(self) -> None:
        """Wait for all ranks and say which rank of each host builds its store, once."""
        if self._receivers is not None:
            return
        group, hosts = self._group, dict[str, list[int]]()
        receives, own = set(), group.launch.host
        for rank in group.workers:
            group.wait(f"rank/{rank}", f"rank {rank} has not come")
            values = Message.from_bytes(group.get(f"ready/{rank}")).values
            if values["host"] != own or not values["visible"]:
                hosts.setdefault(values["host"], []).append(rank)
                if not values["visible"]:
                    receives.add(values["host"])
        leaders = {rank: min(ranks) for ranks in hosts.values() for rank in ranks}
        receivers = [min(hosts[host]) for host in receives]
        group.put("hosts", Message({"leaders": leaders, "receivers": receivers}).to_bytes())
        count = len(hosts.keys() | {own})
        self._progress.note(
            f"{group.launch.ranks} ranks on {count} host{'s' * (count > 1)} share masks, "
            f"candidates and written text"
        )
        self._receivers = len(receivers)
