"""Recognise what a folder or a file is before it is read as a model.

In: a path, or the config and the tensors of an open checkpoint. Out: a :class:`Recognised`, which
says what the path is and what to do with it. Names, the first bytes of small files, JSON and
headers are read; weights are not. Damaged files are not recognised: their readers name the fault.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from frugal_bonsai.checkpoint.folder import (
    CONFIG_FILE,
    INDEX_FILE,
    PICKLE_SUFFIXES,
    SINGLE_FILE,
    convert_pickles,
    find_tensors,
    missing_shards,
    read_config,
    read_json_object,
)
from frugal_bonsai.checkpoint.gguf_header import GGUF_START
from frugal_bonsai.checkpoint.header import TensorEntry
from frugal_bonsai.checkpoint.quantised import dequantise_advice, quantised_by
from frugal_bonsai.checkpoint.recognise_gguf import (
    recognise_gguf,
    recognise_gguf_files,
    recognise_gguf_repository,
)
from frugal_bonsai.checkpoint.recognised import (
    MODEL,
    Recognised,
    adapter,
    diffusion,
    incomplete,
    lfs_pointer,
    multimodal,
)

ADAPTER_FILE = "adapter_config.json"
_LFS_START = b"version https://git-lfs.github.com/spec/"
_PICKLE_STARTS = (b"PK\x03\x04", b"\x80\x02", b"\x80\x04", b"\x80\x05")
_PARTIAL = (".incomplete", ".part", ".crdownload", ".aria2", ".download")
_TOKENIZER = ("tokenizer", "vocab", "merges", "special_tokens_map", "added_tokens", "spiece")
_FOREIGN = {".h5": "TensorFlow", ".msgpack": "Flax", ".onnx": "ONNX", ".npz": "MLX"}
_SHARD = re.compile(r".*-(\d+)-of-(\d+)\.safetensors")
# Keys under which models of several modalities keep the config of a part.
_TEXT_KEYS = ("text_config", "llm_config", "language_config", "thinker_config")
_OTHER_KEYS = ("vision_config", "audio_config", "visual", "vision_tower")
_ENCODERS = (
    *("albert", "bert", "camembert", "deberta", "deberta-v2", "distilbert", "electra", "ernie"),
    *("modernbert", "mpnet", "nomic_bert", "roberta", "roformer", "xlm", "xlm-roberta", "xlnet"),
)
_ENCODER_DECODERS = ("bart", "marian", "mbart", "mt5", "pegasus", "t5", "umt5", "whisper")
_SINGLE_TASK = re.compile(
    r"For(SequenceClassification|TokenClassification|QuestionAnswering|MultipleChoice|MaskedLM"
    r"|ImageClassification|CTC)$"
)


def recognise(path: Path) -> Recognised:
    """Recognise a file or a folder.

    Raises:
        CheckpointError: a file that had to be read is damaged.
    """
    if path.is_file():
        return recognise_file(path)
    found = recognise_folder(path)
    if found.kind != MODEL or "gguf" in found.details:
        return found
    return recognise_contents(path, read_config(path), find_tensors(path))


def recognise_file(path: Path) -> Recognised:
    """Recognise a single file by its first bytes."""
    start = _first_bytes(path)
    if start.startswith(_LFS_START):
        return lfs_pointer(path.parent, [path.name])
    if start.startswith(GGUF_START):
        return recognise_gguf(path)
    if path.name.endswith(_PARTIAL):
        return incomplete([path.name], "is a download that has not finished")
    if path.name.endswith(PICKLE_SUFFIXES) or start.startswith(_PICKLE_STARTS):
        return Recognised(
            kind="pickled",
            what="is a file of pickled weights, which can run code when it is opened",
            advice=f"name the folder that holds it with its {CONFIG_FILE} ({path.parent})",
        )
    return Recognised(
        kind="unknown",
        what="is a file",
        advice=f"name the folder that holds {CONFIG_FILE} and the weights ({path.parent})",
    )


def recognise_folder(folder: Path) -> Recognised:
    """Recognise a folder by the names of its files and by small files. Reads no headers."""
    try:
        entries = sorted(folder.iterdir())
        names = [path.name for path in entries if path.is_file()]
    except OSError:
        return Recognised(kind=MODEL)  # the reader says what the system refuses
    whole = SINGLE_FILE in names or INDEX_FILE in names
    read = [n for n in names if _is_read(n) or not whole]
    pointers = [n for n in read if _first_bytes(folder / n).startswith(_LFS_START)]
    if pointers:
        return lfs_pointer(folder, pointers)
    if "model_index.json" in names:
        return diffusion("a diffusion pipeline")
    if SINGLE_FILE in names and (CONFIG_FILE in names or ADAPTER_FILE not in names):
        return Recognised(kind=MODEL)
    if INDEX_FILE in names:
        missing = missing_shards(folder)
        if missing:
            return incomplete(missing, f"lacks {len(missing)} shards")
        return Recognised(kind=MODEL)
    if ADAPTER_FILE in names:
        return adapter(folder, read_json_object(folder / ADAPTER_FILE))
    return _recognise_unread(folder, names, [p for p in entries if p.is_dir()])


def recognise_repository(
    model: str, names: Collection[str], adapter_config: Mapping[str, Any]
) -> Recognised:
    """Recognise a repository of the Hugging Face Hub that cannot be opened as a model.

    Args:
        model: the hub id.
        names: names of all files.
        adapter_config: ``adapter_config.json``; empty if there is none.
    """
    if adapter_config:
        return adapter(model, adapter_config)
    if "model_index.json" in names:
        return diffusion("a diffusion pipeline")
    gguf_files = sorted(name for name in names if name.endswith(".gguf"))
    if gguf_files:
        return recognise_gguf_repository(model, gguf_files)
    return Recognised(
        kind="unknown",
        what=f"has {'no safetensors' if CONFIG_FILE in names else f'no {CONFIG_FILE}'} on the "
        f"Hugging Face Hub (it has {', '.join(sorted(names)[:5])})",
        advice="check the id, or download it and convert its weights with save_pretrained",
    )


def recognise_contents(
    folder: Path | str, config: Mapping[str, Any], tensors: Mapping[str, TensorEntry]
) -> Recognised:
    """Recognise an open checkpoint by its config and its tensors.

    Args:
        folder: the folder or the hub id, for the advice.
        config: ``config.json``.
        tensors: the tensors' entries.
    """
    method = quantised_by(config, tensors)
    if method is not None:
        return Recognised(
            kind="quantised",
            what=f"has quantised weights ({method}), which cannot be pruned",
            advice=dequantise_advice(str(folder), method),
            details={"method": method},
        )
    if "_diffusers_version" in config or "_class_name" in config:
        return diffusion("a part of a diffusion pipeline")
    if any(".lora_A." in entry.name for entry in tensors.values()):
        return Recognised(
            kind="adapter",
            what="holds LoRA weights beside the model's own",
            advice="merge them first, with merge_and_unload of peft, and save the result",
        )
    return _recognise_architecture(config)


def _recognise_architecture(config: Mapping[str, Any]) -> Recognised:
    """Recognise encoders, classifiers and models of several modalities by their config."""
    model_type, classes = str(config.get("model_type")), config.get("architectures")
    classes = classes if isinstance(classes, list) else []
    parts = [key for key in (*_TEXT_KEYS, *_OTHER_KEYS) if isinstance(config.get(key), Mapping)]
    decodes = not config.get("is_encoder_decoder") and model_type not in _ENCODER_DECODERS
    if parts:
        text: dict[str, Any] = next((config[key] for key in parts if key in _TEXT_KEYS), {})
        return multimodal(model_type, parts[0], text)
    task = next((m[1] for m in map(_SINGLE_TASK.search, map(str, classes)) if m), None)
    if decodes and model_type not in _ENCODERS and task is None:
        return Recognised(kind=MODEL)
    kind = "an encoder" if decodes else "an encoder-decoder"
    what = f"is {kind} ({model_type})" if task is None else f"is a {model_type} for {task}"
    return Recognised(
        kind="encoder",
        what=f"{what}, not a causal language model",
        advice="only decoders that predict the next token can be pruned: docs/families.md lists "
        "them",
        details={"model_type": model_type},
    )


def _recognise_unread(folder: Path, names: list[str], folders: list[Path]) -> Recognised:
    """Recognise a folder without the names of safetensors weights that transformers reads."""
    shards = [match for match in map(_SHARD.fullmatch, names) if match]
    if shards:
        present = {int(match[1]) for match in shards}
        absent = [str(n) for n in range(1, int(shards[0][2]) + 1) if n not in present]
        lacks = f" and shards {', '.join(absent)} of {int(shards[0][2])}" if absent else ""
        return incomplete([INDEX_FILE, *absent], f"lacks {INDEX_FILE}{lacks}")
    hidden = [p.name for p in folder.glob(".cache/huggingface/download/**/*.incomplete")]
    partial = [name for name in names if name.endswith(_PARTIAL)] + hidden
    if partial:
        return incomplete(partial, "holds a download that has not finished")
    if any(name.endswith(".safetensors") for name in names):
        return Recognised(kind=MODEL)  # the reader says which name it expects
    gguf_files = [name for name in names if name.endswith(".gguf")]
    if gguf_files:
        return recognise_gguf_files(folder, gguf_files)
    pickles = [name for name in names if name.endswith(PICKLE_SUFFIXES)]
    if pickles:
        return Recognised(
            kind="pickled",
            what=f"has only pickled weights ({', '.join(pickles)}), which can run code when they "
            "are opened",
            advice=convert_pickles(folder),
            details={"files": pickles},
        )
    foreign = [name for name in names if Path(name).suffix in _FOREIGN]
    if foreign:
        return Recognised(
            kind="other-format",
            what=f"has weights for {_FOREIGN[Path(foreign[0]).suffix]} alone ({foreign[0]})",
            advice="download the safetensors files of the same model",
        )
    return _recognise_weightless(folder, names, folders)


def _recognise_weightless(folder: Path, names: list[str], folders: list[Path]) -> Recognised:
    """Recognise a folder in which no file holds weights."""
    inside = [*(p for p in folders if (p / CONFIG_FILE).is_file()), *folder.glob("snapshots/*")]
    if CONFIG_FILE in names:
        return incomplete([SINGLE_FILE], f"has no weights, expected {SINGLE_FILE} or {INDEX_FILE}")
    if inside:
        return Recognised(
            kind="folder-of-models",
            what=f"has no {CONFIG_FILE}, but folders with models",
            advice=f"name one of them, such as {inside[-1]}",
            details={"folders": [str(path) for path in inside]},
        )
    if any(name.startswith(_TOKENIZER) for name in names):
        return Recognised(
            kind="tokenizer",
            what="is a tokenizer without a model",
            advice=f"download the model's {CONFIG_FILE} and weights into this folder",
        )
    if names:
        return Recognised(
            kind="unknown",
            what=f"has no {CONFIG_FILE} and no weights, so the architecture is unknown (it has "
            f"{', '.join(names[:3])})",
            advice="check the path, or download the model again",
        )
    return Recognised(
        kind="empty", what="is empty", advice="check the path, or download the model again"
    )


def _is_read(name: str) -> bool:
    """Return whether the commands read a file of this name beside whole weights."""
    return name.endswith((".json", ".model")) or name == SINGLE_FILE or bool(_SHARD.fullmatch(name))


def _first_bytes(path: Path) -> bytes:
    """Return the first bytes of a file; none if it cannot be read."""
    try:
        with path.open("rb") as file:
            return file.read(len(_LFS_START))
    except OSError:
        return b""
