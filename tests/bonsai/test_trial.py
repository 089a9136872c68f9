"""The trial: which cuts compete, and that the one that recovers best stands."""

from __future__ import annotations

import pytest
import torch

from frugal_bonsai.bonsai.select import Curve, cut
from frugal_bonsai.bonsai.settings import trial_windows
from frugal_bonsai.bonsai.trial import rival_cuts, try_cuts
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


def _rivals(costs: list[float], *, even: bool = True, pool: int = 20) -> dict[str, KeepMask]:
    mask = KeepMask(_table())
    curves = _curves(mask, costs, pool)
    chosen = cut(mask, curves, TARGET, RULES)
    return rival_cuts(mask, chosen, curves, TARGET, RULES, even=even)


def test_a_cut_with_attention_meets_one_without_and_an_even_one() -> None:
    rivals = _rivals([1, 9, 99, 1, 99, 2])  # KV group 0, then FFN 1 and 2
    assert list(rivals) == ["attention_spared", "even"]
    assert rivals["attention_spared"].counts() == {ATTENTION: [2, 2, 2], FFN: [40, 20, 20]}
    assert rivals["even"].counts()[ATTENTION] == [2, 2, 2]
    assert sorted(rivals["even"].counts()[FFN]) == [26, 27, 27]


def test_a_cut_without_attention_meets_the_even_one_alone() -> None:
    assert list(_rivals([99, 9, 99, 1, 99, 2])) == ["even"]
    assert _rivals([99, 9, 99, 1, 99, 2], even=False) == {}


def test_rivals_that_are_the_same_or_cannot_be_filled_are_left_out() -> None:
    # 39 channels in all: with attention whole, the pools hold 390 of the 400 parameters; a channel
    # short is still the same round. With 12 they hold 360.
    assert list(_rivals([1, 9, 99, 1, 99, 2], pool=13)) == ["attention_spared"]
    assert _rivals([1, 9, 99, 1, 99, 2], pool=12) == {}


def test_the_lowest_loss_stands() -> None:
    mask = KeepMask(_table())
    cuts = {name: mask.without(torch.tensor([at])) for at, name in enumerate(("a", "b", "c"))}
    losses = {at: loss for at, loss in enumerate((2.0, 3.0, 1.0))}

    def recovered_loss(cut: KeepMask) -> float:
        return losses[int((~cut.keep_N).nonzero())]

    rivals = {"even": cuts["b"], "attention_spared": cuts["c"]}
    better, seen = try_cuts(cuts["a"], rivals, recovered_loss)
    assert better == cuts["c"]
    assert seen == {"cut": 2.0, "even": 3.0, "attention_spared": 1.0}
    better, _ = try_cuts(cuts["c"], {"even": cuts["b"]}, recovered_loss)
    assert better == cuts["c"]


@pytest.mark.parametrize(
    ("windows", "expected"), [(48, (16, 16)), (3, (1, 1)), (2, (1, 1)), (1, (1, 0))]
)
def test_a_trial_is_judged_by_other_windows(windows: int, expected: tuple[int, int]) -> None:
    assert trial_windows(windows) == expected
