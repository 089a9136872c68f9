"""The planner is pure: shapes and caps in, items or a refusal out."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from plan_shapes import LLAMA_1B, LLAMA_8B, LLAMA_70B

from frugal_bonsai.errors import BudgetError
from frugal_bonsai.memory.budget import Budget
from frugal_bonsai.memory.plan import MemoryPlan, PruneWorkload, SweepWorkload, plan_memory
from frugal_bonsai.model.family import ModelSpec
from frugal_bonsai.sizes import GIB, MIB

WORK = PruneWorkload(
    window=2048,
    windows=32,
    measured=(4,),
    weights="int8",
    source_bytes=2,
    goals=(0.26,),
    part_windows=32,
    mask_windows=16,
    mask_batches=(12,),
    exact_importance=True,
    imputation_pool=1.0,
    reconstruction=True,
    refit_inputs=True,
    channel_updates=2,
)
NO_GRAM: dict[str, Any] = {
    "reconstruction": False,
    "exact_importance": False,
    "imputation_pool": 0.0,
}


def cuda(gib: float, host_gib: float = 64) -> Budget:
    return Budget(device="cuda", host_bytes=int(host_gib * GIB), gpu_bytes=int(gib * GIB))


def item(plan: MemoryPlan, name: str, where: str) -> int:
    return next(i.size_bytes for i in plan.items if i.name == name and i.where == where)


def test_parameters_of_the_shapes() -> None:
    assert LLAMA_8B.parameters == 8_030_261_248
    assert LLAMA_70B.parameters == 70_553_706_496


def test_the_cache_of_written_text_is_planned() -> None:
    work = replace(WORK, written=64, written_together=10)
    plan = plan_memory(LLAMA_8B, cuda(24), work, base_bytes=500 * MIB)
    (phase,) = [phase for phase in plan.phases if phase.name == "writing text"]
    (cache,) = [i for i in phase.items if i.name == "KV cache of the text that is written"]
    # Texts of 256 tokens, whatever the window.
    each = (33 + 4) * 2 * 256 * 8 * 128 * 2 + 128256 * 12
    assert (cache.size_bytes, cache.where) == (10 * each, "gpu")
    assert work.written_texts == 64 * 2048 // 256


def test_the_cache_of_sampled_windows_is_planned_and_refused_by_its_name() -> None:
    work = replace(WORK, sampled=36)
    name = "KV cache of the text that is sampled"
    plan = plan_memory(LLAMA_8B, cuda(24), work, base_bytes=500 * MIB)
    cache_of_a_layer = 2 * 36 * 2048 * 8 * 128 * 2  # keys and values in bf16
    (cache,) = [i for i in plan.phases[0].items if i.name == name]
    assert plan.phases[0].name == "sampling"
    # 32 layers and the old cache of one; attention repeats it for four query heads a KV head.
    expected = (33 + 4) * cache_of_a_layer + 36 * 128256 * 12
    assert (cache.size_bytes, cache.where) == (expected, "gpu")
    without = plan_memory(LLAMA_8B, cuda(24), WORK, base_bytes=500 * MIB)
    assert not any(name == i.name for phase in without.phases for i in phase.items)
    with pytest.raises(BudgetError, match=name):
        plan_memory(LLAMA_8B, cuda(8), work, base_bytes=500 * MIB)


def test_a_place_holds_what_its_fullest_phase_holds() -> None:
    plan = plan_memory(LLAMA_8B, cuda(24), WORK, base_bytes=500 * MIB)
    for where in ("gpu", "host"):
        totals = [phase.total_bytes(where) for phase in plan.phases]
        assert plan.total_bytes(where) == max(totals) > min(totals)
        assert sum(i.size_bytes for i in plan.items if i.where == where) == max(totals)
    names = [phase.name for phase in plan.phases]
    assert names == [
        "perplexity: layers",
        "perplexity: head",
        "building the store",
        "statistics: layers",
        "statistics: scores",
        "masked evaluation: layers",
        "masked evaluation: head",
        "recovery: layers",
        "recovery: solve",
        "refinement: channels",
        "refinement: layers",
        "refinement: solve",
        "recovery: head",
        "rewriting",
        "verifying: layers",
        "verifying: head",
    ]
    building = plan.phases[2]
    assert not any("Gram" in item.name for item in building.items)


def test_scores_without_gram_matrices_are_a_phase_too() -> None:
    """Wanda's and the like: statistics of all windows, and the weight that is scored."""
    work = PruneWorkload(
        window=256, windows=8, weights="int8", source_bytes=2, goals=(0.5,), part_windows=8
    )
    budget = Budget(device="cpu", host_bytes=8 * GIB)
    plan = plan_memory(LLAMA_8B, budget, work, base_bytes=500 * MIB)
    (scores,) = [phase for phase in plan.phases if phase.name == "statistics: scores"]
    sizes = {item.name: item.size_bytes for item in scores.items}
    assert sizes["weight that is scored"] == 4096 * 14336 * 4
    assert sizes["hidden states"] == 8 * 256 * 4096 * 4
    assert not any("Gram" in name or "solve" in name for name in sizes)


@pytest.mark.parametrize("window", [256, 480])
def test_a_1b_model_is_planned_under_2_gb_of_host_memory(window: int) -> None:
    """32 windows, the whole prune with recovery of all projections, on a CPU."""
    work = replace(WORK, window=window)
    budget = Budget(device="cpu", host_bytes=2 * 10**9)
    plan = plan_memory(LLAMA_1B, budget, work, base_bytes=460 * MIB)
    assert plan.total_bytes("host") <= 2 * 10**9
    assert plan.limits.layer_buffers == (2 if window == 256 else 1)


def test_an_8b_model_is_planned_under_8_gb_of_gpu_memory() -> None:
    budget = Budget(device="cuda", host_bytes=32 * GIB, gpu_bytes=8 * 10**9)
    plan = plan_memory(LLAMA_8B, budget, WORK, base_bytes=500 * MIB)
    assert plan.total_bytes("gpu") <= 8 * 10**9
    assert plan.limits.micro_batch >= 4


@pytest.mark.parametrize("gib", [8, 12, 24, 48])
def test_totals_never_pass_the_caps(gib: int) -> None:
    plan = plan_memory(LLAMA_8B, cuda(gib), WORK, base_bytes=500 * MIB)
    assert plan.total_bytes("gpu") <= gib * GIB
    assert plan.total_bytes("host") <= 64 * GIB


def test_a_larger_cap_never_gives_less() -> None:
    work = replace(WORK, **NO_GRAM, windows=1)
    plans = [
        plan_memory(LLAMA_70B, cuda(gib), work, base_bytes=500 * MIB)
        for gib in (12, 16, 24, 48, 80)
    ]
    for smaller, larger in pairwise(plans):
        assert smaller.limits.micro_batch <= larger.limits.micro_batch
        assert smaller.limits.resident_windows <= larger.limits.resident_windows
    assert plans[0].limits.resident_windows < plans[-1].limits.resident_windows


def test_a_cpu_holds_everything_on_the_host() -> None:
    plan = plan_memory(
        LLAMA_8B, Budget(device="cpu", host_bytes=32 * GIB), WORK, base_bytes=500 * MIB
    )
    assert plan.total_bytes("gpu") == 0
    assert plan.total_bytes("host") <= 32 * GIB
    assert item(plan, "dequantised layer", "host") == 2 * 4 * 218_112_000


def refused_bytes(spec: ModelSpec, work: PruneWorkload) -> int:
    """The smallest cap of a CPU."""
    with pytest.raises(BudgetError) as refusal:
        plan_memory(spec, Budget(device="cpu", host_bytes=1), work, base_bytes=500 * MIB)
    needed = refusal.value.needed_bytes
    assert needed is not None
    return needed


@pytest.mark.parametrize(("spec", "gib"), [(LLAMA_1B, 1.9), (LLAMA_8B, 4.5)])
def test_hidden_states_lie_on_disk_where_the_host_is_too_small(spec: ModelSpec, gib: float) -> None:
    work = replace(WORK, written=64)
    smallest = refused_bytes(spec, work)
    # More windows take more disk, not more memory.
    assert smallest == refused_bytes(spec, replace(work, written=640)) < gib * GIB
    plans = [
        plan_memory(spec, Budget(device="cpu", host_bytes=cap), work, base_bytes=500 * MIB)
        for cap in (smallest, smallest + 3 * GIB, 32 * GIB)
    ]
    for plan in plans[:2]:
        assert plan.limits.on_disk and plan.total_bytes("host") <= plan.budget.host_bytes
        assert plan.disk.total_bytes - plans[2].disk.total_bytes == plan.spilled_bytes > 0
    # Both models' hidden states, and those of a sublayer.
    each = 2048 * spec.hidden * 4
    assert plans[0].limits.resident_windows == 0 and plans[0].spilled_bytes == 3 * 96 * each
    assert plans[1].limits.resident_windows > 0
    assert plans[1].spilled_bytes < plans[0].spilled_bytes
    # Memory is preferred.
    assert not plans[2].limits.on_disk and plans[2].spilled_bytes == 0


def test_only_a_prune_on_a_cpu_spills_to_disk() -> None:
    assert not plan_memory(LLAMA_8B, cuda(12), WORK, base_bytes=500 * MIB).limits.on_disk
    evaluation = SweepWorkload(window=2048, measured=(512,), weights=None)
    with pytest.raises(BudgetError) as refusal:
        budget = Budget(device="cpu", host_bytes=1)
        plan_memory(LLAMA_8B, budget, evaluation, base_bytes=500 * MIB)
    assert refusal.value.needed_bytes is not None
    budget = Budget(device="cpu", host_bytes=refusal.value.needed_bytes)
    plan = plan_memory(LLAMA_8B, budget, evaluation, base_bytes=500 * MIB)
    assert not plan.limits.on_disk and plan.limits.windows_in_flight == 1


def test_recovery_needs_all_its_windows_in_flight() -> None:
    plan = plan_memory(LLAMA_8B, cuda(24), WORK, base_bytes=500 * MIB)
    assert plan.limits.windows_in_flight >= WORK.windows


def test_no_more_windows_are_in_flight_than_pay() -> None:
    """The published settings have 6,432 pairs: all of them would pin 100 GiB of host memory."""
    work = replace(WORK, mask_windows=32, mask_batches=(200,), shared_masks=True)
    plan = plan_memory(LLAMA_8B, cuda(24, host_gib=500), work, base_bytes=500 * MIB)
    assert plan.limits.windows_in_flight == 2**19 // 2048
    many = replace(work, windows=300)
    plan = plan_memory(LLAMA_8B, cuda(24, host_gib=500), many, base_bytes=500 * MIB)
    assert plan.limits.windows_in_flight == 300
    cpu = Budget(device="cpu", host_bytes=500 * GIB)
    assert plan_memory(LLAMA_8B, cpu, work, base_bytes=500 * MIB).limits.windows_in_flight == 6432


@pytest.mark.parametrize("kind", ["mps"])
def test_where_a_gpu_computes_in_host_memory_everything_is_there(kind: str) -> None:
    plan = plan_memory(
        LLAMA_1B, Budget(device=kind, host_bytes=16 * GIB), WORK, base_bytes=500 * MIB
    )
    assert plan.total_bytes("gpu") == 0
    names = [item.name for item in plan.items if item.where == "host"]
    assert "hidden states" in names and "layer buffers" in names
    on_cpu = plan_memory(
        LLAMA_1B, Budget(device="cpu", host_bytes=16 * GIB), WORK, base_bytes=500 * MIB
    )
    # bf16 instead of fp32.
    states = [item(plan, "hidden states", "host") for plan in (plan, on_cpu)]
    assert states[1] == 2 * states[0]


def test_masks_share_a_wave() -> None:
    work = replace(WORK, mask_windows=32, mask_batches=(199,), shared_masks=True, **NO_GRAM)
    plan = plan_memory(LLAMA_8B, cuda(24, host_gib=8), work, base_bytes=500 * MIB)
    together = work.concurrent_masks(plan.limits.windows_in_flight)
    assert together == plan.limits.windows_in_flight // 32
    assert 1 <= together < 200


@pytest.mark.parametrize(("gib", "host"), [(2, 64), (24, 1)])
def test_a_refusal_names_the_item_and_a_cap_that_works(gib: float, host: float) -> None:
    with pytest.raises(BudgetError) as refusal:
        plan_memory(LLAMA_8B, cuda(gib, host), WORK, base_bytes=500 * MIB)
    text = str(refusal.value)
    option = "--max-gpu-mem" if gib == 2 else "--max-cpu-mem"
    assert f"smallest {option} that works is" in text and "largest item" in text
    smallest = int(text.split("that works is ")[1].split("MiB")[0])
    enough = smallest * MIB / GIB
    budget = cuda(enough, host) if gib == 2 else cuda(gib, enough)
    plan_memory(LLAMA_8B, budget, WORK, base_bytes=500 * MIB)
    less = (smallest - 1) * MIB / GIB
    budget = cuda(less, host) if gib == 2 else cuda(gib, less)
    with pytest.raises(BudgetError):
        plan_memory(LLAMA_8B, budget, WORK, base_bytes=500 * MIB)


def refused(spec: ModelSpec, budget: Budget, work: PruneWorkload) -> str:
    with pytest.raises(BudgetError) as refusal:
        plan_memory(spec, budget, work, base_bytes=500 * MIB)
    return str(refusal.value).partition(" works is ")[2]


def test_a_refusal_advises_what_was_tried_and_fits() -> None:
    """On the shapes of a 70B model fewer windows need as much as many do."""
    without = replace(WORK, channel_updates=0)
    with pytest.raises(BudgetError) as refusal:
        plan_memory(LLAMA_70B, cuda(2), without, base_bytes=500 * MIB)
    enough = cuda((refusal.value.needed_bytes + MIB) / GIB)
    text = refused(LLAMA_70B, enough, WORK)
    assert "it fits with --refine 0 or with --no-recovery" in text
    assert "--windows" not in text
    plan_memory(LLAMA_70B, enough, without, base_bytes=500 * MIB)
    assert "fits with" not in refused(LLAMA_70B, cuda(0.7), WORK)


def test_fewer_windows_are_advised_where_they_help() -> None:
    many = replace(WORK, windows=2048, part_windows=2048, sampled=2300)
    budget = cuda(24, host_gib=2)
    text = refused(LLAMA_1B, budget, many)
    found = int(text.partition("fits with --windows ")[2])
    fewer = replace(WORK, windows=found, part_windows=found, sampled=found + found // 8)
    plan_memory(LLAMA_1B, budget, fewer, base_bytes=500 * MIB)


def test_the_binding_item_is_the_largest_that_can_change() -> None:
    plan = plan_memory(LLAMA_8B, cuda(24), WORK, base_bytes=500 * MIB)
    largest = max(i.size_bytes for i in plan.items if i.where == "gpu")
    assert plan.binding.size_bytes == largest
