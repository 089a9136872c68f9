"""Layout ``per-layer``: each layer has its own widths.

In: a model, its mask and a folder. Out: ``config.json`` with transformers' key
``per_layer_config``, and the bundled model file that builds the layers from it. transformers 5.23
accepts the key but has no models for it: without remote code it raises an error and does not build
wrong widths. Holds the config.
"""

from __future__ import annotations

from pathlib import Path

from frugal_bonsai.checkpoint.commit import write_bytes, write_json
from frugal_bonsai.checkpoint.folder import CONFIG_FILE
from frugal_bonsai.model.default_config import default_config
from frugal_bonsai.model.family import ModelSpec
from frugal_bonsai.model.family_schema import HEAD_DIM
from frugal_bonsai.model.layout import EXPERT_TILE, LayoutRules, heads_fit
from frugal_bonsai.model.units import KeepMask
from frugal_bonsai.rewrite.layouts.bundled import FILE, find_bundled, read_bundled
from frugal_bonsai.rewrite.layouts.widths import layer_widths, shared_config


def write_config(spec: ModelSpec, mask: KeepMask, rules: LayoutRules, folder: Path) -> None:
    """Write ``config.json`` and the bundled model file.

    The global widths are the largest of all layers, so that buffers sized by them are large
    enough. ``per_layer_config`` lists the differences. If there are none and the architecture
    accepts the number of heads, the config is a standard one and needs no custom code.

    Raises:
        OptionError: the mask is another model's, or leaves a layer without a unit of some kind.
        UnsupportedModelError: transformers has no causal language model of this architecture.
        OutputError: a file cannot be written.
    """
    widths = layer_widths(spec, mask)
    widest = {key: max(layer[key] for layer in widths) for key in widths[0]}
    config = shared_config(spec) | widest
    overrides = {
        str(index): {key: width for key, width in layer.items() if width != widest[key]}
        for index, layer in enumerate(widths)
        if layer != widest
    }
    if overrides:
        for index, own in _own_sizes(spec).items():
            overrides[index] = {**own, **overrides.get(index, {})}
    # transformers' own class multiplies with all experts of a layer at once.
    uneven = bool(spec.experts) and widest[spec.family.ffn_key] % EXPERT_TILE > 0
    heads = widest.get(spec.family.heads_key, spec.heads)
    if overrides or uneven or not heads_fit(spec, heads):
        bundled = find_bundled(spec.family.model_type)
        if spec.family.head_dim_key is None and spec.whole_attention is None:
            config[HEAD_DIM] = spec.head_dim
        config["architectures"] = [bundled.model_class]
        config["auto_map"] = bundled.auto_map
        if overrides:
            config["per_layer_config"] = overrides
        write_bytes(folder / FILE, read_bundled())
    write_json(folder / CONFIG_FILE, config)


def _own_sizes(spec: ModelSpec) -> dict[str, dict[str, int]]:
    """Return the sizes in which the architecture's own layers differ, by the layers' indices."""
    if not spec.family.full_attention_keys:
        return {}
    from transformers import AutoConfig

    own = AutoConfig.for_model(**default_config(spec)).to_dict().get("per_layer_config") or {}
    return {str(index): dict(sizes) for index, sizes in own.items()}
