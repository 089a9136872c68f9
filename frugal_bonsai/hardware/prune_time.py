"""The predicted time of a prune, one function a phase.

In: shapes, a layer's operations, a workload, its memory plan, the rates of a machine. Out: a
:class:`TimeEstimate`. torch counts the operations of a layer. What no layer has (Gram matrices,
Cholesky solves, quantisation, the head, disk) is stated here. Nothing is measured or fitted. Holds
a few numbers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from frugal_bonsai.checkpoint.page_cache import fits_page_cache
from frugal_bonsai.hardware.profile import FP32, HardwareProfile
from frugal_bonsai.hardware.throughput import (
    SAMPLING,
    LayerOperations,
    Rates,
    TimeEstimate,
    TimePhase,
)
from frugal_bonsai.memory.plan import MemoryPlan
from frugal_bonsai.memory.work import (
    HOST,
    UPDATE_ITERATIONS,
    PruneWorkload,
    text_tokens,
    texts_at_once,
)
from frugal_bonsai.model.family import ModelSpec
from frugal_bonsai.ranks.division import busiest, divide

# Bytes that quantisation reads and writes for an element, beside the element itself: conversion to
# fp16, comparison with zero, absolute value, maximum, scaling in fp32, rounding, int8, a copy.
_QUANTISE_BYTES = 33
# Bytes that the log-sum-exp takes for a logit in fp32: maximum, difference, exponential, sum.
_LOGIT_BYTES = 24
# Bytes that a channel update takes for a channel, in one pass of one projection into the FFN.
_UPDATE_BYTES = 24
# Passes of the head that find the scale of the logits (convex_minimum of logit_scale.py).
_SCALES_TRIED = 7


@dataclass(frozen=True, kw_only=True)
class PruneTime:
    """The time of a prune on the profile's machine, from the operations of the mean layer."""

    spec: ModelSpec
    operations: LayerOperations
    work: PruneWorkload
    plan: MemoryPlan
    profile: HardwareProfile

    def estimate(self) -> TimeEstimate:
        """Return the predicted phases in order of appearance."""
        work = self.work
        phases = [TimePhase(name="starting", compute=self.profile.start_seconds)]
        if work.sampled:
            sampling = self._drawing(work.sampled, work.window, native=True)
            phases.append(self._phase(SAMPLING, sampling))
        phases += [
            self._phase("perplexity", self._perplexity()),
            self._phase("building stores", self._stores(), overlaps=False),
            self._phase("statistics", self._statistics()),
        ]
        if work.pairs:
            phases.append(self._phase("masked evaluation", self._masked_evaluation()))
        if work.written:
            phases.append(self._phase("writing text", self._writing()))
        if work.reconstruction:
            phases.append(self._phase("recovery", self._reconstruction()))
        phases.append(self._phase("rewriting", self._rewriting(), overlaps=False))
        return TimeEstimate(phases=tuple(phases))

    def _phase(self, name: str, seconds: TimePhase, *, overlaps: bool = True) -> TimePhase:
        # With one layer buffer the next layer is read when this one has been computed.
        overlaps = overlaps and self.plan.limits.layer_buffers > 1
        return TimePhase(name=name, overlaps=overlaps) + seconds

    def _writing(self) -> TimePhase:
        """Return the time of the text for the last reconstruction, on the first of the ranks."""
        work, device = self.work, self.profile.device
        starts = range(0, work.written_texts, work.written_together)
        batches = [slice(s, min(s + work.written_together, work.written_texts)) for s in starts]
        if work.ranks > 1:
            grid = texts_at_once(device, work.written_together)
            batches = list(divide(batches, grid, work.ranks))[:: work.ranks]
        seconds = TimePhase()
        for batch in batches:
            seconds += self._drawing(batch.stop - batch.start, text_tokens(work.window))
        return seconds

    def _drawing(self, texts: int, tokens: int, *, native: bool = False) -> TimePhase:
        """Return the time of texts that the model draws together: a sweep for each token.

        For every token the cache of a layer is read and written anew, and repeated for the query
        heads. On average it holds half of the text.
        """
        spec = self.spec
        seconds = self._rates.products(2 * spec.vocabulary * spec.hidden * texts)
        heads = 4 * (spec.kv_heads + spec.heads) * spec.head_dim * self.profile.element_bytes
        seconds += self._rates.traffic(texts * tokens / 2 * spec.layers * heads)
        return (seconds + self._sweep(1.0, texts, tokens=1, native=native)) * (tokens - 1)

    def _perplexity(self) -> TimePhase:
        """Return the time of the dense and the pruned model's perplexity on held-out windows."""
        windows, share = sum(self.work.measured), self.work.remaining[-1]
        sweeps = self._sweep(1.0, windows, native=True) + self._sweep(share, windows, native=True)
        return sweeps + self._head(windows) * 2

    def _stores(self) -> TimePhase:
        """Return the time of the working stores: dense, pruned, reconstructed, and candidates'."""
        work, blocks = self.work, self.spec.block_parameters
        each = 1 + work.reconstruction + (work.candidate_turns if work.trial_windows else 0)
        # The dense store is one more; nothing starts from a store of the last round's end.
        elements = blocks * (1 + each * sum(work.remaining[1:]) - work.remaining[-1])
        read_bytes = each * work.rounds * blocks * work.source_bytes
        seconds = self._disk(read_bytes, elements * self._stored_bytes)
        if work.weights != "int8":
            return seconds
        seconds += self._rates.traffic(elements * (work.source_bytes + _QUANTISE_BYTES))
        return seconds + self._rates.copy(elements * (work.source_bytes + 1))

    def _statistics(self) -> TimePhase:
        """Return the time of importance scores: once, or without reconstruction in every round."""
        work, seconds = self.work, TimePhase()
        tokens = work.part_windows * work.window
        for number in range(1 if work.reconstruction else work.rounds):
            seconds += self._sweep(work.remaining[number], work.part_windows)
            seconds += self._importance(number, factors=2, gram_tokens=tokens)
        return seconds

    def _masked_evaluation(self) -> TimePhase:
        """Return the time of every round's masks, on the rank that takes most of them."""
        work, seconds = self.work, TimePhase()
        pairs = sum(self._own_part(pairs)[0] for pairs in work.pair_batches)
        tokens = pairs * work.window * self.spec.layers
        for number, share in enumerate(work.remaining[:-1]):
            layer, pool = self.operations.kept(share), work.round_imputed_share(number)
            for mine, passes in map(self._own_part, work.pair_batches):
                seconds += self._sweep(share, mine, int8=work.int8_arithmetic, waves=passes)
                seconds += self._head(mine, int8=work.int8_arithmetic)
            # Masks are multiplied in place. An imputed column is gathered, predicted from the
            # columns outside of the pool, and chosen.
            passes = 2 + (4 if pool else 0)
            columns = (layer.query + layer.ffn) * self.profile.element_bytes
            seconds += self._rates.traffic(passes * columns * tokens)
            squares = layer.query**2 + layer.ffn**2
            seconds += self._rates.products(2 * pool * (1 - pool) * squares * tokens)
        return seconds

    def _own_part(self, pairs: int) -> tuple[int, int]:
        """Return the most pairs that a rank takes, and its passes over the layers for them."""
        limits = self.plan.limits
        return busiest(pairs, limits.micro_batch, limits.windows_in_flight, self.work.ranks)

    def _reconstruction(self) -> TimePhase:
        """Return the time of reconstruction after each round, and of the candidates before it."""
        work, seconds = self.work, self._head(self.work.scale_windows) * _SCALES_TRIED
        # The last round's passes over tokens round their factors.
        fast = replace(self, profile=self.profile.with_fast_products())
        for number, share in enumerate(work.remaining[1:], start=1):
            last = number == work.rounds
            windows = work.last_windows if last else work.part_windows
            seconds += (fast if last else self)._refit_sweep(share, windows)
            if work.trial_windows:
                seconds += self._refit_sweep(share, work.trial_windows) * work.candidate_turns
            if not last:  # the factor of the refit serves the importance scores too
                seconds += self._importance(number, factors=1)
            # The dense model's losses, unless the first round has measured them on these windows.
            if number == 1 or work.part_windows < work.windows:
                seconds += self._head(windows)
        return seconds + (fast._channel_updates() if work.channel_updates else TimePhase())

    def _rewriting(self) -> TimePhase:
        """Return the time of the output: parent read, kept part written, both read to verify."""
        spec, share = self.spec, self.work.remaining[-1]
        kept = spec.parameters - (1 - share) * spec.block_parameters
        source_bytes = self.work.source_bytes
        seconds = self._disk(spec.parameters * source_bytes, kept * source_bytes, cold=True)
        for left in (1.0, share):  # verification computes a few tokens
            seconds += self._sweep(left, 1, tokens=1, native=True)
        return seconds

    @property
    def _rates(self) -> Rates:
        return Rates(self.profile)

    @property
    def _stored_bytes(self) -> int:
        """Bytes of an element of the working stores."""
        return 1 if self.work.weights == "int8" else self.work.source_bytes

    def _disk(
        self, read_bytes: float, written_bytes: float = 0, *, cold: bool = False
    ) -> TimePhase:
        """Return the time of reads and writes; the page cache keeps two stores where it can."""
        profile = self.profile
        free_bytes = max(0, profile.host_bytes - self.plan.total_bytes(HOST))
        stores_bytes = 2 * self.spec.block_parameters * self._stored_bytes
        rate = profile.disk_warm_bytes_per_second
        if cold or not fits_page_cache(stores_bytes, free_bytes):
            rate = profile.disk_cold_bytes_per_second
        written = written_bytes / profile.disk_write_bytes_per_second
        return TimePhase(disk=read_bytes / rate + written)

    def _sweep(
        self,
        share: float,
        windows: int,
        *,
        tokens: int | None = None,
        passes: int = 1,
        native: bool = False,
        int8: bool = False,
        waves: int | None = None,
    ) -> TimePhase:
        """Return the time of a sweep over all layers: read, copied, made dense, computed.

        Args:
            share: Share of the block parameters that is left.
            windows: Number of windows; each wave of them takes the layers once.
            tokens: Tokens of a window. None takes those of the workload.
            passes: Forward passes of each layer.
            native: The checkpoint is read instead of the working store.
            int8: Weights are multiplied as they are stored.
            waves: Number of waves, if not all of the plan's windows in flight are together.
        """
        limits, tokens = self.plan.limits, tokens or self.work.window
        if not windows:
            return TimePhase()
        layer, micro_batch = self.operations.kept(share), limits.micro_batch
        one = self._rates.forward(layer, tokens, windows, micro_batch=micro_batch, int8=int8)
        seconds = one * (passes * self.spec.layers)
        waves = waves or -(-windows // limits.windows_in_flight)
        elements = waves * share * self.spec.block_parameters
        stored_bytes = self.work.source_bytes if native else self._stored_bytes
        seconds += self._disk(elements * stored_bytes, cold=native)
        element_bytes = self.profile.element_bytes
        if stored_bytes != element_bytes and not int8:
            # int8 is converted, then scaled in place.
            made_bytes = (3 if stored_bytes == 1 else 1) * element_bytes
            seconds += self._rates.traffic(elements * (stored_bytes + made_bytes))
        spilled = max(0, min(windows, limits.windows_in_flight) - limits.resident_windows) * waves
        spilled_bytes = self.spec.layers * spilled * tokens * self.spec.hidden * element_bytes
        seconds += self._rates.copy(elements * stored_bytes)
        if limits.on_disk:  # its pages leave the cache, if they do not fit
            return seconds + self._disk(spilled_bytes, spilled_bytes)
        return seconds + self._rates.copy(2 * spilled_bytes)

    def _head(self, windows: int, *, int8: bool = False) -> TimePhase:
        """Return the time of the logits and their log-sum-exp."""
        tokens, hidden = windows * self.work.window, self.spec.hidden
        logits = tokens * self.spec.vocabulary
        seconds = self._rates.projections(2 * hidden * logits, tokens * hidden, logits, int8=int8)
        return seconds + self._rates.traffic(_LOGIT_BYTES * logits, 4 * logits)

    def _importance(self, number: int, *, factors: int, gram_tokens: int = 0) -> TimePhase:
        """Return the time of a round's importance scores and imputation; the first round is 0.

        Gram matrices that are at hand are summed over no tokens.
        """
        work, rates, seconds = self.work, self._rates, TimePhase()
        if not work.exact_importance and not work.imputation_pool:
            return seconds
        layer = self.operations.kept(work.remaining[number])
        pool = work.round_imputed_share(number)
        for columns in (layer.query, layer.ffn):
            seconds += rates.gram(columns, 0, gram_tokens) + rates.cholesky(columns) * factors
            # Imputation solves for the pool's columns from the others'.
            seconds += rates.cholesky(pool * columns, (1 - pool) * columns)
            seconds += rates.products(2 * pool * columns**3, FP32)
        return seconds * self.spec.layers

    def _refit_sweep(self, share: float, windows: int) -> TimePhase:
        """Return the time of one reconstruction: both models over windows, projections refitted.

        The pruned model's layer runs once where its inputs are held and about three times where
        they are not. Its o_proj is refitted first and multiplies again wherever it is needed.
        """
        work, rates, layer = self.work, self._rates, self.operations.kept(share)
        tokens, hidden = windows * work.window, self.spec.hidden
        refits = rates.products(2 * layer.query * hidden * tokens * (2 + work.refit_inputs))
        output = rates.refit(layer.query, hidden, hidden, tokens)
        refits += output + rates.refit(layer.ffn, hidden, hidden, tokens)
        if work.refit_inputs:
            rows = layer.projections / 2 / hidden - layer.query - layer.ffn
            # Attention's inputs and the FFN's; the weights are multiplied with two moments.
            inputs = rates.refit(hidden, rows, hidden, tokens)
            refits += inputs + rates.refit(hidden, 0, hidden, tokens)
            refits += rates.products(2 * hidden**2 * rows, FP32)
        dense, passes = self._sweep(1.0, windows), 1 if self.plan.keep_inputs else 3
        sweeps = dense + self._sweep(share, windows, passes=passes) + self._head(windows)
        return sweeps + refits * self.spec.layers

    def _channel_updates(self) -> TimePhase:
        """Return the time of the last reconstruction's channel updates.

        Their conjugate gradients pass through the FFN forward and back. Triangular solves with the
        factor of the inputs' Gram matrix whiten the weights. down_proj is refitted after each.
        """
        work, share = self.work, self.work.remaining[-1]
        layer, hidden = self.operations.kept(share), self.spec.hidden
        tokens, updates = work.last_windows * work.window, work.channel_updates
        channels, inputs = round(layer.ffn), self.spec.ffn_inputs
        passes = tokens * work.update_passes(channels, inputs, keep=self.plan.keep_updates)
        rows = inputs * layer.ffn
        products = 2 * passes * (rows + layer.ffn) * hidden
        seconds = self._rates.products(products, self.profile.update_arithmetic)
        seconds += self._rates.traffic(_UPDATE_BYTES * passes * rows)
        # One triangular solve is half of a solve.
        solves = updates * (2 * UPDATE_ITERATIONS + 3) / 2
        seconds += self._rates.gram(hidden, 0, tokens) + self._rates.cholesky(hidden, solves * rows)
        seconds += self._rates.refit(layer.ffn, hidden, hidden, tokens) * updates
        return seconds * self.spec.layers + self._sweep(share, work.last_windows) * (updates + 1)
