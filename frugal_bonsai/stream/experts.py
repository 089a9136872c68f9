"""Experts as separate modules, so that the weights of each can be streamed.

In: Hugging Face's module of a layer's experts, which holds all of them in two tensors of three
dimensions. Out: an equivalent module with one submodule per expert, under the names that
checkpoints use. Experts may differ in width, and the input of each output projection can be
captured and masked. Router, top-k and the router's weights stay Hugging Face's.

The router's weight multiplies the *input* of an expert's output projection, and the projection's
bias, instead of its output. This is the same, because the projection is linear. So the sum of a
layer's experts is linear in these inputs, and statistics of the inputs contain the router's
weights.

Memory: one expert's tokens.

Shape suffixes: T tokens of a micro-batch, K experts a token is sent to, R tokens of one expert, H
hidden, C channels of an expert.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from torch.func import functional_call
from torch.nn.functional import linear

from frugal_bonsai.model.expert_schema import Experts
from frugal_bonsai.model.family import ModelSpec


class RoutedLinear(nn.Linear):
    """An expert's output projection; during a forward it knows the tokens of its input rows.

    Attributes:
        tokens_R: int64, indices of the tokens in the micro-batch; None outside of a forward.
        weight_R: the router's weight of the expert for these tokens.
    """

    tokens_R: torch.Tensor | None = None
    weight_R: torch.Tensor | None = None

    def forward(self, input_RC: torch.Tensor) -> torch.Tensor:
        """Return the output of weighted inputs, with the bias in the same proportion."""
        output_RH = linear(input_RC, self.weight)
        if self.bias is None or self.weight_R is None:
            return output_RH
        return _with_bias(output_RH, self.weight_R, self.bias)


def _with_bias(
    output_RH: torch.Tensor, weight_R: torch.Tensor, bias_H: torch.Tensor
) -> torch.Tensor:
    return output_RH + weight_R[:, None].to(output_RH.dtype) * bias_H


class _Expert(nn.Module):
    """One gated FFN.

    Args:
        shapes: name inside the expert -> shape of each of its tensors; streamed ones may be
            smaller.
        whole: Hugging Face's module of all experts.
        scales_inputs: the router's weight multiplies the expert's input.
    """

    def __init__(
        self, shapes: Mapping[str, tuple[int, ...]], whole: nn.Module, *, scales_inputs: bool
    ) -> None:
        super().__init__()
        self._scales_inputs = scales_inputs
        for name in [path.removesuffix(".weight") for path in shapes if path.endswith(".weight")]:
            rows, columns = shapes[f"{name}.weight"]
            kind = RoutedLinear if name == "down_proj" else nn.Linear
            bias = f"{name}.bias" in shapes
            self.add_module(name, kind(columns, rows, bias=bias, device="meta"))
        self._whole = [whole]  # in a list: its parameters are none of this module's

    def _inner(self, hidden_RH: torch.Tensor) -> torch.Tensor:
        """Return the activations of the channels, ``[R, C]``."""
        own, whole = cast(Any, self), cast(Any, self._whole[0])
        if hasattr(whole, "_apply_gate") and hasattr(self, "gate_up_proj"):
            inner_RC = whole._apply_gate(own.gate_up_proj(hidden_RH))
        elif hasattr(self, "gate_up_proj"):
            gate_RC, up_RC = own.gate_up_proj(hidden_RH).chunk(2, dim=-1)
            inner_RC = whole.act_fn(gate_RC) * up_RC
        else:
            inner_RC = whole.act_fn(own.gate_proj(hidden_RH)) * own.up_proj(hidden_RH)
        return cast(torch.Tensor, inner_RC)

    def forward(
        self, hidden_RH: torch.Tensor, weight_R: torch.Tensor, tokens_R: torch.Tensor
    ) -> torch.Tensor:
        """Return the expert's weighted output for these tokens, ``[R, H]``."""
        if self._scales_inputs:
            inner_RC = self._inner(hidden_RH * weight_R[:, None])
        else:
            inner_RC = (self._inner(hidden_RH) * weight_R[:, None]).to(hidden_RH.dtype)
        down_proj = cast(RoutedLinear, self.down_proj)
        down_proj.tokens_R, down_proj.weight_R = tokens_R, weight_R
        try:
            return cast(torch.Tensor, down_proj(inner_RC))
        finally:
            down_proj.tokens_R = down_proj.weight_R = None


class RoutedExperts(nn.Module):
    """A layer's experts.

    An expert whose weights are not streamed was dropped. The router's rows are the others in order.

    Args:
        shapes: for each expert, see :class:`_Expert`.
        whole: Hugging Face's module of all experts.
        scales_inputs: the router's weight multiplies the experts' inputs.
    """

    def __init__(
        self,
        shapes: Iterable[Mapping[str, tuple[int, ...]]],
        whole: nn.Module,
        *,
        scales_inputs: bool = False,
    ) -> None:
        super().__init__()
        for expert, own in enumerate(shapes):
            self.add_module(str(expert), _Expert(own, whole, scales_inputs=scales_inputs))

    def forward(
        self, hidden_TH: torch.Tensor, chosen_TK: torch.Tensor, weight_TK: torch.Tensor
    ) -> torch.Tensor:
        """Return the sum of each token's experts, ``[T, H]``.

        An expert without tokens runs too, so that hooks on its input see that there are none.
        """
        result_TH = torch.zeros_like(hidden_TH)
        experts = cast(list[_Expert], list(self.children()))
        alive = [e for e in experts if not cast(RoutedLinear, e.down_proj).weight.is_meta]
        for row, expert in enumerate(alive):
            tokens_R, at_R = (chosen_TK == row).nonzero(as_tuple=True)
            added_RH = expert(hidden_TH[tokens_R], weight_TK[tokens_R, at_R], tokens_R)
            result_TH.index_add_(0, tokens_R, added_RH.to(result_TH.dtype))
        return result_TH


def split_experts(model: nn.Module, spec: ModelSpec) -> None:
    """Replace each layer's experts by :class:`RoutedExperts`, and limit the router's ``top_k``.

    ``top_k`` is the config's value, or the number of remaining experts if it is smaller.

    Args:
        model: Hugging Face's model on the meta device.
        spec: its description; layers may have different numbers of experts.
    """
    rule = spec.family.experts
    if rule is None:
        return
    for layer in range(spec.layers):
        prefix = spec.prefix(layer)
        shapes: dict[str, dict[str, tuple[int, ...]]] = {}
        if not any(group.expert is not None for group in spec.table.of_layer(layer)):
            continue
        for name, shape in spec.layer_tensors[layer].items():
            if name.startswith(f"{rule.module}."):
                expert, _, own = name.removeprefix(f"{rule.module}.").partition(".")
                shapes.setdefault(expert, {})[own] = shape
        whole = model.get_submodule(prefix + rule.module)
        ordered = [shapes[str(expert)] for expert in range(len(shapes))]
        routed = RoutedExperts(ordered, whole, scales_inputs=rule.scales_inputs)
        model.set_submodule(prefix + rule.module, routed)
        if rule.scales_inputs:
            _route_to_chosen(model.get_submodule(prefix + rule.module.rpartition(".")[0]))
        path = prefix + rule.router.rpartition(".")[0]
        router, owner = map(model.get_submodule, (path, path.rpartition(".")[0]))
        clamp = _clamp_chosen(spec.experts_chosen, owner, rule.chosen_key)
        router.register_forward_pre_hook(clamp)


def _route_to_chosen(mixture: nn.Module) -> None:
    """Send tokens to their experts alone; Hugging Face's module multiplies all others by zero."""
    own = cast(Any, mixture)

    def forward(hidden_BSH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        hidden_TH = hidden_BSH.flatten(0, -2)
        scores_TE, logits_TE = own.router(hidden_TH)
        weight_TK, chosen_TK = scores_TE.topk(own.router.top_k, dim=-1)
        routed_TH = own.experts(hidden_TH, chosen_TK, weight_TK)
        return routed_TH.add_(own.shared_expert(hidden_TH)), logits_TE

    own.forward = forward


def _clamp_chosen(chosen: int, owner: nn.Module, key: str) -> Callable[[nn.Module, Any], None]:
    """Return a hook that limits the number of experts of a token to those that are left.

    Args:
        chosen: the config's number.
        owner: the module of the router's module; it may read the number from its config.
        key: key of the number in that config.
    """

    def clamp(router: nn.Module, _: Any) -> None:
        experts, config = len(cast(torch.Tensor, router.weight)), getattr(owner, "config", None)
        number = min(chosen, experts)
        for name, value in (("top_k", number), ("num_experts", experts)):
            setattr(router, name, value)
        if getattr(config, key, number) != number:
            changed = copy.copy(config)
            setattr(changed, key, number)
            owner.config = cast(Any, changed)

    return clamp


@dataclass(frozen=True)
class CapturedExperts:
    """The output of a layer with experts, and the inputs of their output projections.

    Attributes:
        result_BSH: the layer's output.
        inputs: name of each requested output projection -> its input ``[R, C]``, the tokens of its
            rows (int64 ``[R]``), and the router's weights of these tokens ``[R]``.
        weights_T: sum of each token's router weights.
        sum_TH: sum of each token's experts; None unless it was asked for.
    """

    result_BSH: torch.Tensor
    inputs: dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
    weights_T: torch.Tensor
    sum_TH: torch.Tensor | None = None

    def outputs(self, parameters: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield name and weighted output ``[R, H]`` of each requested projection."""
        for name, (input_RC, _, weight_R) in self.inputs.items():
            output_RH = linear(input_RC, parameters[f"{name}.weight"])
            bias_H = parameters.get(f"{name}.bias")
            yield name, output_RH if bias_H is None else _with_bias(output_RH, weight_R, bias_H)


def capture_experts(
    module: nn.Module,
    parameters: Mapping[str, torch.Tensor],
    hidden_BSH: torch.Tensor,
    kwargs: Mapping[str, Any],
    rule: Experts,
    projections: Iterable[str],
    *,
    keep_sum: bool = False,
) -> CapturedExperts:
    """Run the layer and capture what its experts read.

    Args:
        module: The layer, empty of weights.
        parameters: Its weights by name.
        hidden_BSH: Inputs of the layer.
        kwargs: Further arguments of its forward.
        rule: The family's description of its experts.
        projections: Paths of the experts' output projections.
        keep_sum: Keep the sum of each token's experts, too.

    Returns:
        The layer's output, the inputs of the named projections with the tokens that they belong to,
        and the sum of each token's router weights.
    """
    inputs = dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]()
    sums: list[torch.Tensor] = []
    results: list[torch.Tensor] = []

    def added(_: nn.Module, args: Any, result_TH: torch.Tensor) -> None:
        results.append(result_TH.clone())

    def routed(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        sums.append(args[2].sum(-1))

    def keep(projection: str) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
        def hook(linear: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            assert isinstance(linear, RoutedLinear)
            assert linear.tokens_R is not None and linear.weight_R is not None
            inputs[projection] = (args[0], linear.tokens_R, linear.weight_R)

        return hook

    with ExitStack() as stack:
        hooks: list[tuple[str, Callable[..., None]]] = [(rule.module, routed)]
        for path, hook in [*hooks, *((name, keep(name)) for name in projections)]:
            stack.callback(module.get_submodule(path).register_forward_pre_hook(hook).remove)
        if keep_sum:
            experts = module.get_submodule(rule.module)
            stack.callback(experts.register_forward_hook(added).remove)
        output = functional_call(module, dict(parameters), (hidden_BSH,), dict(kwargs))
    result_BSH = output[0] if isinstance(output, tuple) else output
    return CapturedExperts(result_BSH, inputs, sums[0], results[0] if keep_sum else None)


def spread(values_RC: torch.Tensor, tokens_R: torch.Tensor, tokens: int) -> torch.Tensor:
    """Return ``[T, C]`` with an expert's rows at their tokens' places and zeros elsewhere."""
    full_TC = values_RC.new_zeros(tokens, values_RC.shape[-1])
    return full_TC.index_copy_(0, tokens_R, values_RC)
