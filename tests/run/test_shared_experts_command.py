"""Mixtures with shared experts, as wide as a multiple of the routed ones: whole experts go."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import fail
from safetensors.torch import load_file, save_file
from tiny_models import WHOLE_EXPERTS_PRUNED, open_tiny, save_byte_tokenizer, tiny_family

import frugal_bonsai
from frugal_bonsai.bonsai.selection.whole import check_experts
from frugal_bonsai.checkpoint.reader import Checkpoint
from frugal_bonsai.errors import CheckpointError, OptionError
from frugal_bonsai.model.families import FAMILIES
from frugal_bonsai.model.layout import UNIFORM, layout_rules
from frugal_bonsai.model.units import FFN, KeepMask
from frugal_bonsai.rewrite.shrink import shrink
from frugal_bonsai.run.options import PruneOptions


def prune(dense: Path, out: Path) -> dict[str, Any]:
    options = PruneOptions(
        method="experts",
        settings={"sparsity": 0.2},
        calibration="stdlib",
        window=32,
        windows=8,
        device="cpu",
    )
    return frugal_bonsai.prune(str(dense), out, options)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("shared")
    for name in WHOLE_EXPERTS_PRUNED:
        tiny_family(folder / name, name, vocab_size=256).checkpoint.close()
        save_byte_tokenizer(folder / name)
    return {path.name: path for path in folder.iterdir()}


@pytest.mark.parametrize("name", WHOLE_EXPERTS_PRUNED)
def test_experts_go_whole(name: str, dense: dict[str, Path], tmp_path: Path) -> None:
    summary = prune(dense[name], tmp_path / "out")
    first, second = summary["kept"]["experts"]
    assert 0 < second < 4
    assert summary["verify"]["max_relative_difference"] < 1e-5
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    rule = FAMILIES[config["model_type"]].experts
    assert config[rule.count_keys[0]] == summary["kept"]["experts"][1]
    assert config[FAMILIES[config["model_type"]].ffn_key] == 20
    if rule.dense_key is None:
        assert first == second
    else:
        assert first == 0 and config[rule.dense_key] == 28
    model = frugal_bonsai.load_pruned(tmp_path / "out")
    made = model.generate(torch.tensor([[65, 66]]), max_new_tokens=4, pad_token_id=0)
    assert made.shape[1] <= 6
    assert (
        sum(p.numel() for p in model.parameters())
        + sum(b.numel() for n, b in model.named_buffers() if n.endswith("correction_bias"))
        == summary["after"]["parameters"]
    )


def test_an_architecture_with_and_without_experts(tmp_path: Path) -> None:
    """Granite 4: its config decides which table describes it."""
    tiny_family(tmp_path / "dense", "granite4-experts", vocab_size=256).checkpoint.close()
    save_byte_tokenizer(tmp_path / "dense")
    summary = prune(tmp_path / "dense", tmp_path / "out")
    assert summary["kept"]["experts"] == [3, 3]
    assert summary["verify"]["max_relative_difference"] < 1e-5
    with Checkpoint.open(tmp_path / "out") as checkpoint:
        stacked = checkpoint.shapes["model.layers.0.block_sparse_moe.input_linear.weight"]
        assert stacked == (3, 2 * 20, 24)
        assert checkpoint.shapes["model.layers.0.shared_mlp.input_linear.weight"] == (2 * 9, 24)
    frugal_bonsai.load_pruned(tmp_path / "out")


def test_channels_are_refused(dense: dict[str, Path], tmp_path: Path) -> None:
    out = ("--out", tmp_path / "out", "--sparsity", "0.2")
    error = fail("prune", dense["deepseek-v3"], *out, "--calibration", "stdlib", "--device", "cpu")
    assert "keep their channels, because the width of the shared expert" in error
    assert "take --method experts" in error
    tiny = open_tiny(dense["deepseek-v3"])
    rules, mask = layout_rules(tiny.spec, UNIFORM), KeepMask(tiny.spec.table)
    experts = [group for group in tiny.spec.table.groups if group.kind == FFN]
    for group in experts:
        mask.of(group)[:4] = False
    with pytest.raises(OptionError, match="layer 1 keeps 16 of 20 ffn units"):
        shrink(tiny.checkpoint, tiny.spec, mask, tmp_path, rules=rules)
    for group in experts:
        mask.of(group)[:] = group.expert == 2
    with pytest.raises(OptionError, match=r"layer 1 keeps 1 experts, but the router .* needs 2"):
        shrink(tiny.checkpoint, tiny.spec, mask, tmp_path, rules=rules)
    tiny.checkpoint.close()


def test_a_router_of_groups(tmp_path: Path) -> None:
    """Every group loses as many experts; what leaves them unequal is refused."""
    tiny = tiny_family(tmp_path / "dense", "deepseek-v3-groups", vocab_size=256)
    save_byte_tokenizer(tmp_path / "dense")
    summary = prune(tmp_path / "dense", tmp_path / "out")
    assert summary["kept"]["experts"] == [0, 6]
    assert summary["verify"]["max_relative_difference"] < 1e-5
    frugal_bonsai.load_pruned(tmp_path / "out")
    mask = KeepMask(tiny.spec.table)
    rules, refused = layout_rules(tiny.spec, UNIFORM), "drops 0 to 1 experts of each of its 2"
    for gone, text in (((5,), refused), (range(1, 7), "keeps 2 experts, but .* needs 4")):
        for group in tiny.spec.table.groups:
            mask.of(group)[:] = group.expert not in gone
        with pytest.raises(OptionError, match=text):
            shrink(tiny.checkpoint, tiny.spec, mask, tmp_path, rules=rules)
    with pytest.raises(OptionError, match=r"2 experts \(one of each group\) of every layer"):
        check_experts(KeepMask(tiny.spec.table), 0.9, tiny.spec)
    tiny.checkpoint.close()
    path = tmp_path / "dense" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"n_group": 3}))
    with pytest.raises(CheckpointError, match="8 experts of a layer do not divide into 3 groups"):
        open_tiny(tmp_path / "dense")


def test_layers_for_further_tokens_are_not_read(dense: dict[str, Path], tmp_path: Path) -> None:
    """On the hub they follow the last layer; transformers does not read them either."""
    tiny_family(tmp_path / "m", "glm4-moe").checkpoint.close()
    path = tmp_path / "m" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.2.eh_proj.weight"] = torch.zeros(24, 48)
    save_file(tensors, path, metadata={"format": "pt"})
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    config["num_nextn_predict_layers"] = 1
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    tiny = open_tiny(tmp_path / "m")
    assert not any("layers.2." in name for name in tiny.checkpoint.tensors)
    (tmp_path / "out").mkdir()
    rules = layout_rules(tiny.spec, UNIFORM)
    shrink(tiny.checkpoint, tiny.spec, KeepMask(tiny.spec.table), tmp_path / "out", rules=rules)
    tiny.checkpoint.close()
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["num_nextn_predict_layers"] == 0
