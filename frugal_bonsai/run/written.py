"""The windows that the dense model writes for the last reconstruction of a prune.

In: a prepared run, its run directory. Out: token windows, written once and kept in the run
directory, so that a run that is resumed reads them. Holds the windows.

Shape suffixes: n windows, S tokens.
"""

from __future__ import annotations

from pathlib import Path

import torch

from frugal_bonsai.bonsai.calibration import write_windows
from frugal_bonsai.checkpoint.tensor_file import read_tensor, write_tensors
from frugal_bonsai.run.prepare import PruneRun

_FILE, _TENSOR = "written.safetensors", "windows"


def written_windows(run: PruneRun, folder: Path, *, resumed: bool) -> torch.Tensor | None:
    """Return the windows that the dense model writes, int64 ``[n, S]``; None if it writes none.

    Args:
        run: The prune.
        folder: Its run directory.
        resumed: The run directory belongs to this prune, and holds the windows that it began with.
    """
    work, file = run.work, folder / _FILE
    if not work.written:
        return None
    if resumed and file.exists():
        return read_tensor(file, _TENSOR).long()
    windows_nS = write_windows(
        run.engine,
        run.calibration.windows_NS,
        work.written,
        together=work.written_together,
        seed=run.resolved.settings.seed,
    )
    write_tensors(file, {_TENSOR: windows_nS.int()})
    run.progress.note(
        f"text for the last recovery: {work.written} windows that the dense model wrote, from "
        "prompts of the calibration text"
    )
    return windows_nS
