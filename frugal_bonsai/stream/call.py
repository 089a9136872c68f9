"""Calling one of Hugging Face's layers with streamed parameters.

In: a layer module on the meta device, its parameters, hidden states. Out: the layer's output, or
the input of one of its output projections. Masks enter as hooks on those inputs: zeroing them
equals removing the units. Holds one micro-batch's activations.

Shape suffixes: B windows of a micro-batch, S tokens, H hidden, C columns of an output projection.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

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
    with _hooked(module, hooks or {}):
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


def capture_output(
    module: nn.Module,
    parameters: Parameters,
    hidden_BSH: torch.Tensor,
    kwargs: Mapping[str, Any],
    projection: str,
    *,
    input_of: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """The layer's output, the output of one projection, and the input of another one, if named."""
    outputs: list[torch.Tensor] = []
    inputs: list[torch.Tensor] = []

    def keep(_: nn.Module, __: Any, output_BSH: torch.Tensor) -> None:
        outputs.append(output_BSH)

    handle = module.get_submodule(projection).register_forward_hook(keep)
    hooks: dict[str, InputHook] = {} if input_of is None else {input_of: inputs.append}
    try:
        result_BSH = call_layer(module, parameters, hidden_BSH, kwargs, hooks)
    finally:
        handle.remove()
    return result_BSH, outputs[0], inputs[0] if inputs else None


@contextmanager
def replaced(module: nn.Module, projection: str, output_BSH: torch.Tensor) -> Iterator[None]:
    """Within the context the projection's sublayer returns ``output_BSH`` without computing.

    The sublayer is the module that owns the projection (``self_attn`` of ``self_attn.o_proj``).
    """
    sublayer = module.get_submodule(projection.rpartition(".")[0])
    given = (output_BSH, None) if _returns_tuple(sublayer) else output_BSH
    sublayer.forward = lambda *args, **kwargs: given  # shadows the class's forward
    try:
        yield
    finally:
        del sublayer.forward


def _returns_tuple(sublayer: nn.Module) -> bool:
    """Attention modules of transformers return (output, weights), FFN modules the output."""
    return hasattr(sublayer, "layer_idx") or hasattr(sublayer, "num_key_value_groups")


@contextmanager
def _hooked(module: nn.Module, hooks: Mapping[str, InputHook]) -> Iterator[None]:
    handles = []
    try:
        for name, hook in hooks.items():
            handles.append(module.get_submodule(name).register_forward_pre_hook(_as_prehook(hook)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _as_prehook(hook: InputHook) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], Any]:
    def prehook(_: nn.Module, args: tuple[torch.Tensor, ...]) -> Any:
        changed = hook(args[0])
        return None if changed is None else (changed, *args[1:])

    return prehook
