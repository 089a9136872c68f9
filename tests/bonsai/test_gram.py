"""Gram matrices: the closed forms against brute force."""

from __future__ import annotations

import pytest
import torch

from frugal_bonsai.bonsai.gram import Moments, damped_factor, exact_loss_U, ridge_refit
from frugal_bonsai.errors import CheckpointError

CPU = torch.device("cpu")
TOKENS, COLUMNS, HIDDEN = 400, 12, 7


def _inputs(seed: int = 0) -> torch.Tensor:
    """Correlated inputs with a mean, ``[T, C]``."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(COLUMNS, COLUMNS, generator=generator) + 2 * torch.eye(COLUMNS)
    return torch.randn(TOKENS, COLUMNS, generator=generator) @ mixed + 0.5


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
    found = exact_loss_U(gram, weight.float(), columns_per_unit, damping=1e-7, where="here")
    assert found.shape == (COLUMNS // columns_per_unit,)
    torch.testing.assert_close(found.double(), torch.stack(brute), rtol=1e-3, atol=0)


def test_blocks_of_one_column_equal_the_column_form() -> None:
    """A block of two where the second column is never used."""
    inputs, weight = _inputs(), _weight()
    wide_inputs, wide_weight = torch.zeros(TOKENS, 2 * COLUMNS), torch.zeros(HIDDEN, 2 * COLUMNS)
    wide_inputs[:, ::2], wide_weight[:, ::2] = inputs, weight
    plain = exact_loss_U(inputs.T @ inputs, weight, 1, damping=1e-6, where="")
    # Its mean diagonal is half as large, so that half the damping share is the same damping.
    blocks = exact_loss_U(wide_inputs.T @ wide_inputs, wide_weight, 2, damping=2e-6, where="")
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
    found = ridge_refit(
        gram.float(), (inputs.T @ target).float(), anchor.float(), ridge=ridge, where=""
    )
    assert found.shape == (HIDDEN, COLUMNS) and found.is_contiguous()
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-4)


def test_refit_of_what_fits_already_changes_nothing() -> None:
    inputs, anchor = _inputs(), _weight()
    found = ridge_refit(
        inputs.T @ inputs, inputs.T @ (inputs @ anchor.T), anchor, ridge=1e-3, where=""
    )
    torch.testing.assert_close(found, anchor, rtol=1e-4, atol=1e-4)


def test_matrix_that_is_a_little_indefinite_gets_ten_times_the_damping_until_it_is_not() -> None:
    """As fp32 sums leave it: 1e-5 and 1e-4 of the mean diagonal are not enough, 1e-3 is."""
    gram = torch.diag(torch.tensor([1.0, 1.0, -1e-4]))
    factor = damped_factor(gram, 1e-5, where="here")
    added = (factor @ factor.T - gram).diagonal()
    torch.testing.assert_close(added, torch.full((3,), 1e-3 * 2 / 3), rtol=1e-2, atol=0)
    assert torch.equal(gram, torch.diag(torch.tensor([1.0, 1.0, -1e-4])))


def test_dead_inputs_do_not_divide_by_zero() -> None:
    loss = exact_loss_U(torch.zeros(4, 4), torch.ones(2, 4), 1, damping=1e-4, where="here")
    assert loss.isfinite().all() and (loss < 1e-30).all()


def test_activations_that_are_not_finite_are_refused() -> None:
    gram = torch.eye(3)
    gram[1, 1] = float("inf")
    with pytest.raises(CheckpointError, match="layer 3 ffn: activations are not finite"):
        damped_factor(gram, 1e-3, where="layer 3 ffn")


def test_indefinite_matrix_is_refused() -> None:
    gram = torch.diag(torch.tensor([3.0, -30.0, 30.0]))
    with pytest.raises(CheckpointError, match=r"x: the Gram matrix .* is not positive definite"):
        damped_factor(gram, 1e-3, where="x")
