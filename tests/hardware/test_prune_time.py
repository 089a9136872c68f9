"""Phases of a prune: which there are, what binds them, and totals computed by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import profiles
import pytest
import torch

from frugal_bonsai.hardware.profile import HardwareProfile
from frugal_bonsai.hardware.prune_time import PruneTime
from frugal_bonsai.hardware.throughput import TimeEstimate, TimePhase
from frugal_bonsai.memory.budget import Budget
from frugal_bonsai.memory.phases import MemoryPhase
from frugal_bonsai.memory.plan import MemoryPlan
from frugal_bonsai.memory.work import HOST, PlanItem, PruneWorkload, SweepLimits
from frugal_bonsai.run.open import open_model
from frugal_bonsai.stream.operations import count_operations

with open_model("example") as model:
    SPEC = model.spec
OPERATIONS = count_operations(SPEC, 256, torch.float32)
LAYERS, P, BLOCKS = 6, 192 * (512 + 256) + 3 * 192 * 512, 2_656_512
LIMITS = SweepLimits(
    micro_batch=4, windows_in_flight=100, resident_windows=0, head_rows=4096, head_tokens=1024
)
WORK = PruneWorkload(
    window=256,
    windows=32,
    measured=(4,),
    weights="int8",
    source_bytes=2,
    goals=(0.25, 0.5),
    part_windows=32,
    mask_windows=8,
    mask_batches=(12,),
    exact_importance=True,
    reconstruction=True,
    refit_inputs=True,
    candidates=2,
)
# Everything but matrix products takes no time.
ONLY_PRODUCTS: dict[str, Any] = {
    "disk_cold_bytes_per_second": 1e30,
    "disk_warm_bytes_per_second": 1e30,
    "disk_write_bytes_per_second": 1e30,
    "memory_bytes_per_second": 1e30,
    "fresh_bytes_per_second": 1e30,
    "attention_flops_per_second": 1e30,
    "solve_flops_per_second": 1e30,
    "call_seconds": 0.0,
    "start_seconds": 0.0,
}


def plan(*, held_bytes: int = 0, kept: bool = True, **limits: int) -> MemoryPlan:
    held = PlanItem(name="held", where=HOST, size_bytes=held_bytes, formula="")
    return MemoryPlan(
        phases=(MemoryPhase(name="all", items=(held,)),),
        budget=Budget(device="cpu", host_bytes=2**40),
        limits=replace(LIMITS, **limits),
        keep_inputs=kept,
        keep_updates=kept,
    )


PLAN = plan()


def estimate(profile: HardwareProfile, memory: MemoryPlan = PLAN, **changes: Any) -> TimeEstimate:
    work = replace(WORK, **changes)
    time = PruneTime(spec=SPEC, operations=OPERATIONS, work=work, plan=memory, profile=profile)
    return time.estimate()


def phase(found: TimeEstimate, name: str) -> TimePhase:
    return next(phase for phase in found.phases if phase.name == name)


def test_phases_in_order() -> None:
    names = [phase.name for phase in estimate(profiles.cpu()).phases]
    assert names == [
        *("starting", "perplexity", "building stores", "statistics"),
        *("masked evaluation", "recovery", "rewriting"),
    ]
    without = estimate(profiles.cpu(), mask_batches=(), reconstruction=False, sampled=36)
    assert [phase.name for phase in without.phases] == [
        *("starting", "sampling text", "perplexity"),
        *("building stores", "statistics", "rewriting"),
    ]


def test_products_of_the_masked_evaluation() -> None:
    found = phase(estimate(profiles.cpu(**ONLY_PRODUCTS)), "masked evaluation")
    tokens = 104 * 256
    layers = 2 * P * LAYERS * tokens * (1.0 + 0.75)
    head = 2 * 192 * 4096 * tokens * 2
    assert found.compute == pytest.approx((layers + head) / 1e11)
    assert found.seconds == pytest.approx(found.compute)


def test_int8_speeds_the_masked_evaluation_up_and_nothing_else() -> None:
    fp32 = estimate(profiles.cpu(**ONLY_PRODUCTS))
    int8 = estimate(profiles.cpu(**ONLY_PRODUCTS), int8_arithmetic=True)
    before, after = (phase(found, "masked evaluation").seconds for found in (fp32, int8))
    # Both digits of each input are multiplied.
    assert after == pytest.approx(2 * before / 8)
    assert phase(int8, "recovery").seconds == phase(fp32, "recovery").seconds
    # Codes are multiplied as they are stored, but inputs are rounded and sums scaled.
    traffic = profiles.cpu(**{**ONLY_PRODUCTS, "memory_bytes_per_second": 2e10})
    more = [phase(estimate(traffic, int8_arithmetic=a), "masked evaluation") for a in (False, True)]
    assert more[1].elementwise > more[0].elementwise


def test_products_of_statistics_and_recovery() -> None:
    found = estimate(profiles.cpu(**ONLY_PRODUCTS))
    tokens = 32 * 256
    gram = 2 * (256**2 + 512**2)
    assert phase(found, "statistics").compute == pytest.approx(
        LAYERS * tokens * (2 * P + gram) / 1e11
    )
    expected = 0.0
    for share in (0.75, 0.5):
        query, ffn = 256 * share, 512 * share
        projections, o_proj = P * share, 192 * query
        # The pruned layer once, and o_proj three times more: FFN's refit, its inputs, its target.
        expected += 2 * (P + projections + 3 * o_proj) * tokens * LAYERS
        each = query**2 + ffn**2 + 192 * (query + ffn) + 4 * 192**2
        expected += 2 * each * tokens * LAYERS
        rows = projections / 192 - query - ffn
        expected += 192 * (2 * query**2 + 2 * ffn**2 + 4 * 192 * rows) * LAYERS
        expected += 2 * 192 * 4096 * tokens
    expected += 2 * 192 * 4096 * tokens  # the dense model's losses, once
    assert phase(found, "recovery").compute == pytest.approx(expected / 1e11)


def test_rounds_before_the_last_and_candidates_take_a_part_of_the_windows() -> None:
    only = profiles.cpu(**ONLY_PRODUCTS)
    names = ("statistics", "recovery")
    whole, part, tried = (
        {name: phase(estimate(only, exact_importance=False, **changes), name) for name in names}
        for changes in ({}, {"part_windows": 8}, {"part_windows": 8, "trial_windows": 4})
    )
    assert part["statistics"].compute == pytest.approx(whole["statistics"].compute / 4)
    first, last = (
        phase(estimate(only, exact_importance=False, **changes), "recovery").compute
        for changes in ({"goals": (0.25,)}, {"goals": (0.5,)})
    )
    head = 2 * 192 * 4096 * 32 * 256 / 1e11  # each of the two with the dense model's losses
    assert whole["recovery"].compute == pytest.approx(first + last - head)
    solves = sum(
        192 * 2 * ((256 * 0.75) ** 2 + (512 * 0.75) ** 2) + 192 * 4 * 192 * rows
        for rows in (P * 0.75 / 192 - 768 * 0.75,)
    )
    solves *= LAYERS / 1e11
    # A quarter of the windows, but the same solves; the dense losses on both rounds' windows.
    assert part["recovery"].compute == pytest.approx((first - solves) / 4 + solves + last)
    more = tried["recovery"].compute - part["recovery"].compute
    assert more > (first - solves - head) / 8  # both candidates of both rounds, on an eighth


def test_candidates_build_two_more_stores_a_round() -> None:
    profile = profiles.cpu(memory_bytes_per_second=1e30)
    found = phase(estimate(profile, trial_windows=4), "building stores")
    read, written = 8 * BLOCKS * 2, (1 + 4 * 0.75 + 3 * 0.5) * BLOCKS
    assert found.disk == pytest.approx(read / 4e9 + written / 5e8)


def test_a_third_candidate_costs_half_as_much_again_as_two() -> None:
    profile = profiles.cpu(memory_bytes_per_second=1e30)
    for name in ("recovery", "building stores"):
        none, two, three = (
            phase(estimate(profile, **changes), name).seconds
            for changes in ({}, {"trial_windows": 4}, {"trial_windows": 4, "candidates": 3})
        )
        assert three - two == pytest.approx((two - none) / 2)


def test_every_batch_of_masks_reads_the_layers() -> None:
    profile = profiles.cpu()
    one, three = (
        phase(estimate(profile, **changes), "masked evaluation")
        for changes in ({}, {"mask_batches": (4, 8, 12)})
    )
    # 104 pairs at once are two waves, 40, 32 and 32 one after the other three.
    assert three.disk == pytest.approx(1.5 * one.disk) and one.disk > 0
    assert three.compute == pytest.approx(one.compute)


def test_ranks_divide_masks_in_micro_batches_and_candidates() -> None:
    """One batch of 8 * 12 + 8 pairs: 26 micro-batches of 4, of which the busiest of 4 takes 7."""
    products = profiles.cpu(**ONLY_PRODUCTS)
    changes: dict[str, Any] = {"trial_windows": 8, "candidates": 5}
    one, four = (estimate(products, ranks=ranks, **changes) for ranks in (1, 4))
    masked = [phase(found, "masked evaluation").compute for found in (one, four)]
    assert masked[1] == pytest.approx(masked[0] * 7 * 4 / 104)
    two_candidates = estimate(products, **{**changes, "candidates": 2})
    assert phase(four, "recovery") == phase(two_candidates, "recovery")
    assert phase(four, "statistics") == phase(one, "statistics")


def test_imputation_covers_a_multiple_of_what_a_round_removes() -> None:
    work = replace(WORK, imputation_pool=2.5)
    assert work.round_imputed_share(0) == pytest.approx(2.5 * 0.25)
    assert work.round_imputed_share(1) == pytest.approx(2.5 / 3)
    only = profiles.cpu(**ONLY_PRODUCTS)
    plain, imputed = (
        phase(estimate(only, imputation_pool=pool), "masked evaluation").compute
        for pool in (0.0, 2.5)
    )
    tokens, expected = 104 * 256, 0.0
    for share, left in ((0.625, 1.0), (2.5 / 3, 0.75)):
        expected += 2 * share * (1 - share) * (256**2 + 512**2) * left**2 * tokens * LAYERS
    assert imputed - plain == pytest.approx(expected / 1e11)


def test_channel_updates_are_the_last_rounds() -> None:
    only = profiles.cpu(**ONLY_PRODUCTS)
    plain, updated = (phase(estimate(only, channel_updates=n), "recovery").compute for n in (0, 2))
    tokens, ffn = 32 * 256, 256  # half of the channels are left: one block
    # One pass for slopes, one for the residual, four iterations there and back; the Gram matrix of
    # the FFN's inputs; down_proj refitted after each of two steps; three forwards.
    expected = 2 * (1 + 1 + 2 * 4) * 3 * 192 * ffn * tokens + 2 * 192**2 * tokens
    expected += 2 * (2 * ffn * (ffn + 192) * tokens + 2 * ffn**2 * 192) + 3 * P * tokens
    assert updated - plain == pytest.approx(LAYERS * expected / 1e11)
    for changes in ({"keep_updates": False}, {"keep_inputs": False}):
        memory = replace(PLAN, **changes)
        assert phase(estimate(only, memory, channel_updates=2), "recovery").compute > updated


def test_inputs_that_are_not_kept_cost_more() -> None:
    kept, again = (
        phase(estimate(profiles.cpu(), plan(kept=keep)), "recovery").seconds
        for keep in (True, False)
    )
    assert again > 1.2 * kept


def test_stores_are_read_quantised_and_written_one_after_another() -> None:
    profile = profiles.cpu(memory_bytes_per_second=1e30)
    found = phase(estimate(profile), "building stores")
    # Dense; after round one, twice; after the last, once.
    read, written = 4 * BLOCKS * 2, (1 + 2 * 0.75 + 0.5) * BLOCKS
    assert found.disk == pytest.approx(read / 4e9 + written / 5e8)
    assert found.seconds == pytest.approx(found.disk + found.elementwise)


def test_stores_that_the_page_cache_cannot_hold_are_read_cold() -> None:
    warm = phase(estimate(profiles.cpu()), "statistics")
    # Both stores in 0.8 of what is free.
    enough = -(-2 * BLOCKS * 10 // 8)
    assert phase(estimate(profiles.cpu(host_bytes=enough)), "statistics").disk == warm.disk
    cold = phase(estimate(profiles.cpu(host_bytes=enough - 2)), "statistics")
    assert cold.disk == pytest.approx(4 * warm.disk)
    # What the plan holds is not the page cache's.
    full = estimate(profiles.cpu(), plan(held_bytes=16 * 2**30))
    assert phase(full, "statistics").disk == pytest.approx(cold.disk)


def test_with_one_layer_buffer_nothing_overlaps() -> None:
    slow = profiles.cpu(disk_warm_bytes_per_second=1e6)
    two = phase(estimate(slow), "statistics")
    one = phase(estimate(slow, plan(layer_buffers=1)), "statistics")
    assert two.seconds == max(two.disk, two.compute + two.elementwise)
    assert one.seconds == pytest.approx(one.disk + one.compute + one.elementwise)


def test_a_slow_disk_binds_and_sweeps_overlap_it() -> None:
    found = estimate(profiles.cpu(disk_warm_bytes_per_second=1e3))
    masked = phase(found, "masked evaluation")
    # Two waves of 104 pairs with 100 in flight, each through all layers, dense and at 0.75.
    layer = P + 2 * 192
    assert masked.disk == pytest.approx(2 * LAYERS * layer * 1.75 / 1e3)
    assert (masked.binds, masked.seconds, found.binds) == ("disk", masked.disk, "disk")


def test_a_gpu_copies_layers_and_hidden_states() -> None:
    found = estimate(profiles.cuda(copy_bytes_per_second=1e6))
    statistics = phase(found, "statistics")
    layers = LAYERS * (P + 2 * 192)
    hidden = 2 * LAYERS * 32 * 256 * 192 * 2
    assert statistics.copy == pytest.approx((layers + hidden) / 1e6)
    assert (statistics.binds, found.binds) == ("copy", "copy")
    found = estimate(profiles.cuda(copy_bytes_per_second=1e6), plan(resident_windows=32))
    assert phase(found, "statistics").copy == pytest.approx(layers / 1e6)


def test_what_binds_most_of_the_time_binds() -> None:
    phases = (
        TimePhase(name="a", compute=5.0, elementwise=1.0, disk=2.0),
        TimePhase(name="b", disk=4.0, copy=3.0),
        TimePhase(name="c", compute=1.0, disk=1.5, overlaps=False),
    )
    assert [p.binds for p in phases] == ["compute", "disk", "disk"]
    assert [p.seconds for p in phases] == [6.0, 4.0, 2.5]
    found = TimeEstimate(phases=phases)
    assert (found.total_seconds, found.binds) == (12.5, "disk")


def test_overheads() -> None:
    none, some = (
        estimate(profiles.cpu(**{**ONLY_PRODUCTS, "call_seconds": each})) for each in (0.0, 0.5)
    )
    # 104 pairs in micro-batches of 4, six layers, two rounds.
    more = phase(some, "masked evaluation").seconds - phase(none, "masked evaluation").seconds
    assert more == pytest.approx(26 * LAYERS * 2 * 0.5)
    assert phase(estimate(profiles.cpu(start_seconds=9.0)), "starting").seconds == 9.0
