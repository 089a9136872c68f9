"""The design: which masks are evaluated.

In: the prior and the units alive. Out: for every (mask, window) pair, which alive units are off.
Two levels. ``unit``: every candidate has its own coefficient, a mask switches off half of the
candidates, its pair the other half. ``group``: units of a group are ordered by the prior, a mask
draws for every group how much of its pool goes. Holds one bool a candidate and mask (``unit``) or
one number a group and mask (``group``).

Differs from the paper: masks may be drawn per window instead of shared by all windows, and a kind's
candidates are drawn over all layers together, because "half of each layer" makes every mask remove
the same KV group when a layer has two (the ``paper`` method keeps the published draw).

Shape suffixes: M masks, I (mask, window) pairs, G groups, K candidates, N units, B pairs of a
micro-batch, A alive units of a group, C columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from frugal_bonsai.bonsai.importance.imputation import pool_size
from frugal_bonsai.model.layout import LayoutRules
from frugal_bonsai.model.units import ATTENTION, KeepMask, UnitGroup


@dataclass(frozen=True)
class Pools:
    """For every group (in table order), its candidates as flat unit indices, least relevant first.

    One unit of every group is never a candidate: a layer loses its last unit only on purpose. Nor
    is any of a group that the layout cannot cut: no mask is spent on it.
    """

    mask: KeepMask
    members: tuple[torch.Tensor, ...]

    @property
    def sizes_G(self) -> torch.Tensor:
        """int64 ``[G]``."""
        return torch.tensor([len(m) for m in self.members])


def draw_pools(
    mask: KeepMask, score_N: torch.Tensor, share: float, rules: LayoutRules | None = None
) -> Pools:
    """The lowest ``share`` of each group's alive units by the prior, at least one where possible.

    Args:
        mask: units alive.
        score_N: the prior.
        share: share of a group's alive units, 0 to 1.
        rules: of the layout: what it cannot cut is no candidate. None: any unit may go.
    """
    members = []
    for group in mask.table.groups:
        span = mask.table.span(group)
        alive = mask.of(group).nonzero().flatten() + span.start
        order = alive[score_N[alive].argsort(stable=True)]
        cut = group.removable if rules is None else rules.can_cut(group, len(alive))
        size = pool_size(len(alive), share) if cut else 0
        members.append(order[:size])
    return Pools(mask, tuple(members))


@dataclass(frozen=True)
class GroupDesign:
    """``group`` level: ``off_MG[m, g]`` units of group g's pool, lowest first, are off in mask m.

    Attributes:
        pools: the candidates.
        off_MG: int64 ``[M, G]``.
    """

    pools: Pools
    off_MG: torch.Tensor

    def rows(self, masks_I: torch.Tensor) -> torch.Tensor:
        """What the regression sees of these masks: units off by group, int64 ``[I, G]``."""
        return self.off_MG[masks_I]

    def keep(self, group: UnitGroup, masks_B: torch.Tensor) -> torch.Tensor:
        """Bool ``[B, A]``: which alive units of a group each of these masks keeps."""
        mask = self.pools.mask
        at = mask.table.position(group)
        members, span = self.pools.members[at], mask.table.span(group)
        rank_U = torch.full((group.count,), group.count)
        rank_U[members - span.start] = torch.arange(len(members))
        rank_A = rank_U[mask.of(group)]
        return rank_A[None, :] >= self.off_MG[masks_B, at][:, None]


@dataclass(frozen=True)
class UnitDesign:
    """``unit`` level: candidates ``units_K`` (flat indices), ``off_MK`` bool."""

    pools: Pools
    units_K: torch.Tensor
    off_MK: torch.Tensor

    def rows(self, masks_I: torch.Tensor) -> torch.Tensor:
        """What the regression sees of these masks: candidates off, bool ``[I, K]``."""
        return self.off_MK[masks_I]

    def keep(self, group: UnitGroup, masks_B: torch.Tensor) -> torch.Tensor:
        """Bool ``[B, A]``: which alive units of a group each of these masks keeps."""
        mask = self.pools.mask
        span = mask.table.span(group)
        mine_K = (self.units_K >= span.start) & (self.units_K < span.stop)
        keep_BU = torch.ones(len(masks_B), group.count, dtype=torch.bool)
        keep_BU[:, self.units_K[mine_K] - span.start] = ~self.off_MK[masks_B][:, mine_K]
        return keep_BU[:, mask.of(group)]


Design = GroupDesign | UnitDesign


@dataclass(frozen=True, kw_only=True)
class GroupFocus:
    """Where the masks of a later batch look: at what is still undecided in each group.

    Attributes:
        least_G: units of the pool that are off at least, int64.
        most_G: units that are off at most, int64.
        doubt_G: for pools of few units, the probability that the cut takes some and takes none:
            0 where that is known, 0.5 where nothing is.
    """

    least_G: torch.Tensor
    most_G: torch.Tensor
    doubt_G: torch.Tensor


def draw_group_masks(
    pools: Pools,
    pairs: int,
    expected_share: float,
    generator: torch.Generator,
    focus: GroupFocus | None = None,
) -> GroupDesign:
    """Draw ``2 * pairs`` masks: amount t of each pool uniform in [0, 1], its pair takes 1 - t.

    Pools of less than four units cannot be halved finely and one of their units may cost more than
    whole pools of others: each such unit is off with the probability that takes ``expected_share``
    of the group, in one mask of the pair at most.

    With a focus the amounts are uniform between its bounds instead, mirrored in the pair, and units
    of small pools are off as often as they are in doubt, if that is more often.
    """
    sizes_G = pools.sizes_G
    least_G, most_G = torch.zeros_like(sizes_G), sizes_G
    coarse_G = sizes_G < 4
    alive_G = torch.tensor([pools.mask.kept(group) for group in pools.mask.table.groups])
    chance_G = (expected_share * alive_G / sizes_G.clamp_min(1)).clamp(max=0.5)
    if focus is not None:
        least_G, most_G = focus.least_G, focus.most_G
        chance_G = torch.maximum(chance_G, focus.doubt_G.to(chance_G.dtype)).clamp(max=0.5)
    amount_PG = torch.rand(pairs, len(sizes_G), generator=generator)
    off_PG = least_G + (amount_PG * (most_G - least_G)).round().long()
    other_PG = least_G + most_G - off_PG
    drawn_PG = torch.rand(pairs, len(sizes_G), generator=generator)
    units_PG = 1 + (amount_PG * sizes_G).floor().long().clamp(max=sizes_G - 1).clamp_min(0)
    zero_PG = torch.zeros_like(units_PG)
    units_PG = torch.minimum(units_PG, sizes_G.expand_as(units_PG))
    first_PG = torch.where(drawn_PG < chance_G, units_PG, zero_PG)
    second_PG = torch.where((drawn_PG >= chance_G) & (drawn_PG < 2 * chance_G), units_PG, zero_PG)
    off_PG = torch.where(coarse_G, first_PG, off_PG)
    other_PG = torch.where(coarse_G, second_PG, other_PG)
    return GroupDesign(pools, torch.stack([off_PG, other_PG], dim=1).flatten(0, 1))


@dataclass(frozen=True, kw_only=True)
class UnitFocus:
    """Where the masks of a later batch look.

    Attributes:
        doubted_K: candidates of which it is undecided whether they go, bool.
        gone_K: candidates that surely go, bool.
    """

    doubted_K: torch.Tensor
    gone_K: torch.Tensor


def draw_unit_masks(
    pools: Pools,
    score_N: torch.Tensor,
    pairs: int,
    generator: torch.Generator,
    *,
    each_layer: bool = False,
    focus: UnitFocus | None = None,
) -> UnitDesign:
    """Draw ``2 * pairs`` masks: half of each kind's candidates off, the other half in its pair.

    With a focus the same is done with the units in doubt alone, those that surely go are off in all
    masks and the others on.

    ``each_layer`` draws half of each layer's candidates instead, as the published code does: where
    layers have one candidate KV group, every mask has all of them off and its pair none.

    The probability of being off falls with the prior (Bonsai, section 3.2): candidates are ranked
    by Gumbel-perturbed negative log prior, which samples without replacement by weight.
    """
    units_K = torch.cat(pools.members)
    groups = pools.mask.table.groups
    kinds = pools.mask.table.kinds
    stratum_K = torch.cat(
        [
            torch.full((len(m),), at if each_layer else kinds.index(g.kind))
            for at, (g, m) in enumerate(zip(groups, pools.members, strict=True))
        ]
    )
    weight_K = score_N[units_K].clamp_min(1e-30).log().neg()
    weight_K = weight_K / weight_K.std().clamp_min(1e-6) if len(units_K) > 1 else weight_K
    off_PK = torch.zeros(pairs, len(units_K), dtype=torch.bool)
    in_doubt_K = torch.ones(len(units_K), dtype=torch.bool) if focus is None else focus.doubted_K
    for stratum in sorted(set(stratum_K[in_doubt_K].tolist())):
        mine_K = (stratum_K == stratum) & in_doubt_K
        count = int(mine_K.sum())
        uniform_PK = torch.rand(pairs, count, generator=generator, dtype=torch.float64)
        key_PK = weight_K[mine_K] - torch.log(-torch.log(uniform_PK.clamp(1e-12, 1 - 1e-12)))
        half = torch.zeros(pairs, count, dtype=torch.bool)
        chosen = key_PK.argsort(dim=1, descending=True)[:, : (count + 1) // 2]
        half.scatter_(1, chosen, True)
        off_PK[:, mine_K] = half
    other_PK = ~off_PK & in_doubt_K
    if focus is not None:
        off_PK, other_PK = off_PK | focus.gone_K, other_PK | focus.gone_K
    return UnitDesign(pools, units_K, torch.stack([off_PK, other_PK], dim=1).flatten(0, 1))


def draw_uniform_masks(pools: Pools, pairs: int, generator: torch.Generator) -> GroupDesign:
    """Draw ``2 * pairs`` masks that treat all layers alike.

    Every third pair removes attention's whole pool in one mask and half of it (where it has that
    many units) in the other, FFN left whole; the others take t of every FFN pool, and 1 - t.
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
