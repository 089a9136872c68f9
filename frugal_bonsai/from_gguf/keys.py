"""The metadata of one GGUF file, and which of its keys are read.

In: a header. Out: values by the names of keys without the architecture in front, or an error that
names file and key. Opens no files.
"""

from __future__ import annotations

from typing import Any

from frugal_bonsai.checkpoint.gguf_header import GgufHeader
from frugal_bonsai.errors import CheckpointError, UnsupportedModelError

# Keys of an architecture that say nothing about the function that the model computes, or that other
# keys or the tensors say too.
_SILENT = (
    *("vocab_size", "tensor_data_layout", "use_parallel_residual", "mm.tokens_per_image"),
    *("expert_count", "expert_used_count"),  # zero without experts
    *("rope.scaling.finetuned", "rope.scaling.original_context_length"),
)


class Keys:
    """Values of a file's metadata.

    Attributes:
        header: header of the file.
        architecture: llama.cpp's name of the architecture.
    """

    def __init__(self, header: GgufHeader) -> None:
        self.header = header
        self.architecture = str(header.metadata.get("general.architecture"))
        self._read: set[str] = set()

    def get(self, name: str, default: Any = None) -> Any:
        """Return the value of ``ARCHITECTURE.name``.

        A list of one value per layer becomes the value.

        Raises:
            UnsupportedModelError: the values of a list differ.
        """
        key = f"{self.architecture}.{name}"
        self._read.add(key)
        value = self.header.metadata.get(key)
        if isinstance(value, list):
            if len(set(value)) != 1:
                raise UnsupportedModelError(
                    f"{self.header.path}: {key} differs from layer to layer ({value[:4]}...); only "
                    "GGUF files of layers that are alike can be read: use the folder that the file "
                    "was made from"
                )
            return value[0]
        return default if value is None else value

    def array(self, name: str) -> list[Any] | None:
        """Return a list of one value per layer; None if there is none."""
        key = f"{self.architecture}.{name}"
        self._read.add(key)
        value = self.header.metadata.get(key)
        return value if isinstance(value, list) else None

    def number(self, name: str) -> int:
        """Return a count that every file of the architecture has.

        Raises:
            CheckpointError: it is missing or no count.
        """
        value = self.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise CheckpointError(
                f"{self.header.path}: {self.architecture}.{name} is {value!r}, expected a positive "
                "whole number; convert the model again with a current llama.cpp"
            )
        return value

    def unread(self) -> list[str]:
        """Return the architecture's keys that were not asked for and may change the function."""
        prefix = f"{self.architecture}."
        silent = {prefix + name for name in _SILENT}
        names = self.header.metadata.keys() - self._read - silent
        return sorted(name for name in names if name.startswith(prefix))


def gguf_key(method: str, architecture: str) -> str:
    """Return the key that a method of ``gguf.GGUFWriter`` writes, without the architecture."""
    import gguf

    writer = gguf.GGUFWriter("", architecture)  # opens no file before it writes
    before = set(writer.kv_data[0])
    getattr(writer, method)(1.0)
    (key,) = set(writer.kv_data[0]) - before
    return str(key).removeprefix(f"{architecture}.")
