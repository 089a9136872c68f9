"""The model files that the ``per-layer`` layout puts beside the weights, one per architecture.

In: a ``model_type``. Out: names of classes and the file's bytes. A bundled file is a module of this
folder too, so that ``load_pruned`` needs no remote code; it imports nothing of this package. This
table imports none of them: they need torch and transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from types import MappingProxyType

from frugal_bonsai.errors import UnsupportedModelError


@dataclass(frozen=True, kw_only=True)
class BundledModel:
    """One bundled file and the classes in it."""

    module: str  # name of the file without .py
    config_class: str
    model_class: str
    plain_class: str  # transformers' own class for the same architecture

    @property
    def file(self) -> str:
        """Name of the file."""
        return f"{self.module}.py"

    @property
    def auto_map(self) -> dict[str, str]:
        """Which class stands for which of transformers' Auto classes."""
        return {
            "AutoConfig": f"{self.module}.{self.config_class}",
            "AutoModelForCausalLM": f"{self.module}.{self.model_class}",
        }

    def read(self) -> bytes:
        """The file's content."""
        return files(__package__).joinpath(self.file).read_bytes()


BUNDLED: Mapping[str, BundledModel] = MappingProxyType(
    {
        "llama": BundledModel(
            module="modeling_pruned_llama",
            config_class="PrunedLlamaConfig",
            model_class="PrunedLlamaForCausalLM",
            plain_class="LlamaForCausalLM",
        )
    }
)


def find_bundled(model_type: object, *, source: str = "config.json") -> BundledModel:
    """The bundled model of an architecture.

    Raises:
        UnsupportedModelError: there is none; the text lists those that exist.
    """
    if not isinstance(model_type, str) or model_type not in BUNDLED:
        raise UnsupportedModelError(
            f"{source}: there is no bundled model file for model_type {model_type!r} with layers "
            f"of different widths; there is one for: {', '.join(sorted(BUNDLED))}. "
            "The uniform layout needs none"
        )
    return BUNDLED[model_type]
