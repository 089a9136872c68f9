"""The plan's activation term against Hugging Face's own layer class, traced without a device.

Fake tensors run the layer's forward at real shapes and hold no data; every storage that is born and
dies is counted. Every family in the table without experts is traced.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from live_bytes import LiveBytes, Norms
from torch._subclasses import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map_only

from frugal_bonsai.memory.budget import Budget
from frugal_bonsai.memory.prune_items import PruneItems
from frugal_bonsai.memory.work import Choice, PruneWorkload
from frugal_bonsai.model.families import FAMILIES
from frugal_bonsai.model.family import ModelSpec, describe_model
from frugal_bonsai.model.units import ATTENTION, UnitGroup
from frugal_bonsai.sizes import GIB
from frugal_bonsai.stream.call import InputHook, call_layer
from frugal_bonsai.stream.skeleton import Skeleton

CPU, BF16 = torch.device("cpu"), torch.bfloat16
# hidden, FFN channels, query heads, KV heads, head_dim: Llama-3-8B, Llama-3.2-1B, Llama-2-7B (MHA).
SHAPES = {
    "8b-gqa": (4096, 14336, 32, 8, 128),
    "1b-gqa": (2048, 8192, 32, 8, 64),
    "7b-mha": (4096, 11008, 32, 32, 128),
    "narrow-ffn": (1024, 1024, 16, 16, 64),
}

# What a config of the family must say beside its sizes.
EXTRAS: dict[str, dict[str, Any]] = {
    "gpt_neo": {"attention_types": [[["global"], 1]]},
    "granitemoehybrid": {"num_local_experts": 0, "layers_block_type": ["mamba"]},
    "lfm2": {"block_auto_adjust_ff_dim": False, "layer_types": ["full_attention"]},
    "gemma4_text": {"hidden_size_per_layer_input": 0, "layer_types": ["full_attention"]},
    "falcon": {"new_decoder_architecture": True},
}

# Where a router decides, fake tensors have no answer: test_expert_activations.py traces real ones.
TRACED = [name for name, family in FAMILIES.items() if family.experts is None]

# Families whose layers hold most inside attention.
ATTENTION_PEAKS = {
    *("gemma2", "vaultgemma", "olmo2", "olmo3", "gpt_neo", "gpt_neox", "falcon"),
    *(
        "granitemoehybrid",
        "bamba",
        "youtu",
        "qwen3_5_text",
        "ernie4_5",
        "cohere",
        "cohere2",
        "starcoder2",
    ),
}


@functools.cache
def spec_of(model_type: str, shape: tuple[int, ...]) -> ModelSpec:
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    hidden, ffn, heads, kv_heads, head_dim = shape
    family = FAMILIES[model_type]
    sizes = {
        family.hidden_key: hidden,
        family.ffn_key: ffn,
        family.layers_key: 1,
        family.kv_heads_key: kv_heads,
        family.heads_key: heads,  # behind the KV heads: some families have one key for both
        family.positions_key: 8192,
        "vocab_size": 64,
        "pad_token_id": 0,
    }
    if model_type == "youtu":  # its keys and values come from one latent vector
        sizes["num_key_value_heads"] = heads
    if model_type in ("granitemoehybrid", "bamba"):
        sizes["mamba_n_heads"] = hidden // 32  # of 64 channels, as in the models
    if family.head_dim_key is not None or model_type == "helium":
        sizes["head_dim"] = head_dim
    alike = {other: sizes[key] for key, other in family.full_attention_keys.items()}
    sizes |= alike
    config = AutoConfig.for_model(model_type, **sizes, **EXTRAS.get(model_type, {}))
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    for name in shapes:
        if name.endswith(family.transposed):
            shapes[name] = shapes[name][::-1]
    return describe_model(config.to_dict() | alike | {"torch_dtype": "bfloat16"}, shapes)


def traced_bytes(spec: ModelSpec, batch: int, window: int, *, tapped: bool = False) -> int:
    """Peak bytes of a masked layer visit, beside its input, parameters and arguments."""
    skeleton = Skeleton(Norms(spec), spec, device=CPU, dtype=BF16)  # type: ignore[arg-type]
    kwargs = skeleton.layer_kwargs(window)[0]
    seen: list[torch.Tensor] = []

    def hook(group: UnitGroup) -> InputHook:
        def mask(input_BSC: torch.Tensor) -> None:
            input_BSC.mul_(torch.ones(batch, 1, group.columns, dtype=BF16))
            if tapped:
                seen.append(input_BSC)

        return mask

    with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.inference_mode():
        fake = tree_map_only(torch.Tensor, mode.from_tensor, kwargs)
        parameters = {n: torch.empty(s, dtype=BF16) for n, s in spec.layer_tensors[0].items()}
        hidden_BSH = torch.empty(batch, window, spec.hidden, dtype=BF16)
        hooks = {group.output: hook(group) for group in spec.table.of_layer(0)}
        for module in skeleton.layers[0].modules():  # GPT-Neo keeps its causal mask
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, mode.from_tensor(buffer))
        buffers = list(skeleton.layers[0].buffers())
        given = tree_leaves((fake, parameters, hidden_BSH, buffers))
        before = [t for t in given if hasattr(t, "dtype")]
        with LiveBytes(before) as live:
            call_layer(skeleton.layers[0], parameters, hidden_BSH, fake, hooks)
    return live.peak


def planned_bytes(spec: ModelSpec, batch: int, window: int, *, tapped: bool = False) -> int:
    budget = Budget(device="cuda", host_bytes=64 * GIB, gpu_bytes=24 * GIB)
    work = PruneWorkload(
        window=window, windows=batch, source_bytes=2, goals=(0.5,), part_windows=batch
    )
    items = PruneItems(spec, budget, work)
    choice = Choice(micro_batch=batch, in_flight=batch, resident=0, keep_inputs=False)
    item = items.tapped_activations(choice) if tapped else items.activations(choice, batch)
    return item.size_bytes


@pytest.mark.parametrize("family", TRACED)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize(("batch", "window"), [(1, 512), (3, 2048)])
def test_plan_and_trace_agree(family: str, shape: tuple[int, ...], batch: int, window: int) -> None:
    spec = spec_of(family, shape)
    traced = traced_bytes(spec, batch, window)
    assert planned_bytes(spec, batch, window) == pytest.approx(traced, rel=0.1)


@pytest.mark.parametrize("family", TRACED)
@pytest.mark.parametrize("shape", [SHAPES["8b-gqa"], SHAPES["7b-mha"]], ids=["gqa", "mha"])
def test_statistics_keep_the_input_of_o_proj(family: str, shape: tuple[int, ...]) -> None:
    spec = spec_of(family, shape)
    plain, tapped = (traced_bytes(spec, 2, 1024, tapped=tapped) for tapped in (False, True))
    kept = 2 * 1024 * next(g.columns for g in spec.table.groups if g.kind == ATTENTION) * 2
    if family in ATTENTION_PEAKS:  # the peak is over when that input is kept
        assert plain <= tapped <= plain + kept
        assert tapped <= planned_bytes(spec, 2, 1024, tapped=True) < 1.2 * tapped
    else:
        assert tapped - plain == pytest.approx(kept, rel=0.01)
        assert planned_bytes(spec, 2, 1024, tapped=True) == pytest.approx(tapped, rel=0.1)


def test_the_published_figure_of_an_8b_layer() -> None:
    """4H + 6I bytes a token in bf16: 100 KiB."""
    spec = spec_of("llama", SHAPES["8b-gqa"])
    assert planned_bytes(spec, 1, 1024) == 1024 * (4 * 4096 + 6 * 14336) == 1024 * 100 * 1024
