"""What a folder or a file was recognised as, and what to do with it.

In: facts that :mod:`frugal_bonsai.checkpoint.recognise` has found. Out: a :class:`Recognised`, or
the error that refuses it. Opens no files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from frugal_bonsai.errors import CheckpointError, UnsupportedModelError

MODEL, MULTIMODAL = "model", "multimodal"
# Types of PEFT that add tokens or prompts. Nothing of them can be merged into weights.
_PROMPTS = ("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "PREFIX_TUNING", "P_TUNING", "CPT")


@dataclass(frozen=True, kw_only=True)
class Recognised:
    """What a folder or a file is.

    Attributes:
        kind: ``"model"`` for what the commands read; else ``"adapter"``, ``"quantised"``,
            ``"gguf"``, ``"pickled"``, ``"lfs-pointer"``, ``"diffusion"``, ``"encoder"``,
            ``"multimodal"``, ``"incomplete"``, ``"tokenizer"``, ``"other-format"``,
            ``"folder-of-models"``, ``"empty"`` or ``"unknown"``.
        what: the description, as the end of a sentence that begins with the path.
        advice: what to do, as the end of a sentence. A command to copy is on a line of its own.
        details: values by name, such as ``base_model`` or ``method``; ``gguf`` is the name of the
            file that holds a model.
    """

    kind: str
    what: str = "is a model"
    advice: str = ""
    details: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return the attributes as plain values: the details among them, the command by itself."""
        values = asdict(self)
        values["advice"], _, values["command"] = self.advice.partition("\n  ")
        return {**values, **values.pop("details")}


def require_recognised(path: Path | str, found: Recognised) -> None:
    """Raise for anything that is not a model of the kind that the commands read.

    Raises:
        UnsupportedModelError: a model of a kind that is not supported.
        CheckpointError: anything else. Both texts say what it is and what to do.
    """
    if found.kind == MODEL:
        return
    unsupported = found.kind in ("quantised", "diffusion", "encoder", MULTIMODAL)
    error = UnsupportedModelError if unsupported else CheckpointError
    raise error(f"{path} {found.what}; {found.advice}")


def adapter(folder: Path | str, config: Mapping[str, Any]) -> Recognised:
    """Describe an adapter of PEFT, and how it is merged into its base model."""
    base, kind = config.get("base_model_name_or_path"), str(config.get("peft_type", "LORA"))
    what = f"is an adapter ({kind}) of {base or 'a base model that it does not name'}, not a model"
    advice = "prune its base model"
    if kind not in _PROMPTS:
        merged = str(folder) + "-merged"
        advice = (
            "merge it into its base model once with\n"
            '  python -c "from peft import AutoPeftModelForCausalLM as M; from transformers import '
            f"AutoTokenizer as T; a, b, base = {str(folder)!r}, {merged!r}, {base!r}; "
            "M.from_pretrained(a, dtype='auto').merge_and_unload().save_pretrained(b); "
            'T.from_pretrained(base).save_pretrained(b)"'
        )
    return Recognised(
        kind="adapter", what=what, advice=advice, details={"base_model": base, "method": kind}
    )


def multimodal(model_type: str, part: str, text: Mapping[str, Any]) -> Recognised:
    """Describe a model of several modalities.

    The text model inside it may be supported. Then the commands take it, and this description is
    not used.

    Args:
        model_type: the whole model's.
        part: key of ``config.json`` under which a part is described.
        text: config of the text model; empty if it is not nested.
    """
    of_text = f", its text model is a {text['model_type']!r}" if "model_type" in text else ""
    return Recognised(
        kind=MULTIMODAL,
        what=f"is a model of several modalities ({model_type}: {part} is nested in config.json"
        f"{of_text}) that is not supported",
        advice="take one for images and text whose text model is of a family in docs/families.md, "
        "or a text-only checkpoint",
        details={"text_model_type": text.get("model_type")},
    )


def lfs_pointer(folder: Path, files: list[str]) -> Recognised:
    """Describe files that Git LFS has not fetched."""
    return Recognised(
        kind="lfs-pointer",
        what=f"was cloned without Git LFS: {', '.join(files[:3])} is a pointer to a file",
        advice=f"fetch the files with `git -C {folder} lfs install && git -C {folder} lfs pull`",
        details={"files": files},
    )


def incomplete(missing: list[str], what: str) -> Recognised:
    """Describe a download that has not finished."""
    return Recognised(
        kind="incomplete",
        what=f"{what} ({', '.join(missing[:3])})" if missing[0] not in what else what,
        advice="run the download again, which continues it, or copy the missing files here",
        details={"missing": missing},
    )


def diffusion(what: str) -> Recognised:
    """Describe a model that makes images or sound."""
    return Recognised(
        kind="diffusion",
        what=f"is {what}, not a language model",
        advice="only causal language models can be pruned: docs/families.md lists them",
    )
