"""Warnings about results that are bad or cannot be trusted, each with what to do.

In: sizes and figures of a run. Out: sentences for the terminal, the card and ``--json``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from frugal_bonsai.bonsai.settings import PruneSettings
from frugal_bonsai.model.family import ModelSpec
from frugal_bonsai.progress import Progress

Values = Mapping[str, Any]
# A perplexity that rose by more than this factor is a warning.
_MOST_RISE = 5.0
# A standard error of more than this share of the perplexity is a warning.
_MOST_ERROR = 0.05
# Bits a byte of a text at which the dense model predicts it no better than a compressor such as
# bzip2. Models have 0.8 to 1.7 on text of their kind, 2.7 or more on text of another
# (docs/results/windows_2-core-cpu_2026-11-28.md).
_MOST_BITS = 2.0


def note_warnings(progress: Progress, found: Iterable[str | None]) -> list[str]:
    """Tell the user of those warnings that there are, and return them."""
    warnings = [warning for warning in found if warning is not None]
    for warning in warnings:
        progress.note(f"warning: {warning}")
    return warnings


def calibration_warning(
    spec: ModelSpec, settings: PruneSettings, windows: int, window: int
) -> str | None:
    """Return a warning if the calibration has fewer tokens than a Gram matrix has columns.

    The rank of the Gram matrix of T tokens is at most T. A layer's experts share the tokens of all
    windows.
    """
    if not settings.recovery and settings.prior != "exact":
        return None
    needed = 0
    for group in spec.table.groups:
        share = 1.0 if group.expert is None else spec.experts_chosen / spec.experts
        needed = max(needed, math.ceil(group.columns / share))
    if settings.recovery and settings.refit == "all":
        needed = max(needed, spec.hidden)
    if windows * window >= needed:
        return None
    return (
        f"calibration: {windows * window:,} tokens, but the widest projections need at least "
        f"{needed:,} for a Gram matrix of full rank; with fewer, refits overfit the calibration "
        f"text. Use more text: --windows {math.ceil(needed / window)} or more"
    )


def unfamiliar_text_warning(perplexity: float, bytes_per_token: float) -> str | None:
    """Return a warning if the dense model predicts the calibration text badly.

    Args:
        perplexity: That of the dense model on held-out windows.
        bytes_per_token: Mean number of UTF-8 bytes of their tokens.
    """
    bits = math.log2(perplexity) / bytes_per_token if bytes_per_token else 0.0
    if bits < _MOST_BITS:
        return None
    return (
        f"the dense model needs {bits:.1f} bits for a byte of the calibration text, as many as a "
        f"compressor such as bzip2: the text is unlike what the model was trained on. Calibrate on "
        f"text of its kind, or on text that it writes (--calibration self)"
    )


def pruned_before_warning(name: str, provenance: Values) -> str | None:
    """Return a warning if the model is itself the output of a prune."""
    if not provenance["steps"]:
        return None
    return (
        f"{name} was pruned before, from {provenance['dense']}: figures 'before' are of the pruned "
        f"model, and the sparsity is a share of that model. Prune {provenance['dense']} itself for "
        f"a better model of this size"
    )


def figure_warnings(before: Values, after: Values, *, advice: str) -> Iterator[str]:
    """Yield warnings about perplexities that rose, with this advice, or whose error is large."""
    for key, name in (("perplexity", "held-out"), ("eval_perplexity", "--eval-text")):
        old, new, error = before[key], after[key], after.get(f"{key}_error")
        if old is None or new is None:
            continue
        if not new <= _MOST_RISE * old:
            yield f"{name} perplexity rose from {old:.3g} to {new:.3g}: {advice}"
        if error is not None and math.isfinite(new) and error > _MOST_ERROR * new:
            more = "--eval-text or more --windows" if key == "perplexity" else "a longer text"
            yield (
                f"{name} perplexity {new:.3g} has a standard error of {error:.2g}: too few tokens "
                f"were measured; use {more}"
            )
