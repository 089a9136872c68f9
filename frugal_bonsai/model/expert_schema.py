"""The schema of experts in a family's table: their modules, their router, their form in files.

``family_schema.py`` has the rest of a table.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class Stack:
    """A tensor in which some checkpoints hold a part of all experts of a layer, one after another.

    It is read and written expert by expert.

    Attributes:
        tensor: name inside the layer, in the checkpoint. Dimension 0 counts the experts.
        parts: names inside the layer of the tensors of one expert, ``{expert}``, that divide its
            rows evenly.
        transposed: an expert's weight is stored as ``[in, out]``; it is one part then.
    """

    tensor: str
    parts: tuple[str, ...]
    transposed: bool = False


# Checkpoints that hold what the modules of transformers hold.
STACKS = (
    Stack(
        tensor="mlp.experts.gate_up_proj",
        parts=("mlp.experts.{expert}.gate_proj.weight", "mlp.experts.{expert}.up_proj.weight"),
    ),
    Stack(tensor="mlp.experts.down_proj", parts=("mlp.experts.{expert}.down_proj.weight",)),
)


@dataclass(frozen=True, kw_only=True)
class Experts:
    """The experts of a family's layers. Each expert is an FFN.

    Attributes:
        module: name inside the layer of the module that computes all experts. Its forward takes
            the tokens, the indices of each token's experts and their weights, and returns the
            weighted sum.
        router: name inside the layer of the router's weight, which has one row per expert. The
            router's module has the number of experts per token as ``top_k``.
        router_bias: name inside the layer of a tensor with one number per expert, in its last
            dimension.
        count_keys: config keys for the number of experts. A pruned config states those that its
            source states.
        chosen_key: config key for the number of experts per token.
        chosen_default: number of experts per token if the config does not state it.
        stacks: tensors of all experts of a layer, which a checkpoint may have in place of a tensor
            for each expert.
        stored_parts: parts of the experts' tensor names that differ in checkpoints: the model's ->
            the checkpoint's. Layers without experts may use the same words otherwise.
        whole_channels: reason why the experts keep their channels and can only be removed whole;
            None if channels are units.
        dense_key: config key for the width of the FFN in layers without experts, which stays
            whole; None if every layer has experts.
        dense_beside: each layer has that FFN, beside its experts.
        least: number of experts that the router needs, in each group if it has groups.
        scales_inputs: the router's weight multiplies what an expert reads, not what it returns. The
            module above :attr:`module` then has a ``router`` and a ``shared_expert``, and returns
            its output and the router's logits.
        groups_key: config key for the number of groups among which the router chooses first. Each
            has the same number of experts, which follow one another.
        chosen_groups_key: config key for the number of groups that it chooses.
    """

    module: str = "mlp.experts"
    router: str = "mlp.gate.weight"
    router_bias: str | None = None
    count_keys: tuple[str, ...] = ("num_experts", "num_local_experts")
    chosen_key: str = "num_experts_per_tok"
    chosen_default: int = 8
    stacks: tuple[Stack, ...] = STACKS
    stored_parts: Mapping[str, str] = field(default_factory=dict)
    whole_channels: str | None = None
    dense_key: str | None = None
    dense_beside: bool = False
    least: int = 1
    scales_inputs: bool = False
    groups_key: str = "n_group"
    chosen_groups_key: str = "topk_group"

    @property
    def router_tensors(self) -> tuple[str, ...]:
        """Names inside the layer of the tensors with one row for each expert."""
        return (self.router,) if self.router_bias is None else (self.router, self.router_bias)

    def stacked_name(self, name: str) -> str:
        """Return the name of the tensor of all experts that holds an expert's tensor.

        Args:
            name: name of the expert's tensor; anything may precede its name inside the layer.
        """
        for stack in self.stacks:
            for part in stack.parts:
                before, after = part.split("{expert}")
                if before in name and name.endswith(after):
                    return name[: name.index(before)] + stack.tensor
        raise ValueError(f"{name!r} belongs to no stack")
