"""What a worker does in a search that several ranks share: masks, candidates, text.

In: rank 0's tasks (shared.py), an engine of the same model within rank 0's limits. Out: utilities
and losses. On rank 0's host the worker reads rank 0's stores and round folder. On another host one
rank, the leader, builds the stores once for all ranks there. Holds the memory of a sweep or of a
candidate's reconstruction; on disk a store of the candidate, and a leader's stores and copies.

Shape suffixes: N windows or units, S tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from frugal_bonsai.bonsai.calibration import RoundWindows
from frugal_bonsai.bonsai.masks.pairs import Pairs, PairSweep, Utility
from frugal_bonsai.bonsai.reconstruction.rounds import RoundReconstruction
from frugal_bonsai.bonsai.round_importance import round_imputations
from frugal_bonsai.bonsai.round_log import RoundLog
from frugal_bonsai.bonsai.settings import PruneSettings
from frugal_bonsai.bonsai.shared import CANDIDATES, FILES, MASKS, TEXTS
from frugal_bonsai.bonsai.state import PruneState, StateFolder
from frugal_bonsai.bonsai.stores import DENSE, Stores
from frugal_bonsai.bonsai.written_text import Texts
from frugal_bonsai.checkpoint.commit import remove_folder
from frugal_bonsai.model.units import KeepMask, UnitTable
from frugal_bonsai.ranks.files import receive_files
from frugal_bonsai.ranks.group import Group
from frugal_bonsai.ranks.message import Message
from frugal_bonsai.ranks.tasks import Work
from frugal_bonsai.stream.engine import Engine
from frugal_bonsai.stream.head import Head
from frugal_bonsai.stream.store import LayerStore


@dataclass(frozen=True, kw_only=True)
class Places:
    """Folders of a worker.

    Attributes:
        run: Run directory: rank 0's, where it is visible.
        store: Folder of rank 0's stores. None on another host.
        own: Folder that this worker may fill, named ``rank-N``. It is removed at the end.
    """

    run: Path
    store: Path | None
    own: Path


class SearchWorker:
    """Evaluates masks and candidates for rank 0; a ``tasks.Handler``.

    Args:
        group: The ranks.
        engine: Device, sweeps, the dense checkpoint, within rank 0's limits.
        settings: Settings of the prune.
        windows_NS: Rank 0's calibration windows.
        places: Folders.
        imputes: Masks impute values.
        keep_inputs: Reconstruction may hold a layer's inputs (from rank 0's plan).
        utility: The user's own utility.
    """

    def __init__(
        self,
        group: Group,
        engine: Engine,
        settings: PruneSettings,
        windows_NS: torch.Tensor,
        places: Places,
        *,
        imputes: bool,
        keep_inputs: bool,
        utility: Utility | None,
    ) -> None:
        self._group, self._engine, self._settings = group, engine, settings
        self._places, self._imputes, self._utility = places, imputes, utility
        columns = max(g.columns for g in engine.spec.table.groups)
        self._windows = RoundWindows(windows_NS, settings, columns)
        self._keep_inputs = keep_inputs
        self._head: Head | None = None
        self._host: _HostStores | None = None

    def prepare(self, message: Message, task: str) -> None:
        """On another host, receive a round's files or have its stores built."""
        if self._places.store is not None:
            return
        if self._host is None:
            self._host = _HostStores(self._group, self._engine, self._settings, self._places)
        if message.values["kind"] == FILES:
            self._host.receive(message, task)
        else:
            self._host.build(message)

    @contextmanager
    def open(self, message: Message) -> Iterator[Work]:
        """Open what a task's items need."""
        opened = {MASKS: self._masks, CANDIDATES: self._candidates, TEXTS: self._texts}
        with opened[message.values["kind"]](message) as work:
            yield work

    @contextmanager
    def _masks(self, message: Message) -> Iterator[Work]:
        engine, values = self._engine, message.values
        folder, number = self._state_folder(), values["number"]
        store = LayerStore(self._stores() / Path(values["store"]).name, engine.spec.layers)
        pairs = Pairs.of(engine.spec.table, message.tensors)
        try:
            with PairSweep(
                engine,
                store,
                self._evaluation_head(),
                pairs,
                imputations=round_imputations(engine, folder, number) if self._imputes else None,
                utility=self._utility,
            ) as sweep:
                yield lambda item: sweep.run(slice(*values["slices"][item]), "masks")
        finally:
            store.close()

    @contextmanager
    def _candidates(self, message: Message) -> Iterator[Work]:
        engine, table, number = self._engine, self._engine.spec.table, message.values["number"]
        work = self._places.own / "candidate"
        stores = Stores(engine, self._state_folder(), work, self._settings.weights)
        reconstruction = RoundReconstruction(
            engine=engine,
            settings=self._settings,
            stores=stores,
            windows=self._windows,
            keep_inputs=self._keep_inputs,
            keep_updates=False,
            written_together=1,
            utility=self._utility,
            log=RoundLog(),
        )
        dense, state = (
            LayerStore(self._stores() / DENSE, engine.spec.layers),
            _state(table, message),
        )

        def measure(item: int) -> dict[str, Any]:
            mask = KeepMask(table, message.tensors["cuts"][item])
            return vars(reconstruction.measure_candidate(state, number, dense, mask))

        try:
            yield measure
        finally:
            dense.close()
            stores.remove()

    @contextmanager
    def _texts(self, message: Message) -> Iterator[Work]:
        values, tensors, engine = message.values, message.tensors, self._engine
        texts = Texts(
            prompts_tP=tensors["prompts"],
            draws_tS=tensors["draws"],
            together=len(tensors["draws"]),
            window=values["window"],
        )
        store = LayerStore(self._stores() / DENSE, engine.spec.layers)
        try:
            with engine.stream(store) as stream:
                yield lambda item: texts.write(engine, stream, slice(*values["slices"][item]))
        finally:
            store.close()

    def _stores(self) -> Path:
        if self._places.store is not None:
            return self._places.store
        assert self._host is not None
        return self._host.stores

    def _state_folder(self) -> StateFolder:
        return StateFolder(self._places.run if self._host is None else self._host.state, {})

    def _evaluation_head(self) -> Head:
        if self._head is None:
            self._head = self._engine.evaluation_head(self._stores() / "head", written=True)
        return self._head


class _HostStores:
    """The stores of a host that reads none of rank 0's, built by its leader.

    Attributes:
        stores: Folder of the stores.
        state: Folder with the rounds' refits and imputations.
    """

    def __init__(
        self, group: Group, engine: Engine, settings: PruneSettings, places: Places
    ) -> None:
        self._group, self._engine, self._settings = group, engine, settings
        hosts, rank = Message.from_bytes(group.get("hosts")).values, group.launch.rank
        self._leader = hosts["leaders"][str(rank)]
        receives = self._leader in hosts["receivers"]
        own = places.own.with_name(f"rank-{self._leader}")
        self.stores, self.state = own / "store", own / "state" if receives else places.run
        self._leads, self._receives = self._leader == rank, receives and self._leader == rank
        self._built = Stores(engine, StateFolder(self.state, {}), self.stores, settings.weights)
        self._number = 0

    def receive(self, message: Message, task: str) -> None:
        """Write the files of a round, as the leader of a host that receives them."""
        if self._receives:
            remove_folder(self.state)
            folder = StateFolder(self.state, {}).round_folder(message.values["number"] - 1)
            receive_files(self._group, task, folder, message.values["files"])

    def build(self, message: Message) -> None:
        """Build the stores of a round, or wait until the leader has built them."""
        dense, working = f"dense/{self._leader}", f"working/{self._leader}"
        number = message.values.get("number", 1)  # text is written by the dense model
        if not self._leads:
            self._group.wait_count(dense, 1)
            self._group.wait_count(working, number - 1)
            return
        if not self._number:
            self._built.dense()
            self._built.head()
            self._group.count(dense)
            self._number = 1
        if number > self._number:
            self._built.working(_state(self._engine.spec.table, message), number - 1)
            self._group.count(working, number - self._number)
            self._number = number


def _state(table: UnitTable, message: Message) -> PruneState:
    """Return the state before a round, as far as stores and candidates need it."""
    mask = KeepMask(table, message.tensors["keep"])
    return PruneState(mask=mask, refit_mask=mask if message.values["refitted"] else None)
