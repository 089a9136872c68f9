"""Gram products in three arithmetics, and solves with their factor: seconds and errors."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import torch

from frugal_bonsai.accelerator import fast_products
from frugal_bonsai.bonsai.importance.factor import DampedFactor
from frugal_bonsai.bonsai.importance.gram import add_product_
from gpu_checks.check import Check
from gpu_checks.machine import best_seconds, once

_BLOCK = 256


def gram(check: Check, variant: str | None = None) -> None:
    """Products of the inputs of an 8B down_proj, then its factor and refits of 4,096 rows."""
    tokens, columns, rows = (512, 320, 256) if check.dry else (16384, 14336, 4096)
    generator = torch.Generator().manual_seed(0)
    # Columns of very different size, as activations have them.
    scale_C = torch.randn(columns, generator=generator).exp()
    noise = torch.Generator(check.full_device).manual_seed(0)
    drawn_TC = torch.randn(tokens, columns, generator=noise, device=noise.device)
    input_TC = (drawn_TC.to(check.device) * scale_C.to(check.device)).bfloat16()
    del drawn_TC
    _products(check, input_TC)
    with check.part("solves"):
        _solves(check, input_TC, rows)


def _products(check: Check, input_TC: torch.Tensor) -> None:
    block_TB = input_TC[:, :_BLOCK].double()
    exact_BB = block_TB.T @ block_TB
    columns = input_TC.shape[1]
    gram_CC = torch.zeros(columns, columns, device=check.device)

    def whole() -> torch.Tensor:
        wide_TC = input_TC.float()
        return gram_CC.addmm_(wide_TC.T, wide_TC)

    def summed_in_fp32() -> torch.Tensor:
        add_product_(gram_CC, input_TC, input_TC)  # what a prune does
        return gram_CC

    def narrow() -> torch.Tensor:
        return gram_CC.add_(input_TC.T @ input_TC)

    kinds: list[tuple[str, bool, Callable[[], torch.Tensor]]] = [
        ("fp32", False, whole),
        ("TF32", True, whole),
        ("bf16 inputs, fp32 sums", False, summed_in_fp32),
        ("bf16 inputs, bf16 results", False, narrow),
    ]
    for name, tensor_float, run in kinds:
        with check.part(name), fast_products(check.device) if tensor_float else nullcontext():
            gram_CC.zero_()
            found_BB = run()[:_BLOCK, :_BLOCK].double()
            error = (found_BB - exact_BB).norm() / exact_BB.norm()
            seconds = best_seconds(check.device, run, repeat=2)
            check.figure(
                "Gram products",
                arithmetic=name,
                tokens=len(input_TC),
                columns=columns,
                seconds=seconds,
                teraflops=2 * len(input_TC) * columns**2 / seconds / 1e12,
                relative_error=float(error),
            )


def _solves(check: Check, input_TC: torch.Tensor, rows: int) -> None:
    wide_TC = input_TC.float()
    gram_CC = wide_TC.T @ wide_TC
    del wide_TC
    kept_CC, columns = gram_CC.clone(), len(gram_CC)
    seconds, factor = once(check.device, lambda: DampedFactor(gram_CC, 1e-3, where="gpu_check"))
    check.figure(
        "a factor and its solves",
        what="factor",
        columns=columns,
        seconds=seconds,
        teraflops=columns**3 / 3 / seconds / 1e12,
    )
    right_RC = torch.ones(rows, columns, device=check.device)
    for at_once in (128, 1024):

        def solve(at_once: int = at_once) -> torch.Tensor:
            return torch.cat([factor.solve(part) for part in right_RC.split(at_once)])

        seconds = best_seconds(check.device, solve, repeat=1)
        found_C = solve()[0].double()
        left_C = found_C @ kept_CC.double() + factor.added * found_C - 1.0
        check.figure(
            "a factor and its solves",
            what=f"{rows} rows solved, {at_once} at a time",
            columns=columns,
            seconds=seconds,
            teraflops=2 * rows * columns**2 / seconds / 1e12,
            relative_residual=float(left_C.norm() / columns**0.5),
        )
    seconds, _ = once(check.device, factor.inverse_diagonal)
    check.figure(
        "a factor and its solves",
        what="inverse",
        columns=columns,
        seconds=seconds,
        teraflops=columns**3 / 3 / seconds / 1e12,
    )
