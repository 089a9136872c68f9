"""Sentences about the masks of a run: their tokens, their fit, the reason that each round stopped.

In: the reports of a run's rounds. Out: sentences for the console and the card. Holds nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from frugal_bonsai.report.words import NOTHING, numbers_from_to, runs

Values = Mapping[str, Any]

SCORES = (
    "R2, tau: accuracy of the losses that the regression predicts for held-out masks, in size and "
    "in order; 1 is perfect, 0 is no better than guessing; sure (certainty): 1 minus the share of "
    "the cut's predicted loss that full knowledge would save"
)


def by_round(rounds: Sequence[Values], key: str) -> str:
    """Return values by round, such as ``ridge 0.1 (rounds 1-3), ridge 0.01 (round 4)``."""
    chosen = [row[key] or NOTHING for row in rounds]
    if len(set(chosen)) == 1:
        return f"{chosen[0]} in every round"
    parts = []
    for first, last in runs(chosen):
        word = "round" if first == last else "rounds"
        which = numbers_from_to(rounds[first]["round"], rounds[last]["round"])
        parts.append(f"{chosen[first]} ({word} {which})")
    return ", ".join(parts)


def mask_spending(rounds: Sequence[Values]) -> str:
    """Return the tokens of the masks, their budget, and the reason that each round stopped."""
    spent = sum(row["mask_tokens"] for row in rounds)
    budget = sum(row["mask_budget_tokens"] for row in rounds)
    return (
        f"masks: {spent:,} of at most {budget:,} forward tokens ({spent / budget:.0%}); "
        f"sampling ended with: {by_round(rounds, 'stopped')}"
    )


def covered(rounds: Sequence[Values]) -> str | None:
    """Return the share of held-out observations inside their 90% interval, as a sentence."""
    shares = [row["coverage"] for row in rounds if row["coverage"] is not None]
    if not shares:
        return None
    mean = sum(shares) / len(shares)
    return f"{mean:.0%} of the held-out losses lie inside their 90% interval (mean of the rounds)"
