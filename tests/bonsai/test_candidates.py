"""Candidate selection: which cuts compete, and that evidence decides between them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from frugal_bonsai.bonsai.selection.candidates import (
    MOST_CANDIDATES,
    WITH_ATTENTION,
    equal_width_cuts,
    select_cut,
)
from frugal_bonsai.bonsai.selection.curves import Curve
from frugal_bonsai.bonsai.selection.cut import cut
from frugal_bonsai.bonsai.selection.schedule import trial_windows
from frugal_bonsai.model.layout import PER_LAYER, LayoutRules
from frugal_bonsai.model.units import ATTENTION, FFN, KeepMask, UnitGroup, UnitTable

RULES = LayoutRules(layout=PER_LAYER, tile=1, attention_counts=(1, 2))
TARGET = 400


def _table() -> UnitTable:
    def group(layer: int, kind: str) -> UnitGroup:
        return UnitGroup(
            layer=layer,
            kind=kind,
            count=2 if kind == ATTENTION else 40,
            unit_parameters=100 if kind == ATTENTION else 10,
            slices=(),
            output=kind,
            output_weight=f"{layer}.{kind}",
            columns_per_unit=1,
        )

    return UnitTable(tuple(group(i, kind) for i in range(3) for kind in (ATTENTION, FFN)))


def _curves(mask: KeepMask, costs: list[float], pool: int = 20) -> tuple[Curve, ...]:
    """Straight ones: what a unit of each group costs, in table order."""
    curves = []
    for group, cost in zip(mask.table.groups, costs, strict=True):
        count = 1 if group.kind == ATTENTION else pool
        order = torch.arange(count) + mask.table.span(group).start
        loss = cost * torch.arange(count + 1, dtype=torch.float64)
        curves.append(Curve(group=group, order=order, loss=loss))
    return tuple(curves)


def _candidates(costs: list[float], pool: int = 20) -> dict[str, KeepMask]:
    mask = KeepMask(_table())
    curves = _curves(mask, costs, pool)
    chosen = cut(mask, curves, TARGET, RULES)
    return equal_width_cuts(mask, chosen, curves, TARGET, RULES)


def test_candidates_take_every_ffn_alike_and_of_attention_a_share_of_that() -> None:
    candidates = _candidates([1, 9, 99, 1, 99, 2])  # KV group 0, then FFN 1 and 2
    assert list(candidates) == ["even", "even_attention", "even_attention_x2"]
    assert candidates["even"].counts()[ATTENTION] == [2, 2, 2]
    assert sorted(candidates["even"].counts()[FFN]) == [26, 27, 27]
    # 400 of 1800: of six KV groups that share is 1.33, twice it 2.67 and three times 4, more than
    # the pools hold. The curves say which; what is left is taken from all FFNs.
    assert candidates["even_attention"].counts() == {ATTENTION: [1, 2, 2], FFN: [30, 30, 30]}
    assert candidates["even_attention_x2"].counts()[ATTENTION] == [1, 1, 1]


def test_attention_is_tried_where_the_cut_takes_none() -> None:
    candidates = _candidates([99, 9, 98, 1, 99, 2])
    assert list(candidates) == ["even", "even_attention", "even_attention_x2"]
    assert candidates["even_attention"].counts()[ATTENTION] == [2, 1, 2]


def test_candidates_that_are_the_same_or_cannot_be_filled_are_left_out() -> None:
    # 39 channels in all: with attention whole, the pools hold 390 of the 400 parameters; a channel
    # short is still the same round. With 12 they hold 360.
    assert list(_candidates([1, 9, 99, 1, 99, 2], pool=13)) == [
        "even",
        "even_attention",
        "even_attention_x2",
    ]
    assert list(_candidates([1, 9, 99, 1, 99, 2], pool=12)) == [
        "even_attention",
        "even_attention_x2",
    ]
    # The round's own cut is the first that can be filled: it stands without evidence.
    assert list(_candidates([1, 9, 99, 1, 99, 2], pool=9)) == [
        "even_attention",
        "even_attention_x2",
    ]
    assert list(_candidates([1, 9, 99, 1, 99, 2], pool=2)) == []


def _stands(even: list[float], cut: list[float], attention: list[float], share: float = 0.2) -> str:
    """Which of three cuts stands, by the losses of their windows."""
    mask = KeepMask(_table())
    cuts = {
        name: mask.without(torch.tensor([at]))
        for at, name in enumerate(("cut", "even", "even_attention"))
    }
    losses_N = torch.tensor([cut, even, attention])
    candidates = {name: cuts[name] for name in ("even", "even_attention")}
    stands, seen = select_cut(
        cuts["cut"], candidates, lambda mask: losses_N[int((~mask.keep_N).nonzero())], share=share
    )
    assert seen == {
        name: pytest.approx(float(torch.tensor(loss).mean()))
        for name, loss in (("cut", cut), ("even", even), ("even_attention", attention))
    }
    return next(name for name, mask in cuts.items() if mask == stands)


def test_the_lowest_loss_stands_if_it_is_lower_beyond_its_error() -> None:
    even = [2.0, 3.0, 4.0, 5.0]
    clear, spread = [1.8, 2.9, 3.8, 4.9], [1.0, 3.9, 3.0, 5.5]
    # Windows differ far more than cuts: it is their differences that count.
    assert _stands(even, clear, [9.0] * 4) == "cut"
    assert _stands(even, [9.0] * 4, clear) == "even_attention"
    # Lower by as much, but not in every window: the one that needs no evidence.
    assert _stands(even, spread, [9.0] * 4) == "even"
    assert _stands(even, [2.1, 3.1, 4.1, 5.1], [9.0] * 4) == "even"
    # In every window, but by no more than what the trial cannot know.
    assert _stands(even, [1.96, 2.97, 3.96, 4.97], [9.0] * 4) == "even"
    # A round that takes less is turned around by less.
    assert _stands(even, [1.96, 2.97, 3.96, 4.97], [9.0] * 4, share=0.1) == "cut"


def test_more_attention_is_tried_as_long_as_it_helps() -> None:
    mask = KeepMask(_table())
    cuts = [mask.without(torch.tensor([at])) for at in range(5)]
    for losses, tried, best in (
        ([9.0, 5.0, 4.0, 3.0, 2.0], 5, 4),
        ([9.0, 5.0, 4.0, 4.5, 2.0], 4, 2),
        ([9.0, 5.0, 6.0, 3.0, 2.0], 3, 1),
    ):
        seen: list[int] = []

        def recovered_losses(
            mask: KeepMask, losses: list[float] = losses, seen: list[int] = seen
        ) -> torch.Tensor:
            seen.append(int((~mask.keep_N).nonzero()))
            return torch.tensor([losses[seen[-1]], losses[seen[-1]]])

        names = ("even", *WITH_ATTENTION)
        stands, _ = select_cut(
            cuts[0], dict(zip(names, cuts[1:], strict=True)), recovered_losses, share=0.2
        )
        assert len(seen) == tried <= MOST_CANDIDATES
        assert stands == cuts[best]


def test_the_even_cut_stands_without_evidence_where_it_is_the_rounds_own() -> None:
    """It was left out once, and the one that takes a KV group became the baseline."""
    mask = KeepMask(_table())
    curves = _curves(mask, [99, 1, 99, 1, 99, 1])
    first = equal_width_cuts(mask, mask, curves, TARGET, RULES)["even"]
    candidates = equal_width_cuts(mask, first, curves, TARGET, RULES)
    assert next(iter(candidates.items())) == ("even", first) and len(candidates) > 1
    tried: list[KeepMask] = []

    def recovered_losses(mask: KeepMask) -> torch.Tensor:
        tried.append(mask)
        return torch.tensor([2.0, 3.0]) + (0.0 if mask == first else 0.03)

    stands, losses = select_cut(first, candidates, recovered_losses, share=0.2)
    assert stands == first and list(losses) == ["cut", "even_attention"]
    assert tried.count(first) == 1, "it is not tried twice"
    # Better by 0.03 nats, which is less than what a trial cannot know.
    worse = {**candidates, "even_attention": candidates["even_attention"]}
    stands, _ = select_cut(
        first,
        worse,
        lambda mask: torch.tensor([2.0, 3.0]) - (0.0 if mask == first else 0.03),
        share=0.2,
    )
    assert stands == first


def test_a_round_without_other_cuts_has_no_trial() -> None:
    mask, rules = KeepMask(_table()), replace(RULES, attention_counts=(2,))
    curves = _curves(mask, [99, 1, 99, 1, 99, 1])
    first = equal_width_cuts(mask, mask, curves, TARGET, rules)["even"]
    assert equal_width_cuts(mask, first, curves, TARGET, rules) == {}


def test_a_users_utility_has_no_margin_in_nats() -> None:
    mask = KeepMask(_table())
    cuts = [mask.without(torch.tensor([at])) for at in range(2)]
    losses = {0: [0.40, 0.50, 0.60], 1: [0.41, 0.51, 0.61]}
    for in_nats, expected in ((True, cuts[1]), (False, cuts[0])):
        stands, _ = select_cut(
            cuts[0],
            {"even": cuts[1]},
            lambda mask: torch.tensor(losses[int((~mask.keep_N).nonzero())]),
            share=0.2,
            in_nats=in_nats,
        )
        assert stands == expected


def test_one_window_has_no_error() -> None:
    assert _stands([2.0], [1.9], [3.0]) == "cut"
    assert _stands([2.0], [2.0], [3.0]) == "even"


@pytest.mark.parametrize(
    ("windows", "expected"),
    [(300, (96, 32)), (48, (32, 10)), (3, (2, 1)), (2, (1, 1)), (1, (1, 0))],
)
def test_candidates_are_judged_by_other_windows(windows: int, expected: tuple[int, int]) -> None:
    assert trial_windows(512, 256, windows) == expected
