"""Files of a prune and of a training from shapes alone; run/test_full_disk.py measures them."""

from __future__ import annotations

from dataclasses import replace

import pytest
from plan_shapes import LLAMA_8B

from frugal_bonsai.memory.disk import (
    CACHE,
    OUT,
    RUN,
    DiskPlan,
    ModelFiles,
    file_bytes,
    plan_training_disk,
)
from frugal_bonsai.memory.hints import advise, smaller_files
from frugal_bonsai.memory.prune_disk import plan_disk
from frugal_bonsai.memory.work import PruneWorkload, SweepWorkload

H, FFN, KV, LAYERS, VOCABULARY = 4096, 14336, 1024, 32, 128256
MATRICES = 2 * H * H + 2 * KV * H + 3 * FFN * H
WORK = PruneWorkload(
    window=2048,
    windows=32,
    weights="int8",
    source_bytes=2,
    goals=(0.2, 0.4),
    part_windows=32,
    mask_windows=16,
    mask_batches=(12,),
    reconstruction=True,
    refit_inputs=True,
    companion_bytes=9_000_000,
)


def items(plan: DiskPlan, name: str) -> dict[str, int]:
    """Sizes of a phase's items."""
    (found,) = [phase for phase in plan.phases if phase.name == name]
    return {item.name: item.size_bytes for item in found.items}


def test_files_are_rounded_up_to_blocks() -> None:
    assert file_bytes(1, 1) == 4096 and file_bytes(4096, 1) == 8192
    assert file_bytes(3 * 4096, 3, files=3) == 3 * 8192


def test_stores_and_refits_of_a_real_shape() -> None:
    files = ModelFiles(LLAMA_8B, 2)
    rows = 2 * H + 2 * KV + 2 * FFN + H
    dense = LAYERS * (MATRICES + 4 * rows + 2 * 2 * H)
    assert files.store("int8").size_bytes == pytest.approx(dense, rel=1e-4)
    assert files.store("native").size_bytes == pytest.approx(
        2 * LLAMA_8B.block_parameters, rel=1e-4
    )
    half = files.store("int8", 0.5).size_bytes
    assert half == pytest.approx(dense / 2, rel=1e-3)
    all_of_it = 2 * LAYERS * MATRICES * 0.6
    assert files.refits(0.6, {"attention", "ffn"}, name="").size_bytes == pytest.approx(
        all_of_it, rel=1e-3
    )
    outputs = 2 * LAYERS * 0.6 * (H * H + FFN * H)
    assert files.refits(0.6, (), name="").size_bytes == pytest.approx(outputs, rel=1e-3)
    assert files.head().size_bytes == pytest.approx(VOCABULARY * (H + 4), rel=1e-4)


def test_a_round_holds_the_refits_of_the_round_before() -> None:
    plan = plan_disk(LLAMA_8B, WORK)
    assert [phase.name for phase in plan.phases] == [
        "statistics",
        "round 1: masks",
        "round 1: reconstruction",
        "round 2: masks",
        "round 2: reconstruction",
        "writing the output",
    ]
    first, last = (items(plan, f"round {n}: reconstruction") for n in (1, 2))
    assert "refits of round 1" in first and "a layer that is replaced" in first
    assert {"dense store", "working store", "refits of round 1", "refits of round 2"} <= set(last)
    assert last["refits of round 2"] == pytest.approx(
        last["refits of round 1"] * 0.6 / 0.8, rel=1e-3
    )
    output = items(plan, "writing the output")
    assert "dense store" not in output and "refits of round 1" not in output
    assert plan.peak().name == "round 2: reconstruction"
    assert plan.total_bytes == sum(last.values())
    # Reconstruction lies in the run folder; the output on a disk of its own needs only itself.
    assert plan.peak([OUT]).total_bytes([OUT]) == output["pruned model"] + output["its other files"]
    assert plan.peak([RUN]).total_bytes([RUN]) == plan.total_bytes


def test_without_reconstruction_there_is_one_store() -> None:
    plan = plan_disk(LLAMA_8B, replace(WORK, reconstruction=False, refit_inputs=False))
    for phase in plan.phases:
        stores = [item for item in phase.items if item.name.endswith("store")]
        assert len(stores) <= 1
    assert plan.peak().name == "writing the output"
    kept = 2 * (LLAMA_8B.parameters - 0.4 * LLAMA_8B.block_parameters)
    assert items(plan, "writing the output")["pruned model"] == pytest.approx(kept, rel=1e-4)
    padded = plan_disk(LLAMA_8B, replace(WORK, padded=True))
    whole = items(padded, "writing the output")["pruned model"]
    assert whole == pytest.approx(2 * LLAMA_8B.parameters, rel=1e-4)


def test_commands_without_a_working_store_write_nothing() -> None:
    assert plan_disk(LLAMA_8B, SweepWorkload(window=64)).total_bytes == 0
    store = ModelFiles(LLAMA_8B, 2).store("int8").size_bytes
    assert plan_disk(LLAMA_8B, SweepWorkload(window=64, weights="int8")).total_bytes == store


def test_options_that_make_the_files_fit() -> None:
    native = replace(WORK, weights="native")

    def advice(free_bytes: int) -> str:
        return advise(
            smaller_files(native),
            lambda work: plan_disk(LLAMA_8B, work).total_bytes <= free_bytes,
            where="On this disk",
        )

    size = plan_disk(LLAMA_8B, replace(native, weights="int8")).total_bytes
    assert advice(size) == (
        ". On this disk it fits with --weights int8 or with --refit outputs or with --no-recovery"
    )
    least = plan_disk(LLAMA_8B, replace(native, reconstruction=False)).total_bytes
    assert advice(least) == ". On this disk it fits with --no-recovery"
    assert advice(10**9) == ""


def test_files_of_a_training() -> None:
    plan = plan_training_disk(
        LLAMA_8B,
        [10**6, 2 * 10**6],
        optimiser="adamw",
        cache_bytes=10**8,
        sampled_tokens=1000,
        companion_bytes=0,
    )
    training = items(plan, "training")
    assert training["training state"] == pytest.approx(3 * 4 * 3 * 10**6, rel=1e-3)
    assert training["training state that is replaced"] == training["training state"]
    assert training["best parameters"] == pytest.approx(4 * 3 * 10**6, rel=1e-3)
    assert plan.peak([CACHE]).total_bytes([CACHE]) == pytest.approx(10**8 + 8000, rel=1e-3)
    assert plan.peak().name == "writing the output"
