"""A round's masked evaluation, batch after batch on the same windows.

In: designs. Out: observations against the same windows without a mask, which are evaluated once.
Counts the tokens that it spends against those of the whole budget. Holds what a sweep holds.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from frugal_bonsai.bonsai.importance.imputation import Imputations
from frugal_bonsai.bonsai.masks.design import Design
from frugal_bonsai.bonsai.masks.evaluate import Observations, Utility, evaluate_masks
from frugal_bonsai.bonsai.settings import PruneSettings
from frugal_bonsai.stream.engine import Engine
from frugal_bonsai.stream.head import Head
from frugal_bonsai.stream.store import LayerStore


class RoundMasks:
    """Evaluates the batches of one round.

    Args:
        engine: device, sweep, head.
        store: the working store.
        head: gives the head in the arithmetic of masked evaluation, when it is needed.
        settings: of the prune.
        windows_NS: calibration windows; the round's own are drawn from them with the first batch.
        generator: of the round.
        stand_ins: of the round's pools; None puts zeros in the place of units that are off.
        utility: a user's own.
    """

    def __init__(
        self,
        engine: Engine,
        store: LayerStore,
        head: Callable[[], Head],
        settings: PruneSettings,
        windows_NS: torch.Tensor,
        generator: torch.Generator,
        *,
        stand_ins: Imputations | None,
        utility: Utility | None,
    ) -> None:
        self._engine, self._store, self._head = engine, store, head
        self._settings, self._windows_NS, self._generator = settings, windows_NS, generator
        self._stand_ins, self._utility = stand_ins, utility
        self._mine_WS: torch.Tensor | None = None
        self._base_W: torch.Tensor | None = None
        self._done = 0

    @property
    def _shared(self) -> bool:
        return self._settings.design == "shared"

    @property
    def windows(self) -> int:
        """Windows that have masks of their own."""
        return 1 if self._shared else self._count

    @property
    def _count(self) -> int:
        return min(self._settings.mask_windows, len(self._windows_NS))

    @property
    def tokens(self) -> int:
        """Forward tokens spent, the unmasked windows included."""
        return self._tokens(self._done)

    @property
    def budget_tokens(self) -> int:
        """What all masks would have cost; nothing where none were asked for."""
        return self._tokens(self._settings.masks) if self._done else 0

    def _tokens(self, masks: int) -> int:
        return (masks + 1) * self._count * self._windows_NS.shape[1] if masks else 0

    def evaluate(self, design: Design, masks: int) -> Observations:
        """A design with ``masks`` masks on every window.

        Raises:
            OptionError: the user's own utility is no finite number.
        """
        settings = self._settings
        if self._mine_WS is None:
            chosen = torch.randperm(len(self._windows_NS), generator=self._generator)[: self._count]
            self._mine_WS = self._windows_NS[chosen.sort().values]
        with self._engine.evaluation_stream(self._store) as stream:
            seen = evaluate_masks(
                self._engine,
                stream,
                self._head(),
                design,
                masks,
                self._mine_WS,
                shared=self._shared,
                perplexity=settings.utility == "perplexity",
                utility=self._utility,
                stand_ins=self._stand_ins,
                base_W=self._base_W,
                first=self._done * self.windows,
                most=settings.masks * self.windows,
            )
        self._base_W = seen.base_W
        self._done += masks
        return seen
