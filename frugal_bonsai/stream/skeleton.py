"""Hugging Face's model without its weights, and the arguments with which it calls its layers.

In: a model's config. Out: layer modules on the meta device, whose parameters are passed at each
call; the model's arguments for each layer (rotary embeddings, masks); the final norm with real
weights; embedding rows looked up from disk. The model's own forward runs once with recording
proxies in place of its layers, so no forward is written here.

Memory: the final norm and one window's rotary embeddings.

Shape suffixes: B windows of a micro-batch, S tokens of a window, H hidden.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
from accelerate.utils import set_module_tensor_to_device
from torch import nn
from torch.func import functional_call

from frugal_bonsai.accelerator import to_device
from frugal_bonsai.checkpoint.reader import Checkpoint
from frugal_bonsai.errors import CheckpointError
from frugal_bonsai.model.family import ModelSpec
from frugal_bonsai.stream.empty_model import build_empty_model, record_layers

if TYPE_CHECKING:
    from transformers import Cache


class Skeleton:
    """A causal language model's modules on the meta device.

    Args:
        checkpoint: for the final norm and the embedding rows.
        spec: its description.
        device: where layers are computed.
        dtype: compute dtype.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        spec: ModelSpec,
        *,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.spec, self.device, self.dtype = spec, device, dtype
        self._checkpoint = checkpoint
        model = build_empty_model(spec)
        self._check_tensors(model)
        self._base, self.layers, self._proxies = record_layers(model, spec)
        self._load_outer(model)
        self._follow_weights()
        self._embedding = self._base.get_submodule(spec.family.embedding_module)
        # The module is called with the rows of some tokens, where an index of the whole table has
        # no meaning. It matters to gradients and initial values only.
        if isinstance(self._embedding, nn.Embedding):
            self._embedding.padding_idx = None
        self.norm = self._base.get_submodule(spec.family.norm_module)
        self._kwargs: dict[int, list[dict[str, Any]]] = {}

    def _check_tensors(self, model: nn.Module) -> None:
        """Check that the checkpoint has the model's parameters in the model's shapes, and no other.

        The family table checks the shapes of tensors that units own, because they may differ by
        layer. Unknown tensors outside the layers are found while they are loaded.

        Raises:
            CheckpointError: a tensor is missing, unknown or of another shape.
        """
        spec, where = self.spec, self._checkpoint.folder
        owned = {piece.tensor for group in spec.table.groups for piece in group.slices}
        found = dict(spec.other_tensors)
        for layer, tensors in enumerate(spec.layer_tensors):
            found |= {spec.prefix(layer) + name: shape for name, shape in tensors.items()}
        parameters = dict(model.named_parameters(remove_duplicate=False))
        buffers = model.state_dict().keys() - parameters.keys()
        for name in sorted(found.keys() - spec.other_tensors.keys() - parameters.keys() - buffers):
            raise CheckpointError(
                f"{self._checkpoint.tensors[name].file}: tensor {name!r} has no place in "
                f"{type(model).__name__} with this config.json (a bias needs attention_bias or "
                "mlp_bias there); does config.json belong to these weights?"
            )
        for name, parameter in parameters.items():
            if spec.tied and name == spec.family.head:
                continue
            if name not in found:
                raise CheckpointError(
                    f"{where}: the checkpoint has no tensor {name!r}, which "
                    f"{type(model).__name__} needs with this config.json"
                )
            if name not in owned and found[name] != tuple(parameter.shape):
                raise CheckpointError(
                    f"{where}: tensor {name!r} has shape {list(found[name])}, expected "
                    f"{list(parameter.shape)} from config.json"
                )

    def _follow_weights(self) -> None:
        """Set the number of heads in attention modules that store it from streamed weights."""
        spec, sized_by = self.spec, self.spec.family.sized_by
        if not sized_by:
            return
        owner, _, output = spec.family.attention_output.rpartition(".")
        columns = spec.query_heads_per_group * spec.head_dim

        def resize(attention: nn.Module, _: Any) -> None:
            weight_HC = cast(torch.Tensor, attention.get_submodule(output).weight)
            kv_heads = weight_HC.shape[1] // columns
            counts = {
                "kv": kv_heads,
                "query": kv_heads * spec.query_heads_per_group,
                "columns": weight_HC.shape[1],
            }
            for path, what in sized_by.items():
                inside, _, name = path.rpartition(".")
                setattr(getattr(attention, inside) if inside else attention, name, counts[what])

        for layer in self.layers:
            attention = layer.get_submodule(owner)
            if any(path.startswith("config.") for path in sized_by):
                attention.config = copy.copy(attention.config)  # one for each layer: layers differ
            attention.register_forward_pre_hook(resize)

    def _load_outer(self, model: nn.Module) -> None:
        """Load the tensors outside the layers except embedding and head; move all buffers."""
        family = self.spec.family
        for name in self.spec.other_tensors:
            if name in (family.embedding, family.head):
                continue
            try:
                value = self._checkpoint.read(name)
                set_module_tensor_to_device(
                    model, name, self.device, value=value, dtype=self.dtype, clear_cache=False
                )
            except (ValueError, AttributeError) as error:
                raise CheckpointError(
                    f"{self._checkpoint.folder}: tensor {name!r} has no place in "
                    f"{type(model).__name__}: {error}"
                ) from error
        # The layers, which proxies replace in the model, may have buffers too.
        for root in (self._base, *self.layers):
            for module in root.modules():
                for name, buffer in module.named_buffers(recurse=False):
                    if not buffer.is_meta:
                        setattr(module, name, buffer.to(self.device))

    def replace_norm(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Replace the final norm's tensors; names are the checkpoint's."""
        for name, value in tensors.items():
            parameter = nn.Parameter(value.to(self.device, self.dtype), requires_grad=False)
            setattr(self.norm, name.rpartition(".")[2], parameter)

    def embed(self, tokens_BS: torch.Tensor) -> torch.Tensor:
        """Return the first layer's input for these tokens, ``[B, S, H]`` in the compute dtype.

        Rows of the embedding are read from disk, each distinct token once. The model itself applies
        positions, scaling and everything else before its first layer.
        """
        return self._run_base(self._rows(tokens_BS))

    def layer_kwargs(self, window: int) -> list[dict[str, Any]]:
        """Return the keyword arguments of each layer's call for windows of this length."""
        if window not in self._kwargs:
            shape = (1, window, self.spec.hidden)
            self._run_base(torch.zeros(shape, dtype=self.dtype, device=self.device))
            self._kwargs = {window: [dict(proxy.kwargs) for proxy in self._proxies]}
        return self._kwargs[window]

    def new_cache(self) -> Cache:
        """Return an empty KV cache for :meth:`step`."""
        from transformers import DynamicCache

        # Layers without attention have states of other kinds, which the config tells.
        return DynamicCache(config=self._base.config if self.spec.family.other_mixers else None)

    def step(
        self, tokens_BS: torch.Tensor, position: int, cache: Cache
    ) -> tuple[torch.Tensor, list[dict[str, Any]]]:
        """Return the first layer's input and the layers' arguments for one token of each window.

        Args:
            tokens_BS: int64 ``[B, 1]``.
            position: position of these tokens.
            cache: a cache of :meth:`new_cache` that holds the tokens before them.
        """
        position_BS = torch.full((len(tokens_BS), 1), position, device=self.device)
        hidden_BSH = self._run_base(
            self._rows(tokens_BS), past_key_values=cache, position_ids=position_BS, use_cache=True
        )
        return hidden_BSH, [dict(proxy.kwargs) for proxy in self._proxies]

    def _rows(self, tokens_BS: torch.Tensor) -> torch.Tensor:
        distinct, where = torch.unique(tokens_BS.cpu(), return_inverse=True)
        rows = self._checkpoint.gather_rows(self.spec.family.embedding, distinct)
        weight = {"weight": to_device(rows, self.device).to(self.dtype)}
        # The model's own embedding module, which may scale its output, with these rows only.
        embedded = functional_call(self._embedding, weight, (to_device(where, self.device),))
        return cast(torch.Tensor, embedded)

    def _run_base(self, embedded_BSH: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        try:
            with torch.inference_mode():
                self._base(inputs_embeds=embedded_BSH, **{"use_cache": False, **kwargs})
        except OverflowError as error:  # such as a factor of the embedding
            raise CheckpointError(
                f"config.json: a number there is too large to compute with ({error}); correct it"
            ) from error
        hidden_BSH = self._proxies[0].hidden_BSH
        assert hidden_BSH is not None
        for proxy in self._proxies:
            proxy.hidden_BSH = None
        return hidden_BSH
