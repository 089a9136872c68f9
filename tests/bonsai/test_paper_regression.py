"""The paper's regression, on a grid cut down to what a test can wait for."""

from __future__ import annotations

import pytest
import torch
from scipy.stats import kendalltau

from frugal_bonsai.bonsai.masks import paper as paper_regression
from frugal_bonsai.bonsai.masks.paper import fit_paper

# As imported, before the fixture cuts the grid down.
PUBLISHED = (
    paper_regression.PENALTIES,
    paper_regression.RATE_FACTORS,
    paper_regression.BATCHES,
    paper_regression.EPOCHS,
)


@pytest.fixture(autouse=True)
def small_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paper_regression, "PENALTIES", (1e-4, 0.0))
    monkeypatch.setattr(paper_regression, "RATE_FACTORS", (10.0, 0.1))
    monkeypatch.setattr(paper_regression, "BATCHES", (32,))
    monkeypatch.setattr(paper_regression, "EPOCHS", 25)


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _problem(noise: float = 0.0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    units, pairs = 12, 40
    off = torch.rand(pairs, units, generator=_generator(1)).argsort(1) < units // 2
    off = torch.stack([off, ~off], dim=1).flatten(0, 1).double()
    planted = torch.linspace(0, 3, units, dtype=torch.float64)[
        torch.randperm(units, generator=_generator(2))
    ]
    loss = off @ planted + noise * torch.randn(2 * pairs, generator=_generator(3)).double()
    return off, loss, planted


def test_grid_is_the_published_one() -> None:
    assert PUBLISHED == ((100.0, 1e-4, 0.0), (100.0, 10.0, 1.0, 0.1), (32, 64, 128), 50)
    assert paper_regression.FOLDS == 5


def test_planted_coefficients_are_ranked() -> None:
    off, loss, planted = _problem(noise=0.1)
    fit = fit_paper(off, loss, _generator())
    assert kendalltau(fit.relevance_K.numpy(), planted.numpy()).statistic > 0.8
    assert fit.tau > 0.6
    assert fit.relevance_K.dtype == torch.float64 and fit.relevance_K.shape == planted.shape
    assert fit.penalty.split()[0] in ("l1", "l2") and "batch 32" in fit.penalty


def test_relevance_is_the_loss_of_switching_off_not_on() -> None:
    """A unit whose removal costs much must be kept: the sign is that of every other regression."""
    off, loss, planted = _problem()
    relevance = fit_paper(off, loss, _generator()).relevance_K
    assert relevance[planted.argmax()] > relevance[planted.argmin()]


def test_follows_its_generator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paper_regression, "EPOCHS", 5)  # equal after five, equal after fifty
    off, loss, _ = _problem(noise=0.5)
    first, again = (fit_paper(off, loss, _generator(5)) for _ in range(2))
    assert torch.equal(first.relevance_K, again.relevance_K) and first.tau == again.tau
    assert first.r2 == again.r2


def test_noise_scores_low() -> None:
    off, _, _ = _problem()
    loss = torch.randn(len(off), generator=_generator(9)).double()
    fit = fit_paper(off, loss, _generator())
    assert fit.r2 < 0.2


@pytest.mark.filterwarnings("ignore:One or more sample arguments is too small")
@pytest.mark.parametrize("observations", [2, 3])
def test_few_masks(observations: int) -> None:
    off, loss, _ = _problem()
    fit = fit_paper(off[:observations], loss[:observations], _generator())
    assert fit.relevance_K.isfinite().all()
