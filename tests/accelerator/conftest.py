"""A stand-in device for every test that asks for one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from stand_in_device import Machine, installed


@pytest.fixture
def machine() -> Iterator[Machine]:
    """A CUDA device that computes on the CPU."""
    with installed() as found:
        yield found
