"""The public exceptions.

An error that a user can cause is a :class:`FrugalBonsaiError`. Its text says what went wrong, where
(file, tensor or option), what was found, what was expected, and what to try. The command line
prints this text and exits with code 2. Any other exception is a defect and keeps its traceback.
"""

from __future__ import annotations

# What Python and libraries raise where a value from a file has a wrong type, size or content.
# RecursionError comes from deeply nested values.
WRONG_VALUES = (
    *(ArithmeticError, AssertionError, AttributeError, LookupError),
    *(RecursionError, TypeError, ValueError),
)


class FrugalBonsaiError(Exception):
    """Base class of all errors that a user can cause and fix."""


class OptionError(FrugalBonsaiError):
    """An option or setting has an invalid value."""


class CheckpointError(FrugalBonsaiError):
    """A checkpoint is missing or damaged, or contradicts its header, index or config."""


class UnsupportedModelError(FrugalBonsaiError):
    """The model's architecture has no family table."""


class CalibrationError(FrugalBonsaiError):
    """A text source cannot be read or reached, or is too short."""


class BudgetError(FrugalBonsaiError):
    """No plan fits the memory caps, or a cap was exceeded.

    Args:
        text: the error text.
        option: option of the cap that is too small; empty for other reasons.
        needed_bytes: smallest value of that option for which a plan fits.
    """

    def __init__(self, text: str, *, option: str = "", needed_bytes: int = 0) -> None:
        super().__init__(text)
        self.option, self.needed_bytes = option, needed_bytes


class OutputError(FrugalBonsaiError):
    """The output cannot be written: it exists, the disk is full, or permission is missing."""


class StateError(FrugalBonsaiError):
    """A run directory is damaged or cannot be resumed with these options."""


class RankError(FrugalBonsaiError):
    """A process of a launch failed, ended or does not answer, or a command runs in one only."""


class VerifyError(FrugalBonsaiError):
    """The rewritten model does not compute the same as the masked parent."""


class BenchError(FrugalBonsaiError):
    """A model cannot be timed or run in llama.cpp: it does not load, or its process ended."""
