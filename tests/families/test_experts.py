"""Families with experts: removed experts, different widths, refusals."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import Tiny, open_tiny, random_windows, relative, tiny_family
from transformers import AutoModelForCausalLM

from families.contract import (
    greedy,
    logits_of,
    masked_parent,
    random_refit,
    stored_elements,
    streamed_logits,
)
from frugal_bonsai import load_pruned
from frugal_bonsai.errors import CheckpointError, OptionError, UnsupportedModelError
from frugal_bonsai.model.layout import LAYOUTS, PADDED, PER_LAYER, UNIFORM, layout_rules
from frugal_bonsai.model.units import FFN, KeepMask
from frugal_bonsai.rewrite.shrink import RewriteSummary, shrink
from frugal_bonsai.stream.store import build_store

NAMES = (
    "mixtral",
    "qwen3-moe",
    "olmoe",
    "qwen2-moe",
    "qwen3_5-moe",
    "minimax-m2",
    "gpt-oss",
    "gemma4-experts",
    "flex-olmo",
)


@pytest.fixture(scope="module", params=NAMES)
def tiny(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Tiny]:
    tiny = tiny_family(tmp_path_factory.mktemp("experts") / "dense", request.param)
    yield tiny
    tiny.checkpoint.close()


@pytest.fixture
def tokens_NS(tiny: Tiny) -> torch.Tensor:
    return random_windows(3, 13, vocabulary=tiny.spec.vocabulary)


def without_experts(tiny: Tiny, gone: dict[int, tuple[int, ...]], *, width: int = 16) -> KeepMask:
    """Remove these experts of each layer; the others keep different channels of a given number."""
    mask, generator = KeepMask(tiny.spec.table), torch.Generator().manual_seed(3)
    for group in tiny.spec.table.groups:
        if group.kind == FFN:
            order = torch.randperm(group.count, generator=generator)
            kept = 0 if group.expert in gone[group.layer] else width
            mask.of(group)[order[kept:]] = False
    return mask


def rewritten(tiny: Tiny, mask: KeepMask, layout: str, out: Path, refit=None) -> RewriteSummary:
    out.mkdir()
    rules = layout_rules(tiny.spec, layout, tile=1)
    return shrink(tiny.checkpoint, tiny.spec, mask, out, rules=rules, refit=refit)


def sizes(tiny: Tiny) -> tuple[int, int]:
    """Return the parameters of a channel, and those that go with an expert's last channel."""
    biased = tiny.spec.family.model_type == "gpt_oss"  # of gate, up and down
    router = 24 + (tiny.spec.family.experts.router_bias is not None)
    return 3 * 24 + 2 * biased, router + 24 * biased


# One of four goes everywhere; where layers may differ, all but one of the first layer's.
GONE = {
    UNIFORM: {0: (1,), 1: (3,)},
    PADDED: {0: (0,), 1: (2,)},
    PER_LAYER: {0: (0, 1, 3), 1: (2,)},
}


def test_parsed_experts_are_units(tiny: Tiny) -> None:
    spec = tiny.spec
    assert (spec.experts, spec.experts_chosen, spec.intermediate) == (4, 2, 20)
    experts = [group for group in spec.table.groups if group.kind == FFN]
    assert [(g.layer, g.expert) for g in experts] == [(at, e) for at in (0, 1) for e in range(4)]
    assert {g.count for g in experts} == {20}
    channel, joint = sizes(tiny)
    assert {g.unit_parameters for g in experts} == {channel}
    assert {g.joint_parameters for g in experts} == {joint}
    assert experts[6].name == "layer 1 expert 2 ffn"


@pytest.mark.parametrize("refitted", [False, True], ids=["kept", "refit"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_dropped_expert_leaves_the_router(
    tiny: Tiny, tokens_NS: torch.Tensor, layout: str, refitted: bool, tmp_path: Path
) -> None:
    mask = without_experts(tiny, GONE[layout])
    assert mask.dropped_experts(0) == GONE[layout][0]
    refit = random_refit(tiny, mask) if refitted else {}
    refit = {name: read for name, read in refit.items() if read().numel()}
    expected = logits_of(masked_parent(tiny, mask, refit), tokens_NS)
    assert relative(streamed_logits(tiny, tokens_NS, mask=mask, refit=refit), expected) < 1e-5

    summary = rewritten(tiny, mask, layout, tmp_path / "out", refit)
    load = load_pruned if layout == PER_LAYER else AutoModelForCausalLM.from_pretrained
    model = load(tmp_path / "out")
    assert relative(logits_of(model, tokens_NS), expected) < 1e-5
    assert torch.equal(
        greedy(model, tokens_NS), greedy(masked_parent(tiny, mask, refit), tokens_NS)
    )
    parameters = stored_elements(model)
    assert parameters == tiny.spec.parameters - mask.removed_parameters()
    assert parameters == summary.parameters_after
    gone = sum(len(experts) for experts in GONE[layout].values())
    channel, joint = sizes(tiny)
    cut = (8 - gone) * 4 * channel  # four channels of each expert that is left
    assert mask.removed_parameters() == gone * (20 * channel + joint) + cut

    again = open_tiny(tmp_path / "out")
    assert relative(streamed_logits(again, tokens_NS), expected) < 1e-5
    again.checkpoint.close()
    names = {entry.name for entry in tiny.checkpoint.tensors.values()}
    found = set(load_file(tmp_path / "out" / "model.safetensors"))
    assert found <= names
    stacked = any(entry.stacked for entry in tiny.checkpoint.tensors.values())
    assert stacked == (found == names)  # fewer experts are fewer rows, or fewer tensors


def test_a_token_is_sent_to_no_more_experts_than_there_are(tiny: Tiny, tmp_path: Path) -> None:
    mask = without_experts(tiny, GONE[PER_LAYER])
    rewritten(tiny, mask, PER_LAYER, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    key = tiny.spec.family.experts.chosen_key
    assert config[key] == 2
    first = config["per_layer_config"]["0"]
    assert first[key] == 1
    assert {first.get("num_experts"), first.get("num_local_experts")} >= {1}
    one = without_experts(tiny, {0: (0, 1, 2), 1: (1, 2, 3)})
    rewritten(tiny, one, UNIFORM, tmp_path / "one")
    config = json.loads((tmp_path / "one" / "config.json").read_text())
    assert config[key] == 1
    assert "per_layer_config" not in config


def test_the_working_store_leaves_experts_out(
    tiny: Tiny, tokens_NS: torch.Tensor, tmp_path: Path
) -> None:
    mask = without_experts(tiny, GONE[PER_LAYER])
    store = build_store(tmp_path, tiny.checkpoint, tiny.spec, weights="native", mask=mask)
    stored = [record.name for record in store.records(0) if "experts" in record.name]
    assert {name.split("experts.")[1][0] for name in stored} == {"2"}
    engine = tiny.engine(micro_batch=2)
    with engine.stream(store) as stream, torch.inference_mode():
        hidden = engine.sweep.run(stream, tokens_NS)
        found = engine.head.logits(hidden.read(slice(0, len(tokens_NS))))
    store.close()
    assert relative(found, streamed_logits(tiny, tokens_NS, mask=mask)) < 1e-5


def test_a_router_is_not_quantised(tiny: Tiny, tmp_path: Path) -> None:
    store = build_store(tmp_path, tiny.checkpoint, tiny.spec, weights="int8")
    dtypes = {record.name: record.dtype for record in store.records(0)}
    store.close()
    assert dtypes[tiny.spec.family.experts.router] == "F32"
    assert dtypes[tiny.spec.family.ffn_output.format(expert=0) + ".weight"] == "I8"


def test_experts_of_a_layer_may_differ_where_zeros_fill_them_up(
    tiny: Tiny, tokens_NS: torch.Tensor, tmp_path: Path
) -> None:
    mask = KeepMask(tiny.spec.table)
    for group in tiny.spec.table.groups:
        if group.expert is not None:
            mask.of(group)[: 5 + 2 * group.expert + group.layer] = False
    expected = logits_of(masked_parent(tiny, mask, {}), tokens_NS)
    rewritten(tiny, mask, PADDED, tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert relative(logits_of(model, tokens_NS), expected) < 1e-5
    module = tiny.spec.family.experts.module
    # The widest expert keeps 15: the next multiple of 8.
    assert sorted(model.model.layers[0].get_submodule(module).down_proj.shape) == [4, 16, 24]
    with pytest.raises(OptionError, match=r"layer 0 expert 0 ffn keeps 15 .*expert 1 ffn"):
        rewritten(tiny, mask, PER_LAYER, tmp_path / "per-layer")


@pytest.mark.parametrize(
    ("layout", "text"),
    [
        (UNIFORM, "uniform layout: layer 1 keeps 3 expert units, layer 0 keeps 1"),
        (PADDED, "padded layout: layers keep 1 to 3 experts"),
    ],
)
def test_layers_of_unequal_experts_need_per_layer(
    tiny: Tiny, layout: str, text: str, tmp_path: Path
) -> None:
    mask = without_experts(tiny, GONE[PER_LAYER])
    with pytest.raises(OptionError, match=text):
        rewritten(tiny, mask, layout, tmp_path / "out")


def test_a_layer_keeps_an_expert(tiny: Tiny, tmp_path: Path) -> None:
    mask = without_experts(tiny, {0: (0, 1, 2, 3), 1: ()})
    with pytest.raises(OptionError, match="layer 0 keeps none of its 20 ffn units"):
        rewritten(tiny, mask, PER_LAYER, tmp_path / "out")


def test_uniform_widths_are_multiples_that_grouped_products_read(tiny: Tiny) -> None:
    assert layout_rules(tiny.spec, UNIFORM).legal_counts(FFN, 20) == (8, 16, 20)
    with pytest.raises(OptionError, match="--tile: 12 is no multiple of 8"):
        layout_rules(tiny.spec, UNIFORM, tile=12)


def test_a_layer_with_an_ordinary_ffn_is_refused(tmp_path: Path) -> None:
    tiny_family(tmp_path / "dense", "qwen3-moe").checkpoint.close()
    config = json.loads((tmp_path / "dense" / "config.json").read_text())
    for change in ({"mlp_only_layers": [0]}, {"decoder_sparse_step": 2}):
        (tmp_path / "dense" / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(
            UnsupportedModelError, match=f"{next(iter(change))} is .*of another width"
        ):
            open_tiny(tmp_path / "dense")


def test_a_router_of_another_size_is_named(tmp_path: Path) -> None:
    tiny_family(tmp_path / "dense", "mixtral").checkpoint.close()
    path = tmp_path / "dense" / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.1.block_sparse_moe.gate.weight"
    tensors[name] = tensors[name][:3].contiguous()
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(
        CheckpointError, match=r"gate.weight has shape \[3, 24\], expected \[4, 24\]"
    ):
        open_tiny(tmp_path / "dense")
