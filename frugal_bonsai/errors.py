"""Every public exception.

A user's error is a :class:`FrugalBonsaiError`: its text says what went wrong, where (file, tensor
or option), what was found against what was expected, and what to try. The command line prints the
text alone and exits with code 2; anything else that escapes is a defect and keeps its traceback.
"""

from __future__ import annotations


class FrugalBonsaiError(Exception):
    """Base of every error that a user can cause and can mend."""


class OptionError(FrugalBonsaiError):
    """An option or setting has a value that cannot work."""


class CheckpointError(FrugalBonsaiError):
    """A checkpoint is missing, damaged, or not what its header or index says."""


class UnsupportedModelError(FrugalBonsaiError):
    """The model's architecture has no family table."""


class CalibrationError(FrugalBonsaiError):
    """A text source cannot be read, reached, or is too short."""


class BudgetError(FrugalBonsaiError):
    """No plan fits the memory cap, or a cap was passed.

    Args:
        text: what the user reads.
        option: the cap that a plan does not fit into; empty for other reasons.
        needed_bytes: what that option must allow for the plan to fit.
    """

    def __init__(self, text: str, *, option: str = "", needed_bytes: int = 0) -> None:
        super().__init__(text)
        self.option, self.needed_bytes = option, needed_bytes


class OutputError(FrugalBonsaiError):
    """The output cannot be written (it exists, the disk is full, no permission)."""


class StateError(FrugalBonsaiError):
    """A run directory cannot be resumed with these options."""


class VerifyError(FrugalBonsaiError):
    """The rewritten model does not compute what the masked parent computes."""


class BenchError(FrugalBonsaiError):
    """A model cannot be timed: it does not load, or its process ended."""
