"""Tokens that a prune will spend, by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from frugal_bonsai import PruneOptions, plan, prune
from frugal_bonsai.hardware.time_model import PruneWork
from frugal_bonsai.run.predict import forward_tokens
from frugal_bonsai.run.prepare import open_model

with open_model("example", headers_only=True) as example:
    SPEC = example.spec
WORK = PruneWork(
    window=10,
    windows=32,
    reported=4,
    shares=(1.0, 0.75, 0.5),
    pairs=100,
    exact_prior=True,
    recovery=True,
    refit_inputs=True,
    keep_inputs=True,
    int8_store=True,
    source_bytes=2,
)


def test_masks_statistics_and_both_models_in_recovery() -> None:
    assert forward_tokens(SPEC, WORK) == 10 * (32 + 2 * 100 + 2 * 2 * 32)
    assert forward_tokens(SPEC, replace(WORK, keep_inputs=False)) == 10 * (
        32 + 2 * 100 + 3 * 2 * 32
    )
    # Without recovery statistics of the last round's model are not needed.
    assert forward_tokens(SPEC, replace(WORK, recovery=False)) == 10 * (2 * 100 + 2 * 32)


def test_parts_trials_and_refinement() -> None:
    part = replace(WORK, part=8)
    assert forward_tokens(SPEC, part) == 10 * (8 + 2 * 100 + 2 * (8 + 32))
    tried = replace(part, trial=4)
    assert forward_tokens(SPEC, tried) - forward_tokens(SPEC, part) == 10 * 2 * 2 * 2 * 4
    refined = replace(part, refine=2, refine_iterations=4, refine_blocks=3)
    # There for the slopes, for three residuals, four times there and back; two solves, the end.
    passes = 1 + 3 + 2 * 4 + 2 + 1
    assert forward_tokens(SPEC, refined) - forward_tokens(SPEC, part) == 10 * 32 * passes // 2
    again = replace(refined, keep_refinement=False)
    assert forward_tokens(SPEC, again) - forward_tokens(SPEC, refined) == 10 * 32 * 4 // 2


def test_the_scale_of_the_logits_takes_the_heads_share() -> None:
    head = SPEC.vocabulary * SPEC.hidden
    share = head / (head + SPEC.block_parameters)
    more = forward_tokens(SPEC, replace(WORK, rescaled=3)) - forward_tokens(SPEC, WORK)
    assert more == pytest.approx(26 * 3 * 10 * share, abs=1)


@pytest.mark.parametrize(
    ("layout", "settings"),
    [
        ("per-layer", {"step": 0.15}),
        ("per-layer", {"level": "unit", "masks": 4}),
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
