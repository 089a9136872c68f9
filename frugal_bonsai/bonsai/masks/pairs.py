"""(mask, window) pairs and their utilities, a slice of pairs at a time.

In: a design, the mask and the window of each pair, the working store. Out: a utility for each pair,
the same to the bit wherever and with whatever other slices it is evaluated, as long as slices begin
on the grid of :meth:`PairSweep.grid`. Holds the memory of a sweep; with a user's utility also the
logits of one window.

Shape suffixes: I (mask, window) pairs, W mask windows, B pairs of a micro-batch, A alive units of a
group, C columns, P imputed columns, S tokens, V vocabulary, G groups, N units.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from frugal_bonsai.bonsai.fingerprint import fingerprint
from frugal_bonsai.bonsai.importance.imputation import Imputations
from frugal_bonsai.bonsai.masks.design import Design, GroupDesign, Pools, UnitDesign
from frugal_bonsai.errors import OptionError
from frugal_bonsai.model.units import KeepMask, UnitGroup, UnitTable
from frugal_bonsai.stream.engine import Engine
from frugal_bonsai.stream.head import Head
from frugal_bonsai.stream.hidden import HiddenStates
from frugal_bonsai.stream.micro_batch import is_out_of_memory
from frugal_bonsai.stream.source import LayerSource

# (logits fp32 [S, V], tokens int64 [S]) -> a number, higher is better; need not be differentiable.
Utility = Callable[[torch.Tensor, torch.Tensor], float]


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """(mask, window) pairs; those behind the last mask are windows without a mask.

    Attributes:
        design: The masks.
        masks_I: The mask of each pair that has one, int64.
        where_I: The window of each pair, int64.
        windows_WS: The windows, int64.
    """

    design: Design
    masks_I: torch.Tensor
    where_I: torch.Tensor
    windows_WS: torch.Tensor

    def __len__(self) -> int:
        return len(self.where_I)

    @property
    def key(self) -> str:
        """Key of these masks on these windows in the round's log."""
        pools, rows = self.design.pools, self.design.rows(self.masks_I)
        parts = (pools.mask.keep_N, *pools.members, rows, self.windows_WS[self.where_I])
        return fingerprint(*(part.contiguous().numpy().tobytes() for part in parts))

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the pairs as tensors, for :meth:`of`."""
        design, pools = self.design, self.design.pools
        off = design.off_MG if isinstance(design, GroupDesign) else design.off_MK
        return {
            "keep": pools.mask.keep_N,
            "members": torch.cat(pools.members),
            "sizes": pools.sizes_G,
            "off": off,
            "masks": self.masks_I,
            "where": self.where_I,
            "windows": self.windows_WS,
        }

    @classmethod
    def of(cls, table: UnitTable, tensors: dict[str, torch.Tensor]) -> Pairs:
        """Return the pairs of :meth:`tensors`."""
        members, off = tensors["members"], tensors["off"]
        mask = KeepMask(table, tensors["keep"])
        pools = Pools(mask, members.split(tensors["sizes"].tolist()))
        unit = off.dtype == torch.bool
        return cls(
            design=UnitDesign(pools, members, off) if unit else GroupDesign(pools, off),
            masks_I=tensors["masks"],
            where_I=tensors["where"],
            windows_WS=tensors["windows"],
        )


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


class PairSweep:
    """Evaluates slices of pairs; close it after use.

    Args:
        engine: Device, sweep and arithmetic.
        store: The working store.
        head: The head in the arithmetic of masked evaluation.
        pairs: The pairs.
        imputations: Imputed values for units that are off; None puts zeros there.
        utility: The user's own utility; None takes -mean NLL.
    """

    def __init__(
        self,
        engine: Engine,
        store: LayerSource,
        head: Head,
        pairs: Pairs,
        *,
        imputations: Imputations | None = None,
        utility: Utility | None = None,
    ) -> None:
        self._sweep, self._head, self._utility = engine.sweep, head, utility
        self._pairs, self._tokens_IS = pairs, pairs.windows_WS[pairs.where_I]
        self._masker = DesignMasker(pairs.design, pairs.masks_I, imputations)
        self._stream = engine.evaluation_stream(store)

    @property
    def grid(self) -> int:
        """Number of pairs on whose multiples a wave may be divided without another rounding.

        Layers and head then multiply the same windows together as in the undivided wave.
        """
        limits, window, at_once = self._sweep.limits, self._window, self._stream.tokens_at_once
        micro_batch = limits.micro_batch
        if at_once is not None:
            micro_batch = min(micro_batch, max(1, at_once // window))
        return math.lcm(micro_batch, max(1, limits.head_tokens // window))

    @property
    def _window(self) -> int:
        return self._tokens_IS.shape[1]

    def run(self, items: slice, name: str) -> list[float]:
        """Return the utility of each pair of a slice that fits in one wave.

        Args:
            items: The pairs.
            name: Name of the sweep for the progress.

        Raises:
            OptionError: The user's utility returned no finite number.
        """
        tokens_NS = self._tokens_IS[items]
        hidden = self._sweep.run(
            self._stream,
            tokens_NS,
            masker=self._masker,
            first=items.start,
            name=name,
            then=self._head.to_read,
        )
        if self._utility is not None:
            return window_utilities(self._head, hidden, tokens_NS, self._utility)
        with torch.inference_mode():
            utility_N = -self._head.nll(hidden, tokens_NS).double().mean(1)
        return [float(utility) for utility in utility_N]

    def close(self) -> None:
        """Free the buffers of the layers."""
        self._stream.close()

    def __enter__(self) -> PairSweep:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


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
