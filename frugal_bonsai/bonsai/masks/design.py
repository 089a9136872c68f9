"""The design: the masks that a round evaluates.

In: the importance scores and the units alive. Out: for every mask, the alive units that are off.
``unit`` level (the paper): every candidate has its own coefficient; a mask switches off half of
each layer's candidates, its complement the other half. ``group`` level: the units of a group are
ordered by importance, and a mask draws for every group how much of its pool is off. Holds one bool
per candidate and mask (``unit``) or one number per group and mask (``group``).

Shape suffixes: M masks, I (mask, window) pairs, P pairs of masks, G groups, K candidates, N units,
B masks of a micro-batch, A alive units of a group, U units of a group.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from frugal_bonsai.bonsai.importance.imputation import pool_size
from frugal_bonsai.model.layout import LayoutRules
from frugal_bonsai.model.units import ATTENTION, KeepMask, UnitGroup

# Pools of fewer units than this cannot be halved finely; their units are switched one by one.
_FINE_POOL = 4


@dataclass(frozen=True)
class Pools:
    """The candidates of every group (in table order) as flat unit indices, least important first.

    One unit of every group is never a candidate, so that no layer loses its last unit by accident.
    Groups that the layout cannot cut have no candidates, and no mask is spent on them.
    """

    mask: KeepMask
    members: tuple[torch.Tensor, ...]

    @property
    def sizes_G(self) -> torch.Tensor:
        """Number of candidates of each group, int64 ``[G]``."""
        return torch.tensor([len(m) for m in self.members])


def draw_pools(
    mask: KeepMask, score_N: torch.Tensor, share: float, rules: LayoutRules | None = None
) -> Pools:
    """Return each group's pool: the least important ``share`` of its alive units.

    A pool has at least one unit, and never the last one of its group.

    Args:
        mask: Units alive.
        score_N: Importance of each unit.
        share: Share of a group's alive units, 0 to 1.
        rules: Groups that this layout cannot cut get no candidates. None: every group that some
            layout can cut has candidates.
    """
    members = []
    for group in mask.table.groups:
        order = least_important(mask, group, score_N)
        cut = group.removable if rules is None else rules.can_cut(group, len(order))
        size = pool_size(len(order), share) if cut else 0
        members.append(order[:size])
    return Pools(mask, tuple(members))


def least_important(mask: KeepMask, group: UnitGroup, score_N: torch.Tensor) -> torch.Tensor:
    """Return a group's alive units as flat indices, the least important first."""
    alive = mask.of(group).nonzero().flatten() + mask.table.span(group).start
    order: torch.Tensor = alive[score_N[alive].argsort(stable=True)]
    return order


@dataclass(frozen=True)
class GroupDesign:
    """Masks of the ``group`` level.

    Attributes:
        pools: The candidates.
        off_MG: Number of units of each pool that are off, lowest first, int64 ``[M, G]``.
    """

    pools: Pools
    off_MG: torch.Tensor

    def rows(self, masks_I: torch.Tensor) -> torch.Tensor:
        """Return the regressors of these masks: units off per group, int64 ``[I, G]``."""
        return self.off_MG[masks_I]

    def keep(self, group: UnitGroup, masks_B: torch.Tensor) -> torch.Tensor:
        """Return the alive units of a group that each of these masks keeps, bool ``[B, A]``."""
        mask = self.pools.mask
        at = mask.table.position(group)
        members, span = self.pools.members[at], mask.table.span(group)
        rank_U = torch.full((group.count,), group.count)
        rank_U[members - span.start] = torch.arange(len(members))
        rank_A = rank_U[mask.of(group)]
        return rank_A[None, :] >= self.off_MG[masks_B, at][:, None]


@dataclass(frozen=True)
class UnitDesign:
    """Masks of the ``unit`` level.

    Attributes:
        pools: The candidates of each group.
        units_K: All candidates as flat unit indices, int64.
        off_MK: True where a candidate is off, bool ``[M, K]``.
    """

    pools: Pools
    units_K: torch.Tensor
    off_MK: torch.Tensor

    def rows(self, masks_I: torch.Tensor) -> torch.Tensor:
        """Return the regressors of these masks: candidates off, bool ``[I, K]``."""
        return self.off_MK[masks_I]

    def keep(self, group: UnitGroup, masks_B: torch.Tensor) -> torch.Tensor:
        """Return the alive units of a group that each of these masks keeps, bool ``[B, A]``."""
        mask = self.pools.mask
        span = mask.table.span(group)
        mine_K = (self.units_K >= span.start) & (self.units_K < span.stop)
        keep_BU = torch.ones(len(masks_B), group.count, dtype=torch.bool)
        keep_BU[:, self.units_K[mine_K] - span.start] = ~self.off_MK[masks_B][:, mine_K]
        return keep_BU[:, mask.of(group)]


Design = GroupDesign | UnitDesign


def draw_group_masks(
    pools: Pools, pairs: int, expected_share: float, generator: torch.Generator
) -> GroupDesign:
    """Draw ``2 * pairs`` masks of the ``group`` level.

    The amount t of each pool is uniform in [0, 1], and the second mask of a pair takes 1 - t. In
    pools of fewer than four units one unit may cost more than whole pools of channels: such units
    are off with the probability that removes ``expected_share`` of the group, in at most one mask
    of the pair.
    """
    sizes_G = pools.sizes_G
    coarse_G = sizes_G < _FINE_POOL
    alive_G = torch.tensor([pools.mask.kept(group) for group in pools.mask.table.groups])
    chance_G = (expected_share * alive_G / sizes_G.clamp_min(1)).clamp(max=0.5)
    amount_PG = torch.rand(pairs, len(sizes_G), generator=generator)
    off_PG = (amount_PG * sizes_G).round().long()
    other_PG = sizes_G - off_PG
    drawn_PG = torch.rand(pairs, len(sizes_G), generator=generator)
    units_PG = 1 + (amount_PG * sizes_G).floor().long().clamp(max=sizes_G - 1).clamp_min(0)
    zero_PG = torch.zeros_like(units_PG)
    units_PG = torch.minimum(units_PG, sizes_G.expand_as(units_PG))
    first_PG = torch.where(drawn_PG < chance_G, units_PG, zero_PG)
    second_PG = torch.where((drawn_PG >= chance_G) & (drawn_PG < 2 * chance_G), units_PG, zero_PG)
    off_PG = torch.where(coarse_G, first_PG, off_PG)
    other_PG = torch.where(coarse_G, second_PG, other_PG)
    return GroupDesign(pools, torch.stack([off_PG, other_PG], dim=1).flatten(0, 1))


def draw_uniform_masks(pools: Pools, pairs: int, generator: torch.Generator) -> GroupDesign:
    """Draw ``2 * pairs`` masks that treat all layers alike.

    In every third pair the first mask removes attention's whole pool, and the second mask half of
    it (where it has that many units); the FFN stays whole. The other pairs take t and 1 - t of
    every FFN pool.
    """
    groups = pools.mask.table.groups
    sizes_G = pools.sizes_G
    attention_G = torch.tensor([group.kind == ATTENTION for group in groups])
    rows = []
    for pair in range(pairs):
        amount = float(torch.rand((), generator=generator))
        if pair % 3 == 2:
            whole_G = torch.where(attention_G, sizes_G, 0)
            rows += [whole_G, torch.where(attention_G, (sizes_G + 1) // 2, 0)]
        else:
            off_G = torch.where(attention_G, 0, (amount * sizes_G).round().long())
            rows += [off_G, torch.where(attention_G, 0, sizes_G - off_G)]
    return GroupDesign(pools, torch.stack(rows))


def draw_unit_masks(
    pools: Pools, score_N: torch.Tensor, pairs: int, generator: torch.Generator
) -> UnitDesign:
    """Draw ``2 * pairs`` masks of the ``unit`` level, as the published code does.

    A mask switches off half of each group's candidates, and the second mask of the pair switches
    off the other half. Unimportant candidates are off more often (Bonsai, section 3.2): candidates
    are ranked by their negative log importance plus Gumbel noise, which samples without replacement
    by weight.
    """
    units_K = torch.cat(pools.members)
    weight_K = score_N[units_K].clamp_min(1e-30).log().neg()
    weight_K = weight_K / weight_K.std().clamp_min(1e-6) if len(units_K) > 1 else weight_K
    off_PK = torch.zeros(pairs, len(units_K), dtype=torch.bool)
    first = 0
    for count in pools.sizes_G.tolist():
        uniform_PU = torch.rand(pairs, count, generator=generator, dtype=torch.float64)
        gumbel_PU = -torch.log(-torch.log(uniform_PU.clamp(1e-12, 1 - 1e-12)))
        key_PU = weight_K[first : first + count] + gumbel_PU
        chosen_PU = key_PU.argsort(dim=1, descending=True)[:, : (count + 1) // 2]
        off_PK[:, first : first + count].scatter_(1, chosen_PU, True)
        first += count
    return UnitDesign(pools, units_K, torch.stack([off_PK, ~off_PK], dim=1).flatten(0, 1))
