"""Call one of Hugging Face's layers with streamed parameters.

In: a layer module on the meta device, its parameters, hidden states. Out: the layer's output, or
the inputs and outputs of some of its projections. Masks are hooks on the inputs of output
projections: zeroing these inputs equals removing the units. Memory: one micro-batch's activations.

Shape suffixes: B windows of a micro-batch, S tokens, H hidden, C columns of an output projection.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from frugal_bonsai.stream.experts import RoutedLinear, spread
from frugal_bonsai.stream.layers import Parameters

# Receives the input of an output projection; may change it in place, or return another one.
InputHook = Callable[[torch.Tensor], torch.Tensor | None]


def call_layer(
    module: nn.Module,
    parameters: Parameters,
    hidden_BSH: torch.Tensor,
    kwargs: Mapping[str, Any],
    hooks: Mapping[str, InputHook] | None = None,
) -> torch.Tensor:
    """Return the layer's output ``[B, S, H]``.

    Args:
        module: Hugging Face's layer, on the meta device.
        parameters: name inside the layer -> tensor.
        hidden_BSH: the layer's input, which does not change.
        kwargs: keyword arguments that the model calls this layer with.
        hooks: name of an output projection -> hook on its input.
    """
    with _hooked(module, hooks or {}, hidden_BSH.shape[:2]):
        output = functional_call(module, parameters, (hidden_BSH,), dict(kwargs))
    result: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return result


class _CapturedError(Exception):
    """Ends a layer's forward as soon as an input is captured."""


def capture_input(
    module: nn.Module,
    parameters: Parameters,
    hidden_BSH: torch.Tensor,
    kwargs: Mapping[str, Any],
    projection: str,
) -> torch.Tensor:
    """Return the input ``[B, S, C]`` of one projection; the rest of the layer is not computed."""
    seen: list[torch.Tensor] = []

    def stop(input_BSC: torch.Tensor) -> None:
        seen.append(input_BSC)
        raise _CapturedError

    try:
        call_layer(module, parameters, hidden_BSH, kwargs, {projection: stop})
    except _CapturedError:
        pass
    return seen[0]


@dataclass(frozen=True)
class Captured:
    """A layer's output, and activations inside it.

    Attributes:
        result_BSH: the layer's output.
        outputs: name of each requested projection -> its output.
        input_BSH: input of the requested module.
    """

    result_BSH: torch.Tensor
    outputs: dict[str, torch.Tensor]
    input_BSH: torch.Tensor | None


def capture_outputs(
    module: nn.Module,
    parameters: Parameters,
    hidden_BSH: torch.Tensor,
    kwargs: Mapping[str, Any],
    projections: Iterable[str],
    *,
    input_of: str | None = None,
) -> Captured:
    """Run the layer; capture the outputs of some projections and the input of one module."""
    outputs: dict[str, torch.Tensor] = {}
    inputs: list[torch.Tensor] = []

    def keep(projection: str) -> Callable[[nn.Module, Any, torch.Tensor], None]:
        def hook(module: nn.Module, _: Any, output_BSH: torch.Tensor) -> None:
            output_BSH, _ = _of_all_tokens(module, output_BSH, hidden_BSH.shape[:2])
            outputs[projection] = _unflattened(output_BSH, hidden_BSH.shape[:2])

        return hook

    with ExitStack() as stack:
        for name in projections:
            handle = module.get_submodule(name).register_forward_hook(keep(name))
            stack.callback(handle.remove)
        hooks: dict[str, InputHook] = {} if input_of is None else {input_of: inputs.append}
        result_BSH = call_layer(module, parameters, hidden_BSH, kwargs, hooks)
    return Captured(result_BSH, outputs, inputs[0] if inputs else None)


@contextmanager
def replaced(
    module: nn.Module, projection: str, output_BSH: torch.Tensor, *, returns_tuple: bool
) -> Iterator[None]:
    """Within the context the projection's sublayer returns ``output_BSH`` without computing.

    The sublayer is the module that owns the projection (``self_attn`` of ``self_attn.o_proj``). A
    projection that the layer itself owns is replaced alone; the modules before it are computed.

    Args:
        module: the layer.
        projection: the sublayer's output projection.
        output_BSH: output of the projection.
        returns_tuple: return (output, None) as attention modules of transformers do; FFN modules
            return the output alone.
    """
    owner = projection.rpartition(".")[0]
    sublayer = module.get_submodule(owner or projection)
    result = (output_BSH, None) if owner and returns_tuple else output_BSH

    def forward(*args: Any, **kwargs: Any) -> Any:
        return result if owner else output_BSH.view(*args[0].shape[:-1], -1)

    with shadowed_forward(sublayer, forward):
        yield


@contextmanager
def shadowed_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Within the context the module computes ``forward`` instead of its class's forward."""
    module.forward = forward
    try:
        yield
    finally:
        del module.forward


@contextmanager
def _hooked(module: nn.Module, hooks: Mapping[str, InputHook], items: torch.Size) -> Iterator[None]:
    handles = []
    try:
        for name, hook in hooks.items():
            prehook = _as_prehook(hook, items)
            handles.append(module.get_submodule(name).register_forward_pre_hook(prehook))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _as_prehook(
    hook: InputHook, items: torch.Size
) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], Any]:
    def prehook(module: nn.Module, args: tuple[torch.Tensor, ...]) -> Any:
        input_TC, tokens_R = _of_all_tokens(module, args[0], items)
        changed = hook(_unflattened(input_TC, items))
        if tokens_R is not None:  # a hook may have changed it in place, too
            changed = input_TC if changed is None else changed
            return (changed.reshape(-1, changed.shape[-1])[tokens_R], *args[1:])
        return None if changed is None else (changed.view_as(args[0]), *args[1:])

    return prehook


def _of_all_tokens(
    module: nn.Module, value: torch.Tensor, items: torch.Size
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return an input or output for all tokens, and the tokens that an expert received.

    An expert's values are zero for the other tokens. Any other module receives all tokens; the
    second result is None then.
    """
    tokens_R = module.tokens_R if isinstance(module, RoutedLinear) else None
    if tokens_R is None:
        return value, None
    return spread(value, tokens_R, items.numel()), tokens_R


def _unflattened(value: torch.Tensor, items: torch.Size) -> torch.Tensor:
    """Return a view ``[B, S, ...]`` of a value that may be ``[B * S, ...]``."""
    return value if value.shape[:2] == items else value.view(*items, -1)
