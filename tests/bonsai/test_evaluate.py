"""Masked evaluation against Hugging Face's model with the units zeroed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_models import (
    BIASES,
    Tiny,
    hugging_face_losses,
    random_mask,
    random_windows,
    tiny_llama,
)

from frugal_bonsai.bonsai.masks.design import (
    Design,
    GroupDesign,
    draw_group_masks,
    draw_pools,
    draw_unit_masks,
)
from frugal_bonsai.bonsai.masks.evaluate import MaskEvaluator, Observations
from frugal_bonsai.bonsai.masks.pairs import Utility
from frugal_bonsai.bonsai.settings import PruneSettings
from frugal_bonsai.errors import OptionError
from frugal_bonsai.model.units import KeepMask
from frugal_bonsai.stream.engine import Engine
from frugal_bonsai.stream.source import LayerSource
from frugal_bonsai.stream.store import NATIVE, build_store

WINDOWS, WINDOW, MASKS = 3, 10, 4


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return tiny_llama(tmp_path_factory.mktemp("evaluate") / "m", **BIASES)


def _design(mask: KeepMask, masks: int, *, level: str = "group") -> Design:
    generator = torch.Generator().manual_seed(4)
    score_N = torch.rand(mask.table.units, generator=generator, dtype=torch.float64)
    pools = draw_pools(mask, score_N, 0.6)
    if level == "unit":
        return draw_unit_masks(pools, score_N, masks // 2, generator)
    return draw_group_masks(pools, masks // 2, 0.5, generator)


def _keep(design: Design, mask: KeepMask, number: int) -> KeepMask:
    """One mask of a design as a keep mask of the dense model."""
    if isinstance(design, GroupDesign):
        row = design.off_MG[number].tolist()
        members = design.pools.members
        off = torch.cat([m[:count] for m, count in zip(members, row, strict=True)])
    else:
        off = design.units_K[design.off_MK[number]]
    return mask.without(off)


def _evaluator(
    engine: Engine,
    store: LayerSource,
    *,
    shared: bool,
    perplexity: bool = False,
    utility: Utility | None = None,
    masks: int = MASKS,
) -> MaskEvaluator:
    settings = PruneSettings(
        design="shared" if shared else "per-window",
        utility="perplexity" if perplexity else "loss",
        masks=masks,
        mask_windows=WINDOWS,
    )
    windows, draws = random_windows(WINDOWS, WINDOW), torch.Generator()
    return MaskEvaluator(
        engine, store, lambda: engine.head, settings, windows, draws, utility=utility
    )


def _evaluate(
    tiny: Tiny,
    mask: KeepMask,
    design: Design,
    folder: Path,
    *,
    shared: bool,
    perplexity: bool = False,
    utility: Utility | None = None,
    **limits: int,
) -> Observations:
    engine = tiny.engine(**{"micro_batch": 4, **limits})
    store = build_store(folder, tiny.checkpoint, tiny.spec, weights=NATIVE, mask=mask)
    evaluator = _evaluator(engine, store, shared=shared, perplexity=perplexity, utility=utility)
    seen = evaluator.evaluate(design, MASKS)
    pairs = MASKS * WINDOWS + WINDOWS  # the unmasked windows are evaluated too, once
    assert engine.sweep.forward_tokens == pairs * WINDOW
    assert evaluator.tokens == evaluator.budget_tokens == pairs * WINDOW
    return seen


def _nll(tiny: Tiny, mask: KeepMask) -> torch.Tensor:
    """Mean loss of each window, float64 ``[W]``."""
    tokens = random_windows(WINDOWS, WINDOW)
    return hugging_face_losses(tiny.hugging_face(mask), tokens).double().mean(1)


def _masks(tiny: Tiny, alive: str) -> KeepMask:
    return KeepMask(tiny.spec.table) if alive == "dense" else random_mask(tiny.spec, off=0.3)


@pytest.mark.parametrize("level", ["group", "unit"])
@pytest.mark.parametrize("alive", ["dense", "pruned"])
@pytest.mark.parametrize("waves", [1000, 4])
def test_per_window_loss_is_the_windows_own_difference(
    level: str, alive: str, waves: int, tiny: Tiny, tmp_path: Path
) -> None:
    mask = _masks(tiny, alive)
    design = _design(mask, MASKS * WINDOWS, level=level)
    seen = _evaluate(tiny, mask, design, tmp_path, shared=False, windows_in_flight=waves)
    base = _nll(tiny, mask)
    assert seen.masks_I.tolist() == list(range(12))
    assert seen.clusters_I.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    assert seen.base == pytest.approx(-float(base.mean()), rel=1e-5)
    for number in range(12):
        window = number // 2 % WINDOWS  # a mask and its complement share a window
        expected = (_nll(tiny, _keep(design, mask, number)) - base)[window]
        assert float(seen.loss_I[number]) == pytest.approx(float(expected), abs=2e-5)
    assert seen.loss_I.dtype == torch.float64 and seen.loss_I.std() > 0.01


@pytest.mark.parametrize("perplexity", [False, True])
@pytest.mark.parametrize("alive", ["dense", "pruned"])
def test_shared_masks_see_every_window_and_give_one_observation(
    perplexity: bool, alive: str, tiny: Tiny, tmp_path: Path
) -> None:
    mask = _masks(tiny, alive)
    design = _design(mask, MASKS)
    seen = _evaluate(tiny, mask, design, tmp_path, shared=True, perplexity=perplexity)
    assert seen.masks_I.tolist() == [0, 1, 2, 3] and seen.clusters_I.tolist() == [0, 0, 1, 1]

    def utility(nll: torch.Tensor) -> float:
        return -float(nll.mean().exp()) if perplexity else -float(nll.mean())

    base = utility(_nll(tiny, mask))
    assert seen.base == pytest.approx(base, rel=1e-5)
    for number in range(MASKS):
        expected = base - utility(_nll(tiny, _keep(design, mask, number)))
        scale = abs(base) if perplexity else 1.0
        assert float(seen.loss_I[number]) == pytest.approx(expected, abs=2e-5 * scale)


def test_per_window_perplexity_is_of_each_window(tiny: Tiny, tmp_path: Path) -> None:
    mask = KeepMask(tiny.spec.table)
    design = _design(mask, MASKS * WINDOWS)
    seen = _evaluate(tiny, mask, design, tmp_path, shared=False, perplexity=True)
    base = _nll(tiny, mask).exp()
    expected = _nll(tiny, _keep(design, mask, 3)).exp()[1] - base[1]
    assert float(seen.loss_I[3]) == pytest.approx(float(expected), rel=1e-3, abs=1e-3)
    assert seen.base == pytest.approx(-float(base.mean()), rel=1e-4)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("perplexity", [True, False])
def test_custom_utility_that_cannot_be_differentiated(
    shared: bool, perplexity: bool, tiny: Tiny, tmp_path: Path
) -> None:
    """Accuracy of the next token; the perplexity setting has no say when there is one."""
    mask = KeepMask(tiny.spec.table)
    design = _design(mask, MASKS if shared else MASKS * WINDOWS)
    shapes: set[tuple[int, ...]] = set()

    def accuracy(logits_SV: torch.Tensor, tokens_S: torch.Tensor) -> float:
        shapes.add((*logits_SV.shape, *tokens_S.shape))
        assert logits_SV.dtype == torch.float32 and tokens_S.dtype == torch.int64
        return int((logits_SV[:-1].argmax(-1) == tokens_S[1:]).sum()) / 9 - float(tokens_S[0])

    seen = _evaluate(
        tiny, mask, design, tmp_path, shared=shared, perplexity=perplexity, utility=accuracy
    )
    assert shapes == {(WINDOW, 53, WINDOW)}
    tokens = random_windows(WINDOWS, WINDOW)

    def direct(keep: KeepMask) -> torch.Tensor:
        model = tiny.hugging_face(keep)
        with torch.no_grad():
            values = [accuracy(model(window[None]).logits[0], window) for window in tokens]
        return torch.tensor(values, dtype=torch.float64)

    base = direct(mask)
    assert seen.base == pytest.approx(float(base.mean()))
    for number in range(len(seen.loss_I)):
        change = base - direct(_keep(design, mask, number))
        expected = change.mean() if shared else change[number // 2 % WINDOWS]
        assert float(seen.loss_I[number]) == pytest.approx(float(expected), abs=1e-9)


class _Named:
    """Keeps the names of sweeps."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def round(self, number: int, rounds: int, sparsity: float) -> None: ...

    def sweep(self, name: str, steps: int, tokens_per_step: int) -> None:
        self.names.append(name)

    def step(self, detail: str = "") -> None: ...

    def note(self, text: str) -> None: ...


@pytest.mark.parametrize(
    ("shared", "expected"),
    [
        (True, ["masks 1-2 of 4", "masks 2-4 of 4", "masks 4-4 of 4"]),
        (False, ["masks 1-5 of 12", "masks 6-10 of 12", "masks 11-12 of 12"]),
    ],
)
def test_progress_says_which_masks_are_evaluated(
    tmp_path: Path, shared: bool, expected: list[str]
) -> None:
    tiny, seen = tiny_llama(tmp_path / "m"), _Named()
    mask = KeepMask(tiny.spec.table)
    engine = tiny.engine(progress=seen, windows_in_flight=5)
    evaluator = _evaluator(engine, tiny.source(), shared=shared)
    evaluator.evaluate(_design(mask, MASKS if shared else MASKS * WINDOWS), MASKS)
    assert seen.names == [f"masked evaluation, {masks}" for masks in expected]


@pytest.mark.parametrize("shared", [True, False])
def test_a_second_batch_measures_its_windows_no_more(tiny: Tiny, shared: bool) -> None:
    """It is compared with what the first has measured, and says how far it is in the whole."""
    mask, progress = KeepMask(tiny.spec.table), _Named()
    engine = tiny.engine(progress=progress)
    number = MASKS if shared else MASKS * WINDOWS
    design = _design(mask, number)

    evaluator = _evaluator(engine, tiny.source(), shared=shared, masks=3 * MASKS)
    first = evaluator.evaluate(design, MASKS)
    spent = engine.sweep.forward_tokens
    assert spent == evaluator.tokens == (MASKS + 1) * WINDOWS * WINDOW
    second = evaluator.evaluate(design, MASKS)
    assert engine.sweep.forward_tokens - spent == MASKS * WINDOWS * WINDOW
    assert evaluator.budget_tokens == (3 * MASKS + 1) * WINDOWS * WINDOW
    torch.testing.assert_close(second.loss_I, first.loss_I, rtol=0, atol=1e-6)
    assert torch.equal(second.base_W, first.base_W) and second.base == first.base
    assert progress.names[-1] == (
        f"masked evaluation, masks {number + 1}-{2 * number} of {3 * number}"
    )


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_a_utility_that_is_no_number_is_refused(tiny: Tiny, value: float) -> None:
    engine, mask = tiny.engine(), KeepMask(tiny.spec.table)
    evaluator = _evaluator(
        engine, tiny.source(), shared=True, utility=lambda logits_SV, tokens_S: value
    )
    with pytest.raises(OptionError, match=rf"utility .*: returned {value}"):
        evaluator.evaluate(_design(mask, MASKS), MASKS)


def test_an_exception_of_a_utility_names_it_and_the_window(tiny: Tiny) -> None:
    def exact_match(logits_SV: torch.Tensor, tokens_S: torch.Tensor) -> float:
        raise KeyError("answer")

    engine, mask = tiny.engine(), KeepMask(tiny.spec.table)
    evaluator = _evaluator(engine, tiny.source(), shared=True, utility=exact_match)
    expected = r"utility .*exact_match, window that begins with tokens \d+, .*: raised KeyError"
    with pytest.raises(OptionError, match=expected) as caught:
        evaluator.evaluate(_design(mask, MASKS), MASKS)
    assert isinstance(caught.value.__cause__, KeyError)
