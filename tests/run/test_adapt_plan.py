"""``frugal-bonsai adapt --plan-only``: what would be held, before anything runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from commands import fail, frugal_bonsai, succeed

# The embedded example is its own student here: a model is a model.
WORDS = ("adapt", "example", "--teacher", "example", "--data", "stdlib", "--data", "self")
SMALL = ("--window", "64", "--windows", "24", "--batch", "4", "--rank", "8")


def test_the_table_itemises_the_training_and_nothing_runs(tmp_path: Path) -> None:
    done = frugal_bonsai(*WORDS, *SMALL, "--plan-only", "--max-cpu-mem", "3GB", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.iterdir()) == []
    lines = [line.split() for line in done.stdout.splitlines()]
    first = " ".join(done.stdout.split())
    assert first.startswith("example (llama): adapted, with example as its teacher fits: host")
    assert "of 2.79 GiB (" in first
    for part in ("teacher", "training", "writing"):
        assert any(line[:1] == [part] for line in lines), part
    # 6 layers; q, k, v, o of 256, 128, 128, 256 columns, gate, up, down of 512, hidden 192; rank 8.
    sides = 2 * (192 + 256) + 2 * (192 + 128) + 3 * (192 + 512)
    adapters = f"{6 * 4 * 8 * sides / 2**10:.2f}"
    assert ["adapters", "host", "always", "4*R*(O+I)", adapters, "KiB"] in lines
    for item in ("frozen", "head", "gradients", "optimiser", "activations", "logits"):
        assert any(line[:1] == [item] for line in lines), item
    assert "student: native weights, rank 8, adamw, steps of 4 windows of 64 tokens" in first
    assert "data: stdlib" in first and "48 windows" in first


def test_the_smallest_cap_that_is_named_works_and_a_smaller_one_does_not() -> None:
    pytest.importorskip("bitsandbytes")
    refused = frugal_bonsai(*WORDS, *SMALL, "--plan-only", "--max-cpu-mem", "200MB")
    assert refused.returncode == 2 and refused.stdout == ""
    found = re.search(
        r"of which (.+) is the largest item .*smallest --max-cpu-mem that works is (\d+)MiB",
        refused.stderr,
    )
    assert found is not None, refused.stderr
    assert found[1] == "Python and libraries"
    least = int(found[2])
    # What is imported beside differs by some MiB from one process to the next.
    rank = ("--rank", "24", "--optimizer", "adamw8bit")
    plan = succeed(*WORDS, *SMALL, *rank, "--plan-only", "--max-cpu-mem", f"{least + 16}MiB")
    assert plan["totals"]["host"] <= (least + 16) * 2**20
    assert {part["name"] for part in plan["parts"]} == {
        "teacher",
        "training",
        "writing and measuring",
    }
    assert plan["totals"]["host"] == max(part["host_bytes"] for part in plan["parts"])
    [training] = [part for part in plan["parts"] if part["name"] == "training"]
    for phase in training["phases"]:
        held = [item for item in plan["items"] if phase["name"] in item["phases"]]
        assert sum(item["size_bytes"] for item in held) == phase["host_bytes"]
    # A byte for each moment and two fp32 scales for every 256; eight bytes in small parameters.
    sizes = {item["name"]: item["size_bytes"] for item in plan["items"]}
    assert plan["optimiser"] == "adamw8bit" and plan["rank"] == 24
    assert 2 <= 4 * sizes["optimiser"] / sizes["gradients"] < 2.6
    assert "works is" in fail(*WORDS, *SMALL, "--plan-only", "--max-cpu-mem", f"{least - 32}MiB")


def test_without_a_plan_an_output_is_needed() -> None:
    assert "Missing option '--out'" in fail(*WORDS, *SMALL)
