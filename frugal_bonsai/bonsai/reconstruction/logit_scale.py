"""The scale of a pruned model's logits: what pruning leaves is less certain than it says.

In: the last layers' hidden states of the dense and of the recovered model. Out: one factor for the
logits, to be folded into the final norm's weight. A hidden state that has lost information should
shrink towards what is always true, as every least-squares refit does; the final norm undoes that,
and the model stays as sure of itself as the dense one was. The factor is the temperature's inverse
(Guo et al. 2017, arXiv 1706.04599), without a backward pass: the loss is convex in it (but for
soft-capped logits, where it is nearly so), and only the head is computed, on a sample of windows.

What the text itself asks for is not pruning's to mend: where the dense model is too sure of this
text as well, its own best factor is divided out. Holds the sample's hidden states.

Shape suffixes: N windows of the sample, S tokens.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from frugal_bonsai.bonsai.selection.extent import scale_windows
from frugal_bonsai.checkpoint.reader import Checkpoint
from frugal_bonsai.model.family import ModelSpec
from frugal_bonsai.stream.forward import Sweep
from frugal_bonsai.stream.head import Head
from frugal_bonsai.stream.hidden import HiddenStates

_STEP, _LEAST, _MOST = 0.1, 0.3, 2.0


def find_logit_scale(
    sweep: Sweep,
    head: Head,
    dense: HiddenStates,
    pruned: HiddenStates,
    tokens_NS: torch.Tensor,
) -> float:
    """The factor that is right for the pruned model where 1 is right for the dense one.

    It lies between 1 and the pruned model's own best factor, so that by convexity it is never
    worse than 1 on these windows.

    Args:
        sweep: its token count grows by the head's share of what a whole forward computes.
        head: of both models.
        dense: behind the last layer, before the norm, of all windows; stays as it is.
        pruned: the same of the recovered model.
        tokens_NS: the windows; a sample from all over them is used.
    """
    count = scale_windows(tokens_NS.shape[1], len(tokens_NS))
    chosen = torch.linspace(0, len(tokens_NS) - 1, count).round().long()
    best = {}
    for name, hidden in (("dense", dense), ("pruned", pruned)):
        losses = _SampleLosses(sweep, head, hidden, tokens_NS, chosen)
        best[name] = convex_minimum(losses)
    own = best["pruned"]
    return min(max(own / best["dense"], min(1.0, own)), max(1.0, own))


class _SampleLosses:
    """Mean loss of some windows as a function of the logits' factor."""

    def __init__(
        self,
        sweep: Sweep,
        head: Head,
        hidden: HiddenStates,
        tokens_NS: torch.Tensor,
        chosen: torch.Tensor,
    ) -> None:
        self._sweep, self._head = sweep, head
        self._tokens_NS = tokens_NS[chosen]
        self._hidden = sweep.hidden_states(self._tokens_NS)
        for place, window in enumerate(chosen.tolist()):
            one_1SH = hidden.read(slice(window, window + 1))
            self._hidden.write(slice(place, place + 1), one_1SH)
        self._normed = False

    def __call__(self, scale: float) -> float:
        spec, tokens = self._sweep.skeleton.spec, self._tokens_NS.numel()
        losses_NS = self._head.nll(self._hidden, self._tokens_NS, scale=scale, normed=self._normed)
        self._normed = True
        head = spec.vocabulary * spec.hidden
        self._sweep.forward_tokens += round(tokens * head / (head + spec.block_parameters))
        return float(losses_NS.double().mean())


def convex_minimum(value: Callable[[float], float]) -> float:
    """Where a convex function of a factor is least: bracketed in steps of 0.1, then a parabola."""
    at, seen = 1.0, {1.0: value(1.0)}

    def look(scale: float) -> float:
        scale = round(scale, 6)
        if scale not in seen:
            seen[scale] = value(scale)
        return seen[scale]

    step = -_STEP if look(at - _STEP) <= look(at) else _STEP
    while _LEAST < at < _MOST and look(at + step) < look(at):
        at = round(at + step, 6)
    below, here, above = look(at - _STEP), look(at), look(at + _STEP)
    bend = below - 2 * here + above
    if not here <= min(below, above) or bend <= 0:  # the end of the range, or flat
        return at
    return at + _STEP * (below - above) / (2 * bend)


def scaled_norm(checkpoint: Checkpoint, spec: ModelSpec, scale: float) -> dict[str, torch.Tensor]:
    """The final norm's tensors, by name, of the same model with logits ``scale`` times as large.

    fp32; a norm that adds an offset to its weight (Gemma) gives what is to be stored.
    """
    scaled = {}
    for name in spec.norm_tensors:
        offset = spec.family.norm_offset if name.endswith(".weight") else 0.0
        scaled[name] = (checkpoint.read(name).float() + offset) * scale - offset
    return scaled
