"""The layers that a stopped reconstruction had finished: their refits are used, not solved again.

In: the saved refits of a round and its log. Out: the layer's refits and scores, and the hidden
states of both models behind it, equal to the bit to those of the first attempt. That takes one
forward pass of the layer in each model instead of a refit. Holds one saved weight.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from frugal_bonsai.bonsai.fingerprint import fingerprint
from frugal_bonsai.bonsai.reconstruction.layer_pass import LayerPass
from frugal_bonsai.bonsai.round_log import RoundLog
from frugal_bonsai.model.units import KeepMask
from frugal_bonsai.stream.call import call_layer

Readers = Mapping[str, Callable[[], torch.Tensor]]


@dataclass(frozen=True)
class FinishedLayers:
    """Notes finished layers in the round's log, and restores them.

    Attributes:
        log: Log of the round.
        number: The round.
        mask: The remaining units.
        read: Returns the readers of a layer's saved refits, by full name.
    """

    log: RoundLog
    number: int
    mask: KeepMask
    read: Callable[[int], Readers]

    def note(self, work: LayerPass) -> None:
        """Note a layer whose refits are saved: its figures, and the scores of its units."""
        scores = work.pair.scores
        scored = [] if scores is None else scores.of_layer(work.layer)
        figures = [work.extra_passes, float(len(work.residual)), *work.residual]
        self.log.append(self._key(work.layer), [*figures, *scored], 0)

    def restore(self, work: LayerPass) -> bool:
        """Repeat a finished layer and return True; return False if it is not finished."""
        values = self.log.find(self._key(work.layer)).values
        if not values:
            return False
        end = 2 + int(values[1])
        work.extra_passes, work.residual = values[0], values[2:end]
        if work.pair.scores is not None:
            work.pair.scores.restore(work.layer, values[end:])
        prefix = work.spec.prefix(work.layer)
        for name, read in self.read(work.layer).items():
            work.pruned[name.removeprefix(prefix)].copy_(read())
        _advance_dense(work)
        work.advance()
        return True

    def _key(self, layer: int) -> str:
        at = f"layer {layer} of round {self.number}"
        return fingerprint(at.encode(), self.mask.keep_N.numpy().tobytes())


def _advance_dense(work: LayerPass) -> None:
    hidden = work.pair.hidden_dense

    def body(items: slice) -> None:
        hidden.write(items, call_layer(work.module, work.dense, hidden.read(items), work.kwargs))

    work.run(work.pair.fitted, body)
