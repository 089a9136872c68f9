"""Imputations: a masked evaluation equals that of the optimally compensated model."""

from __future__ import annotations

import pytest
import torch
from tiny_models import (
    BIASES,
    Tiny,
    hugging_face_losses,
    random_windows,
    relative,
    tiny_llama,
)

from frugal_bonsai.bonsai.importance.factor import DampedFactor
from frugal_bonsai.bonsai.importance.gram import Moments
from frugal_bonsai.bonsai.importance.imputation import Imputations, ImputationWriter, Tensors
from frugal_bonsai.bonsai.importance.scores import ImportanceBuilder, ImportanceScores
from frugal_bonsai.bonsai.masks.design import GroupDesign, draw_pools
from frugal_bonsai.bonsai.masks.evaluate import MaskEvaluator, Observations
from frugal_bonsai.bonsai.settings import PruneSettings
from frugal_bonsai.model.layout import PER_LAYER, LayoutRules
from frugal_bonsai.model.units import KeepMask, UnitGroup

DAMPING, SHARE = 1e-3, 0.4
RULES = LayoutRules(layout=PER_LAYER, tile=1, attention_counts=(1, 2, 3))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return tiny_llama(tmp_path_factory.mktemp("imputation") / "m", std=0.35, **BIASES)


def _measured(
    tiny: Tiny, tokens_NS: torch.Tensor, mask: KeepMask
) -> tuple[ImportanceScores, dict[UnitGroup, Tensors]]:
    """A sweep that returns the importance scores and the imputations."""
    saved: dict[UnitGroup, Tensors] = {}
    writer = ImputationWriter(share=SHARE, damping=DAMPING, rules=RULES, save=saved.__setitem__)
    builder = ImportanceBuilder(
        "exact", mask, damping=DAMPING, generator=torch.Generator(), imputations=writer
    )
    engine = tiny.engine()
    with engine.stream(tiny.source(mask=mask)) as stream:
        engine.sweep.run(stream, tokens_NS, tap=builder)
    return builder.build(), saved


def _evaluate(
    tiny: Tiny, tokens: torch.Tensor, design: GroupDesign, imputations: Imputations | None
) -> Observations:
    """One pair of masks on the first window."""
    engine = tiny.engine()
    evaluator = MaskEvaluator(
        engine,
        tiny.source(),
        lambda: engine.head,
        PruneSettings(masks=2, mask_windows=1),
        tokens[:1],
        torch.Generator(),
        imputations=imputations,
    )
    return evaluator.evaluate(design, 2)


@pytest.mark.parametrize("after_the_scores", [False, True])
def test_matrix_is_the_damped_least_squares_prediction_of_the_pool(after_the_scores: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    # Wider than one block of the factor.
    mixed = torch.eye(300) + 0.05 * torch.randn(300, 300, generator=generator)
    x = torch.randn(2000, 300, generator=generator) @ mixed
    pool = torch.tensor([1, 4, 5, *range(250, 280)])
    core = [column for column in range(300) if column not in pool]
    factor = DampedFactor(x.T @ x, 1e-3, where="here")
    x_core, x_pool = x[:, core].double(), x[:, pool].double()
    gram = x_core.T @ x_core + factor.added * torch.eye(len(core))
    expected = torch.linalg.solve(gram, x_core.T @ x_pool).T
    if after_the_scores:
        factor.inverse_diagonal()
    assert relative(factor.regression(pool).double(), expected) < 1e-3


def test_pools_of_the_imputations_are_those_of_the_design(tiny: Tiny) -> None:
    mask, tokens = KeepMask(tiny.spec.table), random_windows(20, 12)
    importance, saved = _measured(tiny, tokens, mask)
    pools = draw_pools(mask, importance.score_N, SHARE)
    for group, members in zip(tiny.spec.table.groups, pools.members, strict=True):
        first = tiny.spec.table.span(group).start
        columns = torch.zeros(group.count, dtype=torch.bool)
        columns[members - first] = True
        expected = columns.repeat_interleave(group.columns_per_unit).nonzero().flatten()
        assert torch.equal(saved[group]["columns"], expected)
        assert saved[group]["matrix"].shape == (len(expected), group.columns - len(expected))


@pytest.mark.parametrize("kind", ["attention", "ffn"])
def test_masked_evaluation_is_that_of_the_compensated_projection(kind: str, tiny: Tiny) -> None:
    """Half of a group's pool off: in W the lost columns' share is given to the core's columns."""
    mask, tokens = KeepMask(tiny.spec.table), random_windows(30, 12)
    importance, saved = _measured(tiny, tokens, mask)
    pools = draw_pools(mask, importance.score_N, SHARE)
    at, group = next((i, g) for i, g in enumerate(tiny.spec.table.groups) if g.kind == kind)
    gone = max(1, len(pools.members[at]) // 2)
    off_MG = torch.zeros(2, len(pools.members), dtype=torch.int64)
    off_MG[0, at] = gone
    design = GroupDesign(pools, off_MG)
    seen = _evaluate(tiny, tokens, design, Imputations(saved.get))
    zeroed = _evaluate(tiny, tokens, design, None)
    model = tiny.hugging_face()
    before = hugging_face_losses(model, tokens[:1]).mean()
    weight = dict(model.named_parameters())[group.output_weight]
    first = tiny.spec.table.span(group).start
    units = pools.members[at][:gone] - first
    lost = (
        units[:, None] * group.columns_per_unit + torch.arange(group.columns_per_unit)
    ).flatten()
    columns = saved[group]["columns"]
    core = torch.ones(group.columns, dtype=torch.bool)
    core[columns] = False
    rows = torch.isin(columns, lost)
    matrix = saved[group]["matrix"].float()[rows]
    with torch.no_grad():
        weight[:, core] += weight[:, columns[rows]] @ matrix
        weight[:, lost] = 0.0
    after = hugging_face_losses(model, tokens[:1]).mean()
    assert float(seen.loss_I[0]) == pytest.approx(float(after - before), abs=2e-5)
    assert abs(float(seen.loss_I[1])) < 1e-6
    assert abs(float(seen.loss_I[0] - zeroed.loss_I[0])) > 1e-4


def test_a_group_with_one_unit_left_has_none(tiny: Tiny) -> None:
    group = tiny.spec.table.groups[0]
    moments = Moments(group.columns_per_unit, device=torch.device("cpu"), gram=True)
    moments.add(torch.randn(2, 12, group.columns_per_unit))
    saved: dict[UnitGroup, Tensors] = {}
    writer = ImputationWriter(share=SHARE, damping=DAMPING, rules=RULES, save=saved.__setitem__)
    writer.add(group, moments, torch.ones(1))
    assert not saved
    assert Imputations(saved.get).of(group, torch.zeros(1, 2, group.columns_per_unit)) is None
