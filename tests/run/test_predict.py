"""Tokens that a prune will spend, by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from frugal_bonsai import PruneOptions, plan, prune
from frugal_bonsai.memory.budget import Budget
from frugal_bonsai.memory.plan import MemoryPlan, PruneWorkload, SweepLimits
from frugal_bonsai.run.open import open_model
from frugal_bonsai.run.workload import forward_tokens

with open_model("example", headers_only=True) as example:
    SPEC = example.spec
WORK = PruneWorkload(
    window=10,
    windows=32,
    measured=(4,),
    weights="int8",
    source_bytes=2,
    goals=(0.25, 0.5),
    part_windows=32,
    mask_windows=4,
    mask_batches=(24,),
    exact_importance=True,
    reconstruction=True,
    refit_inputs=True,
    candidates=2,
)
PLAN = MemoryPlan(
    phases=(),
    budget=Budget(device="cpu", host_bytes=2**30),
    limits=SweepLimits(
        micro_batch=4, windows_in_flight=32, resident_windows=0, head_rows=64, head_tokens=64
    ),
    keep_inputs=True,
    keep_updates=True,
)


def tokens(work: PruneWorkload, **plan: bool) -> int:
    return forward_tokens(SPEC, work, replace(PLAN, **plan))


def test_masks_statistics_and_both_models_in_recovery() -> None:
    assert tokens(WORK) == 10 * (32 + 2 * 100 + 2 * 2 * 32)
    assert tokens(WORK, keep_inputs=False) == 10 * (32 + 2 * 100 + 3 * 2 * 32)
    # Without recovery statistics of the last round's model are not needed.
    assert tokens(replace(WORK, reconstruction=False)) == 10 * (2 * 100 + 2 * 32)


def test_parts_trials_and_refinement() -> None:
    part = replace(WORK, part_windows=8)
    assert tokens(part) == 10 * (8 + 2 * 100 + 2 * (8 + 32))
    tried = replace(part, trial_windows=4)
    assert tokens(tried) - tokens(part) == 10 * 2 * 2 * 2 * 4
    refined = replace(part, channel_updates=2)
    # Forward for the slopes and a block's residual, four times there and back; two solves, the end.
    passes = 1 + 1 + 2 * 4 + 2 + 1
    assert tokens(refined) - tokens(part) == 10 * 32 * passes // 2
    again = tokens(refined, keep_updates=False)
    assert again - tokens(refined) == 10 * 32 * 4 // 2


def test_text_that_the_model_writes() -> None:
    part = replace(WORK, part_windows=8)
    # Sampled once, then through both models in the last reconstruction.
    assert tokens(replace(part, written=6)) - tokens(part) == 10 * (6 + 2 * 6)


def test_the_scale_of_the_logits_takes_the_heads_share() -> None:
    head = SPEC.vocabulary * SPEC.hidden
    share = head / (head + SPEC.block_parameters)
    more = tokens(replace(WORK, scale_windows=3)) - tokens(WORK)
    assert more == pytest.approx(26 * 3 * 10 * share, abs=1)


@pytest.mark.parametrize(
    ("layout", "settings"),
    [
        ("per-layer", {"step": 0.15}),
        ("per-layer", {"level": "none"}),
        ("uniform", {"refine": 3}),
        ("per-layer", {"recovery": False}),
    ],
)
def test_what_is_said_to_be_spent_at_most_is_not_passed(
    layout: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    """Five cuts can be tried in a round, where four were counted."""
    options = PruneOptions(
        layout=layout,
        window=32,
        windows=12,
        settings={"sparsity": 0.3, "masks": 4, "mask_windows": 4, **settings},
    )
    spent = prune("example", tmp_path / "out", options)["forward_tokens"]
    most = plan("example", options)["forward_tokens"]
    assert 0.3 * most < spent <= most
