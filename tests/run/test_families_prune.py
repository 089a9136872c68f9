"""Every kind of family pruned end to end as a user does it, and loaded by plain transformers."""

from __future__ import annotations

import json
from pathlib import Path

from commands import python, succeed

PERPLEXITY = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, text = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
tokenizer = AutoTokenizer.from_pretrained(folder)
ids = tokenizer(open(text, encoding="utf-8").read())["input_ids"]
windows = torch.tensor(ids[: len(ids) // 128 * 128]).view(-1, 128)
with torch.inference_mode():
    logits = model(windows).logits[:, :-1].flatten(0, 1)
    loss = torch.nn.functional.cross_entropy(logits, windows[:, 1:].flatten())
    made = model.generate(windows[:1, :8], max_new_tokens=8, do_sample=False)
print(json.dumps({"nll": float(loss), "made": made.shape[1], "layers": [
    layer.mlp.c_fc.weight.shape[1] for layer in model.transformer.h],
    "parameters": sum(p.numel() for p in model.parameters())}))
"""


def test_a_real_gpt2(gpt1m_bytes: Path, shared: Path, tmp_path: Path) -> None:
    text = tmp_path / "test.txt"
    stories = (shared / "text" / "tinystories_test.txt").read_text(encoding="utf-8")
    text.write_text(stories[:12_000], encoding="utf-8")
    out = tmp_path / "out"
    summary = succeed(
        "prune", gpt1m_bytes, "--out", out, "--sparsity", "0.2", "--step", "0.1",
        "--window", "128", "--windows", "48", "--eval-text", text,
        "--calibration", shared / "text" / "tinystories_calibration.txt",
        "--max-cpu-mem", "2GB",
    )  # fmt: skip
    found = json.loads(python(PERPLEXITY, out, text))
    assert found["made"] == 16
    kept = summary["rounds"][-1]["kept"]
    assert kept["attention"] == [4, 4, 4]  # GPT-2 cannot have fewer heads
    assert found["layers"] == kept["ffn"] and kept["ffn"][0] < 608
    assert found["parameters"] == summary["after"]["parameters"]
    pruned, dense = (summary[when]["eval_perplexity"] for when in ("after", "before"))
    assert abs(2.718281828459045 ** found["nll"] / pruned - 1) < 1e-3
    assert dense < pruned < 1.35 * dense
