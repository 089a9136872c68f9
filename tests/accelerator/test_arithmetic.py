"""Operations for which an accelerator has code of its own give the CPU's numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from stand_in_device import Machine, installed
from tiny_models import relative, tiny_llama

from frugal_bonsai.bonsai.importance.factor import DampedFactor
from frugal_bonsai.bonsai.importance.gram import Moments, add_product_
from frugal_bonsai.bonsai.importance.imputation import Imputations
from frugal_bonsai.bonsai.reconstruction.least_squares import LeastSquares, ridge_refit_
from frugal_bonsai.stream.store import INT8, build_head_store, build_store

BF16 = torch.bfloat16


@pytest.fixture
def operators(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """Count the calls of each operation on the device."""
    seen: Counter[str] = Counter()
    run = type(machine).run

    def watched(self: Machine, func: Any, args: Any, kwargs: Any) -> Any:
        seen[func.name()] += 1
        return run(self, func, args, kwargs)

    monkeypatch.setattr(type(machine), "run", watched)
    yield seen


def _random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_products_of_16_bit_factors_are_summed_in_fp32(
    machine: Machine, operators: Counter[str]
) -> None:
    """Finding 5: as exact as converting the factors first, in one product of the factors."""
    left, right = _random(40, 6).to(BF16), _random(40, 5, seed=1).to(BF16)
    begun = _random(6, 5, seed=2)
    found = begun.to(machine.device)
    add_product_(found, left.to(machine.device), right.to(machine.device))
    assert operators["aten::addmm.dtype_out"] == 1
    exact = begun.double() + left.double().T @ right.double()
    assert relative(found.cpu().double(), exact) < 1e-6
    add_product_(begun, left, right)
    assert torch.equal(found.cpu(), begun), "a CPU converts them first"


def test_fp32_factors_stay_fp32(machine: Machine, operators: Counter[str]) -> None:
    sums = torch.zeros(6, 6, device=machine.device)
    left = _random(9, 6).to(machine.device)
    add_product_(sums, left, left)
    assert operators["aten::addmm.dtype_out"] == 0 and operators["aten::addmm_"] == 1


def test_moments_and_cross_moments_are_those_of_a_cpu(machine: Machine) -> None:
    inputs, targets = _random(3, 8, 6).to(BF16), _random(3, 8, 5, seed=1).to(BF16)
    found = []
    for device in (torch.device("cpu"), machine.device):
        problem = LeastSquares(torch.zeros(5, 6, device=device))
        moments = problem.moments
        for _ in range(2):
            moments.add(inputs.to(device))
            problem.add_targets(inputs.to(device), targets.to(device))
        assert moments.gram_CC is not None
        sums = (moments.gram_CC, moments.sum_C, problem.weight_HC)
        found.append([*(one.cpu() for one in sums), problem._energy.cpu()])
    for one, other in zip(*found, strict=True):
        assert torch.allclose(one, other, rtol=1e-6)


def test_sums_are_fp32_where_there_is_no_fp64() -> None:
    with installed("mps") as machine:
        moments = Moments(6, device=machine.device, gram=False)
        moments.add(_random(3, 8, 6).to(BF16).to(machine.device))
        assert moments.variance_C.dtype == torch.float32


@pytest.mark.parametrize("rows", [100, 2048])
def test_a_gpu_solves_for_a_thousand_rows_at_a_time(
    rows: int, machine: Machine, operators: Counter[str]
) -> None:
    """Finding 12: 128 rows are a small part of a GPU."""
    inputs = _random(60, 12)
    gram, cross, anchor = inputs.T @ inputs, _random(rows, 12, seed=1), _random(rows, 12, seed=2)
    on_cpu = cross.clone()
    factor = DampedFactor(gram.clone(), 1e-3, where="here")
    explained = ridge_refit_(factor, on_cpu, anchor)
    there = [one.to(machine.device) for one in (gram, cross, anchor)]
    factor = DampedFactor(there[0], 1e-3, where="here")
    operators.clear()
    assert ridge_refit_(factor, there[1], there[2]) == pytest.approx(explained, rel=1e-4)
    assert operators["aten::linalg_solve_triangular"] == 2 * -(-rows // 1024)
    assert relative(there[1].cpu(), on_cpu) < 1e-4


def test_a_store_that_a_gpu_quantises_has_the_same_bytes(
    machine: Machine, operators: Counter[str], tmp_path: Path
) -> None:
    """Finding 6: the device is not idle while the host quantises."""
    tiny = tiny_llama(tmp_path / "m", dtype=BF16)
    model = (tiny.checkpoint, tiny.spec)
    operators.clear()
    build_store(tmp_path / "host", *model, weights=INT8).close()
    build_head_store(tmp_path / "host-head", *model, rows=20).close()
    assert operators["aten::round"] > 0 and not machine.pageable, "on the host"
    build_store(tmp_path / "there", *model, weights=INT8, device=machine.device).close()
    build_head_store(tmp_path / "there-head", *model, rows=20, device=machine.device).close()
    assert {where.split(":")[0] for _, where in machine.pageable} == {"stream/store.py"}
    for kind in ("", "-head"):
        files = sorted((tmp_path / f"host{kind}").iterdir())
        assert files
        for file in files:
            assert file.read_bytes() == (tmp_path / f"there{kind}" / file.name).read_bytes()
    tiny.checkpoint.close()


def test_the_next_groups_stand_ins_are_read_ahead(machine: Machine, tmp_path: Path) -> None:
    """Finding 7: into pinned memory, in a thread of their own, and converted on the device."""
    tiny = tiny_llama(tmp_path / "m")
    groups, read = tiny.spec.table.groups, list[Any]()

    def saved(group: Any) -> dict[str, torch.Tensor] | None:
        read.append(group)
        if group.layer == 1:
            return None
        pool = torch.arange(2)
        return {"columns": pool, "matrix": torch.ones(2, group.columns - 2).half()}

    imputations = Imputations(saved, groups, machine.device)
    for group in groups:
        hidden = torch.ones(1, 2, group.columns, dtype=BF16, device=machine.device)
        given = imputations.of(group, hidden)
        if group.layer == 1:
            assert given is None
            continue
        assert given is not None and given[1].dtype == BF16
        assert float(given[1][0, 0, 0]) == group.columns - 2
    assert imputations._ahead is not None
    imputations._ahead[1].result()
    assert read == [*groups, groups[0]], "each once, and the first of the next sweep"
    assert not machine.pageable
    tiny.checkpoint.close()
