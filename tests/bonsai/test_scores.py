"""All importance scores against direct computation on inputs captured from Hugging Face's model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_models import BIASES, Tiny, random_mask, random_windows, tiny_llama

from frugal_bonsai.bonsai.importance.scores import SCORES, ImportanceBuilder, ImportanceScores
from frugal_bonsai.bonsai.settings import PRIOR_NAMES, REAP, SIMILARITY
from frugal_bonsai.model.units import KeepMask, UnitGroup
from frugal_bonsai.stream.store import NATIVE, build_store

DAMPING = 1e-4


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return tiny_llama(tmp_path_factory.mktemp("scores") / "m", **BIASES)


def _measure(
    tiny: Tiny,
    name: str,
    mask: KeepMask,
    folder: Path,
    *,
    micro_batch: int = 2,
    keep_means: bool = False,
) -> ImportanceScores:
    builder = ImportanceBuilder(
        name,
        mask,
        damping=DAMPING,
        generator=torch.Generator().manual_seed(11),
        keep_means=keep_means,
    )
    engine = tiny.engine(micro_batch=micro_batch)
    store = build_store(folder, tiny.checkpoint, tiny.spec, weights=NATIVE, mask=mask)
    with engine.stream(store) as stream:
        engine.sweep.run(stream, random_windows(5, 12), tap=builder)
    return builder.build()


def _captured(tiny: Tiny, mask: KeepMask) -> dict[UnitGroup, tuple[torch.Tensor, torch.Tensor]]:
    """Inputs ``[T, C]`` and weight ``[H, C]`` of each output projection, float64, dense columns."""
    model = tiny.hugging_face(mask)
    found: dict[UnitGroup, tuple[torch.Tensor, torch.Tensor]] = {}
    for group in tiny.spec.table.groups:

        def keep(module: torch.nn.Linear, args: tuple[torch.Tensor, ...], group=group) -> None:
            found[group] = (args[0].flatten(0, 1).double(), module.weight.detach().double())

        projection = model.model.layers[group.layer].get_submodule(group.output)
        projection.register_forward_pre_hook(keep)
    with torch.no_grad():
        model(random_windows(5, 12))
    return found


def _direct(name: str, x: torch.Tensor, w: torch.Tensor) -> float:
    """The score of one unit from its own columns, by the formulas of docs/method.md."""
    rms = x.square().mean(0).sqrt()
    return float(
        {
            "activation": lambda: rms.mean(),
            "wanda": lambda: (w.abs() * rms).mean(),
            "output": lambda: (x.square().mean(0) * w.norm(dim=0) ** 2).sum(),
            "fluctuation": lambda: (x.var(0, unbiased=False) * w.norm(dim=0) ** 2).sum(),
            "magnitude": lambda: w.norm(),
        }[name]()
    )


def test_settings_know_the_priors() -> None:
    assert (*SCORES, SIMILARITY, REAP) == PRIOR_NAMES


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", ["activation", "wanda", "output", "fluctuation", "magnitude"])
def test_local_scores(name: str, masked: bool, tiny: Tiny, tmp_path: Path) -> None:
    mask = random_mask(tiny.spec) if masked else KeepMask(tiny.spec.table)
    importance = _measure(tiny, name, mask, tmp_path)
    assert importance.name == name and importance.score_N.dtype == torch.float64
    for group, (x, w) in _captured(tiny, mask).items():
        scores = importance.score_N[tiny.spec.table.span(group)]
        for unit in range(group.count):
            own = slice(unit * group.columns_per_unit, (unit + 1) * group.columns_per_unit)
            alive = bool(mask.of(group)[unit])
            expected = _direct(name, x[:, own], w[:, own]) if alive else 0.0
            assert float(scores[unit]) == pytest.approx(expected, rel=1e-3), (group.name, unit)


@pytest.mark.parametrize("masked", [False, True])
def test_exact_score_is_the_loss_after_the_best_damped_refit(
    masked: bool, tiny: Tiny, tmp_path: Path
) -> None:
    """Damping as rows below the inputs; with them the loss is that of a plain least squares."""
    mask = random_mask(tiny.spec) if masked else KeepMask(tiny.spec.table)
    importance = _measure(tiny, "exact", mask, tmp_path)
    for group, (inputs, weight) in _captured(tiny, mask).items():
        columns = mask.columns(group)
        x, w = inputs[:, columns] / len(inputs) ** 0.5, weight[:, columns]
        root = (DAMPING * x.square().sum(0).mean()).sqrt()
        x = torch.cat([x, root * torch.eye(x.shape[1], dtype=torch.float64)])
        target, scores = x @ w.T, importance.score_N[tiny.spec.table.span(group)]
        assert not scores[~mask.of(group)].any()
        for at, score in enumerate(scores[mask.of(group)]):
            keep = torch.ones(x.shape[1], dtype=torch.bool)
            keep[at * group.columns_per_unit : (at + 1) * group.columns_per_unit] = False
            refit = torch.linalg.lstsq(x[:, keep], target).solution
            expected = float((target - x[:, keep] @ refit).square().sum())
            assert float(score) == pytest.approx(expected, rel=2e-2), (group.name, at)


def test_random_scores_follow_their_generator(tiny: Tiny, tmp_path: Path) -> None:
    mask = random_mask(tiny.spec)
    first = _measure(tiny, "random", mask, tmp_path).score_N
    again = _measure(tiny, "random", mask, tmp_path).score_N
    assert torch.equal(first, again)
    alive = first[mask.keep_N]
    assert not first[~mask.keep_N].any()
    assert ((alive > 0) & (alive < 1)).all() and alive.unique().numel() == alive.numel()


@pytest.mark.parametrize("name", ["exact", "fluctuation"])
def test_micro_batches_do_not_matter(name: str, tiny: Tiny, tmp_path: Path) -> None:
    mask = KeepMask(tiny.spec.table)
    few = _measure(tiny, name, mask, tmp_path, micro_batch=1).score_N
    torch.testing.assert_close(
        few, _measure(tiny, name, mask, tmp_path, micro_batch=5).score_N, rtol=1e-3, atol=1e-7
    )


@pytest.mark.parametrize("masked", [False, True])
def test_flap_is_the_mean_z_score_of_a_units_columns(
    masked: bool, tiny: Tiny, tmp_path: Path
) -> None:
    """As the published code has it: standardised over a group's columns, then averaged."""
    mask = random_mask(tiny.spec) if masked else KeepMask(tiny.spec.table)
    importance = _measure(tiny, "flap", mask, tmp_path)
    for group, (inputs, weight) in _captured(tiny, mask).items():
        columns, alive = mask.columns(group), mask.of(group)
        x, w = inputs[:, columns], weight[:, columns]
        score = x.var(0, unbiased=False) * w.norm(dim=0) ** 2
        standard = (score - score.mean()) / score.std()
        expected = standard.view(-1, group.columns_per_unit).mean(1)
        found = importance.score_N[tiny.spec.table.span(group)]
        torch.testing.assert_close(found[alive], expected, rtol=1e-3, atol=1e-4)
        assert float(found[alive].mean()) == pytest.approx(0, abs=1e-6)
        assert not found[~alive].any()


def test_mean_inputs_are_kept_where_they_are_asked_for(tiny: Tiny, tmp_path: Path) -> None:
    mask = random_mask(tiny.spec)
    assert _measure(tiny, "flap", mask, tmp_path).means is None
    importance = _measure(tiny, "flap", mask, tmp_path, keep_means=True)
    captured = _captured(tiny, mask)
    assert importance.means is not None and len(importance.means) == len(captured)
    for group, (inputs, _) in captured.items():
        expected = inputs[:, mask.columns(group)].mean(0).float()
        torch.testing.assert_close(
            importance.means[group.output_weight], expected, rtol=1e-4, atol=1e-5
        )


def test_only_exact_needs_gram_matrices(tiny: Tiny) -> None:
    mask, generator = KeepMask(tiny.spec.table), torch.Generator()
    needs = [
        name
        for name in SCORES
        if ImportanceBuilder(name, mask, damping=1e-4, generator=generator).needs_gram
    ]
    assert needs == ["exact"]
