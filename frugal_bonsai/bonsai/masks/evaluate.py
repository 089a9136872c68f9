"""Masked evaluation: one utility a (mask, window) pair.

In: a design, windows, the working store. Out: how much worse each masked sub-model is than the
unmasked one on the same window (its control variate). Holds what the sweep holds; with a custom
utility also one window's logits.

Shape suffixes: M masks, W mask windows, I pairs, S tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from frugal_bonsai.bonsai.importance.imputation import Imputations
from frugal_bonsai.bonsai.masks.design import Design
from frugal_bonsai.errors import OptionError
from frugal_bonsai.model.units import UnitGroup
from frugal_bonsai.stream.engine import Engine
from frugal_bonsai.stream.forward import Masker
from frugal_bonsai.stream.head import Head
from frugal_bonsai.stream.hidden import HiddenStates
from frugal_bonsai.stream.layers import LayerStream

# (logits fp32 [S, V], tokens int64 [S]) -> a number, higher is better; need not be differentiable.
Utility = Callable[[torch.Tensor, torch.Tensor], float]


@dataclass(frozen=True, kw_only=True)
class Observations:
    """What the regression explains.

    Attributes:
        masks_I: int64, the mask of each observation.
        clusters_I: int64, observations that share a fold (a mask and its complement on a window).
        windows_I: int64, the window of each observation; all 0 where each is over all windows.
        loss_I: float64, utility without a mask minus utility with it.
        base_W: utility of each window without a mask; of all of them where that is one number.
    """

    masks_I: torch.Tensor
    clusters_I: torch.Tensor
    windows_I: torch.Tensor
    loss_I: torch.Tensor
    base_W: torch.Tensor

    @property
    def base(self) -> float:
        """Mean utility without a mask."""
        return float(self.base_W.mean())


class DesignMasker:
    """Gives a sweep the masks of its (mask, window) pairs; a ``forward.Masker``."""

    def __init__(
        self, design: Design, masks_I: torch.Tensor, stand_ins: Imputations | None = None
    ) -> None:
        self._design, self._masks_I, self._stand_ins = design, masks_I, stand_ins

    def columns(self, group: UnitGroup, items: slice) -> torch.Tensor | None:
        """Bool ``[B, C]`` over the alive columns of a group."""
        keep_BA = self._design.keep(group, self._masks_I[items])
        return keep_BA.repeat_interleave(group.columns_per_unit, dim=1)

    def impute(
        self, group: UnitGroup, input_BSC: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """What takes the place of columns that are off; None where zeros do."""
        return None if self._stand_ins is None else self._stand_ins.of(group, input_BSC)


class _WithUnmasked:
    """A design's masks for the first pairs, no mask for the windows behind them."""

    def __init__(self, masker: Masker, masked: int) -> None:
        self._masker, self._masked = masker, masked

    def columns(self, group: UnitGroup, items: slice) -> torch.Tensor | None:
        inside = slice(items.start, min(items.stop, self._masked))
        if inside.start >= inside.stop:
            return None
        keep_BC = self._masker.columns(group, inside)
        extra = items.stop - inside.stop
        if keep_BC is None or not extra:
            return keep_BC
        return torch.cat([keep_BC, keep_BC.new_ones(extra, keep_BC.shape[1])])

    def impute(
        self, group: UnitGroup, input_BSC: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        return self._masker.impute(group, input_BSC)


def evaluate_masks(
    engine: Engine,
    stream: LayerStream,
    head: Head,
    design: Design,
    masks: int,
    windows_WS: torch.Tensor,
    *,
    shared: bool,
    perplexity: bool,
    utility: Utility | None = None,
    stand_ins: Imputations | None = None,
    base_W: torch.Tensor | None = None,
    first: int = 0,
    most: int | None = None,
) -> Observations:
    """Evaluate a design.

    Args:
        engine: device, sweep, head.
        stream: the working store.
        head: in the stream's arithmetic.
        design: with ``masks`` masks, or ``masks * W`` when they are not shared by the windows.
        masks: masks on each window.
        windows_WS: the mask windows.
        shared: every mask runs on every window and gives one observation.
        perplexity: utility is -perplexity instead of -mean NLL.
        utility: a user's own, instead of both.
        stand_ins: of the design's pools; None puts zeros in the place of units that are off.
        base_W: what an earlier design on the same windows has measured without a mask; None
            measures it beside the masks.
        first: masks that have been evaluated before these, for progress.
        most: masks that may be evaluated in all, for progress.

    Raises:
        OptionError: the user's own utility is no finite number.
    """
    windows = len(windows_WS)
    pairs = torch.arange(masks * windows)
    if shared:
        masks_I, where_I = pairs // windows, pairs % windows
    else:
        # Masks 2k and 2k+1 are complements and share a window.
        masks_I, where_I = pairs, pairs // 2 % windows
    masker: Masker = DesignMasker(design, masks_I, stand_ins)
    tokens_IS = windows_WS[where_I]
    if base_W is None:
        tokens_IS = torch.cat([tokens_IS, windows_WS])
        masker = _WithUnmasked(masker, len(pairs))
    each = windows if shared else 1
    ended = first + len(pairs) // each

    def name(wave: slice) -> str:
        last = min(first - (-wave.stop // each), ended)
        begun = min(first + wave.start // each + 1, last)
        return f"masked evaluation, masks {begun:,}-{last:,} of {most or ended:,}"

    scores_I = _scores(engine, stream, head, tokens_IS, masker, utility, name)
    perplexity = perplexity and utility is None
    seen_MW = scores_I[: len(pairs)].view(-1, windows if shared else 1)
    masked_M = _mean_utility(seen_MW, perplexity=perplexity)
    if base_W is None:
        own_W = scores_I[len(pairs) :]
        base_W = _mean_utility(own_W[None] if shared else own_W[:, None], perplexity=perplexity)
    if shared:
        masks_I = torch.arange(masks)
        where_I = torch.zeros_like(masks_I)
    return Observations(
        masks_I=masks_I,
        clusters_I=masks_I // 2,
        windows_I=where_I,
        loss_I=base_W[where_I] - masked_M,
        base_W=base_W,
    )


def _mean_utility(scores_MW: torch.Tensor, *, perplexity: bool) -> torch.Tensor:
    mean_M = scores_MW.mean(1)
    return -(-mean_M).exp() if perplexity else mean_M


def _scores(
    engine: Engine,
    stream: LayerStream,
    head: Head,
    tokens_IS: torch.Tensor,
    masker: Masker,
    utility: Utility | None,
    name: Callable[[slice], str],
) -> torch.Tensor:
    """Utility of each pair, float64 ``[I]``: -mean NLL, or the user's own."""
    if utility is None:
        losses_IS = engine.sweep.losses(stream, head, tokens_IS, masker=masker, name=name)
        return -losses_IS.double().mean(1)
    scores: list[float] = []
    for wave, hidden in engine.sweep.hidden_waves(stream, tokens_IS, masker=masker, name=name):
        scores += window_utilities(head, hidden, tokens_IS[wave], utility)
        del hidden  # not held while the next wave runs
    return torch.tensor(scores, dtype=torch.float64)


def window_utilities(
    head: Head, hidden: HiddenStates, tokens_NS: torch.Tensor, utility: Utility, *, first: int = 0
) -> list[float]:
    """A user's utility of each window from the first one on.

    Args:
        head: gives the logits.
        hidden: behind the last layer, before the norm.
        tokens_NS: the windows.
        utility: the user's.
        first: the windows before this one are left out.

    Raises:
        OptionError: it is no finite number.
    """
    scores: list[float] = []
    with torch.inference_mode():
        for item in range(first, len(tokens_NS)):
            logits_SV = head.logits(hidden.read(slice(item, item + 1)))[0]
            score = float(utility(logits_SV, tokens_NS[item]))
            if not math.isfinite(score):
                raise OptionError(
                    f"utility: returned {score} for a pruned model, expected a finite number, "
                    "higher is better; return a very low one where it is undefined"
                )
            scores.append(score)
    return scores
