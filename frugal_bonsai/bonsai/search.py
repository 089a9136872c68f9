"""The rounds: prior, masks, cut, recovery, state, until the target sparsity.

In: an engine, settings, layout rules, calibration windows, a run directory. Out: the final mask and
the refit projections, and one report a round. Resumes from the last finished round and ends in the
same masks, because every round draws from a generator seeded by seed and round alone.

Holds what its sweeps hold. On disk: the dense and the working store, one round's refits.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from frugal_bonsai.bonsai.bias import compensate_by_bias
from frugal_bonsai.bonsai.depth import drop_layers, measure_influence
from frugal_bonsai.bonsai.design import Design
from frugal_bonsai.bonsai.evaluate import Observations, Utility, evaluate_masks
from frugal_bonsai.bonsai.prior import Prior, PriorBuilder, PriorTap
from frugal_bonsai.bonsai.recover import Recovery
from frugal_bonsai.bonsai.relevance import JUDGES, Judgement, RoundInputs
from frugal_bonsai.bonsai.select import can_go_nearer, check_reachable, cut, withhold
from frugal_bonsai.bonsai.settings import (
    LAYERS,
    SIMILARITY,
    TRIAL_SHARE,
    PruneSettings,
    round_windows,
)
from frugal_bonsai.bonsai.stand_in import StandIns, StandInWriter
from frugal_bonsai.bonsai.state import PruneState, StateFolder
from frugal_bonsai.bonsai.stores import Refits, Stores
from frugal_bonsai.model.layout import LayoutRules
from frugal_bonsai.model.units import ATTENTION, KeepMask
from frugal_bonsai.stream.engine import Engine
from frugal_bonsai.stream.store import LayerStore


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a search ends with."""

    mask: KeepMask
    refits: Refits
    rounds: list[dict[str, Any]]
    forward_tokens: int


class Search:
    """Runs the rounds.

    Args:
        engine: device, sweeps, the dense checkpoint.
        settings: of the prune.
        rules: of the output layout.
        windows_NS: calibration windows.
        state: of the run directory.
        work: folder for the stores.
        keep_inputs: recovery may hold a layer's inputs (from the plan).
        keep_refinement: refinement may hold its targets and slopes (from the plan).
        utility: a user's own utility.
        unit_milliseconds: of each kind of unit, for the objective ``latency``.
    """

    def __init__(
        self,
        engine: Engine,
        settings: PruneSettings,
        rules: LayoutRules,
        windows_NS: torch.Tensor,
        *,
        state: StateFolder,
        work: Path,
        keep_inputs: bool,
        keep_refinement: bool = True,
        utility: Utility | None = None,
        unit_milliseconds: Mapping[str, float] | None = None,
    ) -> None:
        self._unit_milliseconds = unit_milliseconds
        self._engine, self._settings, self._rules = engine, settings, rules
        self._windows_NS, self._folder = windows_NS, state
        self._keep_inputs, self._keep_refinement = keep_inputs, keep_refinement
        self._utility = utility
        self._stores = Stores(engine, state, work, settings.weights)
        self._blocks = engine.spec.block_parameters
        check_reachable(
            KeepMask(engine.spec.table),
            settings.sparsity,
            rules,
            self._blocks,
            settings.allocation,
        )

    def run(self, *, resume: bool) -> Found:
        """All rounds that are still to do."""
        table = self._engine.spec.table
        state = self._folder.load(table) if resume else PruneState(mask=KeepMask(table))
        dense = self._stores.dense() if self._settings.recovery or not state.rounds else None
        store = self._stores.working(state, len(state.rounds)) if state.rounds else dense
        assert store is not None
        before = state.forward_tokens - self._engine.sweep.forward_tokens
        if state.prior is None and self._can_go_nearer(state.mask):
            state.prior = self._measure_prior(store, state.mask, 0)
        while self._can_go_nearer(state.mask):
            number = len(state.rounds) + 1
            done = state.mask.removed_parameters() / self._blocks
            rounds = number - 1 + math.ceil((self._settings.sparsity - done) / self._settings.step)
            self._engine.progress.round(number, rounds, done)
            started = time.monotonic()
            kept = state.mask
            report = self._round(state, number, store, dense)
            if report is None:
                break
            if self._settings.bias:
                self._leave_means(state, number, before=kept)
            last = not self._can_go_nearer(state.mask)
            if self._settings.recovery or not last:
                store = self._stores.working(state, number if self._settings.bias else number - 1)
                report |= self._refresh(state, number, dense, store, last=last)
            if self._settings.recovery and not last:
                store = self._stores.working(state, number)
            state.forward_tokens = before + self._engine.sweep.forward_tokens
            report["seconds"] = round(time.monotonic() - started, 2)
            report["forward_tokens"] = state.forward_tokens
            state.rounds.append(report)
            self._folder.save(state)
        self._stores.close()
        return Found(
            mask=state.mask,
            refits=self._stores.refits(state, len(state.rounds)),
            rounds=state.rounds,
            forward_tokens=state.forward_tokens,
        )

    def _can_go_nearer(self, mask: KeepMask) -> bool:
        final = round(self._settings.sparsity * self._blocks)
        return can_go_nearer(mask, final, self._rules, self._settings.allocation)

    def _generator(self, number: int) -> torch.Generator:
        return torch.Generator().manual_seed(self._settings.seed * 1_000_003 + number)

    def _builder(self, mask: KeepMask, number: int) -> PriorBuilder:
        """For the round after ``number``."""
        settings = self._settings
        stand_ins = None
        if settings.stand_ins(uniform=self._rules.uniform):
            _, share = self._next_goal(mask)
            stand_ins = StandInWriter(
                share=settings.pool * share,
                damping=settings.ridge,
                save=lambda group, tensors: self._folder.save_stand_in(number, group, tensors),
            )
        return PriorBuilder(
            settings.prior,
            mask,
            damping=settings.ridge,
            generator=self._generator(10_000 + number),
            stand_ins=stand_ins,
            keep_means=settings.bias,
        )

    def _next_goal(self, mask: KeepMask) -> tuple[float, float]:
        """The sparsity that the next round aims at, and the share of the alive units it takes."""
        settings, removed = self._settings, mask.removed_parameters()
        goal = min(removed / self._blocks + settings.step, settings.sparsity)
        # The last round removes just what is left: no sliver of a round behind it.
        if settings.sparsity - goal < 0.2 * settings.step:
            goal = settings.sparsity
        return goal, (goal * self._blocks - removed) / (mask.table.parameters - removed)

    def _measure_prior(self, store: LayerStore, mask: KeepMask, number: int) -> Prior:
        """One unmasked sweep over the calibration windows."""
        engine = self._engine
        if self._settings.prior == SIMILARITY:
            with engine.stream(store) as stream:
                return measure_influence(engine.sweep, stream, self._round_windows(number), mask)
        builder = self._builder(mask, number)
        tap = PriorTap(builder, engine.device)
        with engine.stream(store) as stream:
            engine.sweep.run(stream, self._round_windows(number), tap=tap, name="statistics")
        return builder.build()

    def _round_windows(self, number: int) -> torch.Tensor:
        """The windows of a round before the last, other ones in every round."""
        windows, window = self._windows_NS.shape
        columns = max(group.columns for group in self._engine.spec.table.groups)
        count = round_windows(self._settings, columns, window, windows)
        drawn = torch.randperm(windows, generator=self._generator(20_000 + number))[:count]
        return self._windows_NS[drawn.sort().values]

    def _round(
        self, state: PruneState, number: int, store: LayerStore, dense: LayerStore | None
    ) -> dict[str, Any] | None:
        """Judge and cut; None when the layout leaves nothing to remove."""
        settings, mask = self._settings, state.mask
        assert state.prior is not None
        if settings.allocation == LAYERS:
            return self._drop_layers(state, number)
        goal, share = self._next_goal(mask)
        generator = self._generator(number)
        judgement = JUDGES[settings.level](
            RoundInputs(
                mask=mask,
                prior=state.prior,
                settings=settings,
                rules=self._rules,
                share=share,
                parameters_left=(
                    round(settings.sparsity * self._blocks) - mask.removed_parameters()
                ),
                masks=self._mask_count(),
                evaluate=lambda design: self._evaluate(store, design, generator, number),
                generator=generator,
            )
        )
        cut_mask = mask
        while cut_mask == mask:
            target = round(goal * self._blocks)
            cut_mask = cut(
                mask,
                judgement.curves,
                target,
                self._rules,
                final_parameters=round(settings.sparsity * self._blocks),
                objective=settings.objective,
                latency=self._unit_milliseconds,
                allocation=settings.allocation,
            )
            if goal >= settings.sparsity:
                break
            # The layout's next legal size may be farther away than one step.
            goal = min(goal + settings.step, settings.sparsity)
        if cut_mask == mask:
            return None
        report = _report(number, judgement)
        if settings.tries(uniform=self._rules.uniform):
            assert dense is not None
            cut_mask, tried = self._try(state, number, judgement, cut_mask, target, dense)
            report |= tried
        state.mask = cut_mask
        return report | {
            "sparsity": cut_mask.removed_parameters() / self._blocks,
            "kept": cut_mask.counts(),
        }

    def _drop_layers(self, state: PruneState, number: int) -> dict[str, Any] | None:
        """The round of whole layers, as many as come nearest to the target."""
        assert state.prior is not None
        before, wanted = state.mask, self._settings.sparsity
        state.mask = drop_layers(before, state.prior.score_N, round(wanted * self._blocks))
        if state.mask == before:
            return None
        dropped = state.mask.dropped_layers()
        share = state.mask.removed_parameters() / self._blocks
        note = (
            f"layers {', '.join(map(str, dropped))} of {self._engine.spec.layers} (counted from 0) "
            f"are dropped, {share:.1%}: the number of layers nearest to {wanted:.1%}"
        )
        self._engine.progress.note(note)
        judgement = Judgement(curves=(), fit=None, observations=0)
        report = {"sparsity": share, "kept": state.mask.counts(), "note": note}
        return _report(number, judgement) | report

    def _try(
        self,
        state: PruneState,
        number: int,
        judgement: Judgement,
        cut_mask: KeepMask,
        target: int,
        dense: LayerStore,
    ) -> tuple[KeepMask, dict[str, Any]]:
        """The cut, or the one of the same size that leaves attention whole: which recovers better.

        Attention units are few, large and the costliest mistakes; masks on a few windows compare
        them with channels before recovery, this compares what is left after it.
        """
        before = state.mask
        removed = cut_mask.removed_parameters()
        if cut_mask.counts()[ATTENTION] == before.counts()[ATTENTION]:
            return cut_mask, {}
        # To the round's own target: a cut that stopped a channel short would cost a round more.
        spared = cut(before, withhold(judgement.curves, ATTENTION), target, self._rules)
        channel = max(g.unit_parameters for g in before.table.groups if g.kind != ATTENTION)
        if removed - spared.removed_parameters() > channel:
            return cut_mask, {}  # the pools cannot make up for it
        windows_NS = self._round_windows(number)
        windows_NS = windows_NS[: math.ceil(TRIAL_SHARE * len(windows_NS))]
        losses = []
        for mask in (cut_mask, spared):
            state.mask = mask
            recovery = self._recovery(mask, save=lambda layer, weights: None, name="trial")
            store, head = self._stores.working(state, number - 1), self._engine.head
            with self._engine.stream(dense) as parent, self._engine.stream(store) as pruned:
                result = recovery.run(parent, pruned, head, windows_NS, dense_losses=False)
            losses.append(float(result.losses_NS.mean()))
        state.mask = before
        trial = {"trial": {"cut": losses[0], "attention_spared": losses[1]}}
        return (spared if losses[1] < losses[0] else cut_mask), trial

    def _leave_means(self, state: PruneState, number: int, *, before: KeepMask) -> None:
        """Save the biases that stand for what this round's cut has taken."""
        assert state.prior is not None and state.prior.means is not None
        engine, earlier = self._engine, self._stores.refits(state, number - 1)
        for layer, biases in compensate_by_bias(
            engine.checkpoint, engine.spec, before, state.mask, state.prior.means, earlier
        ):
            self._stores.save_refit(number, layer, biases)
        state.refit_mask = state.mask

    def _mask_count(self) -> int:
        settings = self._settings
        windows = min(settings.mask_windows, len(self._windows_NS))
        return settings.masks * (1 if settings.design == "shared" else windows)

    def _evaluate(
        self, store: LayerStore, design: Design, generator: torch.Generator, number: int
    ) -> Observations:
        settings, windows = self._settings, len(self._windows_NS)
        chosen = torch.randperm(windows, generator=generator)[: settings.mask_windows]
        with self._engine.evaluation_stream(store) as stream:
            return evaluate_masks(
                self._engine,
                stream,
                self._stores.head(),
                design,
                settings.masks,
                self._windows_NS[chosen.sort().values],
                shared=settings.design == "shared",
                perplexity=settings.utility == "perplexity",
                utility=self._utility,
                stand_ins=(
                    StandIns(lambda group: self._folder.stand_in(number - 1, group))
                    if settings.stand_ins(uniform=self._rules.uniform)
                    else None
                ),
            )

    def _refresh(
        self,
        state: PruneState,
        number: int,
        dense: LayerStore | None,
        store: LayerStore,
        *,
        last: bool,
    ) -> dict[str, Any]:
        """Recover, and take the next round's prior from the same sweep; or measure it alone."""
        if not self._settings.recovery:
            state.prior = self._measure_prior(store, state.mask, number)
            return {}
        assert dense is not None
        engine = self._engine
        recovery = self._recovery(
            state.mask,
            save=lambda layer, weights: self._stores.save_refit(number, layer, weights),
            refine=self._settings.refine if last else 0,
        )
        windows_NS = self._windows_NS if last else self._round_windows(number)
        dense_perplexity = self._dense_perplexity(state, windows_NS)
        with engine.stream(dense) as parent, engine.stream(store) as pruned:
            result = recovery.run(
                parent,
                pruned,
                engine.head,
                windows_NS,
                None if last else self._builder(state.mask, number),
                dense_losses=dense_perplexity is None,
            )
        if result.dense_losses_NS is not None:
            dense_perplexity = float(result.dense_losses_NS.mean().exp())
        state.prior, state.refit_mask = result.prior, state.mask
        return {
            "perplexity": float(result.losses_NS.mean().exp()),
            "dense_perplexity": dense_perplexity,
            "recovery_residual": sum(result.residual) / len(result.residual),
        }

    def _dense_perplexity(self, state: PruneState, windows_NS: torch.Tensor) -> float | None:
        """The dense model's, where an earlier round has measured it on these very windows."""
        first = self._round_windows(1)
        if not state.rounds or len(windows_NS) != len(first) or not torch.equal(windows_NS, first):
            return None
        return float(state.rounds[0]["dense_perplexity"])

    def _recovery(
        self,
        mask: KeepMask,
        *,
        save: Callable[[int, dict[str, torch.Tensor]], None],
        refine: int = 0,
        name: str = "recovery",
    ) -> Recovery:
        return Recovery(
            self._engine.sweep,
            ridge=self._settings.ridge,
            keep_inputs=self._keep_inputs,
            save=save,
            saved_dtype=self._stores.saved_dtype,
            mask=mask if self._settings.refit == "all" else None,
            refine=refine,
            keep_refinement=self._keep_refinement,
            name=name,
        )


def _report(number: int, judgement: Judgement) -> dict[str, Any]:
    fit = judgement.fit
    return {
        "round": number,
        "observations": judgement.observations,
        # One fold has nothing held out: not a number, which JSON does not know.
        "r2": None if fit is None or math.isnan(fit.r2) else fit.r2,
        "tau": None if fit is None or math.isnan(fit.tau) else fit.tau,
        "penalty": None if fit is None else fit.penalty,
    }
