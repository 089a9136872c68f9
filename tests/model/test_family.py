"""The description of a model from its config and headers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny_models import BIASES, GQA, MHA, TIED, VARIANTS, Tiny, tiny_family, tiny_llama
from transformers import CONFIG_MAPPING

from frugal_bonsai.errors import CheckpointError, UnsupportedModelError
from frugal_bonsai.model.families import FAMILIES
from frugal_bonsai.model.families.unsupported import UNSUPPORTED
from frugal_bonsai.model.family import describe_model
from frugal_bonsai.model.family_lookup import find_family
from frugal_bonsai.model.layout import LAYOUTS, PADDED, PER_LAYER, UNIFORM, layout_rules
from frugal_bonsai.model.units import ATTENTION, FFN


def _tiny(folder: Path, changes: dict[str, Any]) -> Tiny:
    return tiny_llama(folder / "model", **changes)


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_numbers_are_those_of_hugging_faces_model(changes: dict[str, Any], tmp_path: Path) -> None:
    tiny = _tiny(tmp_path, changes)
    spec, model = tiny.spec, tiny.hugging_face()
    assert spec.parameters == sum(p.numel() for p in model.parameters())
    blocks = sum(p.numel() for p in model.model.layers.parameters())
    assert spec.block_parameters == blocks
    assert spec.layers == 3 and spec.hidden == 24 and spec.intermediate == 20
    assert spec.vocabulary == 53 and spec.positions == 64
    assert spec.tied == bool(changes.get("tie_word_embeddings"))
    assert spec.head_tensor == ("model.embed_tokens.weight" if spec.tied else "lm_head.weight")
    assert spec.head_dim == model.config.head_dim
    assert [(g.layer, g.kind) for g in spec.table.groups] == [
        (layer, kind) for layer in range(3) for kind in (ATTENTION, FFN)
    ]
    assert spec.prefix(2) == "model.layers.2."


def test_gqa_unit_owns_its_heads(tmp_path: Path) -> None:
    spec = _tiny(tmp_path, GQA).spec
    attention, ffn = spec.table.of_layer(1)
    widths = {s.tensor.removeprefix("model.layers.1."): (s.axis, s.width) for s in attention.slices}
    assert widths == {
        "self_attn.q_proj.weight": (0, 8),
        "self_attn.k_proj.weight": (0, 4),
        "self_attn.v_proj.weight": (0, 4),
        "self_attn.o_proj.weight": (1, 8),
    }
    assert attention.count == 3 and attention.columns_per_unit == 8 and attention.columns == 24
    assert attention.unit_parameters == (8 + 4 + 4 + 8) * 24
    assert ffn.count == 20 and ffn.columns_per_unit == 1 and ffn.unit_parameters == 3 * 24
    assert ffn.output == "mlp.down_proj"
    assert ffn.output_weight == "model.layers.1.mlp.down_proj.weight"


def test_biases_of_rows_belong_to_units_and_biases_of_outputs_do_not(tmp_path: Path) -> None:
    spec = _tiny(tmp_path, BIASES).spec
    attention, ffn = spec.table.of_layer(0)
    assert attention.unit_parameters == (8 + 4 + 4 + 8) * 24 + (8 + 4 + 4)
    assert ffn.unit_parameters == 3 * 24 + 2
    owned = {piece.tensor for group in (attention, ffn) for piece in group.slices}
    assert "model.layers.0.self_attn.q_proj.bias" in owned
    assert "model.layers.0.self_attn.o_proj.bias" not in owned
    assert "model.layers.0.mlp.down_proj.bias" not in owned


def test_defaults_of_old_configs(tmp_path: Path) -> None:
    """Configs without head_dim and num_key_value_heads: MHA with hidden / heads."""
    tiny = _tiny(tmp_path, MHA)
    config = dict(tiny.checkpoint.config)
    for key in ("head_dim", "num_key_value_heads", "max_position_embeddings"):
        config.pop(key)
    spec = describe_model(config, tiny.checkpoint.shapes)
    assert (spec.head_dim, spec.kv_heads, spec.positions) == (8, 3, 2048)


def test_head_is_tied_where_the_config_is_silent_and_there_is_no_head(tmp_path: Path) -> None:
    tiny = _tiny(tmp_path, TIED)
    config = dict(tiny.checkpoint.config)
    config.pop("tie_word_embeddings")
    assert describe_model(config, tiny.checkpoint.shapes).tied


def test_head_that_lies_beside_a_tied_embedding_is_not_counted(tmp_path: Path) -> None:
    tiny = _tiny(tmp_path, TIED)
    shapes = {**tiny.checkpoint.shapes, "lm_head.weight": (53, 24)}
    spec = describe_model(tiny.checkpoint.config, shapes)
    assert spec.tied and spec.parameters == tiny.spec.parameters
    assert "lm_head.weight" not in spec.other_tensors


def test_untied_without_a_head_is_refused(tmp_path: Path) -> None:
    tiny = _tiny(tmp_path, GQA)
    shapes = dict(tiny.checkpoint.shapes)
    shapes.pop("lm_head.weight")
    with pytest.raises(CheckpointError, match=r"tie_word_embeddings is false .* lm_head\.weight"):
        describe_model(tiny.checkpoint.config, shapes)


def test_unknown_architecture_lists_the_known_ones() -> None:
    with pytest.raises(UnsupportedModelError, match=r"'bert' is not supported; supported: .*llama"):
        find_family({"model_type": "bert"}, source="x/config.json")
    with pytest.raises(UnsupportedModelError, match="model_type None"):
        find_family({})


@pytest.mark.parametrize("kind", ["missing", "wrong"])
@pytest.mark.parametrize(
    "name", ["self_attn.k_proj.weight", "mlp.down_proj.weight", "mlp.gate_proj.weight"]
)
def test_tensor_missing_or_of_another_shape(name: str, kind: str, tmp_path: Path) -> None:
    tiny = _tiny(tmp_path, GQA)
    shapes, full = dict(tiny.checkpoint.shapes), f"model.layers.1.{name}"
    rows, columns = shapes.pop(full)
    text = f"no tensor '{full}'"
    if kind == "wrong":
        shapes[full] = (rows + 1, columns)
        text = rf"tensor {full} has shape \[{rows + 1}, {columns}\], expected \[{rows}, {columns}\]"
    with pytest.raises(CheckpointError, match=text):
        describe_model(tiny.checkpoint.config, shapes, source="here/config.json")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_size", 0),
        ("num_hidden_layers", "3"),
        ("num_attention_heads", True),
        ("intermediate_size", None),
        ("intermediate_size", -4),
        ("num_key_value_heads", 1.5),
    ],
)
def test_config_value_that_is_no_number(key: str, value: object, tmp_path: Path) -> None:
    tiny = _tiny(tmp_path, GQA)
    with pytest.raises(CheckpointError, match=f"{key} is .*, expected a positive whole number"):
        describe_model({**tiny.checkpoint.config, key: value}, tiny.checkpoint.shapes)


def test_config_without_ffn_width(tmp_path: Path) -> None:
    tiny = _tiny(tmp_path, GQA)
    config = dict(tiny.checkpoint.config)
    config.pop("intermediate_size")
    with pytest.raises(CheckpointError, match="intermediate_size is None"):
        describe_model(config, tiny.checkpoint.shapes)


def test_heads_that_no_kv_head_divides(tmp_path: Path) -> None:
    tiny = _tiny(tmp_path, GQA)
    config = {**tiny.checkpoint.config, "num_key_value_heads": 4}
    with pytest.raises(CheckpointError, match="6 is not a multiple of num_key_value_heads 4"):
        describe_model(config, tiny.checkpoint.shapes)


@pytest.mark.parametrize("key", ["1", "01", 1])
def test_layers_of_their_own_width(key: object, tmp_path: Path) -> None:
    tiny = _tiny(tmp_path, GQA)
    shapes = dict(tiny.checkpoint.shapes)
    layer = "model.layers.1."
    for name, shape in {
        "self_attn.q_proj.weight": (16, 24),
        "self_attn.k_proj.weight": (8, 24),
        "self_attn.v_proj.weight": (8, 24),
        "self_attn.o_proj.weight": (24, 16),
        "mlp.gate_proj.weight": (11, 24),
        "mlp.up_proj.weight": (11, 24),
        "mlp.down_proj.weight": (24, 11),
    }.items():
        shapes[layer + name] = shape
    own = {"num_key_value_heads": 2, "num_attention_heads": 4, "intermediate_size": 11}
    spec = describe_model({**tiny.checkpoint.config, "per_layer_config": {key: own}}, shapes)
    assert [g.count for g in spec.table.groups] == [3, 20, 2, 11, 3, 20]
    assert spec.intermediate == 20


def test_real_model_is_described(stories3m: Path) -> None:
    from frugal_bonsai.checkpoint.reader import Checkpoint

    checkpoint = Checkpoint.open(stories3m)
    spec = describe_model(checkpoint.config, checkpoint.shapes)
    assert (spec.heads, spec.kv_heads, spec.tied) == (6, 2, True)
    assert spec.query_heads_per_group == 3
    assert 3.0e6 < spec.parameters < 3.2e6


@pytest.mark.parametrize(
    ("name", "changes", "text"),
    [
        ("gpt2", {"add_cross_attention": True}, "reads a second input"),
        ("opt", {"word_embed_proj_dim": 12}, r"word_embed_proj_dim is 12: .*project_in"),
        ("opt", {"do_layer_norm_before": False}, "norms are in the residual stream"),
        ("opt", {"_remove_final_layer_norm": True}, "no norm before the head"),
        ("falcon-groups", {"alibi": True}, "position biases depend on the index of a head"),
    ],
)
def test_kinds_of_a_family_that_are_refused(
    name: str, changes: dict[str, Any], text: str, tmp_path: Path
) -> None:
    tiny = tiny_family(tmp_path / "m", name)
    config = {**tiny.checkpoint.config, **changes}
    with pytest.raises(UnsupportedModelError, match=text):
        describe_model(config, tiny.checkpoint.shapes)


def test_fused_parts_lie_behind_each_other(tmp_path: Path) -> None:
    spec = tiny_family(tmp_path / "phi3", "phi3").spec
    attention, ffn = spec.table.of_layer(0)
    # 6 query heads of 4 read 3 KV heads: 8 rows of q, 4 of k and 4 of v for each group.
    assert [(s.axis, s.start, s.width) for s in attention.slices] == [
        (0, 0, 8),
        (0, 24, 4),
        (0, 36, 4),
        (1, 0, 8),
    ]
    assert attention.unit_parameters == (8 + 4 + 4 + 8) * 24
    assert [(s.axis, s.start, s.width) for s in ffn.slices] == [(0, 0, 1), (0, 20, 1), (1, 0, 1)]
    spec = tiny_family(tmp_path / "falcon", "falcon-groups").spec
    attention, _ = spec.table.of_layer(0)
    assert [(s.axis, s.start, s.width) for s in attention.slices] == [
        (0, 0, 16),
        (0, 0, 16),
        (1, 0, 8),
    ]
    assert attention.unit_parameters == 16 * 24 + 16 + 8 * 24


def test_why_attention_stays_whole(tmp_path: Path) -> None:
    tiny = tiny_family(tmp_path / "phi3", "phi3")
    assert tiny.spec.whole_attention is None
    config = {**tiny.checkpoint.config, "rope_scaling": {"type": "longrope"}}
    spec = describe_model(config, tiny.checkpoint.shapes)
    assert spec.whole_attention == (
        "its config checks the number of rotary factors against the number of heads"
    )
    assert [g.removable for g in spec.table.groups] == [False, True, False, True]
    assert tiny_family(tmp_path / "olmo2", "olmo2").spec.whole_attention == (
        "its q_norm and k_norm run over all heads at once"
    )
    parallel = tiny_family(tmp_path / "stablelm", "stablelm-parallel").spec
    assert parallel.whole_attention == "qk_layernorm gives each head separate tensors"


@pytest.mark.parametrize("name", ["gpt2", "opt", "pythia"])
def test_heads_of_a_computed_width_go_in_the_per_layer_layout_alone(
    name: str, tmp_path: Path
) -> None:
    spec = tiny_family(tmp_path / "m", name).spec
    assert spec.whole_attention is None
    counts = {layout: layout_rules(spec, layout, tile=1).attention_counts for layout in LAYOUTS}
    assert counts == {UNIFORM: (), PADDED: (), PER_LAYER: tuple(range(1, spec.heads + 1))}


def test_width_of_a_head_that_the_architecture_cannot_state(tmp_path: Path) -> None:
    tiny = tiny_family(tmp_path / "m", "gpt2")
    shapes = dict(tiny.checkpoint.shapes)
    for layer, heads in enumerate((2, 1)):
        prefix = f"transformer.h.{layer}.attn."
        shapes[prefix + "c_attn.weight"] = (3 * 8 * heads, 24)
        shapes[prefix + "c_attn.bias"] = (3 * 8 * heads,)
        shapes[prefix + "c_proj.weight"] = (24, 8 * heads)
    own = {"n_head": 2, "pruned_head_dim": 8, "per_layer_config": {"1": {"n_head": 1}}}
    spec = describe_model({**tiny.checkpoint.config, **own}, shapes)
    assert (spec.heads, spec.head_dim) == (2, 8)
    assert [g.count for g in spec.table.groups if g.kind == ATTENTION] == [2, 1]


def test_one_kv_head_whatever_the_config_says_of_their_number(tmp_path: Path) -> None:
    spec = tiny_family(tmp_path / "m", "falcon-multi-query").spec
    assert (spec.heads, spec.kv_heads, spec.table.groups[0].count) == (6, 1, 1)
    assert tiny_family(tmp_path / "g", "falcon-groups").spec.kv_heads == 3
    assert tiny_family(tmp_path / "s", "falcon-sequential").spec.kv_heads == 6


@pytest.mark.parametrize("model_type", UNSUPPORTED)
def test_an_architecture_that_cannot_work_says_why(model_type: str) -> None:
    assert model_type in CONFIG_MAPPING and model_type not in FAMILIES
    with pytest.raises(UnsupportedModelError) as refused:
        find_family({"model_type": model_type})
    assert f"{model_type!r} is not supported, because {UNSUPPORTED[model_type]}" in str(
        refused.value
    )
