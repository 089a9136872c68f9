"""The number of the teacher's next tokens that are kept, where the vocabulary is small."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from frugal_bonsai.errors import OptionError
from frugal_bonsai.run.adaptation import _teacher_settings
from frugal_bonsai.run.options import AdaptOptions


@pytest.mark.parametrize(
    ("vocabulary", "asked", "kept"), [(24, None, 24), (99, None, 64), (24, 8, 8)]
)
def test_the_default_is_at_most_the_vocabulary(
    vocabulary: int, asked: int | None, kept: int
) -> None:
    found = _teacher_settings(*arguments(vocabulary, asked))
    assert found is not None and found.top == kept


def test_more_than_the_vocabulary_is_refused_before_any_work() -> None:
    with pytest.raises(OptionError, match="--top: 25 is more than the vocabulary's 24"):
        _teacher_settings(*arguments(24, 25))


def arguments(vocabulary: int, top: int | None) -> Any:
    options = AdaptOptions(data=("self",), teacher="dense", top=top)
    model = SimpleNamespace(name="m", spec=SimpleNamespace(vocabulary=vocabulary, layers=2))
    return options, model, model
