"""A checkpoint of several modalities around a text model.

In: the config and the tensors of the whole, and those of its text model. Out: the way back from the
text model to the whole: names in the files, the nested config, the tensors of the other parts.
Holds configs and headers, no weights. :mod:`frugal_bonsai.model.text_model` finds the text model.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from frugal_bonsai.checkpoint.header import TensorEntry

TEXT_KEY = "text_config"
# Keys that belong to a folder. A nested config does without them.
_FOLDER_KEYS = ("architectures", "auto_map", "dtype")


@dataclass(frozen=True, kw_only=True, eq=False)
class Multimodal:
    """A checkpoint of several modalities around a text model.

    Attributes:
        config: ``config.json`` of the whole.
        text: config of the text model, as a plain text checkpoint states it.
        head_dim_key: key for the width of a head that the whole's text model reads; None if it
            computes the width from the number of heads.
        nested: the text model's config has its own object in ``config``; in old checkpoints of
            Qwen2-VL its keys stand beside those of the whole.
        prefixes: prefix of a plain text checkpoint's names -> prefix in these files.
        tensors: all tensors by their names in the files.
        carried: those that do not belong to the text model.
    """

    config: Mapping[str, Any]
    text: Mapping[str, Any]
    head_dim_key: str | None
    nested: bool
    prefixes: Mapping[str, str]
    tensors: Mapping[str, TensorEntry]
    carried: Mapping[str, TensorEntry]

    @property
    def model_type(self) -> str:
        """Architecture of the whole."""
        return str(self.config["model_type"])

    @property
    def carried_parameters(self) -> int:
        """Parameters outside the text model."""
        return sum(math.prod(entry.shape) for entry in self.carried.values())

    @property
    def carried_bytes(self) -> int:
        """Bytes in the files outside the text model."""
        return sum(entry.size_bytes for entry in self.carried.values())

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of the modules outside the text model, the largest first."""
        sizes: Counter[str] = Counter()
        for name, entry in self.carried.items():
            sizes[name.removeprefix("model.").partition(".")[0]] += entry.size_bytes
        return tuple(name for name, _ in sizes.most_common())

    def stored_name(self, name: str) -> str:
        """Return the name in the files of a tensor of a plain text checkpoint."""
        for plain, stored in self.prefixes.items():
            if name.startswith(plain):
                return stored + name.removeprefix(plain)
        return name

    def whole_config(self, text: Mapping[str, Any]) -> dict[str, Any]:
        """Return ``config.json`` of the whole around another text model.

        Only keys that differ from :attr:`text` are changed: what the source leaves to a default
        stays a default.

        Args:
            text: config of the text model, such as the pruned one.
        """
        whole = dict(self.config)
        inner = dict(whole[TEXT_KEY]) if self.nested else whole
        if text["model_type"] != self.text["model_type"]:  # a class with other defaults
            inner = {key: value for key, value in text.items() if key not in _FOLDER_KEYS}
        for key in self.text.keys() - text.keys():
            inner.pop(key, None)
        for key, value in text.items():
            if key not in _FOLDER_KEYS and (key not in self.text or self.text[key] != value):
                inner[key] = value
        return {**whole, TEXT_KEY: inner} if self.nested else inner
