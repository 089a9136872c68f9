"""Scale of a pruned model's logits, which corrects its overconfidence.

In: the last layers' hidden states of the dense and of the refit model. Out: one factor for the
logits, which is folded into the final norm's weight. A hidden state that has lost information
should shrink towards its mean, as in every least-squares refit, but the final norm undoes this, and
the model stays as confident as the dense one. The factor is an inverse temperature (Guo et al.
2017, arXiv 1706.04599), found without a backward pass: the loss is convex in it (nearly so for
soft-capped logits), and only the head is computed, on a sample of windows.

Overconfidence of the dense model on the same text is not corrected: its own best factor is divided
out.

Memory: the sample's hidden states.

Shape suffixes: N windows of the sample, S tokens.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from frugal_bonsai.bonsai.selection.schedule import scale_windows
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
    """Return the best factor of the pruned model, relative to that of the dense model.

    It lies between 1 and the pruned model's own best factor, so by convexity it is never worse than
    1 on these windows.

    Args:
        sweep: its token count grows by the head's share of a whole forward.
        head: of both models.
        dense: hidden states of all windows before the final norm; they do not change.
        pruned: the same of the refit model.
        tokens_NS: the windows; a sample spread over all of them is used.
    """
    count = scale_windows(tokens_NS.shape[1], len(tokens_NS))
    chosen = torch.linspace(0, len(tokens_NS) - 1, count).round().long()
    best_dense, best_pruned = (
        convex_minimum(_sample_loss(sweep, head, hidden, tokens_NS, chosen))
        for hidden in (dense, pruned)
    )
    return min(max(best_pruned / best_dense, min(1.0, best_pruned)), max(1.0, best_pruned))


def _sample_loss(
    sweep: Sweep,
    head: Head,
    hidden: HiddenStates,
    tokens_NS: torch.Tensor,
    chosen: torch.Tensor,
) -> Callable[[float], float]:
    """Return the chosen windows' mean loss as a function of the logits' factor."""
    spec, sample_NS = sweep.skeleton.spec, tokens_NS[chosen]
    sample = sweep.hidden_states(sample_NS)
    for place, window in enumerate(chosen.tolist()):
        sample.write(slice(place, place + 1), hidden.read(slice(window, window + 1)))
    head_parameters = spec.vocabulary * spec.hidden
    share = head_parameters / (head_parameters + spec.block_parameters)
    normed = False

    def loss(scale: float) -> float:
        nonlocal normed
        losses_NS = head.nll(sample, sample_NS, scale=scale, normed=normed)
        normed = True
        sweep.forward_tokens += round(sample_NS.numel() * share)
        return float(losses_NS.double().mean())

    return loss


def convex_minimum(value: Callable[[float], float]) -> float:
    """Return the factor that minimises a convex function.

    The minimum is bracketed in steps of 0.1 from 1, then refined by a parabola. The search ends
    near 0.3 and 2.
    """
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
    """Return the final norm's tensors with which the logits are ``scale`` times as large.

    They are fp32, by full name, as a checkpoint stores them: without the offset that some norms
    (Gemma's) add to their weight.
    """
    scaled = {}
    for name in spec.norm_tensors:
        offset = spec.family.norm_offset if name.endswith(".weight") else 0.0
        scaled[name] = (checkpoint.read(name).float() + offset) * scale - offset
    return scaled
