"""Profiles as users meet them: measure, save, plan for another machine, predict a prune."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from commands import fail, frugal_bonsai, python, succeed

from frugal_bonsai.hardware.profile import find_profile, read_profile
from frugal_bonsai.run.machine import NOMINAL_PROFILES

PROFILES = find_profile("rtx-12gb").parent
SMALL = (
    *("--windows", "8", "--window", "64", "--masks", "2", "--mask-windows", "2"),
    *("--sparsity", "0.3", "--step", "0.3"),
)


def test_measure_this_machine_and_save_it(tmp_path: Path) -> None:
    out = tmp_path / "mine.toml"
    words = ("profile", "--quick", "--threads", "1", "--device", "cpu", "--dir", tmp_path)
    done = frugal_bonsai(*words, "--out", out, "--report")
    assert done.returncode == 0, done.stderr
    assert "measuring the disk" in done.stderr and f"saved: {out}" in done.stdout
    assert "matrix products, fp32" in done.stdout and "flop/s" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["mine.toml"]
    profile = read_profile(out)
    assert (profile.device, profile.gpu_bytes) == ("cpu", None)
    assert profile.source.startswith("measured 20") and profile.name.endswith("1 thread")
    # Measured again, the file is replaced; a file that is something else is not.
    values = succeed(*words, "--out", out)
    assert values["out"] == str(out)
    assert values["products"]["fp32"] == pytest.approx(read_profile(out).products["fp32"], rel=1e-3)


def test_a_file_that_is_no_profile_is_not_replaced(tmp_path: Path) -> None:
    notes = tmp_path / "notes.toml"
    notes.write_text("mine = 1\n", encoding="utf-8")
    text = fail("profile", "--quick", "--out", notes)
    assert "notes.toml" in text and "not replaced" in text
    assert notes.read_text(encoding="utf-8") == "mine = 1\n"


def test_plan_for_a_card_that_is_not_here() -> None:
    plan = succeed("plan", "example", "--profile", PROFILES / "rtx-12gb.toml")
    assert (plan["device"], plan["device_name"]) == ("cuda", "GeForce RTX 3060 12 GB, nominal")
    assert plan["caps"]["gpu"] == int(11.6 * 2**30) and plan["caps"]["host"] == 31 * 2**30
    assert plan["profile"].startswith("nominal")
    assert any(item["name"] == "device context" for item in plan["items"])
    base = next(item for item in plan["items"] if item["name"] == "Python and libraries")
    assert (base["size_bytes"], base["formula"]) == (2 * 2**30, "nominal")
    assert plan["seconds"] == pytest.approx(sum(phase["seconds"] for phase in plan["phases"]))
    assert any(phase["copy"] > 0 for phase in plan["phases"])
    smaller = succeed("plan", "example", "--profile", "rtx-12gb", "--max-gpu-mem", "4GB")
    assert smaller["caps"]["gpu"] == 4 * 10**9


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is a GPU here")
@pytest.mark.parametrize(
    ("cap", "name"), [("8GB", "rtx-8gb"), ("20GiB", "rtx-24gb"), ("200GB", "h200")]
)
def test_a_plan_for_a_gpu_that_is_not_here_says_so_first(cap: str, name: str) -> None:
    shown = frugal_bonsai("plan", "example", "--max-gpu-mem", cap).stdout
    first = " ".join(shown.partition("\n\n")[0].split())
    assert first.startswith("There is no GPU here, so this is a plan for the CPU.")
    assert first.endswith(f"with this --max-gpu-mem add --profile {name}")
    assert (PROFILES / f"{name}.toml").is_file()
    assert succeed("plan", "example", "--max-gpu-mem", cap)["advice"] == first
    assert succeed("plan", "example")["advice"] is None


def test_the_profiles_that_are_named_have_the_memory_that_is_said() -> None:
    for gigabytes, name in NOMINAL_PROFILES.items():
        found = read_profile(PROFILES / f"{name}.toml")
        assert found.gpu_bytes is not None
        assert 0.9 < found.gpu_bytes / (gigabytes * 2**30) <= 1.0


def test_planning_for_a_card_never_touches_cuda() -> None:
    code = (
        "import sys, json, torch\n"
        "def touched(*_, **__): raise AssertionError('CUDA was touched')\n"
        "for name in ('init', 'is_available', 'mem_get_info', '_lazy_init', 'device_count'):\n"
        "    setattr(torch.cuda, name, touched)\n"
        "import frugal_bonsai\n"
        "options = frugal_bonsai.PruneOptions(profile=sys.argv[1])\n"
        "print(json.dumps(frugal_bonsai.plan('example', options)['device']))\n"
    )
    assert json.loads(python(code, PROFILES / "h200.toml")) == "cuda"


def test_a_profile_of_another_device_is_refused(tmp_path: Path) -> None:
    gpu, cpu = PROFILES / "rtx-8gb.toml", PROFILES / "laptop-cpu-16gb.toml"
    assert "is of a cuda" in fail("plan", "example", "--profile", gpu, "--device", "cpu")
    words = ("prune", "example", "--out", tmp_path / "out", *SMALL)
    if not torch.cuda.is_available():
        text = fail(*words, "--profile", gpu)
        assert "rtx-8gb.toml" in text and "this run's device is cpu" in text
    assert "is of a cpu" in fail("plan", "example", "--profile", cpu, "--device", "cuda")
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_key_names_file_and_key(tmp_path: Path) -> None:
    path = tmp_path / "wrong.toml"
    text = (PROFILES / "h200.toml").read_text(encoding="utf-8")
    path.write_text(text.replace("call_seconds", "calls_seconds"), encoding="utf-8")
    error = fail("plan", "example", "--profile", path)
    assert "wrong.toml" in error and "'calls_seconds' is unknown" in error


def test_a_prune_predicts_its_time(tmp_path: Path) -> None:
    profile = PROFILES / "laptop-cpu-16gb.toml"
    out = tmp_path / "out"
    words = ("prune", "example", "--out", out, *SMALL, "--device", "cpu", "--profile", profile)
    done = frugal_bonsai(*words, "--json")
    assert done.returncode == 0, done.stderr
    assert "predicted: about" in done.stderr
    summary = json.loads(done.stdout)
    predicted = summary["predicted"]
    assert predicted["profile"].startswith("nominal") and predicted["seconds"] > 0
    assert predicted["seconds"] == pytest.approx(sum(p["seconds"] for p in predicted["phases"]))
    report = json.loads((out / "pruning_report.json").read_text(encoding="utf-8"))
    assert report["predicted"] == predicted


def test_a_device_that_is_none_is_refused_for_another_machine_too() -> None:
    words = ("plan", "example", "--profile", PROFILES / "rtx-8gb.toml", "--device")
    assert "--device: 'gpu0' is not cpu or one of" in fail(*words, "gpu0")
    text = fail(*words, "xpu")
    assert "--device xpu" in text and "is of a cuda" in text
