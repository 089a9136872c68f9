"""The files of a prune, round by round, and of a command that streams a working store.

In: shapes and a workload. Out: a :class:`~frugal_bonsai.memory.disk.DiskPlan`. Pure.
"""

from __future__ import annotations

from frugal_bonsai.memory.disk import DiskItem, DiskPhase, DiskPlan, ModelFiles, phase
from frugal_bonsai.memory.items import source_element_bytes
from frugal_bonsai.memory.work import PruneWorkload, SweepWorkload
from frugal_bonsai.model.family import ModelSpec
from frugal_bonsai.model.units import ATTENTION, FFN


def plan_disk(spec: ModelSpec, work: SweepWorkload, *, spilled_bytes: int = 0) -> DiskPlan:
    """Predict the files of a command; ``spilled_bytes`` of hidden states lie there meanwhile."""
    if isinstance(work, PruneWorkload):
        formula = "states*(n-resident)*S*H*c"
        spilled = DiskItem(name="hidden states", size_bytes=spilled_bytes, formula=formula)
        phases = _PruneFiles(spec, work).phases()
        return DiskPlan(phases=tuple(phase(p.name, [*p.items, spilled], p.round) for p in phases))
    if work.weights is None:
        return DiskPlan()
    store = ModelFiles(spec, source_element_bytes(spec)).store(work.weights, name="working store")
    return DiskPlan(phases=(phase("the working store", [store]),))


class _PruneFiles:
    """The files of a prune, in the order in which they come and go.

    The dense store stays for reconstruction; without it, it goes before the first working store.
    The files of a finished round stay until the next round is finished: a resume needs them.
    """

    def __init__(self, spec: ModelSpec, work: PruneWorkload) -> None:
        self._work = work
        self._files = ModelFiles(spec, work.source_bytes)
        assert work.weights is not None
        self._weights = work.weights
        self._dense = self._files.store(self._weights)
        self._head = [self._files.head()] if work.int8_arithmetic and work.pairs else []

    def phases(self) -> list[DiskPhase]:
        """Return all phases."""
        work, last = self._work, self._work.rounds
        phases = [phase("statistics", [self._dense, *self._made(0)])]
        for number in range(1, last + 1):
            phases += self._round(number)
        left = 1.0 if work.padded else work.remaining[last]
        output = self._files.output(left, companion_bytes=work.companion_bytes)
        return [*phases, phase("writing the output", [*self._finished(last), *output], last + 1)]

    def _round(self, number: int) -> list[DiskPhase]:
        """Return the phases of a round: masks, candidates of several ranks, reconstruction."""
        work, last = self._work, number == self._work.rounds
        replaced = self._files.layer(self._weights, work.remaining[number])
        always = [*self._head, *self._finished(number - 1)]
        dense = [self._dense] if work.reconstruction else []
        # A working store is cut to this round's units layer by layer.
        before = [self._dense] if number == 1 else [*dense, self._working(number - 1), replaced]
        after = [*dense, *self._made(number)]
        if work.reconstruction or not last:
            after.append(self._working(number))
        if work.reconstruction and not last:
            after.append(replaced)
        candidates = []
        if work.trial_windows and work.local_ranks > 1:  # each rank has a store of its candidate
            stores = [self._working(number)] * work.local_ranks
            candidates.append(
                phase(f"round {number}: candidates", [*always, *dense, *stores], number)
            )
        return [
            phase(f"round {number}: masks", [*always, *before], number),
            *candidates,
            phase(f"round {number}: reconstruction", [*always, *after], number),
        ]

    def _working(self, number: int) -> DiskItem:
        return self._files.store(self._weights, self._work.remaining[number], name="working store")

    def _finished(self, number: int) -> list[DiskItem]:
        """Return the files of a finished round, which a resume starts from."""
        made = self._made(number)
        return [self._files.state(), *made] if number else made

    def _made(self, number: int) -> list[DiskItem]:
        """Return the tensors that a round leaves for the next one; round 0 is the dense model."""
        work, left = self._work, self._work.remaining[number]
        made, last = [], number == work.rounds
        if number and work.reconstruction:
            inputs = {ATTENTION, FFN} if work.refit_inputs else set()
            if last and work.channel_updates:
                inputs.add(FFN)
            made.append(self._files.refits(left, inputs, name=f"refits of round {number}"))
        elif number and work.mean_biases:
            made.append(self._files.biases(f"biases of round {number}"))
        if not last:
            share, name = work.round_imputed_share(number), f"imputations for round {number + 1}"
            made.append(self._files.imputations(left, share, name))
        return made
