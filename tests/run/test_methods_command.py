"""Published methods through the command line: their output loads in plain transformers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from fresh_process import FreshProcesses
from run.commands import fail, succeed

from frugal_bonsai.hardware.profile import find_profile

PROFILES = find_profile("rtx-12gb").parent
WORDS = ("--windows", "8", "--window", "64", "--max-cpu-mem", "2GB")
# Perplexity of the held-out windows, by transformers alone.
EVALUATE = """
import json, sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
tokens = torch.tensor(json.loads(sys.argv[2]))
with torch.no_grad():
    logits = model(tokens).logits[:, :-1]
loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
print(json.dumps({"perplexity": float(loss.exp()), "parameters": model.num_parameters()}))
"""


def _held_out(windows: int, window: int) -> list[list[int]]:
    """The windows that a prune of ``example`` holds out, as it cuts them."""
    from frugal_bonsai.bonsai.calibration import held_out_count, split_windows
    from frugal_bonsai.run.open import open_model
    from frugal_bonsai.run.texts import read_spread_windows

    with open_model("example") as model:
        wanted = windows + held_out_count(windows)
        _, all_NS = read_spread_windows(
            model, "stdlib", window, windows=wanted, option="--calibration"
        )
    held_out: list[list[int]] = split_windows(all_NS, windows, "stdlib").held_out_NS.tolist()
    return held_out


@pytest.mark.parametrize(
    ("method", "sparsity", "config"),
    [
        ("fluctuation", "0.25", {"attention_bias": True, "mlp_bias": True}),
        ("depth", "0.3", {"attention_bias": False, "mlp_bias": False}),
    ],
)
def test_published_methods_write_what_plain_transformers_loads(
    tmp_path: Path, fresh: FreshProcesses, method: str, sparsity: str, config: dict[str, bool]
) -> None:
    out = tmp_path / "out"
    summary = succeed(
        "prune", "example", "--out", out, "--method", method, "--sparsity", sparsity, *WORDS
    )
    assert summary["method"] == method and summary["verify"]["max_relative_difference"] < 1e-4
    found = json.loads(fresh.run(EVALUATE, out, json.dumps(_held_out(8, 64)), folder=tmp_path))
    assert found["perplexity"] == pytest.approx(summary["after"]["perplexity"], rel=1e-3)
    assert found["parameters"] == summary["after"]["parameters"]
    written = json.loads((out / "config.json").read_text())
    assert {key: written.get(key, False) for key in config} == config
    assert summary["sparsity"] == pytest.approx(float(sparsity), abs=0.06)
    notes = [note for note in summary["notes"] if "dropped" in note]
    if method == "depth":
        dropped = [at for at, kept in enumerate(summary["kept"]["ffn"]) if kept == 0]
        assert written["num_hidden_layers"] == len(summary["kept"]["ffn"]) - len(dropped)
        assert len(notes) == 1 and ", ".join(map(str, dropped)) in notes[0]
        assert all(summary["layer_sparsity"][at] == 1 for at in dropped)
    else:
        assert notes == []


def test_latency_is_what_the_profile_says_and_the_card_states_it(tmp_path: Path) -> None:
    """On a machine where attention takes for ever, attention goes."""
    kept = []
    for name, flops in (("slow", "1e+5"), ("fast", "1e+15")):
        profile = tmp_path / f"{name}.toml"
        lines = (PROFILES / "laptop-cpu-16gb.toml").read_text().splitlines()
        key = "attention_flops_per_second"
        changed = [f"{key} = {flops}" if line.startswith(key) else line for line in lines]
        profile.write_text("\n".join(changed))
        words = ("--objective", "latency", "--profile", profile, "--generated-tokens", "7")
        words += ("--sparsity", "0.3", "--level", "none", "--layout", "per-layer")
        words += ("--step", "0.3", "--no-recovery")
        summary = succeed("prune", "example", "--out", tmp_path / name, *words, *WORDS)
        latency = summary["latency"]
        assert (latency["prompt_tokens"], latency["generated_tokens"]) == (512, 7)
        assert latency["speed_up"] > 1.05
        card = (tmp_path / name / "README.md").read_text(encoding="utf-8")
        assert f"| predicted speed-up | {latency['speed_up']:.2f} times" in card
        kept.append(sum(summary["kept"]["attention"]))
    assert kept[0] < kept[1]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--method", "depth", "--sparsity", "0.01"), "cannot be had from whole layers"),
        (("--method", "depth", "--recovery"), "take it with --no-recovery"),
        (("--objective", "latency"), "add --profile FILE"),
        (("--bias",), "take it with --level none --no-recovery"),
        (("--allocation", "layers", "--level", "none"), "take --method depth"),
        (("--method", "best"), "best"),
    ],
)
def test_methods_that_cannot_work(tmp_path: Path, words: tuple[str, ...], expected: str) -> None:
    text = fail("prune", "example", "--out", tmp_path / "out", *WORDS, *words)
    assert expected in " ".join(text.split()) and not (tmp_path / "out").exists()
