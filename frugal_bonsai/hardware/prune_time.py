"""The predicted time of a prune, one function a phase.

In: shapes, a layer's operations, a workload, its memory plan, the rates of a machine.
Out: a :class:`TimeEstimate`. Operations of a layer are counted by torch; what no layer has (Gram
matrices, Cholesky solves, quantisation, the head, disk) is stated here. Nothing is measured or
fitted. Holds a few numbers.

Legend: H hidden, C input columns of an output projection, V vocabulary, S tokens of a window.
"""

from __future__ import annotations

import math

from frugal_bonsai.accelerator import is_accelerator
from frugal_bonsai.checkpoint.page_cache import fits_page_cache
from frugal_bonsai.hardware.operations import FRESH_BLOCK_BYTES, LayerOperations, Rates
from frugal_bonsai.hardware.profile import INT8, HardwareProfile
from frugal_bonsai.hardware.time_model import SAMPLING, TimeEstimate, TimePhase
from frugal_bonsai.memory.plan import MemoryPlan
from frugal_bonsai.memory.work import (
    HOST,
    REFINE_ITERATIONS,
    PruneWorkload,
    refined_blocks,
    refining_passes,
)
from frugal_bonsai.model.family import ModelSpec
from frugal_bonsai.row_blocks import multiplied_in_blocks

# Bytes that quantisation reads and writes for an element, beside the element itself: conversion to
# fp16, comparison with zero, absolute value, maximum, scaling in fp32, rounding, int8, a copy.
_QUANTISE_BYTES = 33
# Bytes a logit of the log-sum-exp: maximum, difference, exponential and sum in fp32; conversion.
_LOGIT_BYTES, _CONVERT_BYTES = 24, 6
# Bytes that a channel update reads and writes for a channel, in one pass of one input projection.
_UPDATE_BYTES = 24
# Passes of the head that find the scale of the logits (convex_minimum of logit_scale.py).
_SCALES_TRIED = 7


def estimate_time(
    spec: ModelSpec,
    operations: LayerOperations,
    work: PruneWorkload,
    plan: MemoryPlan,
    profile: HardwareProfile,
) -> TimeEstimate:
    """Predict the time of a prune.

    Args:
        spec: The model.
        operations: Operations of its mean layer.
        work: The workload.
        plan: Its memory plan.
        profile: The machine.
    """
    return TimeEstimate(phases=_PruneTime(spec, operations, work, plan, profile).phases())


class _PruneTime:
    def __init__(
        self,
        spec: ModelSpec,
        operations: LayerOperations,
        work: PruneWorkload,
        plan: MemoryPlan,
        profile: HardwareProfile,
    ) -> None:
        self._spec, self._layer, self._work = spec, operations, work
        self._plan, self._limits = plan, plan.limits
        self._rates, self._start_seconds = Rates(profile), profile.start_seconds
        self._gpu = is_accelerator(profile.device)
        self._element_bytes = 2 if self._gpu else 4
        self._int8_store = work.weights == "int8"
        stored_bytes = 1 if self._int8_store else work.source_bytes
        free_bytes = max(0, profile.host_bytes - plan.total_bytes(HOST))
        # Dense and pruned store are read again and again.
        self._cached = fits_page_cache(2 * spec.block_parameters * stored_bytes, free_bytes)

    # -- phases --------------------------------------------------------------------------------
    def phases(self) -> tuple[TimePhase, ...]:
        """Return the phases in order of appearance."""
        work = self._work
        phases = [TimePhase(name="starting", compute=self._start_seconds)]
        if work.sampled:
            phases.append(self._phase(SAMPLING, self._sampling()))
        phases += [
            self._phase("perplexity", self._perplexity()),
            self._phase("building stores", self._stores(), overlaps=False),
            self._phase("statistics", self._statistics()),
        ]
        if work.pairs:
            phases.append(self._phase("masked evaluation", self._masked_evaluation()))
        if work.reconstruction:
            phases.append(self._phase("recovery", self._reconstruction()))
        return (*phases, self._phase("rewriting", self._rewriting(), overlaps=False))

    def _phase(self, name: str, seconds: TimePhase, *, overlaps: bool = True) -> TimePhase:
        # With one layer buffer the next layer is read when this one has been computed.
        overlaps = overlaps and self._limits.layer_buffers > 1
        return TimePhase(name=name, overlaps=overlaps) + seconds

    def _sampling(self) -> TimePhase:
        """Return the time of calibration text from the model: a sweep for each token."""
        windows, tokens = self._work.sampled, self._work.window
        logits = 2 * self._spec.vocabulary * self._spec.hidden * windows
        one = self._forward(1.0, windows / tokens) + self._rates.products(logits)
        return (one + self._visits(1.0, windows, native=True)) * (tokens - 1)

    def _perplexity(self) -> TimePhase:
        """Return the time of the dense and the pruned model's perplexity on held-out windows."""
        windows, shares = sum(self._work.measured), self._work.remaining
        seconds = self._head(windows) * 2
        for share in (shares[0], shares[-1]):
            seconds += self._forward(share, windows) + self._visits(share, windows, native=True)
        return seconds

    def _stores(self) -> TimePhase:
        """Return the time of the working stores: dense, pruned, reconstructed, and candidates'."""
        work, blocks = self._work, self._spec.block_parameters
        shares = [work.remaining[0]]
        for number, share in enumerate(work.remaining[1:], start=1):
            last = number == work.rounds
            stores = int(work.reconstruction or not last) + int(work.reconstruction and not last)
            shares += [share] * (stores + (work.candidates if work.trial_windows else 0))
        elements, source_bytes = sum(shares) * blocks, work.source_bytes
        seconds = self._read(len(shares) * blocks * source_bytes)
        seconds += self._rates.write(elements * (1 if self._int8_store else source_bytes))
        if self._int8_store:
            seconds += self._rates.traffic(elements * (source_bytes + _QUANTISE_BYTES))
            seconds += self._rates.copy(elements * (source_bytes + 1))
        return seconds

    def _statistics(self) -> TimePhase:
        """Return the time of importance scores: once, or without reconstruction in every round."""
        work, seconds = self._work, TimePhase()
        for number in range(1 if work.reconstruction else work.rounds):
            share, windows = work.remaining[number], work.part_windows
            layer = self._layer.kept(share)
            seconds += self._forward(share, windows) + self._visits(share, windows)
            if work.exact_importance or work.imputation_pool:
                for columns in (layer.query, layer.ffn):
                    gram = self._rates.gram(columns, 0, windows * work.window)
                    seconds += gram * self._spec.layers
            seconds += self._importance(number, factors=2)
        return seconds

    def _masked_evaluation(self) -> TimePhase:
        """Return the time of every round's masks."""
        work, seconds = self._work, TimePhase()
        tokens = work.pairs * work.window * self._spec.layers
        arithmetic = INT8 if work.int8_arithmetic else None
        for number, share in enumerate(work.remaining[:-1]):
            layer, pool = self._layer.kept(share), work.round_imputed_share(number)
            seconds += self._forward(share, work.pairs, arithmetic)
            seconds += self._head(work.pairs, arithmetic)
            for pairs in work.pair_batches:
                seconds += self._visits(share, pairs, arithmetic=arithmetic)
            # Masks are multiplied in place. An imputed column is gathered, predicted from the
            # columns outside of the pool, and chosen.
            passes = 2 + (4 if pool else 0)
            columns = (layer.query + layer.ffn) * self._element_bytes
            seconds += self._rates.traffic(passes * columns * tokens)
            squares = layer.query**2 + layer.ffn**2
            seconds += self._rates.products(2 * pool * (1 - pool) * squares * tokens)
        return seconds

    def _reconstruction(self) -> TimePhase:
        """Return the time of reconstruction after each round, and of the candidates before it."""
        work, seconds = self._work, TimePhase()
        for number, share in enumerate(work.remaining[1:], start=1):
            last = number == work.rounds
            windows = work.windows if last else work.part_windows
            seconds += self._refit_sweep(share, windows)
            if work.trial_windows:
                seconds += self._refit_sweep(share, work.trial_windows) * work.candidates
            if not last:  # the refit's factor is the importance scores' too
                seconds += self._importance(number, factors=1)
            # The dense model's losses, unless the first round has measured them on these windows.
            if number == 1 or work.part_windows < work.windows:
                seconds += self._head(windows)
        seconds += self._head(work.scale_windows) * _SCALES_TRIED
        return seconds + self._channel_update(work.remaining[-1])

    def _rewriting(self) -> TimePhase:
        """Return the time of the output: parent read, kept part written, both read to verify."""
        spec, source_bytes = self._spec, self._work.source_bytes
        share = self._work.remaining[-1]
        after = spec.parameters - (1 - share) * spec.block_parameters
        seconds = self._rates.read(spec.parameters * source_bytes, cold=True)
        seconds += self._rates.write(after * source_bytes)
        return seconds + self._visits(1.0, 1, native=True) + self._visits(share, 1, native=True)

    # -- parts of phases -----------------------------------------------------------------------
    def _forward(self, share: float, windows: float, arithmetic: str | None = None) -> TimePhase:
        """Return the time of all layers' forward pass, weights at hand."""
        if not windows:
            return TimePhase()
        layer, micro_batch = self._layer.kept(share), self._limits.micro_batch
        forward = self._rates.forward(layer, self._work.window, windows, micro_batch, arithmetic)
        return forward * self._spec.layers

    def _visits(
        self,
        share: float,
        windows: int,
        *,
        native: bool = False,
        dense: bool = False,
        arithmetic: str | None = None,
    ) -> TimePhase:
        """Return the time of bringing all layers to the windows: read, copied, made dense.

        Args:
            share: Share of the block parameters that is left.
            windows: Number of windows; each wave of them reads the layers once.
            native: The checkpoint is read instead of the working store.
            dense: Weights are made dense as a whole.
            arithmetic: ``"int8"`` multiplies weights as they are stored.
        """
        work, limits, rates = self._work, self._limits, self._rates
        waves = math.ceil(windows / limits.windows_in_flight)
        elements = share * self._spec.block_parameters
        stored_bytes = 1 if self._int8_store and not native else work.source_bytes
        seconds = self._read(waves * elements * stored_bytes, cold=native)
        if stored_bytes != self._element_bytes and arithmetic != INT8:
            # A CPU makes rows of a large weight dense in the cache, for each micro-batch anew.
            weight = (int(self._layer.ffn * share), int(self._layer.hidden))
            blocks = (
                not self._gpu and not dense and multiplied_in_blocks(weight, self._element_bytes)
            )
            times = math.ceil(windows / min(limits.micro_batch, windows)) if blocks else waves
            # int8 is converted, then scaled in place.
            passes = 3 if stored_bytes == 1 and not blocks else 1
            size_bytes = stored_bytes + passes * self._element_bytes
            seconds += rates.traffic(times * elements * size_bytes)
        spilled = max(0, min(windows, limits.windows_in_flight) - limits.resident_windows) * waves
        hidden_bytes = work.window * self._spec.hidden * self._element_bytes
        copied = waves * elements * stored_bytes + 2 * self._spec.layers * spilled * hidden_bytes
        return seconds + rates.copy(copied)

    def _read(self, size_bytes: float, *, cold: bool = False) -> TimePhase:
        """Return the time of reads; stores that the page cache cannot hold are read cold."""
        return self._rates.read(size_bytes, cold=cold or not self._cached)

    def _head(self, windows: int, arithmetic: str | None = None) -> TimePhase:
        """Return the time of the logits and their log-sum-exp, in chunks of the vocabulary."""
        spec, limits, tokens = self._spec, self._limits, windows * self._work.window
        rows = min(limits.head_rows, spec.vocabulary)
        chunks, logits = math.ceil(spec.vocabulary / rows), tokens * spec.vocabulary
        seconds = self._rates.projections(
            2 * spec.hidden * logits, chunks * tokens * spec.hidden, logits, arithmetic
        )
        fresh = rows * limits.head_tokens * 4 >= FRESH_BLOCK_BYTES
        each = _LOGIT_BYTES + (_CONVERT_BYTES if self._gpu else 0)
        seconds += self._rates.traffic(each * logits, 4 * logits if fresh else 0)
        if chunks == 1:
            return seconds
        # A head that does not fit is read again for every wave.
        waves = math.ceil(windows / limits.windows_in_flight)
        weights, source_bytes = spec.vocabulary * spec.hidden, self._work.source_bytes
        blocks = not self._gpu and multiplied_in_blocks((rows, spec.hidden), self._element_bytes)
        times = math.ceil(tokens / limits.head_tokens) if blocks else waves
        seconds += self._read(waves * weights * source_bytes)
        seconds += self._rates.traffic(times * weights * (source_bytes + self._element_bytes))
        spilled = max(0, windows - limits.resident_windows) * self._work.window * spec.hidden
        copied = (waves * weights + chunks * spilled) * self._element_bytes
        return seconds + self._rates.copy(copied)

    def _importance(self, number: int, *, factors: int) -> TimePhase:
        """Return the time of a round's importance scores and imputation, from Gram matrices.

        Args:
            number: The round, from 0.
            factors: Cholesky factors and inverses of each Gram matrix, C^3 / 3 operations each.
        """
        work, rates, seconds = self._work, self._rates, TimePhase()
        if not work.exact_importance and not work.imputation_pool:
            return seconds
        layer, pool = self._layer.kept(work.remaining[number]), work.round_imputed_share(number)
        for columns in (layer.query, layer.ffn):
            seconds += rates.cholesky(columns) * factors
            # Imputation solves for the pool's columns from the others'.
            seconds += rates.cholesky(pool * columns, (1 - pool) * columns)
            seconds += rates.fp32(2 * pool * columns**3)
        return seconds * self._spec.layers

    def _refit_sweep(self, share: float, windows: int) -> TimePhase:
        """Return the time of one reconstruction: both models over windows, projections refitted.

        The pruned model's layer runs once where its inputs are held and about three times where
        they are not. Its o_proj is refitted first and multiplies again wherever it is needed.
        """
        work, layer = self._work, self._layer.kept(share)
        tokens, hidden = windows * work.window, self._layer.hidden
        pruned = self._forward(share, windows) * (1 if self._plan.keep_inputs else 3)
        again = 2 * layer.query * hidden * tokens * (2 + int(work.refit_inputs))
        refits = self._rates.products(again)
        # Targets of the output projections: three sums, and their energy.
        refits += self._rates.traffic(2 * 10 * 4 * hidden * tokens)
        refits += self._refit(layer.query, hidden, tokens) + self._refit(layer.ffn, hidden, tokens)
        if work.refit_inputs:
            ffn_rows = layer.ffn * layer.ffn_inputs
            outputs = layer.projections / 2 / hidden - layer.query - layer.ffn
            for rows in (ffn_rows, outputs - ffn_rows):
                refits += self._refit(hidden, rows, tokens, products=2)
        seconds = self._forward(1.0, windows) + pruned + refits * self._spec.layers
        for stored in (1.0, share):
            seconds += self._visits(stored, windows, dense=True)
        return seconds + self._head(windows)

    def _refit(self, columns: float, rows: float, tokens: float, products: int = 1) -> TimePhase:
        """Return the time of a ridge regression of a projection's rows on its input columns.

        Args:
            columns: Input columns.
            rows: Rows of the weight.
            tokens: Tokens that the Gram matrix and the cross moments are summed over.
            products: Products of the weight and a matrix of moments.
        """
        moments = self._rates.gram(columns, self._layer.hidden, tokens)
        moments += self._rates.fp32(2 * products * columns**2 * rows)
        return moments + self._rates.cholesky(columns, rows)

    def _channel_update(self, share: float) -> TimePhase:
        """Return the time of the last reconstruction's channel update.

        Its conjugate gradients pass through the FFN there and back. Triangular solves with the
        factor of the inputs' Gram matrix whiten the weights. After each step down_proj is refitted.
        """
        work, layer, hidden = self._work, self._layer.kept(share), self._layer.hidden
        if not work.channel_updates:
            return TimePhase()
        tokens, blocks = work.windows * work.window, refined_blocks(round(layer.ffn))
        passes = tokens * refining_passes(
            blocks, keep=self._plan.keep_refinement, iterations=REFINE_ITERATIONS
        )
        rows = layer.ffn_inputs * layer.ffn
        sublayer = (layer.ffn_inputs + 1) * layer.ffn * hidden
        seconds = self._rates.products(2 * passes * sublayer, self._rates.profile.tf32_rate)
        seconds += self._rates.traffic(_UPDATE_BYTES * passes * rows)
        solves = (
            work.channel_updates * (2 * REFINE_ITERATIONS + 3) / 2
        )  # a triangular solve is half of a solve
        seconds += self._rates.gram(hidden, 0, tokens) + self._rates.cholesky(hidden, solves * rows)
        seconds += self._refit(layer.ffn, hidden, tokens) * work.channel_updates
        forwards = self._forward(share, work.windows) * (work.channel_updates + 1)
        return seconds * self._spec.layers + forwards
