"""Every kind of family pruned end to end, and loaded by plain transformers in a fresh process."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from commands import succeed
from fresh_process import FreshProcesses
from tiny_models import PRUNED, PRUNED_BRIEFLY, save_byte_tokenizer, tiny_family

LOAD = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
found = {}
for folder in sys.argv[2:]:
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    stored = model.state_dict(keep_vars=True).values()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(open(sys.argv[1], encoding="utf-8").read())["input_ids"]
    size = model.config.max_position_embeddings // 2
    windows = torch.tensor(ids[: len(ids) // size * size]).view(-1, size)
    with torch.inference_mode():
        logits = model(windows).logits[:, :-1].flatten(0, 1)
        loss = torch.nn.functional.cross_entropy(logits, windows[:, 1:].flatten())
        made = model.generate(windows[:1, :8], max_new_tokens=8, min_new_tokens=8, pad_token_id=0)
    found[folder] = {"nll": float(loss), "made": made.shape[1],
                     "parameters": sum({id(v): v.numel() for v in stored}.values())}
print(json.dumps(found))
"""


def test_a_real_gpt2(
    gpt1m_bytes: Path, shared: Path, tmp_path: Path, fresh: FreshProcesses
) -> None:
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
    found = json.loads(fresh.run(LOAD, text, out, folder=tmp_path))[str(out)]
    assert found["made"] == 16
    kept = summary["rounds"][-1]["kept"]
    assert kept["attention"] == [4, 4, 4]  # GPT-2 cannot have fewer heads
    assert kept["ffn"][0] == kept["ffn"][1] == kept["ffn"][2] < 608
    assert found["parameters"] == summary["after"]["parameters"]
    pruned, dense = (summary[when]["eval_perplexity"] for when in ("after", "before"))
    assert abs(2.718281828459045 ** found["nll"] / pruned - 1) < 1e-3
    assert dense < pruned < 1.35 * dense


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "words.txt"
    words = random.Random(0)
    letters = "abcdefgh \n"
    path.write_text("".join(words.choice(letters) for _ in range(3000)), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def pruned(
    tmp_path_factory: pytest.TempPathFactory, text: Path
) -> dict[str, tuple[Path, dict[str, Any]]]:
    import frugal_bonsai
    from frugal_bonsai.run.options import PruneOptions

    folder, results = tmp_path_factory.mktemp("families"), {}
    two_rounds = {"sparsity": 0.25, "step": 0.15, "masks": 4, "mask_windows": 4}
    one_round = {**two_rounds, "step": 0.25, "masks": 2, "mask_windows": 2, "self_windows": 0}
    for name in (*PRUNED, *PRUNED_BRIEFLY):
        brief = name in PRUNED_BRIEFLY
        tiny_family(folder / name, name, vocab_size=256).checkpoint.close()
        save_byte_tokenizer(folder / name)
        out = folder / f"{name}-pruned"
        options = PruneOptions(
            settings=one_round if brief else two_rounds,
            tile=1,
            calibration=str(text),
            eval_text=str(text),
            window=32,
            windows=12 if brief else 24,
            device="cpu",
        )
        results[name] = (out, frugal_bonsai.prune(str(folder / name), out, options))
    return results


@pytest.fixture(scope="module")
def loaded(
    pruned: dict[str, tuple[Path, dict[str, Any]]], text: Path, fresh: FreshProcesses
) -> dict[str, Any]:
    outs = {name: out for name, (out, _) in pruned.items()}
    found = json.loads(fresh.run(LOAD, text, *outs.values(), folder=text.parent))
    return {name: found[str(out)] for name, out in outs.items()}


@pytest.mark.parametrize("name", (*PRUNED, *PRUNED_BRIEFLY))
def test_pruned_end_to_end(
    name: str, pruned: dict[str, tuple[Path, dict[str, Any]]], loaded: dict[str, Any]
) -> None:
    _, summary = pruned[name]
    # Channels of experts go in steps of eight.
    assert (0.1 if "experts" in summary["kept"] else 0.2) < summary["sparsity"] < 0.3
    assert summary["verify"]["max_relative_difference"] < 1e-4
    rounds = summary["rounds"]
    assert all(0 <= r["recovery_residual"] < 0.9 for r in rounds)
    found = loaded[name]
    assert found["made"] == 16
    assert found["parameters"] == summary["after"]["parameters"]
    nll = found["nll"]
    assert 2.718281828459045**nll == pytest.approx(summary["after"]["eval_perplexity"], rel=1e-3)
