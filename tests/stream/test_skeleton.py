"""Hugging Face's model without weights, and how it calls its layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import BIASES, CPU, TIED, Tiny, random_windows, relative, tiny_family, tiny_llama

from frugal_bonsai.errors import CheckpointError
from frugal_bonsai.model.family import describe_model
from frugal_bonsai.stream.call import call_layer
from frugal_bonsai.stream.empty_model import build_empty_model
from frugal_bonsai.stream.skeleton import Skeleton


def _skeleton(tiny: Tiny, dtype: torch.dtype = torch.float32) -> Skeleton:
    return Skeleton(tiny.checkpoint, tiny.spec, device=CPU, dtype=dtype)


def test_holds_no_layer_weights(tmp_path: Path) -> None:
    skeleton = _skeleton(tiny_llama(tmp_path / "m", **BIASES))
    assert len(skeleton.layers) == 3
    assert all(p.is_meta for layer in skeleton.layers for p in layer.parameters())
    assert not skeleton.norm.weight.is_meta


@pytest.mark.parametrize("changes", [{}, TIED], ids=["untied", "tied"])
def test_embedding_and_norm_are_those_of_the_model(changes: dict[str, Any], tmp_path: Path) -> None:
    tiny = tiny_llama(tmp_path / "m", **changes)
    skeleton, model = _skeleton(tiny), tiny.hugging_face()
    tokens = random_windows(3, 7)
    tokens[0, :4] = tokens[0, 4]  # a token many times
    assert torch.equal(skeleton.embed(tokens), model.model.embed_tokens(tokens))
    hidden = torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(0))
    assert torch.equal(skeleton.norm(hidden), model.model.norm(hidden))


@pytest.mark.parametrize("family", ["llama", "gemma3", "opt", "phi3"])
@pytest.mark.parametrize("padding", [52, -1, 4], ids=["behind the rows", "negative", "among them"])
def test_the_padding_index_has_no_part_in_a_forward_pass(
    family: str, padding: int, tmp_path: Path
) -> None:
    """The embedding is called with the rows of seven tokens, an index counts in the whole table."""
    tiny = tiny_family(tmp_path / "m", family, pad_token_id=padding)
    tokens_NS = random_windows(2, 9, vocabulary=10)
    engine, model = tiny.engine(), tiny.hugging_face()
    with engine.native() as stream, torch.inference_mode():
        hidden = engine.sweep.run(stream, tokens_NS)
        found = engine.head.logits(hidden.read(slice(0, 2)))
        assert relative(found, model(tokens_NS).logits) < 1e-5


def test_dtype_is_the_compute_dtype(tmp_path: Path) -> None:
    skeleton = _skeleton(tiny_llama(tmp_path / "m"), torch.bfloat16)
    assert skeleton.embed(random_windows(1, 4)).dtype == torch.bfloat16
    assert skeleton.norm.weight.dtype == torch.bfloat16


ROPES: dict[str, dict[str, Any]] = {
    "default": {},
    "theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
    "linear": {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}},
    "llama3": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 1e4,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        }
    },
}


@pytest.mark.parametrize("changes", ROPES.values(), ids=ROPES)
def test_layers_are_called_with_what_the_model_calls_them_with(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    tiny = tiny_llama(tmp_path / "m", **changes)
    model = tiny.hugging_face()
    seen: list[dict[str, Any]] = []
    for layer in model.model.layers:
        layer.register_forward_pre_hook(
            lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True
        )
    with torch.no_grad():
        model(random_windows(1, 11), use_cache=False)
    replayed = _skeleton(tiny).layer_kwargs(11)
    assert len(replayed) == len(seen) == 3
    for found, expected in zip(replayed, seen, strict=True):
        for ours, theirs in zip(
            found["position_embeddings"], expected["position_embeddings"], strict=True
        ):
            assert torch.equal(ours, theirs)
        assert (found["attention_mask"] is None) == (expected["attention_mask"] is None)


def test_kwargs_follow_the_window(tmp_path: Path) -> None:
    skeleton = _skeleton(tiny_llama(tmp_path / "m"))
    first = skeleton.layer_kwargs(9)
    assert skeleton.layer_kwargs(9) is first, "asked of the model once"
    for window in (5, 9):
        cosines, _ = skeleton.layer_kwargs(window)[0]["position_embeddings"]
        assert cosines.shape[1] == window


def test_steps_with_a_cache_equal_one_pass_over_the_window(tmp_path: Path) -> None:
    from transformers import DynamicCache

    tiny = tiny_llama(tmp_path / "m")
    skeleton, tokens = _skeleton(tiny), random_windows(3, 6)
    model, cache, steps = tiny.hugging_face(), DynamicCache(), []
    layers = [
        {
            n.removeprefix(tiny.spec.prefix(i)): tiny.checkpoint.read(n)
            for n in tiny.checkpoint.tensors
            if n.startswith(tiny.spec.prefix(i))
        }
        for i in range(3)
    ]
    with torch.inference_mode():
        for position in range(6):
            hidden, kwargs = skeleton.step(tokens[:, position : position + 1], position, cache)
            for module, parameters, given in zip(skeleton.layers, layers, kwargs, strict=True):
                hidden = call_layer(module, parameters, hidden, given)
            steps.append(skeleton.norm(hidden))
        expected = model.model(tokens).last_hidden_state
    assert relative(torch.cat(steps, dim=1), expected) < 1e-5


def test_output_layouts_keys_do_not_reach_transformers(tmp_path: Path) -> None:
    tiny = tiny_llama(tmp_path / "m")
    config = {
        **tiny.checkpoint.config,
        "auto_map": {"AutoModelForCausalLM": "modeling_pruned.Missing"},
        "architectures": ["Missing"],
    }
    spec = describe_model(config, tiny.checkpoint.shapes)
    assert type(build_empty_model(spec)).__name__ == "LlamaForCausalLM"


def test_config_that_transformers_refuses(tmp_path: Path) -> None:
    tiny = tiny_llama(tmp_path / "m")
    config = {**tiny.checkpoint.config, "hidden_act": "no_such_activation"}
    spec = describe_model(config, tiny.checkpoint.shapes)
    with pytest.raises(CheckpointError, match=r"config\.json: transformers does not accept it"):
        build_empty_model(spec)


def _edited(tiny: Tiny, changes: dict[str, torch.Tensor | None]) -> Tiny:
    from safetensors.torch import load_file, save_file
    from tiny_models import open_tiny

    file = tiny.folder / "model.safetensors"
    tensors = load_file(file)
    for name, value in changes.items():
        if value is None:
            del tensors[name]
        else:
            tensors[name] = value
    save_file(tensors, file, metadata={"format": "pt"})
    return open_tiny(tiny.folder)


def test_tensor_that_the_model_has_no_place_for(tmp_path: Path) -> None:
    tiny = _edited(tiny_llama(tmp_path / "m"), {"model.adapter.weight": torch.ones(3)})
    with pytest.raises(CheckpointError, match=r"'model\.adapter\.weight' has no place in Llama"):
        _skeleton(tiny)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model.norm.weight", None),
        ("model.norm.weight", torch.ones(23)),
        ("model.layers.1.input_layernorm.weight", None),
        ("model.layers.1.input_layernorm.weight", torch.ones(1)),
        ("lm_head.weight", torch.ones(53, 12)),
        ("lm_head.weight", torch.ones(50, 24)),
        ("model.embed_tokens.weight", torch.ones(53, 12)),
    ],
)
def test_tensor_that_is_missing_or_does_not_fit(
    name: str, value: torch.Tensor | None, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        _skeleton(_edited(tiny_llama(tmp_path / "m"), {name: value}))
