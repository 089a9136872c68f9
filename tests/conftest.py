"""Real models and text lie beside the repository, in ``../shared``, and never in it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import torch
from fresh_process import FreshProcesses, plain_transformers
from stand_in_device import Machine, installed

from frugal_bonsai.run import machine as run_machine
from frugal_bonsai.run import profile, report

CPU = torch.device("cpu")
SHARED = Path(__file__).resolve().parents[2] / "shared"
TESTS = Path(__file__).parent
# Files and folders that `tools/test.sh --fast` leaves out: whole commands, every family, other
# runtimes, the simulated device. The file that takes longest comes first.
SLOW = (
    "test_gpu_check.py",
    "run",
    "bonsai/test_search.py",
    "families",
    "accelerator",
    "export/test_llama_cpp.py",
    "export/test_llama_cpp_families.py",
    "adapt/test_train.py",
    "bonsai/test_memory_runs_out.py",
    "bonsai/test_paper_regression.py",
    "memory/test_activations.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the slow tests, and begin with them: the short ones then keep all processes busy."""
    ranks = {}
    for item in items:
        place = item.path.relative_to(TESTS).as_posix()
        found = [rank for rank, slow in enumerate(SLOW) if f"{place}/".startswith(f"{slow}/")]
        if found:
            item.add_marker(pytest.mark.slow)
        elif item.get_closest_marker("slow"):
            found = [len(SLOW)]
        ranks[item] = min(found, default=len(SLOW) + 1)
    items.sort(key=ranks.__getitem__)


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """The machine is shared, and sums do not depend on the number of cores."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def quick_disk() -> Iterator[None]:
    """No test pulls the plug: files need not reach the disk, which takes milliseconds for each."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(scope="session", autouse=True)
def short_measurements() -> Iterator[None]:
    """A prune without a profile measures each rate twice, not for a tenth of a second.

    The rates of the processor are measured once for all tests of a process.
    """
    measure, once = run_machine.quick_profile, cache(run_machine.quick_profile)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(profile, "_QUICK_SECONDS", 0.0)
        patched.setattr(
            run_machine,
            "quick_profile",
            lambda device: (once if device == CPU else measure)(device),
        )
        yield


@pytest.fixture(scope="session", autouse=True)
def no_figures() -> Iterator[None]:
    """The page beside an output has no figures, which take a second; test_report_page draws."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(report, "require_plots", lambda: None)
        patched.setattr(report, "draw_figures", lambda charts: {})
        yield


@pytest.fixture(scope="session")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FreshProcesses]:
    """Processes that have imported torch and transformers alone."""
    processes = plain_transformers(tmp_path_factory.mktemp("fresh"))
    yield processes
    processes.close()


@pytest.fixture
def machine() -> Iterator[Machine]:
    """A CUDA device that computes on the CPU."""
    with installed() as found:
        yield found


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with real models and text."""
    if not SHARED.is_dir():
        pytest.skip("needs ../shared (real models and text), which is not part of the repository")
    return SHARED


def _model(shared: Path, name: str) -> Path:
    folder = shared / "models" / name
    if not (folder / "config.json").is_file():
        pytest.skip(f"needs ../shared/models/{name}")
    return folder


@pytest.fixture(scope="session")
def stories3m(shared: Path) -> Path:
    """A real Llama: bf16, GQA 6/2, 3.1 M parameters, tied."""
    return _model(shared, "stories3M")


@pytest.fixture(scope="session")
def stories260k(shared: Path) -> Path:
    """A real Llama: fp32, GQA 8/4, 0.26 M parameters, tied."""
    return _model(shared, "stories260K")


@pytest.fixture(scope="session")
def gpt1m_bytes(shared: Path) -> Path:
    """A real GPT-2: fp16, 4 heads, 0.95 M parameters, bytes as vocabulary, untied."""
    return _model(shared, "gpt1m-bytes")
