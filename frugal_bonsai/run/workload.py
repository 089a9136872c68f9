"""The workload of a prune, made once for its memory plan, its predicted time and its tokens.

In: a resolved prune and the sizes of its texts. Out: a
:class:`~frugal_bonsai.memory.work.PruneWorkload`, and the largest number of tokens that its search
spends. Reads headers, no weights.
"""

from __future__ import annotations

import math

from frugal_bonsai.bonsai.calibration import held_out_count
from frugal_bonsai.bonsai.masks.sampling import batch_ends
from frugal_bonsai.bonsai.selection.candidates import MOST_CANDIDATES
from frugal_bonsai.bonsai.selection.schedule import (
    MOST_SCALES,
    round_goals,
    round_windows,
    scale_windows,
    trial_windows,
)
from frugal_bonsai.bonsai.settings import NONE, PruneSettings
from frugal_bonsai.checkpoint.reader import Checkpoint
from frugal_bonsai.memory.command_items import cache_bytes
from frugal_bonsai.memory.plan import MemoryPlan
from frugal_bonsai.memory.work import PruneWorkload, text_tokens
from frugal_bonsai.model.family import ModelSpec
from frugal_bonsai.model.layout import PADDED
from frugal_bonsai.model.units import FFN
from frugal_bonsai.ranks.launch import launched
from frugal_bonsai.rewrite.companions import companion_bytes
from frugal_bonsai.run.open import Model
from frugal_bonsai.run.resolve import ResolvedPrune
from frugal_bonsai.stream.engine import compute_dtype
from frugal_bonsai.text.sources import SELF

# Share of the memory that the cache of written text may take: 1 / 4.
_CACHE_SHARE = 4


def prune_workload(
    model: Model,
    resolved: ResolvedPrune,
    windows: int,
    *,
    eval_windows: int = 0,
    custom_utility: bool = False,
) -> PruneWorkload:
    """Return the workload of a prune.

    Args:
        model: Model that is pruned.
        resolved: Its resolved options.
        windows: Number of calibration windows.
        eval_windows: Number of windows of the text that ``--eval-text`` names.
        custom_utility: A utility of the user's needs all logits of a window.
    """
    settings, uniform, launch = resolved.settings, resolved.rules.uniform, launched()
    held_out, sampled = held_out_count(windows), 0
    if resolved.source == SELF:
        sampled = resolved.windows + held_out_count(resolved.windows)
    columns = max(group.columns for group in model.spec.table.groups)
    masked = settings.level != NONE
    reconstruction = settings.recovery
    written = settings.self_windows or 0 if reconstruction else 0
    return PruneWorkload(
        window=resolved.window,
        windows=windows,
        measured=(held_out, eval_windows),
        weights=settings.weights,
        sampled=sampled,
        full_logits=custom_utility,
        source_bytes=_element_bytes(model.checkpoint),
        goals=tuple(round_goals(settings)),
        part_windows=round_windows(settings, columns, resolved.window, windows),
        mask_windows=min(settings.mask_windows, windows),
        mask_batches=tuple(batch_ends(settings.masks, settings.certainty)) if masked else (),
        shared_masks=settings.design == "shared",
        int8_arithmetic=settings.arithmetic == "int8",
        exact_importance=settings.prior == "exact",
        imputation_pool=settings.pool if settings.imputes(uniform=uniform) else 0.0,
        reconstruction=reconstruction,
        refit_inputs=reconstruction and settings.refit == "all",
        trial_windows=_trial_windows(settings, columns, resolved.window, windows, uniform=uniform),
        candidates=MOST_CANDIDATES,
        scale_windows=(
            scale_windows(resolved.window, windows) if reconstruction and settings.rescale else 0
        ),
        written=written,
        written_together=_texts_together(model.spec, resolved, written),
        channel_updates=settings.refine if reconstruction else 0,
        mean_biases=settings.bias,
        padded=resolved.rules.layout == PADDED,
        companion_bytes=copied_bytes(model),
        ranks=1 if launch is None else launch.ranks,
        local_ranks=1 if launch is None else launch.local_ranks,
    )


def _texts_together(spec: ModelSpec, resolved: ResolvedPrune, written: int) -> int:
    """Return the number of texts written together: their cache takes a quarter of the cap."""
    budget, dtype = resolved.machine.budget, compute_dtype(resolved.machine.device)
    near_bytes = budget.host_bytes if budget.gpu_bytes is None else budget.gpu_bytes
    tokens = text_tokens(resolved.window)
    most = near_bytes // _CACHE_SHARE // cache_bytes(spec, tokens, dtype.itemsize)
    return max(1, min(most, written * -(-resolved.window // tokens)))


def _trial_windows(
    settings: PruneSettings, columns: int, window: int, windows: int, *, uniform: bool
) -> int:
    """Number of windows through both models that a candidate cut costs; 0 without candidates.

    The windows that judge it take the pruned model alone, at most two passes of three.
    """
    if not settings.selects_candidates(uniform=uniform):
        return 0
    fitted, held_out = trial_windows(columns, window, windows)
    return fitted + math.ceil(held_out * 2 / 3)


def copied_bytes(model: Model) -> int:
    """Return the bytes that an output has beside the text model's weights."""
    whole = model.spec.multimodal
    carried = 0 if whole is None else whole.carried_bytes
    return carried + companion_bytes(model.folder, processor=whole is not None)


def _element_bytes(checkpoint: Checkpoint) -> int:
    """Mean bytes of an element of the tensors that are computed with."""
    entries = checkpoint.tensors.values()
    elements = sum(math.prod(entry.shape) for entry in entries)
    return round(sum(entry.size_bytes for entry in entries) / elements)


def forward_tokens(spec: ModelSpec, work: PruneWorkload, plan: MemoryPlan) -> int:
    """Return the largest number of tokens that a search takes through the whole model.

    Every round may spend all masks and try all candidate cuts. The logit scale takes passes of
    the head, counted by the head's share of the model. A channel update passes through a
    part of the remaining model, counted as all of it: forward and back and for a solve in each
    step, and once at the end.

    Args:
        spec: Shapes of the dense model.
        work: The workload.
        plan: Its memory plan: inputs that are not held are computed again.
    """
    part = work.part_windows * work.window
    masked = work.rounds * work.pairs * work.window
    if not work.reconstruction:
        return masked + work.rounds * work.windows * work.window
    again = 2 if plan.keep_inputs else 3
    last = work.last_windows * work.window
    recovered = (work.rounds - 1) * part + last
    tried = work.rounds * work.candidates * work.trial_windows * work.window
    updated = 0.0
    if work.channel_updates:
        channels = max(group.columns for group in spec.table.groups if group.kind == FFN)
        passes = work.update_passes(channels, spec.ffn_inputs, keep=plan.keep_updates)
        updated = (passes + work.channel_updates + 1) * work.remaining[-1]
    head = spec.vocabulary * spec.hidden
    scaled = MOST_SCALES * work.scale_windows * work.window
    scaled_share = head / (head + spec.block_parameters)
    written = work.written_texts * text_tokens(work.window)
    searched = written + masked + part + again * (recovered + tried)
    return searched + math.ceil(updated * last + scaled * scaled_share)
