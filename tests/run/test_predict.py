"""Tokens that a prune will spend, by hand."""

from __future__ import annotations

from dataclasses import replace

from frugal_bonsai.memory.time_model import PruneWork
from frugal_bonsai.run.predict import forward_tokens

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
    assert forward_tokens(WORK) == 10 * (32 + 2 * 100 + 2 * 2 * 32)
    assert forward_tokens(replace(WORK, keep_inputs=False)) == 10 * (32 + 2 * 100 + 3 * 2 * 32)
    # Without recovery statistics of the last round's model are not needed.
    assert forward_tokens(replace(WORK, recovery=False)) == 10 * (2 * 100 + 2 * 32)


def test_parts_trials_and_refinement() -> None:
    part = replace(WORK, part=8)
    assert forward_tokens(part) == 10 * (8 + 2 * 100 + 2 * (8 + 32))
    tried = replace(part, trial=4)
    assert forward_tokens(tried) - forward_tokens(part) == 10 * 2 * 2 * 2 * 4
    refined = replace(part, refine=2, refine_iterations=4, refine_blocks=3)
    # There for the slopes, for three residuals, four times there and back; two solves, the end.
    passes = 1 + 3 + 2 * 4 + 2 + 1
    assert forward_tokens(refined) - forward_tokens(part) == 10 * 32 * passes // 2
    again = replace(refined, keep_refinement=False)
    assert forward_tokens(again) - forward_tokens(refined) == 10 * 32 * 4 // 2
