"""Tiny random models of images and text, saved as people have them: with old names and new ones."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_models import TINY, save_byte_tokenizer

_TEXT: dict[str, Any] = {**TINY, "vocab_size": 300, "num_hidden_layers": 2, "pad_token_id": 0}
del _TEXT["tie_word_embeddings"]
_VISION = {
    "hidden_size": 16,
    "intermediate_size": 12,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
_QWEN_TEXT = {key: value for key, value in _TEXT.items() if key != "head_dim"}
_QWEN_TEXT |= {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
_QWEN_VISION = {"depth": 1, "hidden_size": 16, "intermediate_size": 12, "num_heads": 2}
_QWEN_TOKENS = {
    "image_token_id": 290,
    "video_token_id": 291,
    "vision_start_token_id": 292,
    "vision_end_token_id": 293,
}
_MROPE = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 1e4}
# Windows are longer than the sliding windows.
_SLIDING = {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]}
WHOLES: dict[str, dict[str, Any]] = {
    "gemma3": {
        "text_config": {**_TEXT, **_SLIDING, "query_pre_attn_scalar": 6},
        "vision_config": {**_VISION, "model_type": "siglip_vision_model"},
        "mm_tokens_per_image": 4,
        "image_token_index": 290,
        "boi_token_index": 291,
        "eoi_token_index": 292,
    },
    "gemma4": {
        "text_config": {
            **_TEXT,
            **_SLIDING,
            "tie_word_embeddings": True,
            "global_head_dim": 8,
            "num_global_key_value_heads": 1,
            "attention_k_eq_v": True,
            "hidden_size_per_layer_input": 0,
        },
        "vision_config": {
            **_VISION,
            "model_type": "gemma4_vision",
            "num_key_value_heads": 2,
            "head_dim": 8,
            "position_embedding_size": 16,
        },
        "image_token_id": 290,
        "video_token_id": 291,
        "boi_token_id": 292,
        "eoi_token_id": 293,
        "audio_token_id": 294,
        "boa_token_id": 295,
        "eoa_token_index": 296,
    },
    "llama4": {
        "text_config": {
            **_TEXT,
            "intermediate_size_mlp": 28,
            "num_local_experts": 4,
            "num_experts_per_tok": 1,
            "moe_layers": [1],
            "no_rope_layers": [1, 0],
            "attention_chunk_size": 5,
        },
        "vision_config": {
            **_VISION,
            "projector_input_dim": 16,
            "projector_output_dim": 16,
            "vision_output_dim": 16,
            "intermediate_size": 64,
        },
        "image_token_index": 290,
    },
    "mistral3": {
        "text_config": {**_TEXT, "model_type": "mistral", "sliding_window": None},
        "vision_config": {**_VISION, "model_type": "pixtral", "head_dim": 8},
        "image_token_index": 290,
        "tie_word_embeddings": False,
    },
    "llava": {
        "text_config": {**_TEXT, "model_type": "llama"},
        "vision_config": {**_VISION, "model_type": "clip_vision_model"},
        "image_token_index": 290,
    },
    "qwen2_5_vl": {
        "text_config": {**_QWEN_TEXT, "rope_parameters": _MROPE},
        "vision_config": {**_QWEN_VISION, "out_hidden_size": 32, "fullatt_block_indexes": [0]},
        **_QWEN_TOKENS,
    },
    "qwen3_vl": {
        "text_config": {**_TEXT, "head_dim": 8, "rope_parameters": _MROPE},
        "vision_config": {
            **_QWEN_VISION,
            "out_hidden_size": 24,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0],
        },
        **_QWEN_TOKENS,
    },
    "qwen3_5": {
        "text_config": {
            **_TEXT,
            "head_dim": 8,
            "rope_parameters": {**_MROPE, "partial_rotary_factor": 1.0},
            "layer_types": ["linear_attention", "full_attention"],
            "linear_num_value_heads": 4,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 4,
            "linear_value_head_dim": 7,
        },
        "vision_config": {
            **_QWEN_VISION,
            "out_hidden_size": 24,
            "num_position_embeddings": 16,
        },
        **_QWEN_TOKENS,
    },
    "qwen2_vl": {
        "text_config": {**_QWEN_TEXT, "rope_parameters": _MROPE},
        "vision_config": dict(depth=1, embed_dim=16, num_heads=2, hidden_size=32, mlp_ratio=1),
        **_QWEN_TOKENS,
    },
    "llava_next": {
        "text_config": {**_TEXT, "model_type": "mistral"},
        "vision_config": {**_VISION, "model_type": "clip_vision_model"},
        "image_token_index": 290,
        "image_grid_pinpoints": [[28, 28]],
    },
    "llava_onevision": {
        "text_config": {**_TEXT, "model_type": "qwen2"},
        "vision_config": {**_VISION, "model_type": "siglip_vision_model"},
        "image_token_index": 290,
        "video_token_index": 291,
        "image_grid_pinpoints": [[28, 28]],
    },
    "idefics3": {
        "text_config": {**_TEXT, "model_type": "llama"},
        "vision_config": {**_VISION, "model_type": "idefics3_vision"},
        "image_token_id": 290,
        "scale_factor": 1,
    },
    "smolvlm": {
        "text_config": {**_TEXT, "model_type": "llama"},
        "vision_config": {**_VISION, "model_type": "smolvlm_vision"},
        "image_token_id": 290,
        "scale_factor": 1,
    },
    "internvl": {
        "text_config": {**_TEXT, "model_type": "qwen2"},
        "vision_config": {
            **_VISION,
            "model_type": "internvl_vision",
            "image_size": [28, 28],
            "patch_size": [14, 14],
        },
        "image_token_id": 290,
    },
    "got_ocr2": {
        "text_config": {**_TEXT, "model_type": "qwen2"},
        "vision_config": {
            "hidden_size": 16,
            "output_channels": 8,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 32,
            "patch_size": 16,
            "mlp_dim": 16,
            "window_size": 2,
            "global_attn_indexes": [0],
        },
        "image_token_index": 290,
    },
}
# Kinds that differ in the names of tensors, in positions or in how a width is stated.
KINDS = ("gemma3", "mistral3", "llava", "qwen2_5_vl", "qwen3_vl")
# Old name -> new name. transformers 5 saves the old ones, transformers 4.52 to 4.57 the new ones.
_NEW = (
    (r"^language_model\.lm_head\.", "lm_head."),
    (r"^language_model\.model\.", "model.language_model."),
    (r"^model\.(layers|embed_tokens|norm)\.", r"model.language_model.\1."),
    (r"^(vision_tower|multi_modal_projector|visual)\.", r"model.\1."),
)


def save_whole(
    folder: Path, kind: str, *, seed: int = 0, shard_size: str = "1GB", **changes: Any
) -> Any:
    """Save a random model with a tokenizer, and return it."""
    config = transformers.AutoConfig.for_model(kind, **{**WHOLES[kind], **changes})
    model = transformers.AutoModelForImageTextToText.from_config(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.3, generator=generator)
            # Gemma's norms multiply by one and their weight.
            if "norm" in name and kind != "gemma3":
                parameter.add_(1.0)
    model.save_pretrained(folder, max_shard_size=shard_size)
    save_byte_tokenizer(folder)
    (folder / "preprocessor_config.json").write_text('{"image_mean": [0.5]}', encoding="utf-8")
    return model


def name_anew(folder: Path) -> None:
    """Give a saved model's tensors the names of transformers 4.52 to 4.57."""
    tensors = load_file(folder / "model.safetensors")
    for old, new in _NEW:
        tensors = {re.sub(old, new, name): value for name, value in tensors.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def change_config(folder: Path, **changes: Any) -> None:
    """Change keys of a config; None removes a key."""
    path = folder / "config.json"
    config = {**json.loads(path.read_text(encoding="utf-8")), **changes}
    kept = {key: value for key, value in config.items() if value is not None}
    path.write_text(json.dumps(kept), encoding="utf-8")


def flatten_config(folder: Path) -> dict[str, Any]:
    """Write a Qwen2.5-VL's config as it is on the hub, with the text model's keys at the top."""
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    text, mrope = config.pop("text_config"), {"type": "mrope", "mrope_section": [2, 1, 1]}
    flat = {key: text[key] for key in text if key not in ("model_type", "rope_parameters")}
    flat |= {"rope_scaling": mrope, "rope_theta": 1e4, **config}
    path.write_text(json.dumps(flat), encoding="utf-8")
    return flat
