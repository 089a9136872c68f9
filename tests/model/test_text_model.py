"""The text model inside a model of images and text: names, config, logits of transformers."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from families.contract import stored_elements
from multimodal_models import KINDS, WHOLES, change_config, flatten_config, name_anew, save_whole
from safetensors.torch import load_file, save_file
from tiny_models import CPU, random_windows, relative, sweep_limits
from transformers import AutoModelForImageTextToText

from frugal_bonsai.errors import CheckpointError, OptionError, UnsupportedModelError
from frugal_bonsai.model import families
from frugal_bonsai.model.layout import PER_LAYER, layout_rules
from frugal_bonsai.run.open import Model, open_model
from frugal_bonsai.stream.engine import FLOAT, Engine


def streamed_logits(model: Model, tokens_NS: torch.Tensor) -> torch.Tensor:
    engine = Engine(
        model.checkpoint,
        model.spec,
        device=CPU,
        dtype=torch.float32,
        limits=sweep_limits(),
        arithmetic=FLOAT,
        progress=None,
    )
    with engine.native() as stream, torch.inference_mode():
        hidden = engine.sweep.run(stream, tokens_NS)
        return engine.head.logits(hidden.read(slice(0, len(tokens_NS))))


@torch.no_grad()
def whole_logits(folder: Path, tokens_NS: torch.Tensor) -> torch.Tensor:
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    logits: torch.Tensor = model(input_ids=tokens_NS).logits
    return logits


FAMILY_OF = {
    "gemma3": "gemma3_text",
    "gemma4": "gemma4_text",
    "llama4": "llama4_text",
    "mistral3": "mistral",
    "llava": "llama",
    "qwen2_5_vl": "qwen2",
    "qwen3_5": "qwen3_5_text",
    "qwen3_vl": "qwen3",
    "qwen2_vl": "qwen2",
    "llava_next": "mistral",
    "llava_onevision": "qwen2",
    "idefics3": "llama",
    "smolvlm": "llama",
    "internvl": "qwen2",
    "got_ocr2": "qwen2",
}


def test_every_kind_is_tested() -> None:
    assert set(WHOLES) == set(FAMILY_OF) == set(families.WHOLES)


@pytest.mark.parametrize(
    ("kind", "names"), [*((kind, "old") for kind in WHOLES), *((kind, "new") for kind in KINDS)]
)
def test_streamed_logits_are_those_of_the_whole(kind: str, names: str, tmp_path: Path) -> None:
    whole = save_whole(tmp_path, kind)
    if names == "new":
        name_anew(tmp_path)
    tokens_NS = random_windows(2, 13, vocabulary=280)
    with open_model(str(tmp_path), text_only=False) as opened:
        assert opened.spec.family.model_type == FAMILY_OF[kind]
        found = streamed_logits(opened, tokens_NS)
        text = torch.nn.ModuleList([whole.get_decoder(), whole.get_output_embeddings()])
        assert opened.spec.parameters == stored_elements(text)
        carried = opened.multimodal.carried_parameters
        stored = load_file(tmp_path / "model.safetensors")
        assert opened.spec.parameters + carried == sum(t.numel() for t in stored.values())
        assert opened.sizes["weight_bytes"] == sum(t.nbytes for t in stored.values())
    assert relative(found, whole_logits(tmp_path, tokens_NS)) < 1e-5


def test_a_config_that_leaves_sizes_to_their_defaults(tmp_path: Path) -> None:
    """As google/gemma-3-4b-it: its heads, their width and its vocabulary are the class's."""
    full = WHOLES["gemma3"]["text_config"]
    defaults = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256}
    save_whole(tmp_path, "gemma3", text_config={**full, **defaults})
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    stated = {k: v for k, v in config["text_config"].items() if k not in (*defaults, "vocab_size")}
    change_config(tmp_path, text_config=stated)
    with open_model(str(tmp_path)) as opened:
        spec = opened.spec
        assert (spec.heads, spec.kv_heads, spec.head_dim, spec.vocabulary) == (8, 4, 256, 300)
        found = opened.multimodal.whole_config({**opened.multimodal.text, "intermediate_size": 7})
    assert found["text_config"] == {**stated, "intermediate_size": 7}
    assert {**found, "text_config": stated} == {**config, "text_config": stated}


def test_a_flat_config_of_the_hub(tmp_path: Path) -> None:
    """Qwen2.5-VL's on the hub has the text model's keys beside those of the whole."""
    save_whole(tmp_path, "qwen2_5_vl")
    flat = flatten_config(tmp_path)
    tokens_NS = random_windows(2, 13, vocabulary=280)
    with open_model(str(tmp_path), text_only=False) as opened:
        assert opened.spec.config["rope_parameters"] == {"rope_theta": 1e4, "rope_type": "default"}
        found = streamed_logits(opened, tokens_NS)
        changed = opened.multimodal.whole_config({**opened.spec.config, "intermediate_size": 7})
        assert changed == {**flat, "intermediate_size": 7}
    assert relative(found, whole_logits(tmp_path, tokens_NS)) < 1e-5


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("outer", [True, False])
def test_tied_embeddings_as_transformers_ties_them(
    outer: bool, nested: bool, tmp_path: Path
) -> None:
    """Whichever config says so, a stored head is used and a head that is not stored is tied."""
    text = {**WHOLES["mistral3"]["text_config"], "tie_word_embeddings": nested}
    save_whole(tmp_path, "mistral3", text_config=text, tie_word_embeddings=outer)
    tokens_NS = random_windows(2, 9, vocabulary=280)
    with open_model(str(tmp_path), text_only=False) as opened:
        assert opened.spec.tied is outer
        found = streamed_logits(opened, tokens_NS)
    assert relative(found, whole_logits(tmp_path, tokens_NS)) < 1e-5
    # A config that says "tied" beside two weights that differ: transformers uses both.
    change_config(tmp_path, tie_word_embeddings=True)
    with open_model(str(tmp_path)) as opened:
        assert opened.spec.tied is outer
        found = streamed_logits(opened, tokens_NS)
    assert relative(found, whole_logits(tmp_path, tokens_NS)) < 1e-5


def test_a_whole_that_transformers_cannot_load_is_refused_unless_text_only(tmp_path: Path) -> None:
    save_whole(tmp_path, "llava")
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    del tensors["multi_modal_projector.linear_1.weight"]
    save_file(tensors, path, {"format": "pt"})
    with open_model(str(tmp_path), text_only=True) as opened:
        assert opened.spec.family.model_type == "llama"
    with (
        pytest.raises(
            CheckpointError,
            match=r"lacks 1 tensors that transformers' LlavaForConditionalGeneration needs .* "
            r"'model.multi_modal_projector.linear_1.weight'; add --text-only",
        ),
        open_model(str(tmp_path), text_only=False),
    ):
        pass
    change_config(tmp_path, model_type="unheard_of")
    with open_model(str(tmp_path), text_only=True) as opened:
        assert opened.spec.family.model_type == "llama"
    with (
        pytest.raises(UnsupportedModelError, match=r"a unheard_of was not tested .*--text-only"),
        open_model(str(tmp_path), text_only=False),
    ):
        pass


def test_tensors_that_cannot_be_told_apart(tmp_path: Path) -> None:
    save_whole(tmp_path, "llava")
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    old = "language_model.model."
    twice = {k.replace(old, "other."): v + 1 for k, v in tensors.items() if k.startswith(old)}
    save_file({**tensors, **twice}, path, {"format": "pt"})
    with (
        pytest.raises(CheckpointError, match=r"text model \(llama\) cannot be told from others"),
        open_model(str(tmp_path)),
    ):
        pass


def test_layers_of_different_widths_need_text_only(tmp_path: Path) -> None:
    save_whole(tmp_path, "gemma3")
    with open_model(str(tmp_path), text_only=True) as opened:
        assert layout_rules(opened.spec, PER_LAYER).layout == PER_LAYER
    with (
        open_model(str(tmp_path), text_only=False) as opened,
        pytest.raises(OptionError, match=r"per-layer: no gemma3 .* add --text-only .* padded"),
    ):
        layout_rules(opened.spec, PER_LAYER)


def test_the_vision_tower_of_the_hub(tmp_path: Path) -> None:
    """Older checkpoints have one more word in the names of Gemma's vision tower."""
    save_whole(tmp_path, "gemma3")
    path = tmp_path / "model.safetensors"
    name = re.compile(r"^vision_tower\.(vision_model\.)?")
    old = {name.sub("vision_tower.vision_model.", k): v for k, v in load_file(path).items()}
    save_file(old, path, {"format": "pt"})
    with open_model(str(tmp_path), text_only=False) as opened:
        assert opened.multimodal.parts == ("vision_tower", "multi_modal_projector")


def test_a_text_model_of_an_assumed_family(tmp_path: Path) -> None:
    text = {**WHOLES["llava"]["text_config"], "model_type": "cwm"}
    save_whole(tmp_path, "llava", text_config=text)
    tokens_NS = random_windows(2, 13, vocabulary=280)
    with pytest.raises(UnsupportedModelError, match="'cwm'"), open_model(str(tmp_path)):
        pass
    with open_model(str(tmp_path), assume_family="llama", text_only=False) as opened:
        assert (
            relative(streamed_logits(opened, tokens_NS), whole_logits(tmp_path, tokens_NS)) < 1e-5
        )


def test_ministral_3_as_people_have_it(tmp_path: Path) -> None:
    """Inside a model of images and text, with queries that grow beyond the trained length."""
    rope = {
        "rope_type": "yarn",
        "rope_theta": 1e6,
        "factor": 8.0,
        "original_max_position_embeddings": 8,
        "llama_4_scaling_beta": 0.5,
    }
    text = {**WHOLES["mistral3"]["text_config"], "model_type": "ministral3"}
    save_whole(tmp_path, "mistral3", text_config={**text, "rope_parameters": rope})
    tokens_NS = random_windows(2, 13, vocabulary=280)
    with open_model(str(tmp_path), text_only=False) as opened:
        assert opened.spec.family.model_type == "ministral3"
        expected = whole_logits(tmp_path, tokens_NS)
        assert relative(streamed_logits(opened, tokens_NS), expected) < 1e-5
