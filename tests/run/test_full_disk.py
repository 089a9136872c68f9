"""Files that a command writes: foreseen by its plan, refused early, kept when a disk is full."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from tiny_models import save_byte_tokenizer, tiny_llama

from frugal_bonsai.adaptation.state import TrainingFolder
from frugal_bonsai.bonsai.state import StateFolder
from frugal_bonsai.bonsai.stores import Stores
from frugal_bonsai.errors import OutputError
from frugal_bonsai.export import gguf_file
from frugal_bonsai.memory.disk import OUT, RUN, DiskItem, DiskPhase, DiskPlan
from frugal_bonsai.memory.plan import MemoryPlan
from frugal_bonsai.run.adapt import adapt
from frugal_bonsai.run.adapt_plan import plan_adapt
from frugal_bonsai.run.disk_room import require_room
from frugal_bonsai.run.evaluate import evaluate
from frugal_bonsai.run.export import export_gguf
from frugal_bonsai.run.options import AdaptOptions, EvalOptions, PruneOptions
from frugal_bonsai.run.prune import prune
from frugal_bonsai.run.shrink import shrink

TOOL = Path(__file__).parents[2] / "tools" / "measure_disk.py"
SETTINGS: dict[str, Any] = {"sparsity": 0.4, "step": 0.2, "masks": 4, "mask_windows": 4}


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("measure_disk", TOOL)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["measure_disk"] = module  # dataclasses look it up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model") / "dense"
    sizes = {"hidden_size": 96, "intermediate_size": 240, "head_dim": 16}
    tiny_llama(folder, vocab_size=259, **sizes)
    save_byte_tokenizer(folder)
    return str(folder)


def options(**given: Any) -> PruneOptions:
    settings = {**SETTINGS, **given.pop("settings", {})}
    return PruneOptions(
        **{"layout": "per-layer", **given},
        settings=settings,
        calibration="stdlib",
        windows=8,
        window=32,
        max_cpu_mem="4GB",
        device="cpu",
    )


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"layout": "uniform", "settings": {"weights": "native"}},
        {"layout": "padded"},
        {"settings": {"recovery": False}},
        {"method": "local-only", "settings": {"refit": "outputs"}},
        {"method": "fluctuation", "settings": {"step": 1.0}},
    ],
    ids=["per-layer", "native", "padded", "no-recovery", "local-only", "fluctuation"],
)
def test_the_files_of_a_prune_are_foreseen(
    model: str, tmp_path: Path, tool: ModuleType, given: dict[str, Any]
) -> None:
    plans: list[MemoryPlan] = []
    with tool.measured_disk(tmp_path) as meter:
        prune(model, tmp_path / "out", options(**given), on_plan=plans.append)
    assert plans[0].total_bytes("disk") == pytest.approx(meter.peak_bytes, rel=0.1)


def test_the_files_of_an_adaptation_are_foreseen(
    model: str, tmp_path: Path, tool: ModuleType
) -> None:
    chosen = AdaptOptions(
        teacher=model, data=("stdlib",), windows=16, window=32, settings={"tokens": 256}
    )
    planned = plan_adapt(model, chosen, tmp_path / "out.run")
    with tool.measured_disk(tmp_path) as meter:
        adapt(model, tmp_path / "out", chosen)
    assert planned["totals"]["disk"] == pytest.approx(meter.peak_bytes, rel=0.1)
    assert planned["totals"]["disk"] == sum(item["size_bytes"] for item in planned["files"])


# -- too little room ------------------------------------------------------------------------------
def free_bytes(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    usage = shutil.disk_usage(Path.cwd())
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=size))


def test_a_prune_is_refused_with_what_would_fit(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plans: list[MemoryPlan] = []
    less = options(settings={"recovery": False})
    prune(model, tmp_path / "less", less, on_plan=plans.append)
    free_bytes(monkeypatch, plans[0].total_bytes("disk"))
    with pytest.raises(OutputError) as caught:
        prune(model, tmp_path / "out", options(), on_plan=plans.append)
    text = str(caught.value)
    assert f"{tmp_path / 'out.run'}: this prune needs" in text
    assert "(run folder and output; most in round 2: reconstruction" in text
    assert "On this disk it fits with --no-recovery" in text
    assert [path.name for path in tmp_path.iterdir()] == ["less"]
    prune(model, tmp_path / "out", less)  # the advice is right


def test_other_commands_are_refused(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free_bytes(monkeypatch, 5000)
    with pytest.raises(OutputError, match="the int8 working store needs"):
        evaluate(model, EvalOptions(text="stdlib", window=32, windows=2, weights="int8"))
    given = AdaptOptions(teacher=model, data=("stdlib",), windows=8, window=32)
    with pytest.raises(
        OutputError, match=r"out\.run: this adaptation needs .* \(run folder and output"
    ):
        adapt(model, tmp_path / "out", given)
    assert list(tmp_path.iterdir()) == []


def test_each_disk_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    items = (
        DiskItem(name="stores", size_bytes=600, formula="", folder=RUN),
        DiskItem(name="model", size_bytes=500, formula="", folder=OUT),
    )
    plan = DiskPlan(phases=(DiskPhase(name="writing", items=items),))
    run, out = tmp_path / "run", tmp_path / "out"
    run.mkdir()
    folders = {RUN: run, OUT: out}
    free_bytes(monkeypatch, 1000)
    with pytest.raises(OutputError, match=r"1\.07 KiB on this disk \(run folder and output"):
        require_room(plan, folders, "it")
    (run / "state").write_bytes(b"x" * 100)  # of a run that is resumed
    require_room(plan, folders, "it", held=run)
    (run / "state").unlink()
    real = Path.stat

    def stat(path: Path, **given: bool) -> Any:
        if path == run:  # a link to another disk
            return SimpleNamespace(st_dev=-1, st_mode=real(path, **given).st_mode)
        return real(path, **given)

    monkeypatch.setattr(Path, "stat", stat)
    require_room(plan, folders, "it")
    free_bytes(monkeypatch, 550)
    with pytest.raises(OutputError, match=r"run: it needs .* \(run folder; most in writing"):
        require_room(plan, folders, "it")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = shutil.which("mount")
    words = [str(mount), "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if mount is None or subprocess.run(words, capture_output=True, check=False).returncode:
        pytest.skip("file systems can be mounted by root on Linux alone")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_run_folder_on_a_small_disk(model: str, tmp_path: Path, small_disk: Path) -> None:
    (small_disk / "run").mkdir()
    (tmp_path / "out.run").symlink_to(small_disk / "run")
    with pytest.raises(OutputError, match=r"out\.run: this prune needs .* \(run folder; most in"):
        prune(model, tmp_path / "out", options())
    (tmp_path / "out.run").unlink()
    with pytest.raises(OutputError, match=r"are free. Free .* choose an --out on another disk"):
        prune(model, small_disk / "out", options())
    prune(model, tmp_path / "out", options())


# -- a disk that becomes full meanwhile -----------------------------------------------------------
@contextmanager
def full_disk() -> Iterator[None]:
    """Refuse every file above 200 bytes: the write itself fails, as on a full disk."""
    resource = pytest.importorskip("resource")
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def fill_at(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, when: Path) -> None:
    """Let the disk be full during the calls of a function, once a file or folder exists."""
    real: Callable[..., Any] = getattr(owner, name)

    def patched(*arguments: Any, **given: Any) -> Any:
        if not when.exists():
            return real(*arguments, **given)
        with full_disk():
            return real(*arguments, **given)

    monkeypatch.setattr(owner, name, patched)


def test_a_resume_needs_room_for_what_is_left_alone(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the last round, that is the output."""
    plans: list[MemoryPlan] = []
    out, run = tmp_path / "out", tmp_path / "out.run"
    with monkeypatch.context() as patched:
        fill_at(patched, sys.modules["frugal_bonsai.rewrite.shrink"], "shrink", run)
        with pytest.raises(OutputError, match="the disk is full"):
            prune(model, out, options(), on_plan=plans.append)
    assert not (run / "store").exists()
    rest = plans[0].disk.after(2).total_bytes
    assert rest == plans[0].disk.phases[-1].total_bytes() < plans[0].total_bytes("disk")
    files = [path for path in run.rglob("*") if path.is_file() and path.name != "events.jsonl"]
    held = sum(path.stat().st_size for path in files)
    free_bytes(monkeypatch, rest - held - 1)
    with pytest.raises(OutputError, match=r"are free\. Free \d+ B$"):
        prune(model, out, options(), resume=True)
    free_bytes(monkeypatch, rest - held)
    prune(model, out, options(), resume=True)
    assert list(tmp_path.iterdir()) == [out]


@pytest.fixture(scope="module")
def reference(model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("reference") / "out"
    prune(model, out, options())
    return out


@pytest.mark.skipif(os.name == "nt", reason="no limit on file sizes on Windows")
@pytest.mark.parametrize(
    ("owner", "name", "rounds"),
    [
        (Stores, "working", 1),
        (StateFolder, "save_imputation", 0),
        (StateFolder, "save_refit", 1),
        (StateFolder, "save", 1),
        ("frugal_bonsai.rewrite.shrink", "shrink", 2),
        ("frugal_bonsai.run.prune", "write_papers", 2),
    ],
    ids=["store", "imputation", "refits", "state", "output", "papers"],
)
def test_a_disk_that_becomes_full(
    model: str,
    reference: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    owner: Any,
    name: str,
    rounds: int,
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patched:
        patched_owner = sys.modules[owner] if isinstance(owner, str) else owner
        when = tmp_path / "out.run" / "state.json" if rounds else tmp_path
        fill_at(patched, patched_owner, name, when)
        with pytest.raises(OutputError) as caught:
            prune(model, out, options())
    text = str(caught.value)
    assert "the disk is full or a size limit was met" in text and str(tmp_path) in text
    assert " are free; free space" in text and " were written" in text
    kept = list(tmp_path.iterdir())
    assert kept == ([tmp_path / "out.run"] if rounds else [])
    if rounds:
        assert not list(tmp_path.rglob("*.partial-*"))
        summary = prune(model, out, options(), resume=True)
        assert len(summary["rounds"]) == 2
        assert (out / "pruning_mask.json").read_text() == (
            reference / "pruning_mask.json"
        ).read_text()
        weights = "model.safetensors"
        assert (out / weights).read_bytes() == (reference / weights).read_bytes()
        assert list(tmp_path.iterdir()) == [out]


@pytest.mark.skipif(os.name == "nt", reason="no limit on file sizes on Windows")
def test_a_disk_that_becomes_full_in_a_training(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, state = tmp_path / "out", tmp_path / "out.run" / "adapt.safetensors"
    given = AdaptOptions(
        teacher=model, data=("stdlib",), windows=16, window=32, settings={"tokens": 2048}
    )
    with monkeypatch.context() as patched:
        fill_at(patched, TrainingFolder, "save", state)
        with pytest.raises(OutputError, match=r"adapt\.safetensors: the disk is full"):
            adapt(model, out, given)
    before = state.read_bytes()
    with monkeypatch.context() as patched:
        fill_at(patched, sys.modules["frugal_bonsai.rewrite.shrink"], "shrink", state)
        with pytest.raises(OutputError, match=r"out.*: the disk is full"):
            adapt(model, out, given, resume=True)
    assert state.read_bytes() != before and list(tmp_path.iterdir()) == [out.with_name("out.run")]
    adapt(model, out, given, resume=True)
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.skipif(os.name == "nt", reason="no limit on file sizes on Windows")
def test_a_disk_that_becomes_full_in_shrink_and_export(
    model: str, reference: Path, tmp_path: Path
) -> None:
    mask, commands = reference / "pruning_mask.json", list[Callable[[], Any]]()
    commands.append(lambda: shrink(model, mask, tmp_path / "out", layout="per-layer"))
    commands.append(lambda: export_gguf("example", tmp_path / "m.gguf"))
    for command in commands:
        with full_disk(), pytest.raises(OutputError, match="the disk is full or a size limit"):
            command()
        assert list(tmp_path.iterdir()) == []


def test_the_size_of_an_export_is_foreseen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needed: list[int] = []
    monkeypatch.setattr(gguf_file, "require_free_space", lambda _, size, what: needed.append(size))
    written = export_gguf("example", tmp_path / "m.gguf", dtype="q8_0")
    assert needed == [pytest.approx(written["file_bytes"], rel=0.01)]
