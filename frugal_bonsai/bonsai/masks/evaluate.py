"""Masked evaluation: one utility per (mask, window) pair.

In: designs, calibration windows, the working store. Out: the loss increase of each masked sub-model
over the unmasked one on the same window (its control variate). The windows of a round and their
unmasked utilities are shared by all of its batches. The utilities of each finished wave go to the
round's log, which a resumed run reads instead of evaluating the same pairs again. Several ranks
share the pairs. Holds the memory of a sweep.

Shape suffixes: M masks, N calibration windows, W mask windows, I (mask, window) pairs, S tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch

from frugal_bonsai.bonsai.importance.imputation import Imputations
from frugal_bonsai.bonsai.masks.design import Design
from frugal_bonsai.bonsai.masks.pairs import Pairs, PairSweep, Utility
from frugal_bonsai.bonsai.round_log import RoundLog
from frugal_bonsai.bonsai.settings import PruneSettings
from frugal_bonsai.stream.engine import Engine
from frugal_bonsai.stream.head import Head
from frugal_bonsai.stream.source import LayerSource


class SharePairs(Protocol):
    """Shares the pairs of a design among ranks."""

    def __call__(
        self, pairs: Pairs, waves: list[slice], grid: int, work: Callable[[slice], list[float]]
    ) -> Iterator[tuple[list[float], bool]]:
        """Yield the utilities of all waves in order, a slice at a time.

        Args:
            pairs: The pairs.
            waves: Slices of pairs that one rank would evaluate together.
            grid: Multiples of it, from the start of a wave, may divide the wave.
            work: Evaluates a slice on this rank.

        Yields:
            The utilities of the next slice, and whether this rank has evaluated it.
        """


@dataclass(frozen=True, kw_only=True)
class Observations:
    """The losses that a regression explains.

    Attributes:
        masks_I: The mask of each observation, int64.
        clusters_I: Observations of one cluster (a mask and its complement) share a fold, int64.
        loss_I: Utility without a mask minus utility with it, float64.
        base_W: Utility of each window without a mask; ``[1]`` if it is one number for all windows.
    """

    masks_I: torch.Tensor
    clusters_I: torch.Tensor
    loss_I: torch.Tensor
    base_W: torch.Tensor

    @property
    def base(self) -> float:
        """Mean utility without a mask."""
        return float(self.base_W.mean())


class MaskEvaluator:
    """Evaluates the designs of one round, batch after batch, on the same windows.

    Args:
        engine: Device, sweep and arithmetic.
        store: The working store.
        head: Opens the head in the arithmetic of masked evaluation; called when it is needed.
        settings: Settings of the prune.
        windows_NS: Calibration windows; the round's own are drawn from them with the first batch.
        generator: Draws the windows; the masks of the round may come from it, too.
        log: Log of the round; None keeps nothing for a resumed run.
        imputations: Imputed values for units that are off; None puts zeros there.
        utility: The user's own utility; None uses the one of the settings.
        share: Shares the pairs among ranks; None evaluates all of them here.
    """

    def __init__(
        self,
        engine: Engine,
        store: LayerSource,
        head: Callable[[], Head],
        settings: PruneSettings,
        windows_NS: torch.Tensor,
        generator: torch.Generator,
        *,
        log: RoundLog | None = None,
        imputations: Imputations | None = None,
        utility: Utility | None = None,
        share: SharePairs | None = None,
    ) -> None:
        self._log = log or RoundLog()
        self._engine, self._store, self._head = engine, store, head
        self._settings, self._windows_NS, self.generator = settings, windows_NS, generator
        self._imputations, self._utility, self._share = imputations, utility, share
        self._count = min(settings.mask_windows, len(windows_NS))
        self._shared = settings.design == "shared"
        self._mine_WS: torch.Tensor | None = None
        self._base_W: torch.Tensor | None = None
        self._done = 0

    @property
    def windows(self) -> int:
        """Number of windows with masks of their own; 1 if all windows share the masks."""
        return 1 if self._shared else self._count

    @property
    def tokens(self) -> int:
        """Forward tokens spent, those of the unmasked windows included."""
        return self._tokens(self._done)

    @property
    def budget_tokens(self) -> int:
        """Forward tokens that all masks would have cost; 0 if no mask was evaluated."""
        return self._tokens(self._settings.masks) if self._done else 0

    def _tokens(self, masks: int) -> int:
        return (masks + 1) * self._count * self._windows_NS.shape[1] if masks else 0

    def evaluate(self, design: Design, masks: int) -> Observations:
        """Evaluate a design.

        Args:
            design: ``masks`` masks if the windows share them, else ``masks`` per window.
            masks: Number of masks on each window.

        Raises:
            OptionError: The user's utility returned no finite number.
        """
        pairs = torch.arange(masks * self._count)
        if self._shared:
            masks_I, where_I = pairs // self._count, pairs % self._count
        else:
            # Masks 2k and 2k+1 are complements and share a window.
            masks_I, where_I = pairs, pairs // 2 % self._count
        windows_WS = self._round_windows()
        if self._base_W is None:
            where_I = torch.cat([where_I, torch.arange(self._count)])
        utility_I = self._utilities(
            Pairs(design=design, masks_I=masks_I, where_I=where_I, windows_WS=windows_WS)
        )
        if self._base_W is None:
            self._base_W = self._means(utility_I[len(pairs) :])
        masked_M = self._means(utility_I[: len(pairs)])
        self._done += masks
        where_I = where_I[: len(pairs)]
        if self._shared:
            masks_I, where_I = torch.arange(masks), torch.zeros(masks, dtype=torch.int64)
        return Observations(
            masks_I=masks_I,
            clusters_I=masks_I // 2,
            loss_I=self._base_W[where_I] - masked_M,
            base_W=self._base_W,
        )

    def _round_windows(self) -> torch.Tensor:
        if self._mine_WS is None:
            chosen = torch.randperm(len(self._windows_NS), generator=self.generator)[: self._count]
            self._mine_WS = self._windows_NS[chosen.sort().values]
        return self._mine_WS

    def _utilities(self, pairs: Pairs) -> torch.Tensor:
        """Return the utility of each pair, float64 ``[I]``: -mean NLL, or the user's own."""
        key, window = pairs.key, pairs.windows_WS.shape[1]
        logged = self._log.find(key)
        found, sweep = logged.values, self._engine.sweep
        sweep.forward_tokens += logged.tokens
        if len(found) < len(pairs):
            for mine, here in self._evaluated(pairs, list(sweep.waves(len(pairs), len(found)))):
                sweep.forward_tokens += 0 if here else len(mine) * window
                self._log.append(key, mine, len(mine) * window)
                found += mine
        return torch.tensor(found, dtype=torch.float64)

    def _evaluated(self, pairs: Pairs, waves: list[slice]) -> Iterator[tuple[list[float], bool]]:
        """Yield the utilities of slices in order, and whether they were evaluated here."""
        name = self._progress_name(len(pairs.masks_I))
        with PairSweep(
            self._engine,
            self._store,
            self._head(),
            pairs,
            imputations=self._imputations,
            utility=self._utility,
        ) as sweep:

            def work(items: slice) -> list[float]:
                return sweep.run(items, name(items))

            if self._share is not None:
                yield from self._share(pairs, waves, sweep.grid, work)
                return
            for wave in waves:
                yield work(wave), True

    def _means(self, utility_I: torch.Tensor) -> torch.Tensor:
        """Return the utility of each observation; shared masks have one for all windows."""
        mean_M = utility_I.view(-1, self._count if self._shared else 1).mean(1)
        perplexity = self._settings.utility == "perplexity" and self._utility is None
        return -(-mean_M).exp() if perplexity else mean_M

    def _progress_name(self, pairs: int) -> Callable[[slice], str]:
        """Return the name of a wave of pairs, such as "masked evaluation, masks 1-5 of 12"."""
        each = self._count if self._shared else 1
        first = self._done * self.windows
        ended = first + pairs // each
        most = max(self._settings.masks * self.windows, ended)

        def name(wave: slice) -> str:
            last = min(first - (-wave.stop // each), ended)
            begun = min(first + wave.start // each + 1, last)
            return f"masked evaluation, masks {begun:,}-{last:,} of {most:,}"

        return name
