"""The model file that the ``per-layer`` layout puts beside the weights, and its classes' names.

In: a ``model_type``. Out: names of classes and the file's bytes. The bundled file is a module of
this folder too, so that ``load_pruned`` needs no remote code; it imports nothing of this package.
This one does not import it: it needs torch and transformers.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import files

from frugal_bonsai.errors import UnsupportedModelError

MODULE = "modeling_pruned"
FILE = f"{MODULE}.py"
_PREFIX = "Pruned"


@dataclass(frozen=True, kw_only=True)
class BundledModel:
    """The classes of one architecture."""

    standard_config: str  # transformers' own classes
    standard_class: str

    @property
    def config_class(self) -> str:
        """The config whose layers may differ."""
        return _PREFIX + self.standard_config

    @property
    def model_class(self) -> str:
        """The model whose layers may differ."""
        return _PREFIX + self.standard_class

    @property
    def auto_map(self) -> dict[str, str]:
        """Which class stands for which of transformers' Auto classes."""
        return {
            "AutoConfig": f"{MODULE}.{self.config_class}",
            "AutoModelForCausalLM": f"{MODULE}.{self.model_class}",
        }


def read_bundled() -> bytes:
    """The bundled file's content."""
    return files(__package__).joinpath(FILE).read_bytes()


def find_bundled(model_type: object, *, source: str = "config.json") -> BundledModel:
    """The bundled classes of an architecture.

    Raises:
        UnsupportedModelError: transformers has no causal language model of this type.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES as CONFIGS
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as MODELS

    if model_type not in CONFIGS or model_type not in MODELS:
        raise UnsupportedModelError(
            f"{source}: layers of different widths need a causal language model of transformers, "
            f"and it has none for model_type {model_type!r}. The uniform layout needs none"
        )
    return BundledModel(standard_config=CONFIGS[model_type], standard_class=MODELS[model_type])
