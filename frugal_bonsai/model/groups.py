"""Build the unit groups of a model from its config and tensor shapes.

In: a :class:`ConfigReader` and the shape of every tensor in the checkpoint. Out: one
:class:`UnitGroup` for the attention and one for the FFN, or for each expert, of every layer. The
shapes must be those that the config implies. Reads no weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from frugal_bonsai.errors import CheckpointError
from frugal_bonsai.model.config_reader import ConfigReader
from frugal_bonsai.model.family_schema import Family
from frugal_bonsai.model.units import ATTENTION, FFN, UnitGroup, UnitSlice

Shapes = Mapping[str, tuple[int, ...]]


def split_by_layer(
    family: Family, shapes: Shapes, layers: int
) -> tuple[tuple[Shapes, ...], Shapes]:
    """Split the tensors of a checkpoint by layer.

    Returns:
        For each layer, the shapes of its tensors by their names inside the layer, without those
        that no model reads; and the shapes of all tensors outside the layers.
    """
    others, by_layer = dict(shapes), list[Shapes]()
    for layer in range(layers):
        prefix = family.layer_prefix.format(layer=layer)
        inside = [name for name in others if name.startswith(prefix)]
        taken = {name: tuple(others.pop(name)) for name in inside}
        by_layer.append(
            {
                name.removeprefix(prefix): shape
                for name, shape in taken.items()
                if family.is_read(name)
            }
        )
    return tuple(by_layer), {name: tuple(shape) for name, shape in others.items()}


class GroupBuilder:
    """Build unit groups and check the shapes of their tensors.

    Args:
        sizes: reads the model's config.
        shapes: full tensor name -> shape.
    """

    def __init__(self, sizes: ConfigReader, shapes: Shapes) -> None:
        self._sizes, self._shapes, self._family = sizes, shapes, sizes.family
        self._hidden = sizes.hidden
        head_dim, query = sizes.head_dim, sizes.query_heads_per_group() * sizes.head_dim
        # Rows of one unit by the names that a family's table has for them; see ``Part.width``.
        widths = {"query": query, "head": head_dim, "group": query + 2 * head_dim}
        self._widths = {**widths, "heads": query // head_dim, "pair": 2, "one": 1}

    def shape_of(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor that the architecture needs.

        Raises:
            CheckpointError: the checkpoint does not have it.
        """
        if name not in self._shapes:
            raise CheckpointError(
                f"{self._sizes.source}: the checkpoint has no tensor {name!r}, which this "
                "architecture needs"
            )
        return tuple(self._shapes[name])

    def layer_groups(self, layer: int) -> list[UnitGroup]:
        """Return the groups of one layer: attention, then the FFN or its experts.

        Raises:
            CheckpointError: a tensor is missing, or its shape contradicts the config.
        """
        if self._family.attention_parts:
            groups = [self._group(layer, ATTENTION, self._sizes.kv_heads(layer))]
        else:
            groups = [self._whole_mixer(layer)]
        channels = self._sizes.ffn_channels(layer)
        if self._family.experts is None:
            return [*groups, self._group(layer, FFN, channels)]
        experts = self._sizes.experts(layer)
        prefix = self._family.layer_prefix.format(layer=layer)
        routers = [prefix + name for name in self._family.experts.router_tensors]
        if self._family.experts.dense_key is not None and routers[0] not in self._shapes:
            return groups  # an ordinary FFN, which stays whole
        self._require_shape(routers[0], (experts, self._hidden))
        for name in routers[1:]:  # some have a dimension before that of the experts
            one = (1,) * (len(self.shape_of(name)) - 1)
            self._require_shape(name, (*one, experts))
        axes = [0, *(len(self.shape_of(name)) - 1 for name in routers[1:])]
        own = self._hidden + len(routers) - 1
        for expert in range(experts):
            group = self._group(layer, FFN, channels, expert)
            # The bias of an expert's output has no rows of units; it goes with the expert.
            bias = self._shapes.get(f"{group.output_weight.removesuffix('.weight')}.bias", (0,))
            rows = [
                UnitSlice(tensor=name, axis=axis, width=1, start=expert, joint=True)
                for name, axis in zip(routers, axes, strict=True)
            ]
            slices = (*group.slices, *rows)
            groups.append(replace(group, slices=slices, joint_parameters=own + bias[0]))
        return groups

    def _whole_mixer(self, layer: int) -> UnitGroup:
        """Return the group of one unit, which stays, of a layer's attention or what replaces it."""
        prefix = self._family.layer_prefix.format(layer=layer)
        weights = {f"{prefix}{mixer.output}.weight": mixer for mixer in self._family.mixers}
        weight = next((name for name in weights if name in self._shapes), next(iter(weights)))
        hidden, columns = self.shape_of(weight)
        return UnitGroup(
            layer=layer,
            kind=ATTENTION,
            count=1,
            unit_parameters=hidden * columns,
            slices=(UnitSlice(tensor=weight, axis=1, width=columns),),
            output=weights[weight].output,
            output_weight=weight,
            columns_per_unit=columns,
            removable=False,
        )

    def _group(self, layer: int, kind: str, count: int, expert: int | None = None) -> UnitGroup:
        """Return the group of one kind in one layer, or of one expert."""
        family, prefix = self._family, self._family.layer_prefix.format(layer=layer)
        parts, output = family.attention_parts, family.attention_output
        if kind == FFN:
            parts, output = family.ffn_parts, family.ffn_output.format(expert=expert)
        slices, parameters, shapes = [], 0, dict[str, tuple[int, ...]]()
        for part in parts:
            name = prefix + part.tensor.format(expert=expert)
            if name not in self._shapes and not part.required:
                continue
            width = self._widths[part.width]
            start = count * sum(self._widths[before] for before in part.after)
            slices.append(UnitSlice(tensor=name, axis=part.axis, width=width, start=start))
            extent = start + count * width  # in a fused tensor, the last part's is the tensor's
            if len(self.shape_of(name)) == 1:
                parameters += width
                shapes[name] = (extent,)
            else:
                parameters += width * self._hidden
                shapes[name] = (self._hidden, extent) if part.axis else (extent, self._hidden)
        for name, shape in shapes.items():
            self._require_shape(name, shape)
        weight = f"{prefix}{output}.weight"
        return UnitGroup(
            layer=layer,
            kind=kind,
            count=count,
            unit_parameters=parameters,
            slices=tuple(slices),
            output=output,
            output_weight=weight,
            columns_per_unit=next(piece.width for piece in slices if piece.tensor == weight),
            expert=expert,
        )

    def _require_shape(self, name: str, expected: tuple[int, ...]) -> None:
        """Check that a tensor has the shape that the config implies."""
        found = self.shape_of(name)
        if found != expected:
            raise CheckpointError(
                f"{self._sizes.source}: tensor {name} has shape {list(found)}, expected "
                f"{list(expected)} from the config"
            )
