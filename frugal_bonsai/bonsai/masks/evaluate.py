"""Masked evaluation: one utility per (mask, window) pair.

In: designs, calibration windows, the working store. Out: the loss increase of each masked sub-model
over the unmasked one on the same window (its control variate). The windows of a round and their
unmasked utilities are shared by all of its batches. The utilities of each finished wave go to the
round's log, which a resumed run reads instead of evaluating the same pairs again. Holds the memory
of a sweep; with a user's utility also the logits of one window.

Shape suffixes: M masks, N calibration windows, W mask windows, I (mask, window) pairs, B pairs of a
micro-batch, C columns, S tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from frugal_bonsai.bonsai.importance.imputation import Imputations
from frugal_bonsai.bonsai.masks.design import Design
from frugal_bonsai.bonsai.round_log import RoundLog
from frugal_bonsai.bonsai.settings import PruneSettings
from frugal_bonsai.bonsai.state import fingerprint
from frugal_bonsai.errors import OptionError
from frugal_bonsai.model.units import UnitGroup
from frugal_bonsai.stream.engine import Engine
from frugal_bonsai.stream.head import Head
from frugal_bonsai.stream.hidden import HiddenStates
from frugal_bonsai.stream.micro_batch import is_out_of_memory
from frugal_bonsai.stream.source import LayerSource

# (logits fp32 [S, V], tokens int64 [S]) -> a number, higher is better; need not be differentiable.
Utility = Callable[[torch.Tensor, torch.Tensor], float]


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


class DesignMasker:
    """Gives a sweep the masks of its pairs; a ``taps.Masker``.

    Args:
        design: The masks.
        masks_I: The mask of each pair. Items behind the last pair are windows without a mask.
        imputations: Imputed values for the columns that are off; None puts zeros there.
    """

    def __init__(
        self, design: Design, masks_I: torch.Tensor, imputations: Imputations | None = None
    ) -> None:
        self._design, self._masks_I, self._imputations = design, masks_I, imputations

    def columns(self, group: UnitGroup, items: slice) -> torch.Tensor | None:
        """Return the alive columns of a group that each item keeps, bool ``[B, C]``; None: all."""
        masks_B = self._masks_I[items]
        if not len(masks_B):
            return None
        keep_BA = self._design.keep(group, masks_B)
        unmasked = items.stop - items.start - len(masks_B)
        keep_BA = torch.cat([keep_BA, keep_BA.new_ones(unmasked, keep_BA.shape[1])])
        return keep_BA.repeat_interleave(group.columns_per_unit, dim=1)

    def impute(
        self, group: UnitGroup, input_BSC: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Return columns and their imputed values ``[B, S, P]``; None imputes zeros."""
        return None if self._imputations is None else self._imputations.of(group, input_BSC)


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
    ) -> None:
        self._log = log or RoundLog()
        self._engine, self._store, self._head = engine, store, head
        self._settings, self._windows_NS, self.generator = settings, windows_NS, generator
        self._imputations, self._utility = imputations, utility
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
        mine_WS = self._round_windows()
        tokens_IS = mine_WS[where_I]
        if self._base_W is None:
            tokens_IS = torch.cat([tokens_IS, mine_WS])
        utility_I = self._utilities(design, masks_I, tokens_IS)
        if self._base_W is None:
            self._base_W = self._means(utility_I[len(pairs) :])
        masked_M = self._means(utility_I[: len(pairs)])
        self._done += masks
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

    def _utilities(
        self, design: Design, masks_I: torch.Tensor, tokens_IS: torch.Tensor
    ) -> torch.Tensor:
        """Return the utility of each pair, float64 ``[I]``: -mean NLL, or the user's own."""
        key, window = _key(design, masks_I, tokens_IS), tokens_IS.shape[1]
        logged = self._log.find(key)
        found, sweep = logged.values, self._engine.sweep
        sweep.forward_tokens += logged.tokens
        if len(found) < len(tokens_IS):
            masker = DesignMasker(design, masks_I, self._imputations)
            head, name = self._head(), self._progress_name(len(masks_I))
            with self._engine.evaluation_stream(self._store) as stream:
                for wave, hidden in sweep.hidden_waves(
                    stream, tokens_IS, masker=masker, name=name, then=head.to_read, first=len(found)
                ):
                    mine = self._wave_utilities(head, hidden, tokens_IS[wave])
                    del hidden  # frees it before the next wave runs
                    self._log.append(key, mine, len(mine) * window)
                    found += mine
        return torch.tensor(found, dtype=torch.float64)

    def _wave_utilities(
        self, head: Head, hidden: HiddenStates, tokens_NS: torch.Tensor
    ) -> list[float]:
        if self._utility is not None:
            return window_utilities(head, hidden, tokens_NS, self._utility)
        with torch.inference_mode():
            utility_N = -head.nll(hidden, tokens_NS).double().mean(1)
        return [float(utility) for utility in utility_N]

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


def _key(design: Design, masks_I: torch.Tensor, tokens_IS: torch.Tensor) -> str:
    """Return the key of these masks on these windows in the round's log."""
    pools = design.pools
    parts = (pools.mask.keep_N, *pools.members, design.rows(masks_I), tokens_IS)
    return fingerprint(*(part.contiguous().numpy().tobytes() for part in parts))


def window_utilities(
    head: Head, hidden: HiddenStates, tokens_NS: torch.Tensor, utility: Utility, *, first: int = 0
) -> list[float]:
    """Return a user's utility of each window from ``first`` on.

    Args:
        head: Gives the logits.
        hidden: Hidden states behind the last layer, before the norm.
        tokens_NS: The windows.
        utility: The user's utility.
        first: Windows before this one are left out.

    Raises:
        OptionError: The utility raised an exception or returned no finite number.
    """
    found: list[float] = []
    with torch.inference_mode():
        for item in range(first, len(tokens_NS)):
            logits_SV = head.logits(hidden.read(slice(item, item + 1)))[0]
            found.append(_utility_of(utility, logits_SV, tokens_NS[item]))
    return found


def _utility_of(utility: Utility, logits_SV: torch.Tensor, tokens_S: torch.Tensor) -> float:
    """Return a user's utility of one window, as a finite number.

    Raises:
        OptionError: The utility raised an exception, or returned something else. Out of memory is
            raised as it is, because the sweep answers it with smaller micro-batches.
    """
    first = ", ".join(str(int(token)) for token in tokens_S[:8])
    where = f"utility {utility_name(utility)}, window that begins with tokens {first}"
    try:
        value = float(utility(logits_SV, tokens_S))
    except Exception as error:  # whatever a user's function raises
        if isinstance(error, MemoryError | RuntimeError) and is_out_of_memory(error):
            raise
        raise OptionError(
            f"{where}: raised {type(error).__name__}: {error}; it is called with logits "
            f"{tuple(logits_SV.shape)} and tokens {tuple(tokens_S.shape)} and returns a number"
        ) from error
    if not math.isfinite(value):
        raise OptionError(
            f"{where}: returned {value} for a pruned model, expected a finite number (higher is "
            "better); return a very low number where it is undefined"
        )
    return value


def utility_name(utility: Utility) -> str:
    """Return the name of a user's utility for errors, state, card and report."""
    return str(getattr(utility, "__qualname__", type(utility).__qualname__))
