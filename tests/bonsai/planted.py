"""Masks of planted models, for the tests of the regressions."""

from __future__ import annotations

import torch


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pairs(observations: int) -> torch.Tensor:
    """A mask and its complement share a cluster."""
    return torch.arange(observations) // 2


def mask_pairs(observations: int, units: int, seed: int = 0) -> torch.Tensor:
    """Pairs of complements, half of the units off in each; bool ``[I, K]``."""
    order = torch.rand(observations // 2, units, generator=generator(seed)).argsort(1)
    off = order < units // 2
    return torch.stack([off, ~off], dim=1).flatten(0, 1)


def planted_units(units: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(units, generator=generator(seed + 50), dtype=torch.float64).square() * 3


def noise(count: int, size: float, seed: int = 7) -> torch.Tensor:
    return size * torch.randn(count, generator=generator(seed), dtype=torch.float64)


def amounts(observations: int, groups: int, seed: int = 1) -> torch.Tensor:
    half = torch.rand(observations // 2, groups, generator=generator(seed), dtype=torch.float64)
    return torch.stack([half, 1 - half], dim=1).flatten(0, 1)


def correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(torch.corrcoef(torch.stack([a, b]))[0, 1])
