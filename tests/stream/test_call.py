"""Calling one of Hugging Face's layers with streamed parameters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import BIASES, CPU, VARIANTS, random_windows, relative, tiny_llama
from torch import nn

from frugal_bonsai.stream.call import call_layer, capture_input, capture_outputs, replaced
from frugal_bonsai.stream.skeleton import Skeleton

O_PROJ, DOWN_PROJ = "self_attn.o_proj", "mlp.down_proj"


@dataclass
class Layer:
    """Layer 1 on the meta device, its parameters, and Hugging Face's own layer 1."""

    module: nn.Module
    parameters: dict[str, torch.Tensor]
    kwargs: dict[str, Any]
    hidden: torch.Tensor
    model: Any

    def oracle(self) -> tuple[torch.Tensor, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """Output, and inputs and outputs of every projection of Hugging Face's layer."""
        inputs: dict[str, torch.Tensor] = {}
        outputs: dict[str, torch.Tensor] = {}
        layer = self.model.model.layers[1]

        def keep(name: str) -> Callable[..., None]:
            def hook(_: Any, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
                inputs[name], outputs[name] = args[0].clone(), output.clone()

            return hook

        handles = [
            layer.get_submodule(name).register_forward_hook(keep(name))
            for name in (O_PROJ, DOWN_PROJ)
        ]
        with torch.no_grad():
            output = layer(self.hidden, **self.kwargs)
        for handle in handles:
            handle.remove()
        return output[0] if isinstance(output, tuple) else output, inputs, outputs


def _layer(folder: Path, changes: dict[str, Any]) -> Layer:
    tiny = tiny_llama(folder, **changes)
    skeleton = Skeleton(tiny.checkpoint, tiny.spec, device=CPU, dtype=torch.float32)
    prefix = tiny.spec.prefix(1)
    names = tiny.spec.layer_tensors[1]
    return Layer(
        module=skeleton.layers[1],
        parameters={name: tiny.checkpoint.read(prefix + name) for name in names},
        kwargs=skeleton.layer_kwargs(6)[1],
        hidden=skeleton.embed(random_windows(3, 6)).clone(),
        model=tiny.hugging_face(),
    )


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_layer_and_captures_equal_hugging_faces(changes: dict[str, Any], tmp_path: Path) -> None:
    layer = _layer(tmp_path / "m", changes)
    expected, inputs, outputs = layer.oracle()
    given = (layer.module, layer.parameters, layer.hidden, layer.kwargs)
    before = layer.hidden.clone()
    with torch.inference_mode():
        assert relative(call_layer(*given), expected) < 1e-6
        for name in (O_PROJ, DOWN_PROJ):
            assert relative(capture_input(*given, name), inputs[name]) < 1e-6
            seen = capture_outputs(*given, [name], input_of=DOWN_PROJ)
            assert relative(seen.result_BSH, expected) < 1e-6
            assert seen.input_BSH is not None
            assert relative(seen.input_BSH, inputs[DOWN_PROJ]) < 1e-6
            assert seen.outputs.keys() == {name}
            assert relative(seen.outputs[name], outputs[name]) < 1e-6
    assert torch.equal(layer.hidden, before), "the layer's input was changed"


def _zero_in_place(input_BSC: torch.Tensor) -> None:
    input_BSC.zero_()


def test_hooks_change_inputs_in_place_or_by_replacing(tmp_path: Path) -> None:
    layer = _layer(tmp_path / "m", BIASES)
    given = (layer.module, layer.parameters, layer.hidden, layer.kwargs)
    with torch.inference_mode():
        whole = call_layer(*given)
        zeroed = call_layer(*given, {O_PROJ: torch.zeros_like, DOWN_PROJ: _zero_in_place})
        again = call_layer(*given)
    # What is left of both sublayers are the biases of their output projections.
    biases = layer.parameters[f"{O_PROJ}.bias"] + layer.parameters[f"{DOWN_PROJ}.bias"]
    assert relative(zeroed, layer.hidden + biases) < 1e-6
    assert torch.equal(whole, again), "a hook was left behind"


def test_capture_stops_before_the_projection(tmp_path: Path) -> None:
    layer = _layer(tmp_path / "m", {})
    calls: list[str] = []
    handles = [
        layer.module.get_submodule(name).register_forward_hook(lambda *_, n=name: calls.append(n))
        for name in ("self_attn.q_proj", O_PROJ, "mlp.up_proj")
    ]
    with torch.inference_mode():
        capture_input(layer.module, layer.parameters, layer.hidden, layer.kwargs, O_PROJ)
    assert calls == ["self_attn.q_proj"]
    for handle in handles:
        handle.remove()
    assert not layer.module.get_submodule(O_PROJ)._forward_pre_hooks


def test_error_in_a_hook_removes_the_hooks(tmp_path: Path) -> None:
    layer = _layer(tmp_path / "m", {})

    def fail(_: torch.Tensor) -> None:
        raise RuntimeError("from the hook")

    with pytest.raises(RuntimeError, match="from the hook"):
        call_layer(layer.module, layer.parameters, layer.hidden, layer.kwargs, {DOWN_PROJ: fail})
    assert not layer.module.get_submodule(DOWN_PROJ)._forward_pre_hooks


@pytest.mark.parametrize("projection", [O_PROJ, DOWN_PROJ])
def test_replaced_sublayer_returns_what_it_is_told(projection: str, tmp_path: Path) -> None:
    layer = _layer(tmp_path / "m", BIASES)
    given = (layer.module, layer.parameters, layer.hidden, layer.kwargs)
    with torch.inference_mode():
        seen = capture_outputs(*given, [projection])
        whole, projected = seen.result_BSH, seen.outputs[projection]
        in_attention = {"returns_tuple": projection == O_PROJ}
        with replaced(layer.module, projection, projected, **in_attention):
            assert relative(call_layer(*given), whole) < 1e-6
        with replaced(layer.module, projection, torch.zeros_like(projected), **in_attention):
            without = call_layer(*given)
        zero = {projection: lambda x: torch.zeros_like(x)}
        bias = layer.parameters[f"{projection}.bias"]
        layer.parameters[f"{projection}.bias"] = torch.zeros_like(bias)
        expected = call_layer(*given, zero)
        layer.parameters[f"{projection}.bias"] = bias
        assert relative(without, expected) < 1e-6
        assert relative(call_layer(*given), whole) == 0, "the sublayer stayed replaced"
