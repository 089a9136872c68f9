"""The phases of a prune, each from its formulas: shapes and a profile in, seconds out.

In: shapes, a :class:`~frugal_bonsai.memory.work.PruneWorkload`, its memory plan, a
:class:`~frugal_bonsai.hardware.profile.HardwareProfile`. Out: a
:class:`~frugal_bonsai.hardware.time_model.TimeEstimate`. Pure: it measures and fits nothing;
operations and bytes come from cost.py, rates from the profile.
"""

from __future__ import annotations

import math

from frugal_bonsai.accelerator import is_accelerator
from frugal_bonsai.checkpoint.page_cache import fits_page_cache
from frugal_bonsai.hardware.cost import (
    Batch,
    Cost,
    LayerWidths,
    attention_cost,
    dequantise_cost,
    digits_cost,
    exact_prior_cost,
    ffn_cost,
    gram_cost,
    head_cost,
    int8_cost,
    layer_cost,
    layer_widths,
    make_stand_ins_cost,
    outputs_cost,
    refine_cost,
    refit_inputs_cost,
    refit_output_cost,
    refit_outputs_cost,
    stand_ins_cost,
)
from frugal_bonsai.hardware.profile import FP32, INT8, HardwareProfile
from frugal_bonsai.hardware.time_model import SAMPLING, Phase, TimeEstimate
from frugal_bonsai.memory.plan import MemoryPlan
from frugal_bonsai.memory.work import HOST, REFINE_ITERATIONS, PruneWorkload, refined_blocks
from frugal_bonsai.model.family import ModelSpec
from frugal_bonsai.model.units import FFN
from frugal_bonsai.row_blocks import multiplied_in_blocks

# Bytes that row-wise quantisation reads and writes an element, beside the source's own: to fp16,
# compared with zero, absolute, largest, scaled in fp32, rounded, to int8, copied.
_QUANTISE_BYTES = 33


def estimate_time(
    spec: ModelSpec, work: PruneWorkload, plan: MemoryPlan, profile: HardwareProfile
) -> TimeEstimate:
    """Predict a prune's time.

    Args:
        spec: shapes.
        work: what is done.
        plan: its memory.
        profile: the machine.
    """
    return TimeEstimate(phases=tuple(_Estimate(spec, work, plan, profile).phases()))


def int8_wins(spec: ModelSpec, profile: HardwareProfile) -> bool:
    """Whether a layer's products are faster with int8 codes than in the device's own arithmetic.

    Both digits of every input are multiplied, and writing them and joining the sums is elementwise
    work, which a GPU with fast products has little time for.
    """
    if INT8 not in profile.products:
        return False
    w = layer_widths(spec)
    extra = int8_cost(w, 1)  # of one token
    products = 2 * w.projections
    int8 = (products + extra.products) / profile.products[INT8]
    int8 += extra.traffic / profile.memory_bytes_per_second
    return int8 < products / profile.products[profile.arithmetic]


# Of the dense and of the pruned model together (convex_minimum of logit_scale.py).
_SCALES_TRIED = 7


class _Estimate:
    def __init__(
        self, spec: ModelSpec, work: PruneWorkload, plan: MemoryPlan, profile: HardwareProfile
    ) -> None:
        self._spec, self._work, self._plan, self._profile = spec, work, plan, profile
        self._limits = plan.limits
        self._int8_store = work.weights == INT8
        self._gpu = is_accelerator(profile.device)
        self._element = 2 if self._gpu else 4
        self._widths = layer_widths(spec)

    def phases(self) -> list[Phase]:
        """All phases of a prune, in order of appearance."""
        work = self._work
        phases = [Phase(name="starting", compute=self._profile.start_seconds)]
        if work.sampled:
            phases.append(self._sampling())
        phases += [self._reporting(), self._stores(), self._statistics()]
        if work.pairs:
            phases.append(self._masked())
        if work.reconstruction:
            phases.append(self._recovery())
        return [*phases, self._rewriting()]

    def _statistics(self) -> Phase:
        """The first prior; without recovery also one after each round but the last."""
        work, cost = self._work, Cost()
        windows = work.part_windows
        tokens = windows * work.window
        for number in range(1 if work.reconstruction else work.rounds):
            w = self._widths.kept(work.remaining[number])
            layer = layer_cost(w, self._batch(windows), tokens)
            if work.exact_importance or work.imputation_pool:
                layer += gram_cost(w.query, tokens) + gram_cost(w.ffn, tokens)
            layer += self._prior(w, number, factored=False)
            cost += layer * self._spec.layers + self._layers_read(w, windows)
        return self._phase("statistics", cost)

    def _prior(self, w: LayerWidths, number: int, *, factored: bool) -> Cost:
        """What a layer's prior and stand-ins for a round (from 0) take, from its Gram matrices."""
        cost = Cost()
        if self._work.exact_importance or self._work.imputation_pool:  # both need the inverse
            cost += exact_prior_cost(w, factored=factored)
        if self._work.imputation_pool:
            cost += make_stand_ins_cost(w, self._work.round_imputed_share(number))
        return cost

    def _masked(self) -> Phase:
        """Every round's masks, with the layers that the rounds before have left."""
        pairs, cost = self._work.pairs, Cost()
        arithmetic = INT8 if self._work.int8_arithmetic else self._profile.arithmetic
        tokens = pairs * self._work.window
        for number, share in enumerate(self._work.remaining[:-1]):
            w, batch = self._widths.kept(share), self._batch(pairs)
            layer = layer_cost(w, batch, tokens, masked=True)
            if self._work.imputation_pool:
                stand_ins = self._work.round_imputed_share(number)
                layer += stand_ins_cost(w, stand_ins, tokens, self._element)
            if arithmetic == INT8:
                layer += int8_cost(w, tokens)
            cost += layer * self._spec.layers + self._head(pairs, int8=arithmetic == INT8)
            for sweep in self._work.pair_batches:
                cost += self._layers_read(w, sweep, as_stored=arithmetic == INT8)
        return self._phase("masked evaluation", cost, arithmetic)

    def _recovery(self) -> Phase:
        """After each round, the dense and the pruned model side by side; trials before them."""
        work, cost = self._work, Cost()
        for number, share in enumerate(work.remaining[1:], start=1):
            w, last = self._widths.kept(share), number == work.rounds
            windows = work.windows if last else work.part_windows
            cost += self._paired_sweep(w, windows)
            if work.trial_windows:
                cost += self._paired_sweep(w, work.trial_windows) * work.candidates
            if not last:
                cost += self._prior(w, number, factored=True) * self._spec.layers
            # The dense model's losses, unless the first round has measured them on these windows.
            if number == 1 or work.part_windows < work.windows:
                cost += self._head(windows)
        if work.scale_windows:
            cost += self._head(work.scale_windows) * _SCALES_TRIED
        if work.channel_updates:
            cost += self._refined_layer(w) * self._spec.layers
        return self._phase("recovery", cost)

    def _paired_sweep(self, w: LayerWidths, windows: int) -> Cost:
        """Both models over some windows, refitted, and the pruned one's losses."""
        batch, tokens = self._batch(windows), windows * self._work.window
        layer = layer_cost(self._widths, batch, tokens) + self._pruned_layer(w, batch, tokens)
        layer += refit_outputs_cost(w, tokens)
        if self._work.refit_inputs:
            layer += refit_inputs_cost(w, tokens)
        cost = layer * self._spec.layers + self._head(windows)
        cost += self._layers_read(self._widths, windows, dense=True)
        return cost + self._layers_read(w, windows, dense=True)

    def _refined_layer(self, w: LayerWidths) -> Cost:
        """The last recovery's refinement: the FFN's inputs taken, moved, and down_proj solved for.

        After each step the FFN's inputs are computed anew for the solve, and once more at the end.
        They, and targets that are not held, need o_proj's output again, for which attention runs
        where recovery's inputs are not held.
        """
        work = self._work
        tokens, batch = work.windows * work.window, self._batch(work.windows)
        channels = max(group.columns for group in self._spec.table.groups if group.kind == FFN)
        blocks = refined_blocks(channels)
        cost = refine_cost(
            w,
            tokens,
            steps=work.channel_updates,
            blocks=blocks,
            iterations=REFINE_ITERATIONS,
            keep=self._plan.keep_refinement,
        )
        before = Cost(products=2 * w.attention_out * tokens)
        if not self._plan.keep_inputs:
            before += attention_cost(w, batch, tokens)
        # To begin with: inputs and targets; for each step: inputs; targets, also of each block.
        uses = 2 + work.channel_updates + 1
        if not self._plan.keep_refinement:
            uses += work.channel_updates + blocks - 1
        solves = refit_output_cost(w.ffn, w.hidden, tokens) + ffn_cost(w, batch, tokens)
        return cost + before * uses + solves * work.channel_updates + ffn_cost(w, batch, tokens)

    def _pruned_layer(self, w: LayerWidths, batch: Batch, tokens: float) -> Cost:
        """The pruned model's layer while its projections are refitted in turn.

        With inputs held, attention and the FFN's first half run once. The refitted o_proj is
        applied again wherever its output is needed: for the FFN's target, its inputs (and their
        own refit), and at the layer's end. Without, what leads to it is computed again each time.
        """
        uses = 3 + int(self._work.refit_inputs)
        attention, ffn = attention_cost(w, batch, tokens), ffn_cost(w, batch, tokens)
        first = Cost(products=2 * w.attention_out * tokens)
        if not self._plan.keep_inputs:
            # At the end down_proj's inputs are computed again, and for them o_proj's output.
            attention, ffn, uses = attention * (2 + uses), ffn * 2, uses + 1
        cost = attention + ffn + first * (uses - 1) + outputs_cost(w, batch, tokens)
        return cost + Cost(calls=5 * tokens / (batch.micro_batch * batch.window))

    def _head(self, windows: int, *, int8: bool = False) -> Cost:
        """The head over windows; read again each wave where it does not fit in one chunk."""
        spec, limits = self._spec, self._limits
        tokens = windows * self._work.window
        batch = self._batch(windows)
        rows = min(limits.head_rows, spec.vocabulary)
        cost = head_cost(spec, batch, tokens, rows=rows, chunk_tokens=limits.head_tokens)
        if int8:
            again = math.ceil(spec.vocabulary / rows) * spec.hidden
            cost += Cost(products=cost.products) + digits_cost(again, spec.vocabulary, tokens)
        if rows >= spec.vocabulary:
            return cost
        weights, times = spec.vocabulary * spec.hidden, self._waves(windows)
        again = times * weights
        cost += Cost(read=again * self._work.source_bytes)
        if not self._gpu and multiplied_in_blocks((rows, spec.hidden), self._element):
            times = max(times, math.ceil(tokens / limits.head_tokens))
        cost += Cost(traffic=times * weights * (self._work.source_bytes + self._element))
        if not self._gpu:
            return cost
        spilled = max(0, windows - limits.resident_windows) * self._work.window * spec.hidden
        chunks = math.ceil(spec.vocabulary / rows)
        return cost + Cost(copy=again * self._element + chunks * spilled * self._element)

    def _layers_read(
        self,
        w: LayerWidths,
        windows: int,
        *,
        native: bool = False,
        as_stored: bool = False,
        dense: bool = False,
    ) -> Cost:
        """What each wave does once a layer: read, copy, dequantise; hidden states that spill.

        A CPU dequantises large weights for each micro-batch, in blocks.

        Args:
            w: the layer.
            windows: in all.
            native: the checkpoint is read, not the store.
            as_stored: int8 products take the codes as they are.
            dense: weights are made dense whole.
        """
        waves, layers = self._waves(windows), self._spec.layers
        stored = 1 if self._int8_store and not native else self._work.source_bytes
        read = waves * layers * w.parameters * stored
        cost = Cost(read=read)
        if not as_stored:
            large = multiplied_in_blocks((int(w.ffn), int(w.hidden)), self._element)
            blocks = large and not dense and not self._gpu
            times = math.ceil(windows / self._batch(windows).micro_batch) if blocks else waves
            each = dequantise_cost(w.parameters, stored, self._element, in_blocks=blocks)
            cost += each * (times * layers)
        if not self._gpu:
            return cost
        in_wave = min(windows, self._limits.windows_in_flight)
        spilled = max(0, in_wave - self._limits.resident_windows) * waves
        state = self._work.window * self._spec.hidden * self._element
        return cost + Cost(copy=read + 2 * layers * spilled * state)

    def _stores(self) -> Phase:
        """The dense store; after each round one to recover from, one with the refits, trials'."""
        work, source = self._work, self._work.source_bytes
        shares = [work.remaining[0]]
        for at, share in enumerate(work.remaining[1:], start=1):
            last = at == work.rounds
            shares += [share] * (
                int(work.reconstruction or not last) + int(work.reconstruction and not last)
            )
            shares += [share] * work.candidates if work.trial_windows else []
        blocks, cost = self._spec.block_parameters, Cost()
        for share in shares:
            stored = share * blocks * (1 if self._int8_store else source)
            quantise = share * blocks * (source + _QUANTISE_BYTES) if self._int8_store else 0.0
            copied = share * blocks * (source + 1) if self._gpu and self._int8_store else 0.0
            cost += Cost(read=blocks * source, traffic=quantise, write=stored, copy=copied)
        return self._phase("building stores", cost, overlaps=False)

    def _native_sweep(self, share: float, windows: int, tokens: float) -> Cost:
        """A sweep over a checkpoint in its own precision."""
        w = self._widths.kept(share)
        layer = layer_cost(w, self._batch(windows), tokens)
        return layer * self._spec.layers + self._layers_read(w, windows, native=True)

    def _reporting(self) -> Phase:
        """Perplexity on held-out windows and on the user's text, dense and pruned."""
        windows, cost = sum(self._work.measured), Cost()
        for share in (self._work.remaining[0], self._work.remaining[-1]):
            cost += self._native_sweep(share, windows, windows * self._work.window)
            cost += self._head(windows)
        return self._phase("perplexity", cost, cold=True)

    def _rewriting(self) -> Phase:
        """The checkpoint read and its kept part written; both models swept over a few tokens."""
        work, spec = self._work, self._spec
        after = (
            spec.parameters - (1 - work.remaining[-1]) * spec.block_parameters
        ) * work.source_bytes
        verify = self._native_sweep(1.0, 1, 0) + self._native_sweep(work.remaining[-1], 1, 0)
        cost = Cost(read=spec.parameters * work.source_bytes, write=after) + verify
        return self._phase("rewriting", cost, cold=True, overlaps=False)

    def _sampling(self) -> Phase:
        """Calibration text drawn from the model: a sweep for each token of a window."""
        windows = self._work.sampled
        one = self._native_sweep(1.0, windows, windows) + Cost(
            products=2 * self._spec.vocabulary * self._spec.hidden * windows
        )
        return self._phase(SAMPLING, one * (self._work.window - 1), cold=True)

    def _batch(self, windows: int) -> Batch:
        """A micro-batch never holds more than the windows there are."""
        return Batch(
            window=self._work.window,
            micro_batch=max(1, min(self._limits.micro_batch, windows)),
            element_bytes=self._element,
        )

    def _waves(self, windows: int) -> int:
        return math.ceil(windows / self._limits.windows_in_flight)

    def _disk_rate(self, *, cold: bool) -> float:
        """Stores are read from the page cache where it can hold them; checkpoints never."""
        stored = 1 if self._int8_store else self._work.source_bytes
        stores = 2 * self._spec.block_parameters * stored
        free = max(0, self._profile.host_bytes - self._plan.total_bytes(HOST))
        if cold or not fits_page_cache(stores, free):
            return self._profile.disk_cold_bytes_per_second
        return self._profile.disk_warm_bytes_per_second

    def _phase(
        self,
        name: str,
        cost: Cost,
        arithmetic: str | None = None,
        *,
        cold: bool = False,
        overlaps: bool = True,
    ) -> Phase:
        profile = self._profile
        rate = profile.products[arithmetic or profile.arithmetic]
        elementwise = cost.traffic / profile.memory_bytes_per_second
        if profile.fresh_bytes_per_second is not None:
            elementwise += cost.fresh / profile.fresh_bytes_per_second
        return Phase(
            name=name,
            compute=cost.products / rate
            + cost.fp32_products / profile.products[FP32]
            + cost.gram_products / profile.gram_rate
            + cost.tf32_products / profile.tf32_rate
            + cost.attention / profile.attention_flops_per_second
            + cost.solves / profile.solve_flops_per_second
            + cost.calls * profile.call_seconds,
            elementwise=elementwise,
            disk=cost.read / self._disk_rate(cold=cold)
            + cost.write / profile.disk_write_bytes_per_second,
            copy=0.0
            if profile.copy_bytes_per_second is None
            else cost.copy / profile.copy_bytes_per_second,
            # With one layer buffer the next layer is read when this one has been computed.
            overlaps=overlaps and self._limits.layer_buffers > 1,
        )
