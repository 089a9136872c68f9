"""Reconstruction as the search uses it: of a round's candidates, and after its cut.

In: the stores, calibration windows and the mask. Out: refits saved in the round's folder, figures
for its report, the importance scores of the next round, and the losses of candidates. The paired
sweep itself is in reconstruct.py. Holds the memory of that sweep.

Shape suffixes: N windows, S tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import torch

from frugal_bonsai.bonsai.calibration import RoundWindows
from frugal_bonsai.bonsai.fingerprint import fingerprint
from frugal_bonsai.bonsai.importance.scores import ImportanceBuilder
from frugal_bonsai.bonsai.masks.pairs import Utility, window_utilities
from frugal_bonsai.bonsai.reconstruction.finished import FinishedLayers
from frugal_bonsai.bonsai.reconstruction.layer_pass import ReconstructionOptions
from frugal_bonsai.bonsai.reconstruction.logit_scale import find_logit_scale, scaled_norm
from frugal_bonsai.bonsai.reconstruction.reconstruct import Reconstruction
from frugal_bonsai.bonsai.round_log import RoundLog
from frugal_bonsai.bonsai.settings import PruneSettings
from frugal_bonsai.bonsai.state import PruneState
from frugal_bonsai.bonsai.stores import Stores
from frugal_bonsai.bonsai.written_text import ShareTexts, Texts
from frugal_bonsai.model.units import KeepMask
from frugal_bonsai.stream.engine import Engine
from frugal_bonsai.stream.store import LayerStore


@dataclass(frozen=True, kw_only=True)
class Measured:
    """The losses of a candidate.

    Attributes:
        losses: Losses on the windows that judge it.
        tokens: Forward tokens that they cost.
    """

    losses: list[float]
    tokens: int


class ShareCandidates(Protocol):
    """Shares candidates of a round among ranks."""

    def __call__(
        self,
        state: PruneState,
        number: int,
        masks: list[KeepMask],
        work: Callable[[KeepMask], Measured],
    ) -> Iterator[Measured]:
        """Yield the losses of all candidates in order; ``work`` measures one on this rank."""


@dataclass(frozen=True, kw_only=True)
class RoundReconstruction:
    """Reconstructs pruned models for one search.

    Attributes:
        engine: Device, sweeps, the dense checkpoint.
        settings: Settings of the prune.
        stores: Stores of the search.
        windows: Calibration windows of the rounds.
        keep_inputs: A layer's inputs may be held (from the plan).
        keep_updates: Targets and slopes of the channel updates may be held (from the plan).
        written_together: Number of texts that the dense model writes at a time (from the plan).
        utility: The user's utility judges candidates; None judges them by mean NLL.
        log: Log of the round.
        share_texts: Shares written text among ranks; None writes all of it here.
    """

    engine: Engine
    settings: PruneSettings
    stores: Stores
    windows: RoundWindows
    keep_inputs: bool
    keep_updates: bool
    written_together: int
    utility: Utility | None
    log: RoundLog
    share_texts: ShareTexts | None = None

    def refit(
        self,
        state: PruneState,
        number: int,
        dense: LayerStore,
        pruned: LayerStore,
        importance: ImportanceBuilder | None,
    ) -> dict[str, Any]:
        """Refit the model of the state's mask and save the refits.

        Args:
            state: Receives the importance scores and the mask of the refits.
            number: The round.
            dense: The dense store.
            pruned: The working store, cut to the state's mask.
            importance: Scores the units for the next round; None in the last round, which uses all
                windows and those that the dense model wrote, updates channels and scales the
                logits.

        Returns:
            Figures for the report; perplexities are of the calibration windows.
        """
        engine, head, last = self.engine, self.engine.head, importance is None
        if last:
            windows_NS, judged = self.windows.of_last(self._write_text(dense))
        else:
            windows_NS = self.windows.of_round(number)
            judged = torch.arange(len(windows_NS))
        reconstruction = self._reconstruction(
            state.mask,
            save=lambda layer, weights: self.stores.save_refit(number, layer, weights),
            channel_updates=self.settings.refine if last else 0,
            fast=last,
        )
        with engine.dense_stream(dense) as parent, engine.dense_stream(pruned) as mine:
            result = reconstruction.run(
                parent, mine, windows_NS, importance, finished=self._finished(state.mask, number)
            )
        state.importance, state.refit_mask = result.scores, state.mask
        scale = None
        with torch.inference_mode():
            if last and self.settings.rescale:
                scale = find_logit_scale(
                    engine.sweep, head, result.hidden_dense, result.hidden_pruned, windows_NS
                )
                norm = scaled_norm(engine.checkpoint, engine.spec, scale)
                self.stores.save_refit(number, None, norm)
            losses_NS = head.nll(result.hidden_pruned, windows_NS, scale=scale or 1.0)[judged]
            dense_perplexity = self._known_dense_perplexity(state, windows_NS[judged])
            if dense_perplexity is None:
                dense_NS = head.nll(result.hidden_dense, windows_NS)[judged]
                dense_perplexity = float(dense_NS.mean().exp())
        return {
            "perplexity": float(losses_NS.mean().exp()),
            "dense_perplexity": dense_perplexity,
            "recovery_residual": sum(result.residual) / len(result.residual),
            "logit_scale": scale,
        }

    def _finished(self, mask: KeepMask, number: int) -> FinishedLayers:
        return FinishedLayers(self.log, number, mask, partial(self.stores.layer_refits, number))

    def _write_text(self, dense: LayerStore) -> torch.Tensor:
        """Let the dense model write the windows that join the calibration, int64 ``[n, S]``."""
        windows_NS, count = self.windows.all_NS, self.settings.self_windows or 0
        if not count:
            return windows_NS[:0]
        together, seed = self.written_together, self.settings.seed
        texts = Texts.of(windows_NS, count, together=together, seed=seed)
        with self.engine.stream(dense) as stream:
            work = partial(texts.write, self.engine, stream)
            shared = self.share_texts
            parts = map(work, texts.batches) if shared is None else shared(texts, work)
            written_nS = texts.windows([text for part in parts for text in part])
        self.engine.sweep.forward_tokens += written_nS.numel()
        return written_nS

    def candidate_losses(
        self, state: PruneState, number: int, dense: LayerStore, mask: KeepMask
    ) -> torch.Tensor:
        """Return the losses of a candidate after reconstruction, float64 ``[N]``.

        They are measured on windows that the candidate was not fitted to; with a single calibration
        window, on that one. With a user's utility they are its negative. Losses that the round's
        log holds are not measured again.
        """
        logged = self.log.find(_candidate_key(number, mask))
        if not logged.values:
            self._log_candidate(number, mask, self.measure_candidate(state, number, dense, mask))
            logged = self.log.find(_candidate_key(number, mask))
        self.engine.sweep.forward_tokens += logged.tokens
        return torch.tensor(logged.values, dtype=torch.float64)

    def log_candidates(
        self,
        state: PruneState,
        number: int,
        dense: LayerStore,
        masks: Sequence[KeepMask],
        share: ShareCandidates,
    ) -> None:
        """Measure candidates on several ranks, so that the round's log holds their losses."""
        missing = [m for m in masks if not self.log.find(_candidate_key(number, m)).values]
        measure = partial(self.measure_candidate, state, number, dense)
        found = share(state, number, missing, measure) if len(missing) > 1 else ()
        for measured, mask in zip(found, missing, strict=False):  # asks for the end of the task
            self._log_candidate(number, mask, measured)

    def _log_candidate(self, number: int, mask: KeepMask, measured: Measured) -> None:
        self.log.append(_candidate_key(number, mask), measured.losses, measured.tokens)

    def measure_candidate(
        self, state: PruneState, number: int, dense: LayerStore, mask: KeepMask
    ) -> Measured:
        """Reconstruct and measure a candidate; the sweep's count of tokens stays as it is."""
        sweep = self.engine.sweep
        earlier = sweep.forward_tokens
        loss_N = self._candidate_losses(state, number, dense, mask)
        tokens, sweep.forward_tokens = sweep.forward_tokens - earlier, earlier
        return Measured(losses=loss_N.tolist(), tokens=tokens)

    def _candidate_losses(
        self, state: PruneState, number: int, dense: LayerStore, mask: KeepMask
    ) -> torch.Tensor:
        windows_NS, held_out = self.windows.of_trial(number)
        first = len(windows_NS) - held_out if held_out else 0
        store = self.stores.working(replace(state, mask=mask), number - 1)
        reconstruction = self._reconstruction(mask, save=lambda layer, weights: None, name="trial")
        head = self.engine.head
        with self.engine.dense_stream(dense) as parent, self.engine.dense_stream(store) as mine:
            result = reconstruction.run(parent, mine, windows_NS, held_out=held_out)
        with torch.inference_mode():
            if self.utility is None:
                return head.nll(result.hidden_pruned, windows_NS)[first:].mean(1).double()
            own = window_utilities(
                head, result.hidden_pruned, windows_NS, self.utility, first=first
            )
        return -torch.tensor(own, dtype=torch.float64)

    def _known_dense_perplexity(self, state: PruneState, windows_NS: torch.Tensor) -> float | None:
        """Return the dense perplexity if an earlier round measured it on the same windows."""
        first = self.windows.of_round(1)
        if not state.rounds or len(windows_NS) != len(first) or not torch.equal(windows_NS, first):
            return None
        return float(state.rounds[0]["dense_perplexity"])

    def _reconstruction(
        self,
        mask: KeepMask,
        *,
        save: Callable[[int, dict[str, torch.Tensor]], None],
        channel_updates: int = 0,
        fast: bool = False,
        name: str = "recovery",
    ) -> Reconstruction:
        options = ReconstructionOptions(
            ridge=self.settings.ridge,
            mask=mask if self.settings.refit == "all" else None,
            channel_updates=channel_updates,
            keep_inputs=self.keep_inputs,
            keep_updates=self.keep_updates,
            fast=fast,
            saved_dtype=self.stores.saved_dtype,
        )
        return Reconstruction(self.engine.sweep, options, save=save, name=name)


def _candidate_key(number: int, mask: KeepMask) -> str:
    """Return the key of a candidate in the round's log."""
    return fingerprint(f"candidate of round {number}".encode(), mask.keep_N.numpy().tobytes())
