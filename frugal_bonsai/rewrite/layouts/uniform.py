"""Layout ``uniform``: the same widths in every layer.

In: a model, its mask and a folder. Out: the source's ``config.json`` with new sizes. The output
needs no custom code and loads wherever the architecture loads. Holds the config.
"""

from __future__ import annotations

from pathlib import Path

from frugal_bonsai.checkpoint.commit import write_json
from frugal_bonsai.checkpoint.folder import CONFIG_FILE
from frugal_bonsai.errors import OptionError
from frugal_bonsai.model.family import ModelSpec
from frugal_bonsai.model.layout import LayoutRules, heads_fit
from frugal_bonsai.model.units import FFN, KeepMask
from frugal_bonsai.rewrite.layouts.widths import equal_layers_config, layer_widths


def write_config(spec: ModelSpec, mask: KeepMask, rules: LayoutRules, folder: Path) -> None:
    """Write ``config.json`` with the numbers of heads and FFN channels of every layer.

    Raises:
        OptionError: the layers keep different numbers of units, or the architecture's config class
            refuses the number of heads. The text names the layer, the kind and the number.
        OutputError: the file cannot be written.
    """
    widths = layer_widths(spec, mask)[0]
    _require_equal(spec, mask)
    heads = widths.get(spec.family.heads_key, spec.heads)
    if not rules.heads_fit(spec, heads):
        kept = widths[spec.family.kv_heads_key]
        raise OptionError(
            f"uniform layout: layer 0 keeps {kept} attention units, which is {heads} query heads; "
            f"{spec.family.model_type} demands that {spec.family.hidden_key} ({spec.hidden}) is a "
            f"multiple of {spec.family.heads_key}. Legal numbers of units: {_legal(spec)}; or "
            "take --layout per-layer, or --as-mistral"
        )
    write_json(folder / CONFIG_FILE, spec.output_config(equal_layers_config(spec, widths)))


def _require_equal(spec: ModelSpec, mask: KeepMask) -> None:
    """Check that all kept layers keep the same numbers of units and experts."""
    whole = {} if spec.family.experts is None else {"expert": mask.experts()}
    for kind, counts in {**whole, **mask.counts()}.items():
        layers = mask.layers_with(FFN if kind == "expert" else kind)
        first = layers[0]
        for layer, count in enumerate(counts):
            if count != counts[first] and layer in layers:
                raise OptionError(
                    f"uniform layout: layer {layer} keeps {count} {kind} units, layer {first} "
                    f"keeps {counts[first]}; keep the same number in every layer, or take --layout "
                    "per-layer"
                )


def _legal(spec: ModelSpec) -> str:
    """Return the legal numbers of KV groups as text for an error."""
    per_group = spec.query_heads_per_group
    return ", ".join(str(n) for n in range(1, spec.kv_heads + 1) if heads_fit(spec, n * per_group))
