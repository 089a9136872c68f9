"""A Llama with a number of heads that its config class refuses, written as a Mistral."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from fresh_process import FreshProcesses
from transformers import AutoModelForCausalLM

from frugal_bonsai import load_pruned
from frugal_bonsai.errors import OptionError
from frugal_bonsai.model.layout import LAYOUTS, PADDED, PER_LAYER, UNIFORM, layout_rules
from frugal_bonsai.rewrite.layouts.mistral import as_mistral
from frugal_bonsai.rewrite.shrink import shrink
from rewrite.models import (
    Parent,
    greedy,
    keep_counts,
    logits_of,
    masked_parent,
    relative_difference,
    tiny_parent,
    tokens,
)

SIX = {"num_attention_heads": 6, "num_key_value_heads": 6}
FIVE = {"attention": [5, 5, 5], "ffn": [9, 9, 9]}
PLAIN = """
import sys, torch
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
folder, answer = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
ids = torch.load(answer + ".tokens")
with torch.no_grad():
    found = {"logits": model(ids).logits, "type": model.config.model_type,
             "heads": model.config.num_attention_heads,
             "foreign": sorted(name for name in sys.modules if name.startswith("frugal"))}
torch.save(found, answer)
"""


def write(parent: Parent, counts: dict[str, list[int]], folder: Path, layout: str = UNIFORM) -> Any:
    folder.mkdir()
    rules = layout_rules(parent.spec, layout, tile=1, as_mistral=True)
    mask = keep_counts(parent.spec, counts)
    shrink(parent.checkpoint, parent.spec, mask, folder, rules=rules)
    return mask


ROPES: dict[str, dict[str, Any]] = {
    "default": {},
    "theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
    "llama3": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 1e4,
            "factor": 8.0,
            "original_max_position_embeddings": 16,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
        }
    },
}


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("tied", [False, True])
def test_plain_transformers_gives_the_llamas_logits(
    tmp_path: Path, rope: str, tied: bool, fresh: FreshProcesses
) -> None:
    changes = {**SIX, **ROPES[rope], "tie_word_embeddings": tied}
    with tiny_parent(tmp_path / "dense", **changes) as parent:
        mask = write(parent, FIVE, tmp_path / "out")
        parent.shrink(mask, tmp_path / "bundled", PER_LAYER)
        expected = logits_of(masked_parent(parent, mask), tokens())
    torch.save(tokens(), tmp_path / "answer.tokens")
    fresh.run(PLAIN, tmp_path / "out", tmp_path / "answer", folder=tmp_path)
    found = torch.load(tmp_path / "answer")
    assert (found["type"], found["heads"], found["foreign"]) == ("mistral", 5, [])
    assert relative_difference(found["logits"], expected) <= 1e-5
    # Llama's own layers on the same weights: bit for bit.
    llama = load_pruned(tmp_path / "bundled", attn_implementation="eager")
    assert torch.equal(found["logits"], logits_of(llama, tokens()))


def test_what_the_config_leaves_out_is_llamas_default(tmp_path: Path) -> None:
    """Mistral's own defaults differ (positions, sliding window, token ids)."""
    with tiny_parent(tmp_path / "dense", **SIX) as parent:
        pass
    path = tmp_path / "dense" / "config.json"
    config = json.loads(path.read_text())
    for key in ("max_position_embeddings", "rms_norm_eps", "hidden_act", "rope_parameters"):
        config.pop(key, None)
    path.write_text(json.dumps(config))
    from rewrite.models import open_parent

    with open_parent(tmp_path / "dense") as parent:
        mask = write(parent, FIVE, tmp_path / "out")
        expected = logits_of(masked_parent(parent, mask), tokens())
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["max_position_embeddings"] == 2048 and written["sliding_window"] is None
    assert written["rope_parameters"]["rope_theta"] == 10000.0
    assert not {"attention_bias", "mlp_bias", "pretraining_tp"} & written.keys()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager")
    assert relative_difference(logits_of(model, tokens()), expected) <= 1e-5


def test_padded_and_generation(tmp_path: Path) -> None:
    with tiny_parent(tmp_path / "dense", **SIX) as parent:
        counts = {"attention": [5, 1, 3], "ffn": [9, 3, 7]}
        mask = write(parent, counts, tmp_path / "out", PADDED)
        expected = greedy(masked_parent(parent, mask), tokens())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert (model.config.model_type, model.config.num_attention_heads) == ("mistral", 5)
    assert torch.equal(greedy(model, tokens()), expected)
    assert torch.equal(greedy(model, tokens(), cache_implementation="static"), expected)


@pytest.mark.parametrize("layout", [UNIFORM, PADDED])
def test_a_legal_head_count_stays_a_llama(tmp_path: Path, layout: str) -> None:
    with tiny_parent(tmp_path / "dense", **SIX) as parent:
        write(parent, {"attention": [4] * 3, "ffn": [9] * 3}, tmp_path / "out", layout)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_type"] == "llama" and config["architectures"] == ["LlamaForCausalLM"]


def test_every_count_is_legal(tmp_path: Path) -> None:
    with tiny_parent(tmp_path / "dense", **SIX) as parent:
        assert layout_rules(parent.spec, UNIFORM).attention_counts == (1, 2, 3, 4, 6)
        rules = layout_rules(parent.spec, UNIFORM, as_mistral=True)
        assert rules.attention_counts == (1, 2, 3, 4, 5, 6)


@pytest.mark.parametrize("biases", [{"attention_bias": True}, {"mlp_bias": True}])
def test_biases_are_refused(tmp_path: Path, biases: dict[str, Any]) -> None:
    with tiny_parent(tmp_path / "dense", **SIX, **biases) as parent:
        for layout in (UNIFORM, PADDED):
            text = r"--as-mistral: this Llama has biases \(model.layers.0.*bias\)"
            with pytest.raises(OptionError, match=text):
                layout_rules(parent.spec, layout, as_mistral=True)
        with pytest.raises(OptionError, match=r"_bias is true, and a Mistral has no biases"):
            as_mistral(parent.spec, dict(parent.spec.config))


def test_where_it_makes_no_sense(tmp_path: Path) -> None:
    from tiny_models import tiny_family

    with tiny_parent(tmp_path / "dense", **SIX) as parent:
        with pytest.raises(OptionError, match="is for --layout uniform and padded"):
            layout_rules(parent.spec, PER_LAYER, as_mistral=True)
    spec = tiny_family(tmp_path / "qwen2", "qwen2").spec
    with pytest.raises(OptionError, match="this is a qwen2; leave it out"):
        layout_rules(spec, UNIFORM, as_mistral=True)
    assert set(LAYOUTS) == {UNIFORM, PER_LAYER, PADDED}
