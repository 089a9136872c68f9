"""The importance scores of a round, and the imputations that its masks need.

In: a store, a mask, the number of a round. Out: scores; imputations in the run directory, and their
reader. Holds the memory of one sweep.
"""

from __future__ import annotations

from dataclasses import dataclass

from frugal_bonsai.bonsai.calibration import RoundWindows, round_generator
from frugal_bonsai.bonsai.importance.imputation import Imputations, ImputationWriter
from frugal_bonsai.bonsai.importance.scores import ImportanceBuilder, ImportanceScores
from frugal_bonsai.bonsai.importance.whole import measure_whole
from frugal_bonsai.bonsai.selection.schedule import Schedule
from frugal_bonsai.bonsai.settings import WHOLE
from frugal_bonsai.bonsai.state import StateFolder
from frugal_bonsai.model.units import KeepMask
from frugal_bonsai.stream.engine import Engine
from frugal_bonsai.stream.store import LayerStore


@dataclass(frozen=True, kw_only=True)
class RoundImportance:
    """Scores units for one round after the other.

    Attributes:
        engine: Device and sweeps.
        schedule: Settings and layout rules.
        windows: Calibration windows of each round.
        folder: The run directory, which takes the imputations.
    """

    engine: Engine
    schedule: Schedule
    windows: RoundWindows
    folder: StateFolder

    def measure(self, store: LayerStore, mask: KeepMask, number: int) -> ImportanceScores:
        """Score the units for the round after ``number`` in one unmasked sweep."""
        windows_NS, name = self.windows.of_round(number), self.schedule.settings.prior
        with self.engine.stream(store) as stream:
            if name in WHOLE.values():
                return measure_whole(name, self.engine.sweep, stream, windows_NS, mask)
            builder = self.builder(mask, number)
            self.engine.sweep.run(stream, windows_NS, tap=builder, name="statistics")
            return builder.build()

    def builder(self, mask: KeepMask, number: int) -> ImportanceBuilder:
        """Collect the statistics, and the imputations, of the round after ``number``."""
        settings, imputations = self.schedule.settings, None
        if settings.imputes(uniform=self.schedule.rules.uniform):
            imputations = ImputationWriter(
                share=settings.pool * self.schedule.share(mask),
                damping=settings.ridge,
                rules=self.schedule.rules,
                save=lambda group, tensors: self.folder.save_imputation(number, group, tensors),
            )
        return ImportanceBuilder(
            settings.prior,
            mask,
            damping=settings.ridge,
            generator=round_generator(settings.seed, 10_000 + number),
            imputations=imputations,
            keep_means=settings.bias,
        )


def round_imputations(engine: Engine, folder: StateFolder, number: int) -> Imputations:
    """Return the reader of the imputations for the masks of a round.

    Args:
        engine: Device and units.
        folder: The run directory, which has the imputations.
        number: Number of the round.
    """
    return Imputations(
        lambda group: folder.imputation(number - 1, group),
        engine.spec.table.groups,
        engine.device,
    )
