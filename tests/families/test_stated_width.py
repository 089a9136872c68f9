"""LFM2: the config states another width of the FFN than its tensors have."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tiny_models import open_tiny, relative, tiny_family
from transformers import AutoModelForCausalLM

from families.contract import legal_mask, logits_of, masked_parent
from frugal_bonsai.model.layout import PER_LAYER, UNIFORM, layout_rules
from frugal_bonsai.model.units import FFN
from frugal_bonsai.rewrite.shrink import shrink


def test_an_output_states_the_width_of_its_tensors(tmp_path: Path) -> None:
    """The hub's configs have ``block_ff_dim``, too, which transformers prefers."""
    tiny_family(tmp_path / "dense", "lfm2").checkpoint.close()
    path = tmp_path / "dense" / "config.json"
    config = json.loads(path.read_text())
    assert config["intermediate_size"] == 36 and config["block_auto_adjust_ff_dim"]
    path.write_text(json.dumps(config | {"block_ff_dim": 36, "intermediate_size": 1}))
    tiny = open_tiny(tmp_path / "dense")
    assert tiny.spec.intermediate == 24
    mask, tokens_NS = legal_mask(tiny, UNIFORM), torch.arange(3, 29).reshape(2, 13)
    expected = logits_of(masked_parent(tiny, mask, {}), tokens_NS)
    (tmp_path / "out").mkdir()
    rules = layout_rules(tiny.spec, UNIFORM, tile=1)
    shrink(tiny.checkpoint, tiny.spec, mask, tmp_path / "out", rules=rules)
    tiny.checkpoint.close()
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["intermediate_size"] == 13 and written["block_auto_adjust_ff_dim"] is False
    assert "block_ff_dim" not in written
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert relative(logits_of(found, tokens_NS), expected) < 1e-5


def test_layers_of_an_output_may_differ_in_width(tmp_path: Path) -> None:
    """The widths are those of the config, not layer 0's."""
    tiny = tiny_family(tmp_path / "dense", "lfm2")
    mask = legal_mask(tiny, PER_LAYER)
    mask.of(tiny.spec.table.groups[1])[:20] = False
    mask.of(tiny.spec.table.groups[3])[:] = True
    (tmp_path / "out").mkdir()
    rules = layout_rules(tiny.spec, PER_LAYER, tile=1)
    shrink(tiny.checkpoint, tiny.spec, mask, tmp_path / "out", rules=rules)
    tiny.checkpoint.close()
    again = open_tiny(tmp_path / "out")
    widths = [group.count for group in again.spec.table.groups if group.kind == FFN]
    assert widths[0] < widths[1] == again.spec.intermediate == 24
    again.checkpoint.close()
