"""Recognise GGUF files: models, parts of models, and what is no model.

In: paths, or the names of files in a repository. Out: a :class:`Recognised`. Reads headers.
"""

from __future__ import annotations

from pathlib import Path

from frugal_bonsai.checkpoint.gguf_header import read_gguf_header
from frugal_bonsai.checkpoint.gguf_reader import part_files
from frugal_bonsai.checkpoint.recognised import MODEL, Recognised, incomplete

GGUF_SUFFIX = ".gguf"
_PROJECTOR = "clip"  # architecture of projectors from images or sound
_NO_MODELS = {
    "adapter": "is a LoRA adapter for llama.cpp",
    "imatrix": "is an importance matrix for llama.cpp's quantisation",
    "vocab": "is a tokenizer without a model",
}


def recognise_gguf(path: Path) -> Recognised:
    """Recognise a GGUF file, or any part of a split one, by its header.

    Returns:
        A model has the name of its (first) file under ``gguf`` in the details.

    Raises:
        CheckpointError: the file is damaged.
    """
    parts = part_files(path)
    missing = [part.name for part in parts if not part.is_file()]
    if missing:
        return incomplete(missing, f"lacks {len(missing)} of {len(parts)} parts")
    metadata = read_gguf_header(parts[0]).metadata
    kind = str(metadata.get("general.type", MODEL))
    if kind == "mmproj" or metadata.get("general.architecture") == _PROJECTOR:
        return Recognised(
            kind="gguf",
            what="is the projector of a model of several modalities (mmproj), not a language model",
            advice="name the GGUF file of its language model",
        )
    if kind != MODEL:
        return Recognised(
            kind="gguf",
            what=_NO_MODELS.get(kind, f"is a GGUF file of the type {kind!r}, not a model"),
            advice="name the GGUF file of a model",
        )
    return Recognised(kind=MODEL, details={"gguf": parts[0].name})


def recognise_gguf_files(folder: Path, names: list[str]) -> Recognised:
    """Recognise a folder whose only weights are these GGUF files.

    One model is taken for the folder, whatever projectors lie beside it. Several are named.
    """
    firsts = list(dict.fromkeys(part_files(folder / name)[0] for name in names))
    found = {path: recognise_gguf(path) for path in firsts}
    models = [path for path in firsts if found[path].kind == MODEL]
    if len(models) == 1 or len(firsts) == 1:
        return found[(models or firsts)[0]]
    listed = ", ".join(path.name for path in (models or firsts)[:6])
    return Recognised(
        kind="gguf",
        what=f"holds {len(firsts)} GGUF files ({listed})",
        advice=f"name one of them, such as {(models or firsts)[0]}",
        details={"files": [path.name for path in firsts]},
    )


def recognise_gguf_repository(model: str, names: list[str]) -> Recognised:
    """Describe a repository of the Hugging Face Hub whose only weights are GGUF files."""
    best = next((name for name in names if "Q8_0" in name.upper()), names[0])
    return Recognised(
        kind="gguf",
        what=f"has no safetensors on the Hugging Face Hub, but GGUF files ({', '.join(names[:4])})",
        advice="take the original model, or download one of the files (all parts of a split one) "
        f"and name it\n  hf download {model} {best} --local-dir .",
        details={"files": names},
    )
