"""Gram matrices: the closed forms against brute force."""

from __future__ import annotations

import pytest
import torch

from frugal_bonsai.bonsai.importance.factor import DampedFactor
from frugal_bonsai.bonsai.importance.gram import Moments, exact_loss_U
from frugal_bonsai.bonsai.reconstruction.least_squares import ridge_refit_

CPU = torch.device("cpu")
TOKENS, COLUMNS, HIDDEN = 400, 12, 7


def _inputs(seed: int = 0) -> torch.Tensor:
    """Correlated inputs with a mean, ``[T, C]``."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(COLUMNS, COLUMNS, generator=generator) + 2 * torch.eye(COLUMNS)
    return torch.randn(TOKENS, COLUMNS, generator=generator) @ mixed + 0.5


def factor_of(gram: torch.Tensor, damping: float) -> DampedFactor:
    return DampedFactor(gram.clone(), damping, where="here")


def _weight(seed: int = 1) -> torch.Tensor:
    return torch.randn(HIDDEN, COLUMNS, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("gram", [False, True])
def test_moments_over_micro_batches(gram: bool) -> None:
    inputs = _inputs()
    moments = Moments(COLUMNS, device=CPU, gram=gram)
    for part in inputs.view(20, 20, COLUMNS).split([7, 7, 6]):
        moments.add(part)
    assert moments.tokens == TOKENS
    exact = inputs.double()
    torch.testing.assert_close(moments.mean_square_C, exact.square().mean(0), rtol=1e-5, atol=0)
    torch.testing.assert_close(
        moments.variance_C, exact.var(0, unbiased=False), rtol=1e-4, atol=1e-6
    )
    if gram:
        expected = (exact.T @ exact).float()
        torch.testing.assert_close(moments.gram_CC, expected, rtol=1e-4, atol=1e-2)
    else:
        assert moments.gram_CC is None


def test_bf16_inputs_are_summed_in_fp32() -> None:
    inputs = _inputs().bfloat16()
    moments = Moments(COLUMNS, device=CPU, gram=True)
    moments.add(inputs[None])
    expected = inputs.double().square().mean(0)
    torch.testing.assert_close(moments.mean_square_C, expected, rtol=1e-5, atol=0)


def test_variance_of_a_constant_is_zero_and_never_negative() -> None:
    moments = Moments(2, device=CPU, gram=True)
    moments.add(torch.full((3, 50, 2), 1.1))
    assert (moments.variance_C >= 0).all() and (moments.variance_C < 1e-5).all()


@pytest.mark.parametrize("columns_per_unit", [1, 3, 4])
def test_exact_loss_is_what_the_best_refit_cannot_give_back(columns_per_unit: int) -> None:
    """min over W' without unit j of mean ||X W^T - X_kept W'^T||^2, by least squares."""
    inputs, weight = _inputs().double(), _weight().double()
    target = inputs @ weight.T
    brute = []
    for start in range(0, COLUMNS, columns_per_unit):
        keep = torch.ones(COLUMNS, dtype=torch.bool)
        keep[start : start + columns_per_unit] = False
        refit = torch.linalg.lstsq(inputs[:, keep], target).solution
        brute.append((target - inputs[:, keep] @ refit).square().sum() / TOKENS)
    gram = (inputs.T @ inputs / TOKENS).float()
    found = exact_loss_U(factor_of(gram, 1e-7), weight.float(), columns_per_unit)
    assert found.shape == (COLUMNS // columns_per_unit,)
    torch.testing.assert_close(found.double(), torch.stack(brute), rtol=1e-3, atol=0)


def test_blocks_of_one_column_equal_the_column_form() -> None:
    """A block of two where the second column is never used."""
    inputs, weight = _inputs(), _weight()
    wide_inputs, wide_weight = torch.zeros(TOKENS, 2 * COLUMNS), torch.zeros(HIDDEN, 2 * COLUMNS)
    wide_inputs[:, ::2], wide_weight[:, ::2] = inputs, weight
    plain = exact_loss_U(factor_of(inputs.T @ inputs, 1e-6), weight, 1)
    # Its mean diagonal is half as large, so that half the damping share is the same damping.
    blocks = exact_loss_U(factor_of(wide_inputs.T @ wide_inputs, 2e-6), wide_weight, 2)
    torch.testing.assert_close(plain, blocks, rtol=1e-3, atol=0)


@pytest.mark.parametrize("ridge", [1e-4, 1e-2, 1.0])
def test_refit_is_the_least_squares_solution_of_the_augmented_system(ridge: float) -> None:
    """[X; sqrt(lambda) I] W' = [T; sqrt(lambda) W], lambda a share of the mean diagonal."""
    inputs, anchor = _inputs().double(), _weight().double()
    noise = torch.randn(TOKENS, HIDDEN, generator=torch.Generator().manual_seed(3)).double()
    target = inputs @ _weight(9).double().T + noise
    gram = inputs.T @ inputs
    root = (ridge * gram.diagonal().mean()).sqrt()
    rows = torch.cat([inputs, root * torch.eye(COLUMNS, dtype=torch.float64)])
    wanted = torch.cat([target, root * anchor.T])
    expected = torch.linalg.lstsq(rows, wanted).solution.T
    found = (target.T @ inputs).float()
    explained = ridge_refit_(factor_of(gram.float(), ridge), found, anchor.float())
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-4)
    left = (target - inputs @ expected.T).square().sum()
    assert explained == pytest.approx(float(target.square().sum() - left), rel=1e-4)


def test_refit_of_what_fits_already_changes_nothing() -> None:
    inputs, anchor = _inputs(), _weight()
    found = (inputs @ anchor.T).T @ inputs
    ridge_refit_(factor_of(inputs.T @ inputs, 1e-3), found, anchor)
    torch.testing.assert_close(found, anchor, rtol=1e-4, atol=1e-4)


def test_dead_inputs_do_not_divide_by_zero() -> None:
    loss = exact_loss_U(factor_of(torch.zeros(4, 4), 1e-4), torch.ones(2, 4), 1)
    assert loss.isfinite().all() and (loss < 1e-30).all()


def test_moments_factor_again_for_another_damping() -> None:
    moments = Moments(COLUMNS, device=CPU, gram=True)
    moments.add(_inputs()[None])
    assert moments.gram_CC is not None
    gram = moments.gram_CC.clone()
    first = moments.factor(1e-2, where="here")
    assert moments.factor(1e-2, where="here") is first
    second = moments.factor(1e-1, where="here")
    wanted = torch.linalg.inv(gram.double() + second.added * torch.eye(COLUMNS)).diagonal()
    torch.testing.assert_close(second.inverse_diagonal().double(), wanted, rtol=1e-4, atol=0)
    assert second.added == pytest.approx(10 * first.added)
