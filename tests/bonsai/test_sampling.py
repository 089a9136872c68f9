"""Adaptive sampling on planted curves: when it stops, and what it says of itself."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise

import pytest
import torch
from planted import generator

from frugal_bonsai.bonsai.masks.design import (
    Design,
    GroupDesign,
    Pools,
    draw_group_masks,
    draw_pools,
    draw_uniform_masks,
)
from frugal_bonsai.bonsai.masks.estimators import (
    CurveEstimator,
    UnitEstimator,
    gone_counts,
)
from frugal_bonsai.bonsai.masks.evaluate import Observations
from frugal_bonsai.bonsai.masks.sampling import (
    BUDGET,
    FIXED,
    SETTLED,
    Estimate,
    Seen,
    batch_ends,
    sample_masks,
)
from frugal_bonsai.bonsai.selection.curves import Curve
from frugal_bonsai.bonsai.selection.cut import cut
from frugal_bonsai.model.layout import PER_LAYER, UNIFORM, LayoutRules
from frugal_bonsai.model.units import ATTENTION, FFN, KeepMask, UnitGroup, UnitTable

WINDOWS = 8


def _table(layers: int = 6, channels: int = 40) -> UnitTable:
    def group(layer: int, kind: str) -> UnitGroup:
        attention = kind == ATTENTION
        return UnitGroup(
            layer=layer,
            kind=kind,
            count=2 if attention else channels,
            unit_parameters=100 if attention else 10,
            slices=(),
            output=kind,
            output_weight=f"{layer}.{kind}",
            columns_per_unit=1,
        )

    return UnitTable(tuple(group(i, kind) for i in range(layers) for kind in (ATTENTION, FFN)))


def _rules(layout: str = PER_LAYER) -> LayoutRules:
    return LayoutRules(layout=layout, tile=1, attention_counts=(1, 2))


class _Planted:
    """A model whose masks lose what planted curves say, and noise.

    FFN groups lose 0.5 to 4.5 times t^2, KV groups ``attention / 4`` times as much.
    """

    def __init__(self, *, noise: float, attention: float = 20.0, seed: int = 0) -> None:
        self.table = _table()
        self.mask = KeepMask(self.table)
        self.score_N = torch.rand(self.table.units, generator=generator(seed)).double() + 0.1
        self.pools = draw_pools(self.mask, self.score_N, 0.6)
        self.sizes_G = self.pools.sizes_G
        kinds = [group.kind == ATTENTION for group in self.table.groups]
        square_G = 0.5 + 4 * torch.rand(len(kinds), generator=generator(seed + 1)).double()
        self.square_G = torch.where(torch.tensor(kinds), attention / 4 * square_G, square_G)
        self._noise, self._generator = noise, generator(seed + 2)
        self.designs: list[Design] = []

    def truth(self, off_IG: torch.Tensor) -> torch.Tensor:
        return (off_IG / self.sizes_G.clamp_min(1)).double().square() @ self.square_G

    def evaluate(self, design: Design, masks: int) -> Observations:
        assert isinstance(design, GroupDesign) and len(design.off_MG) == masks * WINDOWS
        self.designs.append(design)
        loss_I = self.truth(design.off_MG)
        loss_I += self._noise * torch.randn(len(loss_I), generator=self._generator).double()
        masks_I = torch.arange(len(loss_I))
        return Observations(
            masks_I=masks_I,
            clusters_I=masks_I // 2,
            loss_I=loss_I,
            base_W=torch.zeros(WINDOWS),
        )

    def cut(self, curves: tuple[Curve, ...]) -> KeepMask:
        return cut(self.mask, curves, 600, _rules())

    def best_loss(self) -> float:
        curves = self.estimator(0).curves(torch.cat([torch.zeros(12).double(), self.square_G]))
        return float(self.truth(gone_counts(self.mask, self.cut(curves))))

    def estimator(self, seed: int, pools: Pools | None = None) -> CurveEstimator:
        pools, draws = pools or self.pools, generator(seed)
        draw = partial(draw_group_masks, pools, expected_share=0.15, generator=draws)
        return CurveEstimator(pools, torch.arange(12), draw, draws)

    def sample(self, masks: int, target: float, seed: int = 5) -> Estimate:
        return sample_masks(
            self.estimator(seed),
            self.evaluate,
            self.cut,
            masks=masks,
            windows=WINDOWS,
            target=target,
            generator=generator(seed),
        )


# -- batches ----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("masks", "ends"),
    [(2, [2]), (4, [2, 4]), (8, [2, 4, 6, 8]), (16, [2, 4, 6, 8, 12, 16]), (200, None)],
)
def test_batches_grow_by_half_and_end_at_the_budget(masks: int, ends: list[int] | None) -> None:
    found = batch_ends(masks, 0.9)
    assert ends is None or found == ends
    assert found[-1] == masks and all(end % 2 == 0 for end in found)
    assert all(0 < b - a <= max(2, a / 2) for a, b in pairwise(found))
    assert len(found) <= 14
    assert batch_ends(masks, 1.0) == [masks]


def test_observations_of_batches_are_put_together() -> None:
    planted = _Planted(noise=0.1)
    first = planted.estimator(0).draw(WINDOWS)
    batches: list[tuple[Design, Observations]] = [
        (first, planted.evaluate(first, 2)),
        (first, planted.evaluate(first, 2)),
    ]
    seen = Seen.of(batches)
    assert seen.clusters_I.tolist() == [i // 2 for i in range(32)]
    assert torch.equal(seen.off_IX, torch.cat([first.off_MG, first.off_MG]))
    assert torch.equal(seen.loss_I[16:], batches[1][1].loss_I)


# -- when it stops ----------------------------------------------------------------------------
def test_a_clear_cut_settles_early() -> None:
    estimate = _Planted(noise=0.01).sample(64, 0.8)
    assert estimate.stopped == SETTLED and estimate.certainty is not None
    assert estimate.certainty >= 0.8
    assert estimate.observations <= 12 * WINDOWS


def test_noise_spends_the_budget_and_says_so() -> None:
    planted = _Planted(noise=30.0)
    estimate = planted.sample(8, 0.95)
    assert estimate.stopped == BUDGET
    assert estimate.observations == 8 * WINDOWS
    assert estimate.certainty is not None and estimate.certainty < 0.95
    assert len(planted.designs) == 4


def test_a_target_of_one_is_the_fixed_budget_in_one_batch() -> None:
    planted = _Planted(noise=0.01)
    estimate = planted.sample(8, 1.0)
    assert len(planted.designs) == 1 and estimate.observations == 8 * WINDOWS
    assert estimate.stopped == FIXED


def test_a_higher_target_asks_for_more() -> None:
    spent = [_Planted(noise=5.0).sample(64, target).observations for target in (0.3, 0.8, 0.95)]
    assert spent == sorted(spent) and spent[0] < spent[-1]


def test_certainty_is_about_what_the_cut_really_costs() -> None:
    """Over planted models: one less the share of the loss that the true best cut would save."""
    said, true = [], []
    for seed in range(8):
        planted = _Planted(noise=5.0, seed=10 * seed)
        estimate = planted.sample(8, 0.999)
        assert estimate.certainty is not None
        said.append(estimate.certainty)
        chosen = gone_counts(planted.mask, planted.cut(estimate.curves))
        true.append(planted.best_loss() / float(planted.truth(chosen)))
    means = [sum(values) / len(values) for values in (said, true)]
    assert means[0] == pytest.approx(means[1], abs=0.1), means


def test_the_seed_decides_and_only_the_seed() -> None:
    found = [_Planted(noise=1.0).sample(16, 0.85, seed) for seed in (1, 1, 2)]
    assert found[0].certainty == found[1].certainty
    assert found[0].observations == found[1].observations
    for one, other in zip(found[0].curves, found[1].curves, strict=True):
        assert torch.equal(one.loss, other.loss)
    assert any(
        not torch.equal(one.loss, other.loss)
        for one, other in zip(found[0].curves, found[2].curves, strict=True)
    )


# -- the estimators ---------------------------------------------------------------------------
@pytest.mark.parametrize("level", ["unit", "group", "kind"])
def test_a_cut_costs_what_the_curves_say(level: str) -> None:
    """``loss`` of a cut made by the same coefficients is the curves' at that cut."""
    planted, draws = _Planted(noise=0.1), generator()
    pools = planted.pools
    kinds = torch.arange(12) % 2
    uniform = partial(draw_uniform_masks, pools, generator=draws)
    make: dict[str, Callable[[], UnitEstimator | CurveEstimator]] = {
        "unit": partial(UnitEstimator, pools, planted.score_N, draws),
        "group": partial(planted.estimator, 0),
        "kind": partial(CurveEstimator, pools, kinds, uniform, draws),
    }
    estimator = make[level]()
    count = {"unit": len(torch.cat(pools.members)), "group": 24, "kind": 4}[level]
    relevance_K = torch.rand(count, generator=generator(8)).double()
    curves = estimator.curves(relevance_K)
    rules = _rules(UNIFORM if level == "kind" else PER_LAYER)
    chosen = cut(planted.mask, curves, 600, rules)
    gone_G = gone_counts(planted.mask, chosen)
    assert gone_G.sum() > 10
    expected = sum(float(c.loss[int(n)]) for c, n in zip(curves, gone_G, strict=True))
    assert estimator.loss(relevance_K, chosen) == pytest.approx(expected)


def test_pools_without_candidates_cost_nothing() -> None:
    planted = _Planted(noise=0.1)
    members = tuple(m[:0] if at == 1 else m for at, m in enumerate(planted.pools.members))
    estimator = planted.estimator(0, Pools(planted.mask, members))
    curves = estimator.curves(torch.ones(24).double())
    assert curves[1].loss.tolist() == [0.0] and len(curves[3].loss) == len(members[3]) + 1
