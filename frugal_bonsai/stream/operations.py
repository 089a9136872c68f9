"""The operations of one layer, counted on Hugging Face's own module without its weights.

In: a model's description. Out: :class:`LayerOperations`. The largest layer runs once on the meta
device, where tensors have shapes and no values: torch's FLOP counter counts the matrix products, a
dispatch mode counts the bytes of all other operations. The other layers are taken to be like it, in
proportion to their parameters. Holds no weights.

Shape suffixes: B windows, S tokens, H hidden, T tokens of all windows, K experts of a token.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from frugal_bonsai.hardware.throughput import LayerOperations
from frugal_bonsai.model.default_config import config_errors
from frugal_bonsai.model.family import ModelSpec
from frugal_bonsai.model.units import ATTENTION, FFN
from frugal_bonsai.stream.empty_model import build_empty_model, record_layers

_ATEN = torch.ops.aten


class _Traffic(TorchDispatchMode):
    """Counts what operations read, write and allocate; fused attention has a rate of its own.

    Attributes:
        size_bytes: Bytes read and written, without the weights of projections.
        arrays: Bytes of each new array.
        inputs: Elements that enter projections.
        outputs: Elements that leave projections.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.size_bytes = self.inputs = self.outputs = 0
        self.arrays: list[int] = []

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {value.untyped_storage()._cdata for value in _tensors((args, kwargs))}
        found = _tensors(result)
        new = [value.nbytes for value in found if value.untyped_storage()._cdata not in given]
        view = not new and not func._schema.is_mutable
        if view or func.overloadpacket == _ATEN.scaled_dot_product_attention:
            return result
        if func.overloadpacket == _ATEN.linear:
            args, kwargs = args[:1], None
            self.inputs += args[0].numel()
            self.outputs += result.numel()
        self.size_bytes += sum(value.nbytes for value in [*_tensors((args, kwargs)), *found])
        self.arrays += new
        return result


def _tensors(values: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]


def count_operations(spec: ModelSpec, window: int, dtype: torch.dtype) -> LayerOperations:
    """Count the operations of a model's mean layer.

    Args:
        spec: The model.
        window: S, tokens of a window; where attention is not fused, traffic depends on it.
        dtype: Compute dtype.
    """
    from transformers import Cache, DynamicCache

    model = build_empty_model(spec)
    base, layers, proxies = record_layers(model, spec)
    sizes = [sum(map(math.prod, tensors.values())) for tensors in spec.layer_tensors]
    at = sizes.index(max(sizes))
    layer = layers[at]
    for module in (base, layer):
        module.to(torch.device("meta"), dtype)
    if spec.family.experts is not None:
        _choose_first(layer.get_submodule(spec.family.experts.module), spec.experts_chosen)
    hidden_BSH = torch.empty(1, window, spec.hidden, dtype=dtype, device="meta")
    flops, traffic = FlopCounterMode(display=False), _Traffic()
    with torch.inference_mode(), config_errors(spec.config):
        # Without a cache the model compares positions, which have no values here.
        base(inputs_embeds=hidden_BSH, use_cache=False, past_key_values=DynamicCache())
        kwargs = {k: v for k, v in proxies[at].kwargs.items() if not isinstance(v, Cache)}
        with flops, traffic:
            layer(hidden_BSH, **kwargs)
    # Of one token of the mean layer.
    share = spec.block_parameters / spec.layers / sizes[at] / window
    products = {str(kind): n * share for kind, n in flops.get_flop_counts()["Global"].items()}
    # Fused attention is two batched products; the half of them that causal masks hide is skipped.
    attention = products.pop("aten.bmm", 0) / 2
    return LayerOperations(
        projections=sum(products.values()),
        attention=attention / window,
        traffic_bytes=traffic.size_bytes * share,
        array_bytes=tuple(size * share for size in traffic.arrays),
        inputs=traffic.inputs * share,
        outputs=traffic.outputs * share,
        query=_mean_columns(spec, ATTENTION),
        ffn=_mean_columns(spec, FFN) * (spec.experts_chosen / spec.experts if spec.experts else 1),
    )


def _choose_first(experts: nn.Module, chosen: int) -> None:
    """Send every token through the first experts: a router's choice depends on values."""
    first = list(experts.children())[:chosen]

    def forward(
        hidden_TH: torch.Tensor, chosen_TK: torch.Tensor, weight_TK: torch.Tensor
    ) -> torch.Tensor:
        result_TH = torch.zeros_like(hidden_TH)
        for expert in first:
            result_TH += expert(hidden_TH, weight_TK[:, 0], chosen_TK[:, 0])
        return result_TH

    experts.forward = forward  # shadows the class's


def _mean_columns(spec: ModelSpec, kind: str) -> float:
    """Return the input columns of the output projections of one kind, a layer."""
    return sum(group.columns for group in spec.table.groups if group.kind == kind) / spec.layers
