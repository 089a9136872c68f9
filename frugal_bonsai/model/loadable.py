"""Check that transformers loads a model of several modalities.

In: its config, and the names and shapes of its tensors. Out: nothing, or an error. Builds the model
of transformers without weights.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

from frugal_bonsai.errors import CheckpointError, UnsupportedModelError
from frugal_bonsai.model.default_config import config_errors
from frugal_bonsai.model.families import WHOLES
from frugal_bonsai.model.multimodal import Multimodal

TEXT_ONLY = "add --text-only to write the text model alone"


def require_loadable(whole: Multimodal, *, source: str = "config.json") -> None:
    """Check that transformers loads the whole with all its parameters.

    Transformers' own loading runs on tensors without data, with its renaming of old names.

    Args:
        whole: the model of several modalities.
        source: file name for error texts.

    Raises:
        UnsupportedModelError: the whole may compute something else than its text model.
        CheckpointError: the class lacks a tensor, or its shape contradicts the config.
    """
    import torch
    from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, AutoConfig

    if whole.model_type not in WHOLES:
        raise UnsupportedModelError(
            f"{source}: a {whole.model_type} was not tested as a whole, so its other parts are not "
            f"carried along (those of {', '.join(WHOLES)} are); {TEXT_ONLY}"
        )
    with config_errors(whole.config, source):
        config = AutoConfig.for_model(**copy.deepcopy(dict(whole.config)))
        model_class = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)]
    empty = {name: torch.empty(entry.shape, device="meta") for name, entry in whole.tensors.items()}
    with silent_transformers():
        _, found = model_class.from_pretrained(
            None,
            config=config,
            state_dict=empty,
            device_map="meta",
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    wrong = {
        "lacks": sorted(found["missing_keys"]),
        "has in another shape": sorted(key[0] for key in found["mismatched_keys"]),
    }
    for what, names in wrong.items():
        if names:
            raise CheckpointError(
                f"{source}: the checkpoint {what} {len(names)} tensors that transformers' "
                f"{model_class.__name__} needs with this config, the first is {names[0]!r}; "
                f"{TEXT_ONLY}"
            )


@contextmanager
def silent_transformers() -> Iterator[None]:
    """Keep transformers from reporting: what it finds is read from its result."""
    from transformers.utils import logging

    level, shows_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if shows_bars:
            logging.enable_progress_bar()
