"""How far rounds go."""

from __future__ import annotations

import pytest
import torch

from frugal_bonsai.bonsai.methods import make_settings
from frugal_bonsai.bonsai.selection.curves import Curve
from frugal_bonsai.bonsai.selection.cut import cut_round
from frugal_bonsai.bonsai.selection.reach import can_go_nearer
from frugal_bonsai.bonsai.selection.schedule import Schedule
from frugal_bonsai.model.layout import PER_LAYER, LayoutRules
from frugal_bonsai.model.units import KeepMask, UnitGroup, UnitTable


def _schedule(tile: int = 1, **settings: float) -> tuple[Schedule, KeepMask]:
    group = UnitGroup(
        layer=0,
        kind="ffn",
        count=100,
        unit_parameters=10,
        slices=(),
        output="ffn",
        output_weight="w",
        columns_per_unit=1,
    )
    rules = LayoutRules(layout=PER_LAYER, tile=tile, attention_counts=())
    made = make_settings("default", settings)
    return Schedule(settings=made, rules=rules, blocks=1000), KeepMask(UnitTable((group,)))


def _curves(mask: KeepMask) -> tuple[Curve, ...]:
    order = mask.keep_N.nonzero().flatten()
    loss = torch.arange(len(order) + 1, dtype=torch.float64)
    return (Curve(group=mask.table.groups[0], order=order, loss=loss),)


def test_rounds_of_a_step_and_what_is_left() -> None:
    schedule, mask = _schedule(sparsity=0.25, step=0.1)
    gone = []
    while can_go_nearer(mask, schedule.final_parameters, schedule.rules):
        assert schedule.share(mask) == pytest.approx(
            (schedule.goal(mask) * 1000 - mask.removed_parameters())
            / (1000 - mask.removed_parameters())
        )
        mask, target = cut_round(schedule, mask, _curves(mask))
        gone.append(mask.removed_parameters())
        assert target == gone[-1]
    assert gone == [100, 200, 250] and schedule.final_parameters == 250


def test_the_last_round_takes_a_sliver_that_would_be_left() -> None:
    schedule, mask = _schedule(sparsity=0.21, step=0.1)
    mask, _ = cut_round(schedule, mask, _curves(mask))
    assert schedule.goal(mask) == 0.21


def test_a_tile_larger_than_a_step_is_waited_for() -> None:
    schedule, mask = _schedule(tile=25, sparsity=0.5, step=0.1)
    cut_mask, target = cut_round(schedule, mask, _curves(mask))
    assert cut_mask.removed_parameters() == 250 and target == 300


def test_what_the_layout_cannot_hold_stays() -> None:
    schedule, mask = _schedule(tile=50, sparsity=0.3, step=0.1)
    cut_mask, _ = cut_round(schedule, mask, _curves(mask))
    assert cut_mask == mask
    assert not can_go_nearer(mask, schedule.final_parameters, schedule.rules)
