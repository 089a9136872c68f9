"""The phases of a prune: statistics, masked evaluation and reconstruction beside a command's own.

In: items, a choice of sizes. Out: phases, as in phases.py. Pure.
"""

from __future__ import annotations

from frugal_bonsai.memory.phases import CommandPhases, MemoryPhase
from frugal_bonsai.memory.prune_items import PruneItems
from frugal_bonsai.memory.work import Choice, PlanItem


class PrunePhases(CommandPhases):
    """Builds the phases of a prune for a choice of sizes."""

    _items: PruneItems

    def of(self, choice: Choice) -> list[MemoryPhase]:
        """Return all phases in the order in which they come first."""
        items, work = self._items, self._items.work
        self._kept = items.kept_head(choice)
        phases = self._sampling(choice)
        if work.measured:
            phases += self._sweep("perplexity", choice, max(work.measured), weights=None)
        phases.append(self._held("building the store", items.building()))
        phases += self._statistics(choice)
        if work.pairs:
            phases += self._masked(choice)
        if work.written:
            stream = items.stream(choice, work.weights)
            held = [*stream, items.writing(), *items.head_rows(choice)]
            phases.append(self._held("writing text", held))
        if work.reconstruction:
            phases += self._reconstruction(choice)
        return phases + self._rewrite(choice, refitted=work.reconstruction)

    def _masked(self, choice: Choice) -> list[MemoryPhase]:
        items, work = self._items, self._items.work

        def imputed(choice: Choice, windows: int) -> list[PlanItem]:
            return [*items.imputation(), items.masked_activations(choice, windows)]

        return self._sweep(
            "masked evaluation",
            choice,
            work.pairs,
            weights=work.weights,
            products=work.int8_arithmetic,
            called=imputed if work.imputed_share else None,
        )

    def _statistics(self, choice: Choice) -> list[MemoryPhase]:
        items, gram = self._items, self._items.work.gram
        held = [
            *items.stream(choice, self._items.work.weights),
            *items.hidden(choice, self._items.work.windows),
            *([items.gram()] if gram else []),
        ]
        scored = [items.scored_weight()]
        if gram:
            scored.append(items.solve(share=self._items.work.imputed_share))
        return [
            self._held("statistics: layers", [*held, items.tapped_activations(choice)]),
            self._held("statistics: scores", [*held, *scored]),
        ]

    def spilled_bytes(self, choice: Choice) -> int:
        """Return the bytes of the hidden states that lie on disk, at most."""
        if not choice.on_disk:
            return 0
        work = self._items.work
        windows = max(work.windows, choice.in_flight) - choice.resident
        if work.reconstruction:
            windows = max(windows, self._states(choice) * (work.last_windows - choice.resident))
        return max(0, windows) * self._items.hidden_bytes

    def _states(self, choice: Choice) -> int:
        """Return the number of hidden states of each window in a reconstruction.

        Those of both models; a sublayer's dense inputs, or its own for channel updates; targets of
        the updates; the dense layer's last projection if a norm follows it.
        """
        work = self._items.work
        states = 2 + int(work.refit_inputs or work.channel_updates > 0)
        return states + choice.keep_updates + int(self._items.spec.family.ffn_norm is not None)

    def _reconstruction(self, choice: Choice) -> list[MemoryPhase]:
        items, work = self._items, self._items.work
        windows = work.last_windows
        held = [
            *items.paired_streams(choice, self._items.work.weights),
            *items.hidden(choice, windows, states=self._states(choice)),
        ]
        layer = [*held, items.refits(), items.gram_of_reconstruction()]
        if choice.keep_inputs:
            layer.append(items.kept_inputs(windows))
        solve = items.solve(share=work.imputed_share)
        phases = [
            self._held("recovery: layers", [*layer, items.paired_activations(choice)]),
            self._held("recovery: solve", [*layer, solve]),
        ]
        if work.channel_updates:
            phases += self._channel_updates(choice, held)
        return [*phases, self._held("recovery: head", [*held, *self._head(choice)])]

    def _channel_updates(self, choice: Choice, held: list[PlanItem]) -> list[MemoryPhase]:
        """Return the phases of channel updates: an update, then the refit of down_proj.

        Neither holds the FFN's inputs.
        """
        items, windows = self._items, self._items.work.last_windows
        layer = [*held, items.refits(), *items.updated_weights()]
        if choice.keep_inputs:
            layer.append(items.kept_inputs(windows, ffn=False))
        moved = [*layer, items.updated_block(), items.update_activations(choice)]
        if choice.keep_updates:
            moved.append(items.slopes(windows))
        again = [*layer, items.gram_of_reconstruction()]
        return [
            self._held("refinement: channels", moved),
            self._held("refinement: layers", [*again, items.paired_activations(choice)]),
            self._held("refinement: solve", [*again, items.solve()]),
        ]
