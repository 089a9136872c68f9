"""Messages between ranks: plain values and tensors as bytes, without pickle.

In: JSON values and tensors. Out: bytes, and the same message from them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import torch
from safetensors.torch import load, save

_LENGTH_BYTES = 8


@dataclass(frozen=True)
class Message:
    """Plain values and tensors.

    Attributes:
        values: Values that JSON can hold.
        tensors: Tensors by name, on the CPU.
    """

    values: dict[str, Any]
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)

    def to_bytes(self) -> bytes:
        """Return the message as bytes: a length, JSON, safetensors."""
        text = json.dumps(self.values).encode()
        tensors = {name: value.contiguous() for name, value in self.tensors.items()}
        return b"".join((len(text).to_bytes(_LENGTH_BYTES, "little"), text, save(tensors)))

    @classmethod
    def from_bytes(cls, data: bytes) -> Message:
        """Return the message of :meth:`to_bytes`."""
        end = _LENGTH_BYTES + int.from_bytes(data[:_LENGTH_BYTES], "little")
        return cls(json.loads(data[_LENGTH_BYTES:end]), load(data[end:]))
