"""The blocked factor against torch's own routines, over block borders."""

from __future__ import annotations

import pytest
import torch

from frugal_bonsai.bonsai.importance import factor as module
from frugal_bonsai.bonsai.importance.factor import DampedFactor
from frugal_bonsai.errors import CheckpointError


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK", 8)


def _gram(columns: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(columns)
    inputs = torch.randn(columns // 2 + 3, columns, generator=generator)
    return inputs.T @ inputs


def _inverse(gram: torch.Tensor, factor: DampedFactor) -> torch.Tensor:
    return torch.linalg.inv(gram.double() + factor.added * torch.eye(len(gram)))


SIZES = [1, 7, 8, 9, 16, 31, 40]


@pytest.mark.parametrize("columns", SIZES)
def test_solves_and_products(columns: int) -> None:
    gram, right = _gram(columns), torch.randn(5, columns, generator=torch.Generator())
    factor = DampedFactor(gram.clone(), 0.1, where="")
    assert factor.added == pytest.approx(0.1 * float(gram.diagonal().mean()))
    wanted = right.double() @ _inverse(gram, factor)
    torch.testing.assert_close(factor.solve(right).double(), wanted, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(factor.times_gram(right), right @ gram, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("columns", SIZES)
def test_the_matrix_can_be_brought_back_to_the_bit(columns: int) -> None:
    gram = (_gram(columns) + _gram(columns).T) / 2
    matrix = gram.clone()
    DampedFactor(matrix, 0.1, where="").restore()
    assert torch.equal(matrix, gram)


@pytest.mark.parametrize("columns", SIZES)
def test_diagonal_of_the_inverse(columns: int) -> None:
    gram = _gram(columns)
    factor = DampedFactor(gram.clone(), 0.1, where="")
    wanted = _inverse(gram, factor).diagonal()
    torch.testing.assert_close(factor.inverse_diagonal().double(), wanted, rtol=1e-4, atol=0)


@pytest.mark.parametrize("width", [1, 3, 5, 8, 12])
def test_blocks_of_the_inverse_whatever_their_width(width: int) -> None:
    gram = _gram(5 * width)
    factor = DampedFactor(gram.clone(), 0.1, where="")
    wanted = _inverse(gram, factor)
    for at, block in enumerate(factor.inverse_blocks(width)):
        own = slice(at * width, (at + 1) * width)
        torch.testing.assert_close(block.double(), wanted[own, own], rtol=1e-3, atol=1e-6)


def test_matrix_that_is_a_little_indefinite_gets_ten_times_the_damping_until_it_is_not() -> None:
    """As fp32 sums leave it: 1e-5 and 1e-4 of the mean diagonal are not enough, 1e-3 is."""
    values = torch.ones(20)
    values[11] = -1e-4
    factor = DampedFactor(torch.diag(values), 1e-5, where="here")
    assert factor.damping == 1e-5 and factor.added == pytest.approx(1e-3 * float(values.mean()))
    found = factor.solve(torch.ones(1, 20))[0]
    torch.testing.assert_close(found, 1 / (values + factor.added), rtol=1e-4, atol=0)


def test_activations_that_are_not_finite_are_refused() -> None:
    gram = torch.eye(3)
    gram[1, 1] = float("inf")
    with pytest.raises(CheckpointError, match="layer 3 ffn: activations are not finite"):
        DampedFactor(gram, 1e-3, where="layer 3 ffn")


def test_indefinite_matrix_is_refused() -> None:
    gram = torch.diag(torch.tensor([3.0, -30.0, 30.0]))
    with pytest.raises(CheckpointError, match=r"x: the Gram matrix .* is not positive definite"):
        DampedFactor(gram, 1e-3, where="x")
