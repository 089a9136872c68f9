"""The design: pools and masks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import random_mask, tiny_llama

from frugal_bonsai.bonsai.masks.design import (
    Pools,
    draw_group_masks,
    draw_pools,
    draw_uniform_masks,
    draw_unit_masks,
)
from frugal_bonsai.bonsai.masks.pairs import DesignMasker
from frugal_bonsai.model.layout import PADDED, LayoutRules
from frugal_bonsai.model.units import ATTENTION, FFN, KeepMask, UnitGroup, UnitTable


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _table(layers: int = 4, heads: int = 2, channels: int = 16) -> UnitTable:
    def group(layer: int, kind: str) -> UnitGroup:
        attention = kind == ATTENTION
        return UnitGroup(
            layer=layer,
            kind=kind,
            count=heads if attention else channels,
            unit_parameters=100 if attention else 10,
            slices=(),
            output=kind,
            output_weight=f"{layer}.{kind}",
            columns_per_unit=3 if attention else 1,
        )

    return UnitTable(tuple(group(i, kind) for i in range(layers) for kind in (ATTENTION, FFN)))


def _scores(table: UnitTable, seed: int = 0) -> torch.Tensor:
    return torch.rand(table.units, generator=_generator(seed), dtype=torch.float64) + 0.1


def _pools(share: float = 0.5, table: UnitTable | None = None) -> tuple[Pools, torch.Tensor]:
    table = table or _table()
    score_N = _scores(table)
    return draw_pools(KeepMask(table), score_N, share), score_N


# -- pools ------------------------------------------------------------------------------------
def test_no_mask_is_spent_on_what_the_layout_cannot_cut() -> None:
    """GPT-2's heads in the padded layout: transformers computes their width from their number."""
    mask = KeepMask(_table())
    score_N = _scores(mask.table)
    cannot = LayoutRules(layout=PADDED, tile=1, attention_counts=())
    pools = draw_pools(mask, score_N, 0.5, cannot)
    assert pools.sizes_G.tolist() == [0, 8] * 4
    units = draw_unit_masks(pools, score_N, 4, _generator())
    groups = draw_group_masks(pools, 4, 0.2, _generator())
    for group in mask.table.groups:
        if group.kind == ATTENTION:
            assert units.keep(group, torch.arange(8)).all()
            assert groups.keep(group, torch.arange(8)).all()
    can = LayoutRules(layout=PADDED, tile=1, attention_counts=(1, 2))
    assert draw_pools(mask, score_N, 0.5, can).sizes_G.tolist() == [1, 8] * 4
    # What is left is the least that the layout holds.
    one = KeepMask(mask.table)
    for group in mask.table.groups:
        one.of(group)[1:] = group.kind == FFN
    assert draw_pools(one, score_N, 0.5, can).sizes_G.tolist() == [0, 8] * 4


@given(
    share=st.floats(0, 1),
    seed=st.integers(0, 1000),
    alive=st.lists(st.integers(0, 16), min_size=8, max_size=8),
)
@settings(max_examples=60, deadline=None)
def test_pools_are_the_lowest_alive_units_and_never_the_last(
    share: float, seed: int, alive: list[int]
) -> None:
    table, mask = _table(), KeepMask(_table())
    for group, count in zip(table.groups, alive, strict=True):
        order = torch.randperm(group.count, generator=_generator(seed))
        mask.of(group)[order[count:]] = False
    score_N = _scores(table, seed)
    pools = draw_pools(mask, score_N, share)
    for group, members in zip(table.groups, pools.members, strict=True):
        span, kept = table.span(group), mask.kept(group)
        assert len(members) == max(0, min(max(1, round(share * kept)), kept - 1))
        assert all(span.start <= int(m) < span.stop and mask.keep_N[m] for m in members)
        assert score_N[members].tolist() == sorted(score_N[members].tolist())
        left = [i for i in range(span.start, span.stop) if mask.keep_N[i]]
        left = sorted(set(left) - set(members.tolist()))
        if left and len(members):
            assert score_N[members].max() <= score_N[left].min()
    assert pools.sizes_G.tolist() == [len(m) for m in pools.members]


# -- unit level -------------------------------------------------------------------------------
def test_unit_masks_halve_each_layer_and_come_in_complements() -> None:
    """As published: with one candidate KV group a layer, a mask has all of them off."""
    pools, score_N = _pools(table=_table(layers=5, heads=2))
    design = draw_unit_masks(pools, score_N, 30, _generator())
    assert design.off_MK.shape == (60, len(design.units_K))
    assert torch.equal(design.off_MK[::2], ~design.off_MK[1::2])
    for group, members in zip(pools.mask.table.groups, pools.members, strict=True):
        off_M = design.off_MK[:, torch.isin(design.units_K, members)].sum(1)
        half = (len(members) + 1) // 2
        assert off_M[::2].tolist() == [half] * 30
        assert off_M[1::2].tolist() == [len(members) - half] * 30
        if group.kind == ATTENTION:
            assert len(members) == 1


def test_units_of_low_importance_are_off_more_often() -> None:
    pools, score_N = _pools()
    design = draw_unit_masks(pools, score_N, 2000, _generator())
    ffn = design.units_K % 18 >= 2
    often = design.off_MK[::2][:, ffn].double().mean(0)
    score = score_N[design.units_K[ffn]]
    assert torch.corrcoef(torch.stack([often, score]))[0, 1] < -0.9
    assert often.min() > 0.02, "every candidate is seen both on and off"


def test_unit_masks_survive_scores_of_zero_and_equal_scores() -> None:
    table = _table(heads=5)
    for score_N in (torch.zeros(table.units).double(), torch.ones(table.units).double()):
        pools = draw_pools(KeepMask(table), score_N, 0.5)
        design = draw_unit_masks(pools, score_N, 200, _generator())
        often = design.off_MK[::2].double().mean(0)
        assert ((often > 0.35) & (often < 0.65)).all()


# -- group level ------------------------------------------------------------------------------
def test_group_masks_take_t_and_one_minus_t() -> None:
    pools, _ = _pools(table=_table(heads=10))
    design = draw_group_masks(pools, 300, 0.2, _generator())
    off = design.off_MG.view(300, 2, -1)
    assert (off.sum(1) == pools.sizes_G).all()
    assert (off >= 0).all() and (off <= pools.sizes_G).all()
    share = off[:, 0].double() / pools.sizes_G
    # Uniform in [0, 1], a draw for every group of its own.
    assert ((share.mean(0) - 0.5).abs() < 0.06).all()
    assert ((share.var(0) - 1 / 12).abs() < 0.03).all()
    across = torch.corrcoef(share.T) - torch.eye(len(pools.sizes_G))
    assert across.abs().max() < 0.25


def test_coarse_pools_are_off_as_often_as_the_cut_takes_them() -> None:
    """Two KV groups: the pool is one unit, and taking it in every second mask would be far more
    than the cut takes."""
    pools, _ = _pools()
    assert pools.sizes_G[0] == 1
    design = draw_group_masks(pools, 3000, 0.1, _generator())
    off = design.off_MG.view(3000, 2, -1)[:, :, ::2]
    assert (off.sum(1) <= 1).all(), "on in at least one mask of the pair"
    expected = 0.1 * 2  # share of the alive units, over a pool of one
    often = off.double().mean(dim=(0, 1))
    assert ((often - expected).abs() < 0.03).all()


@pytest.mark.parametrize("size", [2, 3])
def test_coarse_pools_of_more_units_use_all_amounts(size: int) -> None:
    table = _table(heads=size + 1)
    pools = draw_pools(KeepMask(table), _scores(table), 1.0)
    assert pools.sizes_G[0] == size
    off = draw_group_masks(pools, 500, 0.4, _generator()).off_MG[:, 0]
    assert set(off.tolist()) == set(range(size + 1))


def test_group_without_candidates_stays_whole() -> None:
    table = _table(heads=1)
    pools = draw_pools(KeepMask(table), _scores(table), 0.5)
    design = draw_group_masks(pools, 50, 0.9, _generator())
    assert pools.sizes_G.tolist() == [0, 8] * 4
    assert not design.off_MG[:, ::2].any()


def test_designs_follow_their_generator() -> None:
    pools, score_N = _pools()
    for draw in (
        lambda seed: draw_group_masks(pools, 5, 0.2, _generator(seed)).off_MG,
        lambda seed: draw_unit_masks(pools, score_N, 5, _generator(seed)).off_MK,
        lambda seed: draw_uniform_masks(pools, 5, _generator(seed)).off_MG,
    ):
        assert torch.equal(draw(1), draw(1)) and not torch.equal(draw(1), draw(2))


# -- uniform layouts --------------------------------------------------------------------------
def test_uniform_masks_treat_layers_alike() -> None:
    pools, _ = _pools(share=0.75, table=_table(heads=4))
    assert pools.sizes_G.tolist() == [3, 12] * 4
    off = draw_uniform_masks(pools, 9, _generator()).off_MG.view(9, 2, 4, 2)
    assert (off == off[:, :, :1]).all(), "the same amount in every layer"
    attention, ffn = off[:, :, 0, 0], off[:, :, 0, 1]
    for pair in range(9):
        if pair % 3 == 2:
            assert attention[pair].tolist() == [3, 2] and ffn[pair].tolist() == [0, 0]
        else:
            assert attention[pair].tolist() == [0, 0] and ffn[pair].sum() == 12
    assert len(set(ffn[:, 0].tolist())) > 3


# -- from designs to columns ------------------------------------------------------------------
@pytest.mark.parametrize("level", ["group", "unit"])
def test_columns_on_a_mask_with_dead_units(level: str, tmp_path: Path) -> None:
    """Columns are those of the working store, which has the alive units alone."""
    spec = tiny_llama(tmp_path / "m").spec
    table, mask = spec.table, random_mask(spec, seed=2, off=0.3)
    score_N = _scores(table)
    pools = draw_pools(mask, score_N, 0.6)
    if level == "group":
        design = draw_group_masks(pools, 6, 0.5, _generator())
        off_sets = [
            {int(u) for m, k in zip(pools.members, row.tolist(), strict=True) for u in m[:k]}
            for row in design.off_MG
        ]
    else:
        design = draw_unit_masks(pools, score_N, 6, _generator())
        off_sets = [set(design.units_K[row].tolist()) for row in design.off_MK]
    assert any(off_sets)
    masks_I = torch.tensor([3, 3, 0, 11, 7, 2])
    masker = DesignMasker(design, masks_I)
    for group in table.groups:
        found = masker.columns(group, slice(1, 5))
        alive = mask.of(group).nonzero().flatten() + table.span(group).start
        expected = [
            [int(unit) not in off_sets[m] for unit in alive for _ in range(group.columns_per_unit)]
            for m in masks_I[1:5].tolist()
        ]
        assert found is not None and found.tolist() == expected
