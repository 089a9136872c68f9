"""Calling one of Hugging Face's layers with streamed parameters.

In: a layer module on the meta device, its parameters, hidden states. Out: the layer's output, or
the input of one of its output projections. Masks enter as hooks on those inputs: zeroing them
equals removing the units. Holds one micro-batch's activations.

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

# Sees (and may change in place or replace) the input of an output projection.
InputHook = Callable[[torch.Tensor], torch.Tensor | None]


def call_layer(
    module: nn.Module,
    parameters: Parameters,
    hidden_BSH: torch.Tensor,
    kwargs: Mapping[str, Any],
    hooks: Mapping[str, InputHook] | None = None,
) -> torch.Tensor:
    """The layer's output ``[B, S, H]``.

    Args:
        module: Hugging Face's layer, on the meta device.
        parameters: name inside the layer -> tensor.
        hidden_BSH: the layer's input; not changed.
        kwargs: what the model calls this layer with.
        hooks: name of an output projection -> hook on its input.
    """
    with _hooked(module, hooks or {}, hidden_BSH.shape[:2]):
        output = functional_call(module, parameters, (hidden_BSH,), dict(kwargs))
    result: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return result


class _CapturedError(Exception):
    """Ends a layer's forward once the wanted input has been seen."""


def capture_input(
    module: nn.Module,
    parameters: Parameters,
    hidden_BSH: torch.Tensor,
    kwargs: Mapping[str, Any],
    projection: str,
) -> torch.Tensor:
    """The input ``[B, S, C]`` of one output projection; what follows it is not computed."""
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
    """What a layer gave, and what was asked for on the way.

    Attributes:
        result_BSH: the layer's output.
        outputs: of the projections that were named.
        input_BSH: of the module that was named.
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
    """The layer's output, those of some of its projections, and the input of one more, if named."""
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

    The sublayer is the module that owns the projection (``self_attn`` of ``self_attn.o_proj``); a
    projection that the layer itself owns is replaced alone, what stands before it is computed.

    Args:
        module: the layer.
        projection: the sublayer's output projection.
        output_BSH: of the projection.
        returns_tuple: attention modules of transformers return (output, weights), FFN modules the
            output.
    """
    owner = projection.rpartition(".")[0]
    sublayer = module.get_submodule(owner or projection)
    given = (output_BSH, None) if owner and returns_tuple else output_BSH
    # Shadows the class's forward.
    if owner:
        sublayer.forward = lambda *args, **kwargs: given
    else:
        sublayer.forward = lambda value: output_BSH.view(*value.shape[:-1], -1)
    try:
        yield
    finally:
        del sublayer.forward


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
        if tokens_R is not None:  # a hook may have changed it where it lies, too
            changed = input_TC if changed is None else changed
            return (changed.reshape(-1, changed.shape[-1])[tokens_R], *args[1:])
        return None if changed is None else (changed.view_as(args[0]), *args[1:])

    return prehook


def _of_all_tokens(
    module: nn.Module, value: torch.Tensor, items: torch.Size
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """An expert's input or output with zeros for the tokens that it is not given, and which it is.

    What any other module is given is that of all tokens already.
    """
    tokens_R = module.tokens_R if isinstance(module, RoutedLinear) else None
    if tokens_R is None:
        return value, None
    return spread(value, tokens_R, items.numel()), tokens_R


def _unflattened(value: torch.Tensor, items: torch.Size) -> torch.Tensor:
    """``[B, S, ...]``, where a layer works on ``[B * S, ...]`` too; the same memory."""
    return value if value.shape[:2] == items else value.view(*items, -1)
