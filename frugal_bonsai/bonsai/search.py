"""The rounds: importance, masks, cut, reconstruction, state, until the target sparsity.

In: an engine, settings, layout rules, calibration windows, a run directory. Out: the final mask,
the refit projections and one report per round. A search resumes in its last round and ends in the
same masks, because every round draws from generators seeded by seed and round alone. Holds the
memory of its sweeps. On disk: the dense and the working store, two rounds' refits.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from frugal_bonsai.bonsai.calibration import RoundWindows, round_generator
from frugal_bonsai.bonsai.masks.estimate import RoundInputs, estimate_round
from frugal_bonsai.bonsai.masks.evaluate import MaskEvaluator
from frugal_bonsai.bonsai.masks.pairs import Utility
from frugal_bonsai.bonsai.masks.sampling import Estimate
from frugal_bonsai.bonsai.reconstruction.bias import compensate_by_bias
from frugal_bonsai.bonsai.reconstruction.rounds import RoundReconstruction
from frugal_bonsai.bonsai.round_importance import RoundImportance, round_imputations
from frugal_bonsai.bonsai.round_log import ROUND_LOG, RoundLog
from frugal_bonsai.bonsai.selection.candidates import equal_width_cuts, select_cut
from frugal_bonsai.bonsai.selection.curves import Curve
from frugal_bonsai.bonsai.selection.cut import cut_round
from frugal_bonsai.bonsai.selection.reach import can_go_nearer, check_reachable
from frugal_bonsai.bonsai.selection.schedule import Schedule, round_goals
from frugal_bonsai.bonsai.selection.whole import drop_whole
from frugal_bonsai.bonsai.settings import WHOLE, PruneSettings
from frugal_bonsai.bonsai.shared import SharedSearch
from frugal_bonsai.bonsai.state import PruneState, StateFolder
from frugal_bonsai.bonsai.stores import Refits, Stores
from frugal_bonsai.model.layout import LayoutRules
from frugal_bonsai.model.units import KeepMask
from frugal_bonsai.stream.engine import Engine
from frugal_bonsai.stream.store import LayerStore


@dataclass(frozen=True, kw_only=True)
class SearchResult:
    """The result of a search.

    Attributes:
        mask: Units that stay.
        refits: Readers of the refit projections by tensor name.
        rounds: One report per round.
        forward_tokens: Tokens through the model.
    """

    mask: KeepMask
    refits: Refits
    rounds: list[dict[str, Any]]
    forward_tokens: int


class Search:
    """Runs the rounds.

    Args:
        engine: Device, sweeps, the dense checkpoint.
        settings: Settings of the prune.
        rules: Rules of the output layout.
        windows_NS: Calibration windows, int64 ``[N, S]``.
        state: State of the run directory.
        work: Folder for the stores.
        keep_inputs: Reconstruction may hold a layer's inputs (from the plan).
        keep_updates: Channel updates may hold their targets and slopes (from the plan).
        written_together: Number of texts that the dense model writes at a time (from the plan).
        utility: The user's own utility.
        unit_milliseconds: Milliseconds of each kind of unit, for the objective ``latency``.
        shared: Shares masks and candidates among ranks; None does all of them here.

    Raises:
        OptionError: The layout or the allocation cannot reach the sparsity.
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
        keep_updates: bool = True,
        written_together: int = 1,
        utility: Utility | None = None,
        unit_milliseconds: Mapping[str, float] | None = None,
        shared: SharedSearch | None = None,
    ) -> None:
        self._engine, self._settings, self._rules = engine, settings, rules
        self._folder, self._utility, self._shared = state, utility, shared
        self._log = RoundLog(state.folder / ROUND_LOG)
        self._stores = Stores(engine, state, work, settings.weights)
        columns = max(group.columns for group in engine.spec.table.groups)
        self._windows = RoundWindows(windows_NS, settings, columns)
        self._blocks, whole = engine.spec.block_parameters, KeepMask(engine.spec.table)
        self._schedule = Schedule(
            settings=settings, rules=rules, blocks=self._blocks, latency=unit_milliseconds
        )
        self._importance = RoundImportance(
            engine=engine, schedule=self._schedule, windows=self._windows, folder=state
        )
        self._reconstruction = RoundReconstruction(
            engine=engine,
            settings=settings,
            stores=self._stores,
            windows=self._windows,
            keep_inputs=keep_inputs,
            keep_updates=keep_updates,
            written_together=written_together,
            utility=utility,
            log=self._log,
            share_texts=None if shared is None else shared.texts,
        )
        check_reachable(whole, settings.sparsity, rules, self._blocks, settings.allocation)

    def run(self, *, resume: bool) -> SearchResult:
        """Run all rounds that are still to do."""
        table = self._engine.spec.table
        if not resume:
            self._log.clear()
        state = self._folder.load(table) if resume else PruneState(mask=KeepMask(table))
        dense, store = None, None
        if self._goes_on(state.mask):
            dense, store = self._stores.begin(state, recovery=self._settings.recovery)
        earlier_tokens = state.forward_tokens - self._engine.sweep.forward_tokens
        if state.importance is None and store is not None:
            state.importance = self._importance.measure(store, state.mask, 0)
            state.forward_tokens = earlier_tokens + self._engine.sweep.forward_tokens
            self._folder.save(state)
        while self._goes_on(state.mask):
            assert store is not None
            started, number, before = time.monotonic(), len(state.rounds) + 1, state.mask
            done = before.removed_parameters() / self._blocks
            rounds = number - 1 + len(round_goals(self._settings, done))
            self._engine.progress.round(number, rounds, done)
            report = self._cut(state, number, store, dense)
            if state.mask == before:
                break  # the layout leaves nothing to remove
            store, more = self._rebuild(state, number, dense, before)
            state.forward_tokens = earlier_tokens + self._engine.sweep.forward_tokens
            seconds = round(time.monotonic() - started, 2)
            more |= {"seconds": seconds, "forward_tokens": state.forward_tokens}
            state.rounds.append(report | more)
            self._folder.save(state)
            self._log.clear()
        self._stores.remove()
        return SearchResult(
            mask=state.mask,
            refits=self._stores.refits(state, len(state.rounds)),
            rounds=state.rounds,
            forward_tokens=state.forward_tokens,
        )

    def _goes_on(self, mask: KeepMask) -> bool:
        """Tell whether another round can bring the mask nearer to the target."""
        schedule, settings = self._schedule, self._settings
        return can_go_nearer(mask, schedule.final_parameters, self._rules, settings.allocation)

    def _cut(
        self, state: PruneState, number: int, store: LayerStore, dense: LayerStore | None
    ) -> dict[str, Any]:
        """Estimate, cut and select; set the state's mask and return the report."""
        assert state.importance is not None
        evaluator, estimate = self._evaluator(state, store, number), Estimate(curves=())
        score_N = state.importance.score_N
        if self._settings.allocation in WHOLE:
            spec = self._engine.spec
            state.mask, note = drop_whole(state.mask, score_N, self._settings, spec)
            self._engine.progress.note(note)
            more: dict[str, Any] = {"note": note}
        else:
            estimate = estimate_round(
                RoundInputs(
                    mask=state.mask,
                    score_N=score_N,
                    schedule=self._schedule,
                    evaluator=evaluator,
                )
            )
            state.mask, more = self._select(state, number, dense, estimate.curves)
        return {
            "round": number,
            **estimate.describe(),
            "evidence": estimate.evidence(score_N),
            "mask_tokens": evaluator.tokens,
            "mask_budget_tokens": evaluator.budget_tokens,
            **more,
            "sparsity": state.mask.removed_parameters() / self._blocks,
            "kept": state.mask.counts_with_experts(),
        }

    def _evaluator(self, state: PruneState, store: LayerStore, number: int) -> MaskEvaluator:
        shared, imputes = self._shared, self._settings.imputes(uniform=self._rules.uniform)
        return MaskEvaluator(
            self._engine,
            store,
            self._stores.head,
            self._settings,
            self._windows.all_NS,
            round_generator(self._settings.seed, number),
            log=self._log,
            imputations=round_imputations(self._engine, self._folder, number) if imputes else None,
            utility=self._utility,
            share=None if shared is None else shared.pairs_of(state, number, store),
        )

    def _select(
        self,
        state: PruneState,
        number: int,
        dense: LayerStore | None,
        curves: tuple[Curve, ...],
    ) -> tuple[KeepMask, dict[str, Any]]:
        """Cut by curves; compare the cut with equal widths after reconstruction."""
        before = state.mask
        chosen, target = cut_round(self._schedule, before, curves)
        if chosen == before or not self._settings.selects_candidates(uniform=self._rules.uniform):
            return chosen, {}
        others = equal_width_cuts(before, chosen, curves, target, self._rules)
        if not others:
            return chosen, {}
        assert dense is not None
        reconstruction, shared = self._reconstruction, self._shared

        def ahead(masks: list[KeepMask]) -> None:
            if shared is not None:
                reconstruction.log_candidates(state, number, dense, masks, shared.candidates)

        mask, losses = select_cut(
            chosen,
            others,
            partial(reconstruction.candidate_losses, state, number, dense),
            share=(target - before.removed_parameters()) / self._blocks,
            in_nats=self._utility is None,
            ahead=ahead,
            together=1 if shared is None else shared.ranks,
        )
        return mask, {"trial": losses}

    def _rebuild(
        self, state: PruneState, number: int, dense: LayerStore | None, before: KeepMask
    ) -> tuple[LayerStore | None, dict[str, Any]]:
        """Refit what is left; return the next round's store, None after the last, and figures."""
        if self._settings.bias:
            self._save_mean_biases(state, number, before)
        last = not self._goes_on(state.mask)
        if self._settings.recovery:
            assert dense is not None
            store = self._stores.working(state, number - 1)
            importance = None if last else self._importance.builder(state.mask, number)
            figures = self._reconstruction.refit(state, number, dense, store, importance)
            return None if last else self._stores.working(state, number), figures
        if last:
            return None, {}
        self._stores.remove_dense()
        store = self._stores.working(state, number)
        state.importance = self._importance.measure(store, state.mask, number)
        return store, {}

    def _save_mean_biases(self, state: PruneState, number: int, before: KeepMask) -> None:
        """Save the biases that stand for the mean output of this round's removed units."""
        assert state.importance is not None and state.importance.means is not None
        engine, earlier = self._engine, self._stores.refits(state, number - 1)
        for layer, biases in compensate_by_bias(
            engine.checkpoint, engine.spec, before, state.mask, state.importance.means, earlier
        ):
            self._stores.save_refit(number, layer, biases)
        state.refit_mask = state.mask
