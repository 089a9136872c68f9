"""Check an assumed family on a small random model of the same architecture.

In: the description of a model whose family the user names (``--assume-family``). Out: the largest
difference between the logits that this package streams and those of transformers' own class, or an
error. The small model has the user's config with two layers, few heads, few channels and a small
vocabulary. It is compared dense, pruned (streamed through a mask, against what transformers loads
after the rewrite), after a reconstruction of all its units, which must not change it, and with a
scaled final norm. So names, order of rows, norms and multipliers are checked by what they compute.
Holds the small model, at most some tens of megabytes.

Shape suffixes: N windows, S tokens, V vocabulary.
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from frugal_bonsai.bonsai.reconstruction.layer_pass import ReconstructionOptions
from frugal_bonsai.bonsai.reconstruction.logit_scale import scaled_norm
from frugal_bonsai.bonsai.reconstruction.reconstruct import Reconstruction
from frugal_bonsai.checkpoint.reader import Checkpoint
from frugal_bonsai.errors import FrugalBonsaiError, UnsupportedModelError
from frugal_bonsai.memory.work import SweepLimits
from frugal_bonsai.model.canonical_names import describe_checkpoint
from frugal_bonsai.model.default_config import config_errors, default_config
from frugal_bonsai.model.drop import with_kept_layers
from frugal_bonsai.model.family import ModelSpec
from frugal_bonsai.model.layout import UNIFORM, LayoutRules, layout_rules
from frugal_bonsai.model.loadable import silent_transformers
from frugal_bonsai.model.units import KeepMask
from frugal_bonsai.rewrite.shrink import shrink
from frugal_bonsai.rewrite.verify import TOLERANCE
from frugal_bonsai.stream.engine import Engine
from frugal_bonsai.stream.source import CheckpointSource
from frugal_bonsai.stream.store import NATIVE, build_store

_VOCABULARY, _CHANNELS, _WINDOW, _SLIDING = 64, 96, 13, 5
_RECONSTRUCTED = 1e-2  # largest relative change of a weight by a reconstruction that finds no error
_CPU = torch.device("cpu")
_LIMITS = SweepLimits(
    micro_batch=2, windows_in_flight=2, resident_windows=0, head_rows=1000, head_tokens=1000
)


def check_assumption(spec: ModelSpec, *, source: str = "config.json") -> float:
    """Return the largest difference of logits, relative to the largest logit.

    Args:
        spec: the user's model.
        source: file name for error texts.

    Raises:
        UnsupportedModelError: the table does not describe the architecture.
        CheckpointError: transformers does not accept the small config.
    """
    family = spec.family
    tokens_NS = torch.randint(
        3, _VOCABULARY, (2, _WINDOW), generator=torch.Generator().manual_seed(0)
    )
    with TemporaryDirectory() as folder, silent_transformers():
        dense, pruned = Path(folder, "dense"), Path(folder, "pruned")
        pruned.mkdir()
        model = _random_model(spec)
        model.save_pretrained(dense)
        try:
            with Checkpoint.open(dense) as checkpoint:
                small = describe_checkpoint(checkpoint, assume=family.assumed)
                found = _streamed(checkpoint, small, tokens_NS)
                largest = _difference(found, model, tokens_NS)
                _require_same_targets(checkpoint, small, tokens_NS, Path(folder, "stores"))
                rules = layout_rules(small, UNIFORM, tile=1)
                mask = _mask(small, rules)
                found = _streamed(checkpoint, small, tokens_NS, mask=mask)
                shrink(checkpoint, small, mask, pruned, rules=rules)
            largest = max(largest, _difference(found, _load(pruned), tokens_NS))
        except (FrugalBonsaiError, AttributeError) as error:  # a module that is not there
            raise _wrong(spec, source, str(error)) from error
    if not largest <= TOLERANCE[torch.float32]:
        raise _wrong(
            spec,
            source,
            f"its logits differ from transformers' own by {largest:.2g} of the largest logit",
        )
    return largest


def assumption_note(spec: ModelSpec, difference: float | None) -> str:
    """Return the warning about a family that the user named with ``--assume-family``."""
    checked = "their meaning was not checked"
    if difference is not None:
        checked = (
            "a random model of two layers gives transformers' logits, dense and pruned "
            f"(largest difference {difference:.0e})"
        )
    return (
        f"ASSUMED: model_type {spec.family.model_type!r} has no table of its own and is taken for "
        f"a {spec.family.assumed}: the names of its tensors agree, {checked}; compare "
        "`frugal-bonsai eval` with a perplexity that you know"
    )


def _wrong(spec: ModelSpec, source: str, reason: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{source}: --assume-family {spec.family.assumed} does not describe model_type "
        f"{spec.family.model_type!r}, as a random model of two layers shows: {reason}; name "
        "another family, or add a table (docs/adding-a-family.md)"
    )


def _random_model(spec: ModelSpec) -> Any:
    """Return a model of transformers with random weights, in fp32."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = _small_config(spec)
    with config_errors(config):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() < 2:  # norms and biases, none of which stays one or zero
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(0.2 * noise)
            else:
                parameter.normal_(std=parameter.shape[-1] ** -0.5, generator=generator)
    return model.float().eval()


def _small_config(spec: ModelSpec) -> dict[str, Any]:
    """Return the user's config with two layers, as different as possible, and small sizes."""
    family = spec.family
    kept = {0, _other_layer(spec)}
    mask = KeepMask(spec.table).without_layers([at for at in range(spec.layers) if at not in kept])
    config = default_config(with_kept_layers(spec, mask))
    kv_heads = min(spec.kv_heads, 2)
    heads = kv_heads * min(spec.query_heads_per_group, 2)
    config |= {
        "vocab_size": _VOCABULARY,
        family.hidden_key: heads * spec.head_dim,
        family.ffn_key: min(spec.intermediate, _CHANNELS),
        family.kv_heads_key: kv_heads,
        # Behind the KV heads: some families have one key for both.
        family.heads_key: heads,
        **{f"{name}_token_id": at for at, name in enumerate(("pad", "bos", "eos"))},
    }
    if family.head_dim_key is not None:
        config[family.head_dim_key] = spec.head_dim
    for key in ("sliding_window", "attention_window_size"):
        if isinstance(config.get(key), int):
            config[key] = min(config[key], _SLIDING)
    return config


def _other_layer(spec: ModelSpec) -> int:
    """Return the first layer that differs from layer 0 in a list of the config, or the next."""
    lists = [v for v in spec.config.values() if isinstance(v, list) and len(v) == spec.layers]
    differing = (at for at in range(spec.layers) if any(own[at] != own[0] for own in lists))
    return next(differing, min(1, spec.layers - 1))


def _mask(spec: ModelSpec, rules: LayoutRules) -> KeepMask:
    """Return a mask that keeps about half of the units of each kind, not the first ones."""
    mask = KeepMask(spec.table)
    for group in spec.table.groups:
        legal = rules.legal_counts(group.kind, group.count)
        count = legal[(len(legal) - 1) // 2]
        mask.of(group)[: group.count - count] = False
    return mask


def _engine(checkpoint: Checkpoint, spec: ModelSpec) -> Engine:
    return Engine(checkpoint, spec, device=_CPU, dtype=torch.float32, limits=_LIMITS)


def _require_same_targets(
    checkpoint: Checkpoint, spec: ModelSpec, tokens_NS: torch.Tensor, folder: Path
) -> None:
    """Check that a reconstruction of the whole model, and a scaled norm, compute what they should.

    Raises:
        UnsupportedModelError: norms behind a projection, a multiplier of the residual stream, or a
            constant that the final norm adds, are not those of the table.
    """
    engine, whole = _engine(checkpoint, spec), KeepMask(spec.table)
    saved: dict[str, torch.Tensor] = {}
    reconstruction = Reconstruction(
        engine.sweep,
        ReconstructionOptions(ridge=1e-2),
        save=lambda _, refits: saved.update({n: w.clone() for n, w in refits.items()}),
    )
    store = build_store(folder, checkpoint, spec, weights=NATIVE, mask=whole)
    with engine.dense_stream(store) as dense, engine.dense_stream(store) as pruned:
        reconstruction.run(dense, pruned, tokens_NS)
    store.close()
    for name, weight in saved.items():
        source = checkpoint.read(name)
        if not float((weight - source).abs().max() / source.abs().max()) < _RECONSTRUCTED:
            raise UnsupportedModelError(
                f"a reconstruction of the whole model changes {name}, so that a norm behind it or "
                "a multiplier is not in the table"
            )
    hidden_SH = torch.randn(3, spec.hidden, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        wanted_SH = 0.5 * engine.skeleton.norm(hidden_SH)
        engine.skeleton.replace_norm(scaled_norm(checkpoint, spec, 0.5))
        found_SH = engine.skeleton.norm(hidden_SH)
    if not torch.allclose(found_SH, wanted_SH, rtol=1e-4, atol=1e-5):
        raise UnsupportedModelError("its final norm does not follow its weight as in the table")


@torch.inference_mode()
def _streamed(
    checkpoint: Checkpoint, spec: ModelSpec, tokens_NS: torch.Tensor, **source: Any
) -> torch.Tensor:
    """Return the logits ``[N, S, V]`` that this package computes."""
    engine = _engine(checkpoint, spec)
    with engine.stream(CheckpointSource(checkpoint, spec, **source)) as stream:
        hidden = engine.sweep.run(stream, tokens_NS)
        return engine.head.logits(hidden.read(slice(0, len(tokens_NS)))).clone()


@torch.inference_mode()
def _difference(found_NSV: torch.Tensor, model: Any, tokens_NS: torch.Tensor) -> float:
    """Return the largest difference from transformers' logits, relative to the largest one."""
    expected_NSV = model(tokens_NS).logits
    return float((found_NSV - expected_NSV).abs().max() / expected_NSV.abs().max())


def _load(folder: Path) -> Any:
    """Return transformers' model of the rewritten folder."""
    from transformers import AutoModelForCausalLM

    try:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    except (RuntimeError, ValueError) as error:
        raise UnsupportedModelError(
            f"transformers does not load it pruned ({str(error).splitlines()[0]}), so that tensors "
            "have parts of units that the table does not know"
        ) from error
