"""The main flow as README.md writes it, each a command on real input: prune to export."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import succeed
from safetensors.torch import load_file

README = Path(__file__).resolve().parents[2] / "README.md"
# What keeps each command short; the README's own words come before. Without recovery there is much
# to learn, and a few steps show it.
_TEXT = ("--window", "256", "--windows", "16")
QUICK = {
    "prune": ("--layout", "per-layer", "--method", "local-only", "--no-recovery", *_TEXT),
    "adapt": ("--tokens", "9k", "--evaluations", "2", *_TEXT),
    "eval": (),
    "export": (),
}


def readme_commands() -> list[list[str]]:
    """The first four commands under "Use", without their comments."""
    use = README.read_text(encoding="utf-8").partition("\n## Use\n")[2]
    block = re.search(r"```\n(.*?)```", use, re.DOTALL)
    assert block is not None
    lines = [line.partition("#")[0] for line in block[1].splitlines()]
    commands = [shlex.split(line) for line in lines]
    assert [words[:2] for words in commands] == [["frugal-bonsai", name] for name in QUICK]
    return [words[1:] for words in commands]


@pytest.mark.slow
def test_the_readmes_commands_end_in_a_better_model_and_a_gguf_file(tmp_path: Path) -> None:
    import gguf

    from frugal_bonsai.text.stdlib import held_out_text

    text = tmp_path / "held_out.txt"
    text.write_text(held_out_text()[:10_000], encoding="utf-8")
    pruned, adapted, file = tmp_path / "pruned", tmp_path / "adapted", tmp_path / "m.gguf"
    meant = {"MODEL": "example", "PRUNED": pruned, "DIR": adapted, "SOURCE": "stdlib"}
    found: dict[str, Any] = {}
    for name, *words in readme_commands():
        meant["FILE"] = file if name == "export" else text
        more = [*QUICK[name], *(["--eval-text", str(text)] if name == "adapt" else [])]
        found[name] = succeed(name, *(str(meant.get(word, word)) for word in words), *more)

    assert found["prune"]["sparsity"] == pytest.approx(0.5, abs=0.01)
    before, after = found["adapt"]["before"], found["adapt"]["after"]
    assert after["eval_perplexity"] < 0.9 * before["eval_perplexity"]
    assert after["parameters"] == found["prune"]["after"]["parameters"]
    # The README's window is the training's here: the same measure.
    assert found["eval"]["window"] == 256
    assert found["eval"]["perplexity"] == pytest.approx(after["eval_perplexity"], rel=1e-4)
    report = json.loads((adapted / "adaptation_report.json").read_text(encoding="utf-8"))
    assert report["teacher"] == "example" and report["cache"]["top"] == 64
    page = (adapted / "report.html").read_text(encoding="utf-8")
    assert "Kept units" in page and str(tmp_path) not in page

    assert found["export"]["out"] == str(file)
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    weights = load_file(adapted / "model.safetensors")
    for layer, name in ((0, "down"), (5, "up")):
        exported = tensors[f"blk.{layer}.ffn_{name}.weight"]
        values = gguf.quants.dequantize(exported.data, exported.tensor_type)
        expected = weights[f"model.layers.{layer}.mlp.{name}_proj.weight"].half().float()
        assert torch.equal(torch.from_numpy(values.copy()), expected)
