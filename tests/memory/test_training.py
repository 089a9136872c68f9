"""The plan of a training: its items, what it chooses, and the activations of a layer as traced."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from test_activations import LiveBytes
from tiny_models import FAMILY_CONFIGS, TINY, Tiny, random_windows, tiny_family, tiny_model
from torch.utils._pytree import tree_leaves

from frugal_bonsai.adaptation.adapters import add_adapters
from frugal_bonsai.adaptation.optimiser import kept_state, make_optimiser
from frugal_bonsai.adaptation.settings import Objective
from frugal_bonsai.adaptation.student import Activations, Student
from frugal_bonsai.adaptation.training_data import MicroBatch
from frugal_bonsai.errors import BudgetError
from frugal_bonsai.memory.budget import Budget
from frugal_bonsai.memory.training import TrainingPlan, plan_training
from frugal_bonsai.memory.training_items import NATIVE, TrainingWork, training_elements
from frugal_bonsai.model.families import FAMILIES
from frugal_bonsai.model.family import describe_model
from frugal_bonsai.sizes import GIB, MIB

CPU = torch.device("cpu")
LLAMA_8B = {
    "model_type": "llama",
    "torch_dtype": "bfloat16",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 7168,
    "num_hidden_layers": 32,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": False,
}


def spec_8b() -> Any:
    hidden, ffn, query, key = 4096, 7168, 2048, 512
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (128256, hidden),
        "model.norm.weight": (hidden,),
        "lm_head.weight": (128256, hidden),
    }
    for layer in range(32):
        prefix = f"model.layers.{layer}."
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{prefix}{norm}.weight"] = (hidden,)
        for name, rows in (("q", query), ("k", key), ("v", key)):
            shapes[f"{prefix}self_attn.{name}_proj.weight"] = (rows, hidden)
        shapes[f"{prefix}self_attn.o_proj.weight"] = (hidden, query)
        shapes[f"{prefix}mlp.gate_proj.weight"] = shapes[f"{prefix}mlp.up_proj.weight"] = (
            ffn,
            hidden,
        )
        shapes[f"{prefix}mlp.down_proj.weight"] = (hidden, ffn)
    return describe_model(LLAMA_8B, shapes)


def plan(gpu_gib: float, **changes: Any) -> TrainingPlan:
    budget = Budget(device="cuda", host_bytes=32 * GIB, gpu_bytes=int(gpu_gib * GIB))
    work = {"window": 2048, "batch": 8, "lora": True, "top": 64, **changes}
    return plan_training(spec_8b(), budget, TrainingWork(**work), base_bytes=GIB)


def test_native_weights_before_int8_and_the_largest_micro_batch() -> None:
    large, small, tight = plan(48), plan(8), plan(6.5)
    assert (large.weights, large.rank, large.micro_batch) == ("native", 64, 8)
    assert (small.weights, small.rank, small.micro_batch) == ("int8", 64, 1)
    assert (tight.weights, tight.rank, tight.micro_batch) == ("int8", 16, 1)
    for one, cap in ((large, 48), (small, 8), (tight, 6.5)):
        assert one.total_bytes("gpu") <= cap * GIB


def test_the_items_are_those_of_the_shapes() -> None:
    items = {item.name: item for item in plan(48, rank=16).items if item.where == "gpu"}
    layer = 2 * 4096 * (2048 + 512) + 3 * 4096 * 7168
    assert items["frozen weights"].size_bytes == 32 * (2 * layer + 2 * 2 * 4096)
    sides = 2 * (4096 + 2048) + 2 * (4096 + 512) + 3 * (4096 + 7168)
    assert items["adapters"].size_bytes == 32 * 4 * 16 * sides
    assert items["optimiser"].size_bytes == 2 * items["gradients"].size_bytes
    assert items["head"].size_bytes == 2 * 128256 * 4096
    quantised = {i.name: i for i in plan(48, weights="int8").items if i.where == "gpu"}
    assert quantised["head"].size_bytes == 128256 * 4096 + 4 * 128256
    assert quantised["rows of a weight, dense"].size_bytes == 32 * MIB
    rows = 32 * (2048 + 2 * 512 + 4096 + 2 * 7168 + 4096)
    assert quantised["frozen weights"].size_bytes == 32 * (layer + 2 * 2 * 4096) + 4 * rows
    full = {i.name: i for i in plan(200, lora=False).items if i.where == "gpu"}
    assert full["optimiser"].size_bytes == 8 * 32 * layer and "adapters" not in full


def test_what_does_not_fit_is_refused_with_the_smallest_cap_that_does() -> None:
    with pytest.raises(BudgetError, match=r"--max-gpu-mem 3.00 GiB is too small") as refused:
        plan(3, weights="int8")
    assert "frozen weights is the largest item" in str(refused.value)
    found = re.search(r"The smallest --max-gpu-mem that works is (\d+)MiB", str(refused.value))
    assert found is not None
    least = int(found.group(1)) * MIB / GIB
    assert plan(least, weights="int8").micro_batch == 1
    with pytest.raises(BudgetError):
        plan(least - 2 * MIB / GIB, weights="int8")


def test_a_refusal_advises_what_was_tried_and_fits() -> None:
    with pytest.raises(BudgetError, match="it fits with another --weights, or none") as refused:
        plan(6, weights="native")
    assert plan(6).weights == "int8"
    assert "--rank" not in str(refused.value)  # the plan has tried them all


def test_the_smallest_cap_is_of_the_smallest_choice() -> None:
    """A step's windows at all boundaries are more than int8 weights here."""
    with pytest.raises(BudgetError, match="frozen weights is the largest item") as refused:
        plan(4)
    assert refused.value.option == "--max-gpu-mem"
    least = plan(refused.value.needed_bytes / GIB)
    assert (least.weights, least.rank) == ("int8", 4)
    with pytest.raises(BudgetError):
        plan(refused.value.needed_bytes / GIB, weights="streamed")


def test_eight_bit_moments_are_taken_where_others_do_not_fit() -> None:
    both = ("adamw", "adamw8bit")
    assert plan(48, optimisers=both).optimiser == "adamw"
    tight = plan(7, optimisers=both)
    assert (tight.weights, tight.rank, tight.optimiser) == ("int8", 64, "adamw8bit")
    assert plan(7).rank == 32
    assert plan(48, optimisers=("adamw8bit",)).optimiser == "adamw8bit"


@pytest.mark.parametrize("optimiser", ["adamw", "adamw8bit"])
@pytest.mark.parametrize("rank", [4, 64])
def test_moments_take_what_is_planned(optimiser: str, rank: int, tmp_path: Path) -> None:
    """A rank of 4 keeps parameters below what bitsandbytes holds in 8 bits."""
    if optimiser == "adamw8bit":
        pytest.importorskip("bitsandbytes")
    sizes = {"hidden_size": 256, "intermediate_size": 600, "head_dim": 32}
    config = {**TINY, **sizes, "num_attention_heads": 8, "num_key_value_heads": 4}
    tiny = tiny_model(tmp_path / "m", "llama", **config)
    student = Student(tiny.checkpoint, tiny.spec, device=CPU, dtype=torch.float32, head_tokens=64)
    student.load(NATIVE)
    parameters = add_adapters(student, rank=rank, alpha=1.0, seed=0).values()
    for value in parameters:
        value.grad = torch.ones_like(value)
    made = make_optimiser(optimiser, parameters, rate=1e-3)
    made.step()
    found = sum(
        t.numel() * t.element_size() for p in parameters for t in kept_state(made, p).values()
    )
    work = TrainingWork(window=32, batch=1, lora=True, rank=rank, optimisers=(optimiser,))
    foretold = plan_training(
        tiny.spec, Budget(device="cpu", host_bytes=4 * GIB, gpu_bytes=None), work, base_bytes=MIB
    )
    [item] = [item for item in foretold.items if item.name == "optimiser"]
    assert item.size_bytes == found


def test_what_does_not_fit_as_int8_is_streamed() -> None:
    streamed = plan(5, batch=2)
    assert streamed.weights == "streamed" and streamed.total_bytes("gpu") <= 5 * GIB
    items = {item.name: item for item in streamed.items if item.where == "gpu"}
    layer = 2 * 4096 * (2048 + 512) + 3 * 4096 * 7168
    assert items["frozen weights"].size_bytes < 2.1 * 2 * layer
    assert items["layer boundaries"].size_bytes == 36 * 2 * 2048 * 4096 * 2  # a step's windows
    with pytest.raises(BudgetError, match="layer boundaries is the largest item"):
        plan(2, batch=2)


def traced_elements(tiny: Tiny, windows: int, window: int) -> float:
    """Elements a token that are alive at most while a layer is gone back through."""
    spec = tiny.spec
    student = Student(tiny.checkpoint, spec, device=CPU, dtype=torch.float32, head_tokens=64)
    student.load(NATIVE)
    add_adapters(student, rank=1, alpha=1.0, seed=0)
    objective, tokens = Objective(lm=1.0), random_windows(windows, window)
    student.gradients([MicroBatch(tokens[:1])], objective, scale=1.0)
    shape = (windows, window, spec.hidden)
    walk = Activations(
        MicroBatch(tokens), [torch.randn(shape), torch.randn(shape)], torch.randn(shape)
    )
    values = list(student.layers.parameters())
    before = [
        *values,
        *(value.grad for value in values if value.grad is not None),
        *walk.inputs,
        *([] if walk.gradient is None else [walk.gradient]),
        *(x for x in tree_leaves(student._arguments(window)) if isinstance(x, torch.Tensor)),
    ]
    live = LiveBytes(before)
    with live:
        student._layer_gradient(1, walk, objective, 1.0)
    return live.peak / 4 / windows / window


# hidden, FFN channels, query heads, KV heads.
SHAPES = [(256, 512, 8, 8), (256, 1536, 8, 4), (512, 512, 8, 4), (256, 512, 16, 4)]


@pytest.mark.parametrize(("hidden", "ffn", "heads", "kv_heads"), SHAPES)
def test_a_llama_layers_activations_are_foretold(
    hidden: int, ffn: int, heads: int, kv_heads: int, tmp_path: Path
) -> None:
    config = {
        **TINY,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": 32,
        "num_hidden_layers": 2,
        "max_position_embeddings": 128,
    }
    tiny = tiny_model(tmp_path / "m", "llama", **config)
    traced, foretold = traced_elements(tiny, 2, 128), training_elements(tiny.spec, 128)
    assert traced <= foretold <= 1.2 * traced


# `adapt` refuses the others.
ADAPTED = sorted(
    name
    for name, (kind, _) in FAMILY_CONFIGS.items()
    if FAMILIES[kind].experts is None and FAMILIES[kind].attention_parts
)


@pytest.mark.parametrize("name", ADAPTED)
def test_no_familys_layer_holds_more_than_is_foretold(name: str, tmp_path: Path) -> None:
    tiny = tiny_family(tmp_path / "m", name)
    window = 32
    assert traced_elements(tiny, 4, window) <= training_elements(tiny.spec, window) * 1.25
