"""Tiny random Llamas, masks for them, and the masked parents that rewrites are compared with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from frugal_bonsai.checkpoint.reader import Checkpoint
from frugal_bonsai.model.family import ModelSpec, describe_model
from frugal_bonsai.model.layout import PER_LAYER, UNIFORM, LayoutRules, layout_rules
from frugal_bonsai.model.units import ATTENTION, KeepMask, UnitGroup
from frugal_bonsai.rewrite.shrink import RewriteSummary, shrink

# head_dim is neither hidden_size / num_attention_heads nor a divisor of hidden_size.
TINY = {
    "vocab_size": 61,
    "hidden_size": 48,
    "intermediate_size": 20,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 10,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": None,
    "attn_implementation": "eager",
}
GQA = {"num_attention_heads": 6, "num_key_value_heads": 3}
MHA = {"num_attention_heads": 4, "num_key_value_heads": 4}


@dataclass(frozen=True)
class Parent(AbstractContextManager["Parent"]):
    """A dense model on disk."""

    folder: Path
    checkpoint: Checkpoint
    spec: ModelSpec

    def __exit__(self, *exception: object) -> None:
        self.checkpoint.close()

    def rules(self, layout: str) -> LayoutRules:
        return layout_rules(self.spec, layout, tile=1)

    def shrink(
        self, mask: KeepMask, folder: Path, layout: str = PER_LAYER, **options: Any
    ) -> RewriteSummary:
        folder.mkdir()
        return shrink(self.checkpoint, self.spec, mask, folder, rules=self.rules(layout), **options)


def open_parent(folder: Path) -> Parent:
    checkpoint = Checkpoint.open(folder)
    return Parent(folder, checkpoint, describe_model(checkpoint.config, checkpoint.shapes))


def save_llama(
    folder: Path, *, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any
) -> LlamaForCausalLM:
    """Save a Llama with random parameters, norms and biases included."""
    model = LlamaForCausalLM(LlamaConfig(**{**TINY, **changes}))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.3, generator=generator)
            if "norm" in name:
                parameter.add_(1.0)
    model.to(dtype).eval().save_pretrained(folder)
    return model


def tiny_parent(folder: Path, **options: Any) -> Parent:
    save_llama(folder, **options)
    return open_parent(folder)


def random_mask(spec: ModelSpec, layout: str, *, seed: int = 0) -> KeepMask:
    """Draw random units: 2 groups and 9 channels per layer for ``uniform``, else any number."""
    generator = torch.Generator().manual_seed(seed)
    mask = KeepMask(spec.table)
    for group in spec.table.groups:
        if layout == UNIFORM:
            kept = 2 if group.kind == ATTENTION else 9
        else:
            # Layer 0 is the narrowest, so that nothing may be sized by it.
            low, high = (1, 2) if group.layer == 0 else (2, group.count + 1)
            kept = int(torch.randint(low, high, (), generator=generator))
        order = torch.randperm(group.count, generator=generator)
        mask.of(group)[order[kept:]] = False
    return mask


def keep_counts(spec: ModelSpec, counts: Mapping[str, list[int]]) -> KeepMask:
    """Keep the first units of each group."""
    mask = KeepMask(spec.table)
    for group in spec.table.groups:
        mask.of(group)[counts[group.kind][group.layer] :] = False
    return mask


def random_refit(spec: ModelSpec, mask: KeepMask, *, seed: int = 5) -> dict[str, torch.Tensor]:
    """Draw ``[H, kept columns]`` for every output projection except the first."""
    generator = torch.Generator().manual_seed(seed)
    return {
        group.output_weight: 0.3
        * torch.randn(spec.hidden, int(mask.columns(group).sum()), generator=generator)
        for group in spec.table.groups[1:]
    }


def thunks(refit: Mapping[str, torch.Tensor]) -> dict[str, Callable[[], torch.Tensor]]:
    return {name: (lambda tensor=tensor: tensor) for name, tensor in refit.items()}


def masked_parent(
    parent: Parent, mask: KeepMask, refit: Mapping[str, torch.Tensor] | None = None
) -> Any:
    """Load the dense model in fp32 and zero the removed inputs of o_proj and down_proj."""
    model = AutoModelForCausalLM.from_pretrained(
        parent.folder, dtype=torch.float32, attn_implementation="eager"
    )
    for group in parent.spec.table.groups:
        projection = model.model.layers[group.layer].get_submodule(group.output)
        columns_C = mask.columns(group)
        projection.register_forward_pre_hook(_zeroing(columns_C))
        if refit and group.output_weight in refit:
            with torch.no_grad():
                projection.weight.zero_()
                projection.weight[:, columns_C] = refit[group.output_weight]
    return model.eval()


def _zeroing(columns_C: torch.Tensor) -> Callable[[Any, Any], Any]:
    def hook(_module: Any, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return (inputs[0] * columns_C, *inputs[1:])

    return hook


def tokens(vocabulary: int = TINY["vocab_size"], *, batch: int = 2, length: int = 12) -> Any:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(2, vocabulary, (batch, length), generator=generator)


@torch.no_grad()
def logits_of(model: Any, input_ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids).logits.float()


def relative_difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def greedy(model: Any, input_ids: torch.Tensor, *, new_tokens: int = 20, **options: Any) -> Any:
    return model.generate(
        input_ids,
        attention_mask=torch.ones_like(input_ids),
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        do_sample=False,
        pad_token_id=0,
        **options,
    )


def expected_llama_tensor(
    name: str, dense: torch.Tensor, mask: KeepMask, query_rows: int, head_dim: int
) -> torch.Tensor:
    """Return the kept part of a Llama's tensor, by the tensor's name and not by the unit table.

    ``query_rows``: rows of q_proj, and columns of o_proj, that one KV group owns.
    """
    if "layers." not in name:
        return dense
    layer = int(name.split("layers.")[1].split(".")[0])
    groups: dict[str, UnitGroup] = {g.kind: g for g in mask.table.of_layer(layer)}
    kv, channels = mask.of(groups["attention"]), mask.of(groups["ffn"])
    query, heads = kv.repeat_interleave(query_rows), kv.repeat_interleave(head_dim)
    rows = {"q_proj": query, "k_proj": heads, "v_proj": heads, "gate": channels, "up": channels}
    for part, keep in rows.items():
        if part in name:
            return dense[keep]
    if name.endswith("o_proj.weight"):
        return dense[:, query]
    if name.endswith("down_proj.weight"):
        return dense[:, channels]
    return dense
