"""The model file of the ``per-layer`` layout, and the names of its classes.

In: a ``model_type``. Out: class names, and the content of the file. ``modeling_pruned.py`` is a
module of this folder, so that ``load_pruned`` needs no remote code, and imports nothing from this
package. It is not imported here, because it imports torch and transformers.
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
    """The names of the classes of one architecture.

    Attributes:
        standard_config: config class of transformers.
        standard_class: causal language model class of transformers.
    """

    standard_config: str
    standard_class: str

    @property
    def config_class(self) -> str:
        """Name of the config class whose layers may differ in width."""
        return _PREFIX + self.standard_config

    @property
    def model_class(self) -> str:
        """Name of the model class whose layers may differ in width."""
        return _PREFIX + self.standard_class

    @property
    def auto_map(self) -> dict[str, str]:
        """The config's ``auto_map``: transformers' Auto class -> bundled class."""
        return {
            "AutoConfig": f"{MODULE}.{self.config_class}",
            "AutoModelForCausalLM": f"{MODULE}.{self.model_class}",
        }


def read_bundled() -> bytes:
    """Return the content of the bundled file."""
    return files(__package__).joinpath(FILE).read_bytes()


def find_bundled(model_type: object, *, source: str = "config.json") -> BundledModel:
    """Return the names of the bundled classes of an architecture.

    Raises:
        UnsupportedModelError: transformers has no causal language model of this type.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES as CONFIGS
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as MODELS

    if model_type not in CONFIGS or model_type not in MODELS:
        raise UnsupportedModelError(
            f"{source}: layers of different widths need a causal language model of transformers, "
            f"which has none for model_type {model_type!r}; take --layout uniform, which needs none"
        )
    return BundledModel(standard_config=CONFIGS[model_type], standard_class=MODELS[model_type])
