"""What ``torchrun`` and ``accelerate launch`` say of a process in its environment.

In: the environment. Out: a :class:`Launch`, or None for a process that was started alone. Imports
no torch and talks to nobody.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass

from frugal_bonsai.errors import OptionError

# A name for the host in place of the system's. Tests give processes of one machine several.
HOST_NAME = "FRUGAL_BONSAI_HOST"


@dataclass(frozen=True, kw_only=True)
class Launch:
    """The place of a process among those that were launched together.

    Attributes:
        rank: Number of the process, from 0.
        ranks: Number of processes, at least 2.
        local_rank: Number of the process on its host.
        local_ranks: Number of processes on its host.
        host: Name of the host.
    """

    rank: int
    ranks: int
    local_rank: int
    local_ranks: int
    host: str


def launched(environment: Mapping[str, str] = os.environ) -> Launch | None:
    """Return the place of this process in its launch; None if it was started alone.

    Raises:
        OptionError: A variable of the launcher is not a number.
    """
    if "RANK" not in environment or _number(environment, "WORLD_SIZE", 1) < 2:
        return None
    return Launch(
        rank=_number(environment, "RANK", 0),
        ranks=_number(environment, "WORLD_SIZE", 1),
        local_rank=_number(environment, "LOCAL_RANK", 0),
        local_ranks=max(1, _number(environment, "LOCAL_WORLD_SIZE", 1)),
        host=environment.get(HOST_NAME) or platform.node(),
    )


def _number(environment: Mapping[str, str], name: str, default: int) -> int:
    text = environment.get(name, str(default))
    try:
        return int(text)
    except ValueError as error:
        raise OptionError(
            f"environment variable {name}: {text!r} is not a number; torchrun and accelerate "
            f"launch set it, and a process that is started alone needs none"
        ) from error
