"""The cut: it hits its target, keeps to what the layout holds, and takes the cheapest first."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from frugal_bonsai.bonsai.selection.curves import Curve, withhold
from frugal_bonsai.bonsai.selection.cut import cut
from frugal_bonsai.bonsai.selection.reach import can_go_nearer, check_reachable
from frugal_bonsai.bonsai.selection.uniform import uniform_options
from frugal_bonsai.errors import OptionError
from frugal_bonsai.model.layout import PER_LAYER, UNIFORM, LayoutRules
from frugal_bonsai.model.units import ATTENTION, FFN, KeepMask, UnitGroup, UnitTable

HEAD, CHANNEL = 100, 12  # parameters of one unit


def _table(layers: int = 3, heads: int = 4, channels: int = 32) -> UnitTable:
    def group(layer: int, kind: str) -> UnitGroup:
        attention = kind == ATTENTION
        return UnitGroup(
            layer=layer,
            kind=kind,
            count=heads if attention else channels,
            unit_parameters=HEAD if attention else CHANNEL,
            slices=(),
            output=kind,
            output_weight=f"{layer}.{kind}",
            columns_per_unit=1,
        )

    return UnitTable(tuple(group(i, kind) for i in range(layers) for kind in (ATTENTION, FFN)))


def _rules(layout: str, *, tile: int = 1, heads: Sequence[int] = (1, 2, 3, 4)) -> LayoutRules:
    return LayoutRules(layout=layout, tile=tile, attention_counts=tuple(heads))


def _curves(mask: KeepMask, seed: int, *, attention_cost: float = 1.0) -> tuple[Curve, ...]:
    """Random orders and rising convex curves over all alive units but one."""
    generator = torch.Generator().manual_seed(seed)
    curves = []
    for group in mask.table.groups:
        alive = mask.of(group).nonzero().flatten() + mask.table.span(group).start
        order = alive[torch.randperm(len(alive), generator=generator)][: max(0, len(alive) - 1)]
        steps = torch.rand(len(order), generator=generator, dtype=torch.float64).sort().values
        if group.kind == ATTENTION:
            steps = steps * attention_cost
        loss = torch.cat([torch.zeros(1, dtype=torch.float64), steps.cumsum(0)])
        curves.append(Curve(group=group, order=order, loss=loss))
    return tuple(curves)


def _removed(before: KeepMask, after: KeepMask, curves: tuple[Curve, ...]) -> list[int]:
    """How many went from each group; each group's first in order must be the ones that went."""
    counts = []
    for curve in curves:
        gone = (before.of(curve.group) & ~after.of(curve.group)).nonzero().flatten()
        gone = {int(i) + before.table.span(curve.group).start for i in gone}
        assert gone == set(curve.order[: len(gone)].tolist()), curve.group.name
        counts.append(len(gone))
    assert not (after.keep_N & ~before.keep_N).any(), "a dead unit came back"
    return counts


# -- per layer --------------------------------------------------------------------------------
@given(seed=st.integers(0, 10_000), share=st.floats(0.01, 0.9))
@settings(max_examples=60, deadline=None)
def test_per_layer_cut_is_within_one_unit_of_the_target(seed: int, share: float) -> None:
    mask = KeepMask(_table())
    curves = _curves(mask, seed)
    most = sum(len(c.order) * c.group.unit_parameters for c in curves)
    target = round(share * most)
    after = cut(mask, curves, target, _rules(PER_LAYER))
    _removed(mask, after, curves)
    # Channels are exhausted only near the end; then what is left is a KV group.
    unit = CHANNEL if share < 0.7 else HEAD
    assert abs(after.removed_parameters() - target) <= unit


@given(seed=st.integers(0, 10_000), share=st.floats(0.05, 0.6), again=st.floats(0.05, 0.3))
@settings(max_examples=40, deadline=None)
def test_second_round_counts_what_the_first_removed(seed: int, share: float, again: float) -> None:
    table = _table()
    first = cut(
        KeepMask(table),
        _curves(KeepMask(table), seed),
        round(share * table.parameters),
        _rules(PER_LAYER),
    )
    curves = _curves(first, seed + 1)
    target = round((share + again) * table.parameters)
    second = cut(first, curves, target, _rules(PER_LAYER))
    _removed(first, second, curves)
    assert abs(second.removed_parameters() - target) <= HEAD
    assert all(second.kept(group) >= 1 for group in table.groups)


@given(seed=st.integers(0, 10_000), tile=st.sampled_from([2, 4, 5, 8]), share=st.floats(0.1, 0.6))
@settings(max_examples=40, deadline=None)
def test_per_layer_cut_respects_tiles(seed: int, tile: int, share: float) -> None:
    mask, rules = KeepMask(_table()), _rules(PER_LAYER, tile=tile)
    curves = _curves(mask, seed)
    target = round(share * mask.table.parameters)
    after = cut(mask, curves, target, rules)
    _removed(mask, after, curves)
    for group in mask.table.groups:
        assert after.kept(group) in rules.legal_counts(group.kind, group.count)
    assert abs(after.removed_parameters() - target) <= max(HEAD, tile * CHANNEL)


@given(seed=st.integers(0, 10_000), share=st.floats(0.1, 0.8))
@settings(max_examples=40, deadline=None)
def test_nothing_that_stays_was_cheaper_than_what_went(seed: int, share: float) -> None:
    """Channels cost the same to remove: the dearest that went is below the next of every group."""
    mask = KeepMask(_table(heads=1))
    curves = _curves(mask, seed)
    after = cut(mask, curves, round(share * 3 * 31 * CHANNEL), _rules(PER_LAYER))
    counts = _removed(mask, after, curves)
    ffn = [(c, k) for c, k in zip(curves, counts, strict=True) if c.group.kind == FFN]
    went = max(float(c.loss[k] - c.loss[k - 1]) for c, k in ffn if k)
    stays = [float(c.loss[k + 1] - c.loss[k]) for c, k in ffn if k + 1 < len(c.loss)]
    assert went <= min(stays, default=went) + 1e-12


def test_cost_is_counted_per_parameter() -> None:
    """A KV group that costs four times a channel has eight times its parameters: it goes first."""
    mask = KeepMask(_table(layers=1, heads=2))
    attention, ffn = mask.table.groups
    curves = (
        Curve(group=attention, order=torch.tensor([0]), loss=torch.tensor([0.0, 4.0]).double()),
        Curve(group=ffn, order=torch.arange(2, 33), loss=torch.arange(32).double()),
    )
    after = cut(mask, curves, HEAD + CHANNEL, _rules(PER_LAYER))
    assert after.counts() == {ATTENTION: [1], FFN: [31]}
    dear = (Curve(group=attention, order=curves[0].order, loss=3 * curves[0].loss), curves[1])
    after = cut(mask, dear, HEAD + CHANNEL, _rules(PER_LAYER))
    assert after.counts() == {ATTENTION: [2], FFN: [32 - (HEAD + CHANNEL) // CHANNEL]}


def test_cost_counted_per_unit_ignores_how_many_parameters_a_unit_has() -> None:
    """The published code's ranking: a channel that costs a little less goes before a KV group."""
    mask = KeepMask(_table(layers=1))
    attention, ffn = mask.table.groups
    curves = tuple(
        Curve(
            group=group,
            order=torch.arange(group.count - 1) + mask.table.span(group).start,
            loss=each * torch.arange(group.count, dtype=torch.float64),
        )
        for group, each in ((attention, 1.1), (ffn, 1.0))
    )
    per_parameter = cut(mask, curves, HEAD, _rules(PER_LAYER))
    assert per_parameter.kept(attention) == attention.count - 1
    per_unit = cut(mask, curves, HEAD, _rules(PER_LAYER), objective="units")
    assert per_unit.kept(attention) == attention.count
    assert per_unit.kept(ffn) == ffn.count - HEAD // CHANNEL


@pytest.mark.parametrize("layout", [PER_LAYER, UNIFORM])
def test_where_attention_is_slow_a_cut_for_latency_takes_more_of_it(layout: str) -> None:
    """Loss per parameter is the same everywhere; only the machine's time decides."""
    mask = KeepMask(_table())
    curves = tuple(
        Curve(
            group=group,
            order=torch.arange(group.count - 1) + mask.table.span(group).start,
            loss=group.unit_parameters * torch.arange(group.count, dtype=torch.float64),
        )
        for group in mask.table.groups
    )
    target, rules = 6 * HEAD, _rules(layout)
    kept = []
    for milliseconds in (
        {ATTENTION: 10 * HEAD, FFN: CHANNEL},
        {ATTENTION: HEAD, FFN: 10 * CHANNEL},
    ):
        after = cut(mask, curves, target, rules, objective="latency", latency=milliseconds)
        assert abs(after.removed_parameters() - target) <= 3 * CHANNEL / 2
        kept.append(sum(after.counts()[ATTENTION]))
    assert kept == [6, 12]


def test_kv_group_that_is_larger_than_the_target_stays() -> None:
    mask = KeepMask(_table())
    curves = _curves(mask, 0, attention_cost=0.0)
    after = cut(mask, curves, 5 * CHANNEL, _rules(PER_LAYER))
    assert after.counts()[ATTENTION] == [4, 4, 4]
    assert after.removed_parameters() == 5 * CHANNEL


def test_withheld_kind_stays_whole_and_the_others_make_up_for_it() -> None:
    mask = KeepMask(_table())
    curves = _curves(mask, 3, attention_cost=0.01)
    target = round(0.3 * mask.table.parameters)
    free, spared = (
        cut(mask, c, target, _rules(PER_LAYER)) for c in (curves, withhold(curves, ATTENTION))
    )
    whole = mask.counts()[ATTENTION]
    assert free.counts()[ATTENTION] != whole and spared.counts()[ATTENTION] == whole
    assert 0 <= target - spared.removed_parameters() < CHANNEL


def test_target_that_is_met_already_changes_nothing() -> None:
    mask = KeepMask(_table()).without(torch.tensor([0, 5, 6]))
    curves = _curves(mask, 0)
    for layout in (PER_LAYER, UNIFORM):
        assert cut(mask, curves, mask.removed_parameters(), _rules(layout)) == mask


# -- uniform ----------------------------------------------------------------------------------
@given(
    seed=st.integers(0, 10_000),
    tile=st.sampled_from([1, 4, 8]),
    share=st.floats(0.1, 0.75),
    attention_cost=st.sampled_from([0.0, 0.3, 3.0, 1000.0]),
)
@settings(max_examples=60, deadline=None)
def test_uniform_cut_keeps_counts_equal_legal_and_near_the_target(
    seed: int, tile: int, share: float, attention_cost: float
) -> None:
    mask, rules = KeepMask(_table()), _rules(UNIFORM, tile=tile, heads=(1, 2, 4))
    curves = _curves(mask, seed, attention_cost=attention_cost)
    target = round(share * (mask.table.parameters - 3 * HEAD - 3 * tile * CHANNEL))
    after = cut(mask, curves, target, rules)
    _removed(mask, after, curves)
    for kind, counts in after.counts().items():
        assert len(set(counts)) == 1
        assert counts[0] in rules.legal_counts(kind, 4 if kind == ATTENTION else 32)
    over = after.removed_parameters() - target
    half_step = 3 * tile * CHANNEL / 2
    assert over <= half_step, "farther beyond the target than the nearest legal size"
    if len(curves[1].order) >= 32 - tile:
        # Where attention stays whole, channels alone may not be enough: then it is short.
        assert over >= -half_step or after.counts()[FFN][0] == tile


@pytest.mark.parametrize("before", [0, 6, 11])
@pytest.mark.parametrize("final", [0.3, 0.45, 0.6])
def test_step_of_attention_does_not_pass_the_final_target(before: int, final: float) -> None:
    """Two KV groups: one step of attention is far more than a round. It is free here."""
    table = _table(heads=2, channels=24)
    mask = KeepMask(table)
    for group in table.groups:
        if group.kind == FFN:
            mask.of(group)[:before] = False
    curves = _curves(mask, 1, attention_cost=0.0)
    goal = round(final * table.parameters)
    if mask.removed_parameters() >= goal:
        return
    this_round = min(goal, mask.removed_parameters() + round(0.05 * table.parameters))
    after = cut(mask, curves, this_round, _rules(UNIFORM), final_parameters=goal)
    assert mask.removed_parameters() < after.removed_parameters() <= goal + 3 * CHANNEL / 2
    if mask.removed_parameters() + 3 * HEAD <= goal:
        assert after.counts()[ATTENTION] == [1, 1, 1], "free, and there is room for it"
    else:
        assert after.counts()[ATTENTION] == [2, 2, 2]


def test_remainder_below_half_a_tile_does_not_cost_a_kv_group() -> None:
    """The nearest legal size has been reached; only attention could go on, far past the target."""
    table = _table(heads=2)
    mask = KeepMask(table)
    for group in table.groups:
        if group.kind == FFN:
            mask.of(group)[:8] = False
    target = mask.removed_parameters() + 3 * CHANNEL
    curves = _curves(mask, 0, attention_cost=0.0)
    after = cut(mask, curves, target, _rules(UNIFORM, tile=8), final_parameters=target)
    assert after == mask


def test_uniform_cut_weighs_attention_against_ffn() -> None:
    mask, rules = KeepMask(_table()), _rules(UNIFORM)
    target = 3 * HEAD  # one KV group of every layer, or about 8 channels
    cheap = cut(mask, _curves(mask, 0, attention_cost=0.01), target, rules)
    assert cheap.counts() == {ATTENTION: [3, 3, 3], FFN: [32, 32, 32]}
    dear = cut(mask, _curves(mask, 0, attention_cost=100.0), target, rules)
    assert dear.counts() == {ATTENTION: [4, 4, 4], FFN: [24, 24, 24]}


def test_uniform_options_lists_every_legal_attention_count() -> None:
    mask, rules = KeepMask(_table()), _rules(UNIFORM, tile=4)
    curves = _curves(mask, 3)
    options = uniform_options(mask, curves, 900, rules)
    assert [o.attention for o in options] == [1, 2, 3, 4]
    assert [o.ffn for o in options] == [32, 24, 16, 8]
    for option in options:
        gone = 3 * HEAD * (4 - option.attention) + 3 * CHANNEL * (32 - option.ffn)
        assert option.removed_parameters == gone
        expected = sum(
            float(
                c.loss[
                    c.group.count - (option.attention if c.group.kind == ATTENTION else option.ffn)
                ]
            )
            for c in curves
        )
        assert option.loss == pytest.approx(expected)
    assert all(a.removed_parameters > 0 for a, _ in pairwise(options))


# -- equal shares -----------------------------------------------------------------------------
@given(seed=st.integers(0, 10_000), share=st.floats(0.05, 0.8))
@settings(max_examples=40, deadline=None)
def test_equal_allocation_takes_the_same_share_of_every_layer_and_kind(
    seed: int, share: float
) -> None:
    """Whatever the losses say: widths within one channel, heads as many as whole units allow."""
    mask = KeepMask(_table())
    curves = _curves(mask, seed, attention_cost=0.001)
    target = round(share * sum(len(c.order) * c.group.unit_parameters for c in curves))
    after = cut(mask, curves, target, _rules(PER_LAYER), allocation="equal")
    _removed(mask, after, curves)
    heads, channels = after.counts()[ATTENTION], after.counts()[FFN]
    assert max(channels) - min(channels) <= 1
    gone = 1 - min(channels) / 32
    # A head goes when the share that would be gone with it is that of the channels.
    for kept in heads:
        assert 1 - kept / 4 <= gone + 1 / 32
        assert kept == 1 or 1 - (kept - 1) / 4 >= gone - 1 / 32 - HEAD / target
    assert 0 <= target - after.removed_parameters() < CHANNEL or min(channels) == 1


def test_equal_allocation_leaves_it_to_the_loss_which_layers_lose_one_more() -> None:
    mask = KeepMask(_table())
    curves = tuple(
        Curve(group=c.group, order=c.order, loss=(3 - c.group.layer) * torch.arange(len(c.loss)))
        for c in _curves(mask, 0)
    )
    after = cut(mask, curves, 7 * CHANNEL, _rules(PER_LAYER), allocation="equal")
    assert after.counts() == {ATTENTION: [4, 4, 4], FFN: [30, 30, 29]}


@pytest.mark.parametrize("layout", [PER_LAYER, UNIFORM])
def test_ffn_allocation_leaves_attention_whole(layout: str) -> None:
    mask = KeepMask(_table())
    curves = _curves(mask, 0, attention_cost=0.0)
    target = 3 * 20 * CHANNEL
    after = cut(mask, curves, target, _rules(layout), allocation="ffn")
    assert after.counts() == {ATTENTION: [4, 4, 4], FFN: [12, 12, 12]}
    assert can_go_nearer(after, target + 3 * CHANNEL, _rules(layout), "ffn")
    narrow = cut(mask, curves, 3 * 31 * CHANNEL, _rules(layout), allocation="ffn")
    # Only attention could go on.
    assert can_go_nearer(narrow, mask.table.parameters, _rules(layout))
    assert not can_go_nearer(narrow, mask.table.parameters, _rules(layout), "ffn")


def test_uniform_layout_with_equal_allocation_takes_the_kinds_alike() -> None:
    mask, rules = KeepMask(_table()), _rules(UNIFORM, heads=(1, 2, 4))
    curves = _curves(mask, 0, attention_cost=1e-6)  # by the loss, attention would go
    few = cut(mask, curves, round(0.2 * mask.table.parameters), rules, allocation="equal")
    assert few.counts()[ATTENTION] == [4, 4, 4]
    half = cut(mask, curves, round(0.5 * mask.table.parameters), rules, allocation="equal")
    assert half.counts() == {ATTENTION: [2, 2, 2], FFN: [16, 16, 16]}


# -- reach ------------------------------------------------------------------------------------
def test_sparsity_beyond_the_layout_is_refused() -> None:
    mask = KeepMask(_table())
    blocks = mask.table.parameters + 60  # norms and the like
    most = 3 * (3 * HEAD + 31 * CHANNEL)
    check_reachable(mask, most / blocks - 1e-9, _rules(PER_LAYER), blocks)
    with pytest.raises(OptionError, match=r"--sparsity: 0\.95 is beyond .* per-layer layout") as e:
        check_reachable(mask, 0.95, _rules(PER_LAYER), blocks)
    assert f"at most {most / blocks:.3f} of the block parameters" in str(e.value)


def test_sparsity_beyond_the_ffn_is_refused_where_attention_stays_whole() -> None:
    mask = KeepMask(_table())
    most = 3 * 31 * CHANNEL / mask.table.parameters
    check_reachable(mask, most - 0.001, _rules(PER_LAYER), mask.table.parameters, "ffn")
    with pytest.raises(OptionError, match=r"attention stays whole \(--allocation ffn\)"):
        check_reachable(mask, most + 0.001, _rules(PER_LAYER), mask.table.parameters, "ffn")


def test_legal_head_counts_and_tile_bound_the_reach() -> None:
    mask = KeepMask(_table())
    blocks = mask.table.parameters
    rules = _rules(UNIFORM, tile=16, heads=(2, 4))
    most = 3 * (2 * HEAD + 16 * CHANNEL) / blocks
    check_reachable(mask, most - 0.001, rules, blocks)
    with pytest.raises(OptionError, match=r"uniform layout can hold: at most 0\.500.*tile 16"):
        check_reachable(mask, most + 0.001, rules, blocks)


def test_the_uniform_layout_refuses_layers_that_already_differ() -> None:
    table = UnitTable((*_table(layers=2).groups, *_table(layers=3, channels=20).groups[4:]))
    mask, blocks = KeepMask(table), table.parameters
    check_reachable(mask, 0.1, _rules(PER_LAYER), blocks)
    with pytest.raises(OptionError, match=r"20 to 32 ffn units.*--layout per-layer"):
        check_reachable(mask, 0.1, _rules(UNIFORM), blocks)
