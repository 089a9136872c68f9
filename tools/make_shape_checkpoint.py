"""Write a checkpoint of random weights with the shapes of a real model, for measurements.

The tensors are those that Hugging Face's own class of the architecture has, one written at a time;
a tokenizer of single bytes comes along, so that every command runs on it. Any number of layers
can stand for all: memory and time of a sweep are proportional to them.

    python tools/make_shape_checkpoint.py llama-3.2-1b OUT [--layers 4] [--dtype bfloat16]
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import torch

from frugal_bonsai.checkpoint.commit import staged_directory
from frugal_bonsai.checkpoint.writer import ShardedWriter
from frugal_bonsai.dtypes import dtype_name
from frugal_bonsai.model.units import KeepMask
from frugal_bonsai.sizes import format_bytes, parse_bytes

# From the published config.json of each model; rope scaling left out, it changes no shape.
LLAMA_3 = {
    "model_type": "llama",
    "vocab_size": 128_256,
    "rope_theta": 500_000.0,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
}
SHAPES: dict[str, dict[str, Any]] = {
    # No real model: 100 M parameters of which nearly all are in the layers, to measure speed with.
    "llama-100m": {
        **LLAMA_3,
        "vocab_size": 512,
        "max_position_embeddings": 2048,
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "num_hidden_layers": 8,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
    },
    "llama-3.2-1b": {
        **LLAMA_3,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "tie_word_embeddings": True,
    },
    "llama-3-8b": {
        **LLAMA_3,
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "llama-3-70b": {
        **LLAMA_3,
        "hidden_size": 8192,
        "intermediate_size": 28_672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
    },
    "qwen2.5-7b": {
        "model_type": "qwen2",
        "vocab_size": 152_064,
        "rope_theta": 1_000_000.0,
        "max_position_embeddings": 32_768,
        "rms_norm_eps": 1e-6,
        "hidden_size": 3584,
        "intermediate_size": 18_944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
    },
}


def make_checkpoint(
    shape: str,
    out: Path,
    *,
    layers: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
    max_shard_bytes: int = 10**9,
    seed: int = 0,
) -> int:
    """Write the checkpoint; the bytes of its weights."""
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**SHAPES[shape], dtype=str(dtype).removeprefix("torch."))
    config.num_hidden_layers = layers or config.num_hidden_layers
    if hasattr(config, "layer_types"):
        config.layer_types = config.layer_types[:1] * config.num_hidden_layers
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config)
    model.tie_weights()  # a tied head is then listed once
    config.architectures = [type(model).__name__]
    parameters = dict(model.named_parameters())
    specs = [(name, dtype_name(dtype), tuple(p.shape)) for name, p in parameters.items()]
    generator = torch.Generator().manual_seed(seed)
    with staged_directory(out) as folder:
        config.save_pretrained(folder)
        write_tokenizer(folder)
        with ShardedWriter(folder, specs, max_shard_bytes=max_shard_bytes) as writer:
            for name, parameter in parameters.items():
                writer.write(
                    name,
                    random_weight(
                        name, parameter.shape, config.num_hidden_layers, dtype, generator
                    ),
                )
            writer.finish()
    return int(sum(p.numel() for p in parameters.values())) * dtype.itemsize


def random_weight(
    name: str, shape: torch.Size, layers: int, dtype: torch.dtype, generator: torch.Generator
) -> torch.Tensor:
    """As a model is initialised: norms one, biases small, outputs scaled by the depth."""
    if len(shape) == 1:
        weight = torch.ones(shape) if name.endswith("weight") else 0.02 * torch.ones(shape)
        return weight.to(dtype)
    std = 0.02
    if name.endswith(("o_proj.weight", "down_proj.weight")):
        std /= math.sqrt(2 * layers)
    return torch.empty(shape, dtype=dtype).normal_(0.0, std, generator=generator)


def write_tokenizer(folder: Path) -> None:
    """A tokenizer of single bytes, which GGUF files can hold too."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: at for at, character in enumerate(alphabet)}
    last = alphabet[-1]
    vocabulary[last * 2] = len(alphabet)  # llama.cpp loads no tokenizer without merges
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[(last, last)]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)


def write_half_mask(folder: Path, path: Path) -> None:
    """A mask for ``frugal-bonsai shrink`` that keeps every second unit of each group."""
    from frugal_bonsai.rewrite.mask_file import write_mask
    from frugal_bonsai.run.open import open_model

    with open_model(str(folder), headers_only=True) as opened:
        mask = KeepMask(opened.spec.table)
        for group in opened.spec.table.groups:
            mask.of(group)[1::2] = False
        write_mask(path, folder.name, opened.spec, mask)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("shape", choices=sorted(SHAPES))
    parser.add_argument("out", type=Path)
    parser.add_argument("--layers", type=int, help="instead of the model's own number")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--max-shard-size", default="1GB")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--half-mask", type=Path, help="write a mask too that keeps every second unit"
    )
    given = parser.parse_args()
    size_bytes = make_checkpoint(
        given.shape,
        given.out,
        layers=given.layers,
        dtype=getattr(torch, given.dtype),
        max_shard_bytes=parse_bytes(given.max_shard_size, option="--max-shard-size"),
        seed=given.seed,
    )
    if given.half_mask is not None:
        write_half_mask(given.out, given.half_mask)
    print(f"{given.out}: {format_bytes(size_bytes)} of random weights, shapes of {given.shape}")


if __name__ == "__main__":
    main()
