"""The stores of a search: the dense and the working layers, the head, one round's refits.

In: an engine, a run directory. Out: layer stores and a head, built when they are asked for. A
resume builds them again from the checkpoint, the mask and the saved refits. Holds the memory of
building a store; on disk two copies of the layers, and the head's int8 rows, until the search ends.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from frugal_bonsai.bonsai.state import PruneState, StateFolder
from frugal_bonsai.checkpoint.commit import remove_folder
from frugal_bonsai.dtypes import torch_dtype
from frugal_bonsai.model.biases import weight_of
from frugal_bonsai.stream.engine import Engine
from frugal_bonsai.stream.head import Head
from frugal_bonsai.stream.store import LayerStore, build_store

DENSE = "dense"
Refits = dict[str, Callable[[], torch.Tensor]]


class Stores:
    """The stores of one search; remove them at its end.

    Args:
        engine: The dense checkpoint, progress.
        folder: The run directory with the refits.
        work: Folder for the stores.
        weights: ``"int8"`` or ``"native"``.
    """

    def __init__(self, engine: Engine, folder: StateFolder, work: Path, weights: str) -> None:
        self._engine, self._folder, self._work, self._weights = engine, folder, work, weights
        self._dense: LayerStore | None = None
        self._working: LayerStore | None = None
        self._head: Head | None = None

    def begin(self, state: PruneState, *, recovery: bool) -> tuple[LayerStore | None, LayerStore]:
        """Write the stores that the next round reads.

        Args:
            state: The state after the last finished round.
            recovery: Rounds reconstruct, for which the dense store is read in every round.

        Returns:
            The dense store, None if no round reads it any more, and the next round's store.
        """
        if not state.rounds:
            store = self.dense()
            return store, store
        dense = self.dense() if recovery else None
        return dense, self.working(state, len(state.rounds))

    def dense(self) -> LayerStore:
        """Write the store of the dense model; NaN and infinity in it are refused."""
        self._dense = build_store(
            self._work / DENSE,
            self._engine.checkpoint,
            self._engine.spec,
            weights=self._weights,
            device=self._engine.device,
            check_finite=True,
            progress=self._engine.progress,
        )
        return self._dense

    def working(self, state: PruneState, number: int) -> LayerStore:
        """Write the store of the alive units with round ``number``'s refits over the last one."""
        if self._working is not None:
            self._working.close()
        self._working = build_store(
            self._work / "working",
            self._engine.checkpoint,
            self._engine.spec,
            weights=self._weights,
            device=self._engine.device,
            mask=state.mask,
            refit=self.refits(state, number),
            progress=self._engine.progress,
        )
        return self._working

    def head(self) -> Head:
        """Return the head of masked evaluation, written at its first use."""
        if self._head is None:
            self._head = self._engine.evaluation_head(self._work / "head")
        return self._head

    def refits(self, state: PruneState, number: int) -> Refits:
        """Return round ``number``'s refits, cut to the state's mask; none before any refit."""
        if state.refit_mask is None:
            return {}
        return self._folder.refits(number, self._engine.spec, state.refit_mask, state.mask)

    def layer_refits(self, number: int, layer: int) -> Refits:
        """Return the readers of the refits of round ``number`` that are saved for one layer."""
        return self._folder.layer_refits(number, layer)

    def saved_dtype(self, name: str) -> torch.dtype:
        """Return the source's dtype, which the rewriter writes; a new bias has its weight's."""
        tensors = self._engine.checkpoint.tensors
        return torch_dtype(tensors[name if name in tensors else weight_of(name)].dtype)

    def save_refit(self, number: int, layer: int | None, weights: dict[str, torch.Tensor]) -> None:
        """Save one layer's refits of round ``number`` (None: the norm) in the source's dtype."""
        dtypes = {name: self.saved_dtype(name) for name in weights}
        self._folder.save_refit(number, layer, weights, dtypes)

    def remove_dense(self) -> None:
        """Remove the dense store: without reconstruction nothing reads it after the first round."""
        if self._dense is not None:
            self._dense.close()
            remove_folder(self._work / DENSE)
            self._dense = None

    def remove(self) -> None:
        """Close and remove all stores, so that the output finds their room."""
        for store in (self._dense, self._working):
            if store is not None:
                store.close()
        self._dense = self._working = self._head = None
        remove_folder(self._work)
