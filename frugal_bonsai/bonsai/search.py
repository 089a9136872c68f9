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
from functools import partial
from pathlib import Path
from typing import Any

import torch

from frugal_bonsai.bonsai.importance.experts import measure_saliency
from frugal_bonsai.bonsai.importance.imputation import Imputations, ImputationWriter
from frugal_bonsai.bonsai.importance.layers import measure_influence
from frugal_bonsai.bonsai.importance.scores import ImportanceBuilder, ImportanceScores
from frugal_bonsai.bonsai.masks.estimate import JUDGES, RoundInputs, look_ahead
from frugal_bonsai.bonsai.masks.evaluate import Utility, window_utilities
from frugal_bonsai.bonsai.masks.round_masks import RoundMasks
from frugal_bonsai.bonsai.masks.sampling import Judgement
from frugal_bonsai.bonsai.reconstruction.bias import compensate_by_bias
from frugal_bonsai.bonsai.reconstruction.layer_pass import ReconstructionOptions
from frugal_bonsai.bonsai.reconstruction.logit_scale import find_logit_scale, scaled_norm
from frugal_bonsai.bonsai.reconstruction.reconstruct import Reconstruction
from frugal_bonsai.bonsai.selection.candidates import rival_cuts, try_cuts
from frugal_bonsai.bonsai.selection.cut import check_reachable
from frugal_bonsai.bonsai.selection.extent import round_goals, round_windows, trial_windows
from frugal_bonsai.bonsai.selection.schedule import Schedule
from frugal_bonsai.bonsai.selection.whole import drop_experts, drop_layers
from frugal_bonsai.bonsai.settings import (
    EXPERTS,
    GROUP,
    LAYERS,
    REAP,
    SIMILARITY,
    WHOLE,
    PruneSettings,
)
from frugal_bonsai.bonsai.state import PruneState, StateFolder
from frugal_bonsai.bonsai.stores import Refits, Stores
from frugal_bonsai.model.layout import LayoutRules
from frugal_bonsai.model.units import KeepMask
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
        keep_updates: refinement may hold its targets and slopes (from the plan).
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
        keep_updates: bool = True,
        utility: Utility | None = None,
        unit_milliseconds: Mapping[str, float] | None = None,
    ) -> None:
        self._engine, self._settings, self._rules = engine, settings, rules
        self._windows_NS, self._folder = windows_NS, state
        self._keep_inputs, self._keep_updates = keep_inputs, keep_updates
        self._utility = utility
        self._stores = Stores(engine, state, work, settings.weights)
        self._blocks = engine.spec.block_parameters
        self._columns = max(group.columns for group in engine.spec.table.groups)
        self._schedule = Schedule(
            settings=settings, rules=rules, blocks=self._blocks, latency=unit_milliseconds
        )
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
        if state.prior is None and self._schedule.goes_on(state.mask):
            state.prior = self._measure_prior(store, state.mask, 0)
        while self._schedule.goes_on(state.mask):
            number = len(state.rounds) + 1
            done = state.mask.removed_parameters() / self._blocks
            rounds = number - 1 + len(round_goals(self._settings, done))
            self._engine.progress.round(number, rounds, done)
            started = time.monotonic()
            kept = state.mask
            report = self._round(state, number, store, dense)
            if report is None:
                break
            if self._settings.bias:
                self._leave_means(state, number, before=kept)
            last = not self._schedule.goes_on(state.mask)
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

    def _generator(self, number: int) -> torch.Generator:
        return torch.Generator().manual_seed(self._settings.seed * 1_000_003 + number)

    def _builder(self, mask: KeepMask, number: int) -> ImportanceBuilder:
        """For the round after ``number``."""
        settings = self._settings
        imputations = None
        if settings.stand_ins(uniform=self._rules.uniform):
            imputations = ImputationWriter(
                share=settings.pool * self._schedule.share(mask),
                damping=settings.ridge,
                rules=self._rules,
                save=lambda group, tensors: self._folder.save_stand_in(number, group, tensors),
            )
        return ImportanceBuilder(
            settings.prior,
            mask,
            damping=settings.ridge,
            generator=self._generator(10_000 + number),
            imputations=imputations,
            keep_means=settings.bias,
        )

    def _measure_prior(self, store: LayerStore, mask: KeepMask, number: int) -> ImportanceScores:
        """One unmasked sweep over the calibration windows."""
        engine = self._engine
        if self._settings.prior in (SIMILARITY, REAP):
            measure = measure_saliency if self._settings.prior == REAP else measure_influence
            with engine.stream(store) as stream:
                return measure(engine.sweep, stream, self._round_windows(number), mask)
        builder = self._builder(mask, number)
        with engine.stream(store) as stream:
            engine.sweep.run(stream, self._round_windows(number), tap=builder, name="statistics")
        return builder.build()

    def _round_windows(self, number: int) -> torch.Tensor:
        """The windows of a round before the last, other ones in every round."""
        windows, window = self._windows_NS.shape
        count = round_windows(self._settings, self._columns, window, windows)
        drawn = torch.randperm(windows, generator=self._generator(20_000 + number))[:count]
        return self._windows_NS[drawn.sort().values]

    def _round(
        self, state: PruneState, number: int, store: LayerStore, dense: LayerStore | None
    ) -> dict[str, Any] | None:
        """Judge and cut; None when the layout leaves nothing to remove."""
        settings, mask = self._settings, state.mask
        assert state.prior is not None
        if settings.allocation in WHOLE:
            return self._drop_whole(state, number)
        generator = self._generator(number)
        masks = self._masks(store, number, generator)
        judgement = JUDGES[settings.level](
            RoundInputs(
                mask=mask,
                prior=state.prior,
                settings=settings,
                rules=self._rules,
                share=self._schedule.share(mask),
                parameters_left=self._schedule.final_parameters - mask.removed_parameters(),
                windows=masks.windows,
                evaluate=masks.evaluate,
                cut=lambda curves: self._schedule.cut(mask, curves)[0],
                ahead=state.ahead,
                generator=generator,
            )
        )
        cut_mask, target = self._schedule.cut(mask, judgement.curves)
        if cut_mask == mask:
            return None
        report = describe_judgement(number, judgement, masks)
        if settings.tries(uniform=self._rules.uniform):
            assert dense is not None
            even = settings.level == GROUP
            rivals = rival_cuts(mask, cut_mask, judgement.curves, target, self._rules, even=even)
            if rivals:
                recovered = partial(self._recovered_losses, state, number, dense)
                taken = (target - mask.removed_parameters()) / self._blocks
                own = self._utility is not None
                cut_mask, report["trial"] = try_cuts(
                    cut_mask, rivals, recovered, share=taken, in_nats=not own
                )
        state.mask, state.ahead = cut_mask, look_ahead(judgement, mask, cut_mask)
        return report | {
            "sparsity": cut_mask.removed_parameters() / self._blocks,
            "kept": cut_mask.counts_with_experts(),
        }

    def _masks(self, store: LayerStore, number: int, generator: torch.Generator) -> RoundMasks:
        stand_ins = None
        if self._settings.stand_ins(uniform=self._rules.uniform):
            stand_ins = Imputations(
                lambda group: self._folder.stand_in(number - 1, group),
                self._engine.spec.table.groups,
                self._engine.device,
            )
        return RoundMasks(
            self._engine,
            store,
            self._stores.head,
            self._settings,
            self._windows_NS,
            generator,
            stand_ins=stand_ins,
            utility=self._utility,
        )

    def _drop_whole(self, state: PruneState, number: int) -> dict[str, Any] | None:
        """The round of whole layers or experts, as many as come nearest to the target."""
        assert state.prior is not None
        before, wanted = state.mask, self._settings.sparsity
        drop = drop_experts if self._settings.allocation == EXPERTS else drop_layers
        state.mask = drop(before, state.prior.score_N, round(wanted * self._blocks))
        if state.mask == before:
            return None
        share = state.mask.removed_parameters() / self._blocks
        if self._settings.allocation == LAYERS:
            dropped = ", ".join(map(str, state.mask.dropped_layers()))
            gone = f"layers {dropped} of {self._engine.spec.layers} (counted from 0) are dropped"
        else:
            count = len(state.mask.dropped_experts(0))
            gone = f"{count} of {self._engine.spec.experts} experts of every layer are dropped"
        what = self._settings.allocation
        note = f"{gone}, {share:.1%}: the number of {what} nearest to {wanted:.1%}"
        self._engine.progress.note(note)
        judgement = Judgement(curves=(), fit=None, observations=0)
        report = {"sparsity": share, "kept": state.mask.counts_with_experts(), "note": note}
        return describe_judgement(number, judgement) | report

    def _recovered_losses(
        self, state: PruneState, number: int, dense: LayerStore, mask: KeepMask
    ) -> torch.Tensor:
        """Losses ``[N]`` of a mask's model after recovery, of windows that it did not see.

        With a user's utility its negative.
        """
        windows, window = self._windows_NS.shape
        fitted, held_out = trial_windows(self._columns, window, windows)
        # Both from all over the text: neighbouring windows are alike.
        order = torch.randperm(windows, generator=self._generator(30_000 + number))
        windows_NS = self._windows_NS[order[: fitted + held_out]]
        before, state.mask = state.mask, mask
        store = self._stores.working(state, number - 1)
        state.mask = before
        reconstruction = self._reconstruction(mask, save=lambda layer, weights: None, name="trial")
        with self._engine.dense_stream(dense) as parent, self._engine.dense_stream(store) as pruned:
            result = reconstruction.run(parent, pruned, windows_NS, held_out=held_out)
        first, head, hidden = fitted if held_out else 0, self._engine.head, result.hidden_pruned
        with torch.inference_mode():
            if self._utility is not None:
                own = window_utilities(head, hidden, windows_NS, self._utility, first=first)
                return -torch.tensor(own, dtype=torch.float64)
            losses_NS = head.nll(hidden, windows_NS)
        return losses_NS[first:].mean(1)

    def _leave_means(self, state: PruneState, number: int, *, before: KeepMask) -> None:
        """Save the biases that stand for what this round's cut has taken."""
        assert state.prior is not None and state.prior.means is not None
        engine, earlier = self._engine, self._stores.refits(state, number - 1)
        for layer, biases in compensate_by_bias(
            engine.checkpoint, engine.spec, before, state.mask, state.prior.means, earlier
        ):
            self._stores.save_refit(number, layer, biases)
        state.refit_mask = state.mask

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
        reconstruction = self._reconstruction(
            state.mask,
            save=lambda layer, weights: self._stores.save_refit(number, layer, weights),
            channel_updates=self._settings.refine if last else 0,
        )
        windows_NS = self._windows_NS if last else self._round_windows(number)
        scores = None if last else self._builder(state.mask, number)
        with engine.dense_stream(dense) as parent, engine.dense_stream(store) as pruned:
            result = reconstruction.run(parent, pruned, windows_NS, scores)
        state.prior, state.refit_mask = result.scores, state.mask
        dense_perplexity = self._dense_perplexity(state, windows_NS)
        scale, head = None, engine.head
        with torch.inference_mode():
            if last and self._settings.rescale:
                scale = find_logit_scale(
                    engine.sweep, head, result.hidden_dense, result.hidden_pruned, windows_NS
                )
                norm = scaled_norm(engine.checkpoint, engine.spec, scale)
                self._stores.save_refit(number, None, norm)
            losses_NS = head.nll(result.hidden_pruned, windows_NS, scale=scale or 1.0)
            if dense_perplexity is None:
                dense_losses_NS = head.nll(result.hidden_dense, windows_NS)
                dense_perplexity = float(dense_losses_NS.mean().exp())
        return {
            "perplexity": float(losses_NS.mean().exp()),
            "dense_perplexity": dense_perplexity,
            "recovery_residual": sum(result.residual) / len(result.residual),
            "logit_scale": scale,
        }

    def _dense_perplexity(self, state: PruneState, windows_NS: torch.Tensor) -> float | None:
        """The dense model's, where an earlier round has measured it on these very windows."""
        first = self._round_windows(1)
        if not state.rounds or len(windows_NS) != len(first) or not torch.equal(windows_NS, first):
            return None
        return float(state.rounds[0]["dense_perplexity"])

    def _reconstruction(
        self,
        mask: KeepMask,
        *,
        save: Callable[[int, dict[str, torch.Tensor]], None],
        channel_updates: int = 0,
        name: str = "recovery",
    ) -> Reconstruction:
        options = ReconstructionOptions(
            ridge=self._settings.ridge,
            mask=mask if self._settings.refit == "all" else None,
            channel_updates=channel_updates,
            keep_inputs=self._keep_inputs,
            keep_updates=self._keep_updates,
            saved_dtype=self._stores.saved_dtype,
        )
        return Reconstruction(self._engine.sweep, options, save=save, name=name)


def describe_judgement(
    number: int, judgement: Judgement, masks: RoundMasks | None = None
) -> dict[str, Any]:
    """A round's masks and regression as plain values."""
    fit, sampled = judgement.fit, judgement.sampled
    return {
        "round": number,
        "observations": judgement.observations,
        "r2": None if fit is None else _number(fit.r2),
        "tau": None if fit is None else _number(fit.tau),
        "coverage": None if fit is None else _number(fit.coverage),
        "penalty": None if fit is None else fit.penalty,
        "certainty": None if sampled is None else sampled.certainty,
        "stopped": None if sampled is None else sampled.stopped,
        "mask_tokens": 0 if masks is None else masks.tokens,
        "mask_budget_tokens": 0 if masks is None else masks.budget_tokens,
    }


def _number(value: float | None) -> float | None:
    """One fold has nothing held out: not a number, which JSON does not know."""
    return None if value is None or math.isnan(value) else value
