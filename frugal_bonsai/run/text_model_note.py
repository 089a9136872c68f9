"""The note on the parts beside the text model of a model of several modalities.

In: the descriptions of both. Out: a text. Holds nothing.
"""

from __future__ import annotations

from frugal_bonsai.model.family import ModelSpec
from frugal_bonsai.model.multimodal import Multimodal

_CARRIED = (
    "carried along bit for bit; how well it works with the changed text model is not measured"
)


def text_model_note(spec: ModelSpec, whole: Multimodal) -> str:
    """Return the note on what happens to the parts of a model of several modalities."""
    carried = spec.multimodal is not None
    heads = ""
    if carried and whole.head_dim_key is None:
        heads = (
            f"; attention stays whole, because a {whole.model_type} computes the width of a head "
            "from their number (--text-only can prune it)"
        )
    rest = ""
    if whole.carried:
        rest = (
            f"; the rest ({', '.join(whole.parts)}: {whole.carried_parameters:,} parameters) is "
            f"{_CARRIED if carried else 'left aside'}"
        )
    return (
        f"a {whole.model_type} of several modalities: parameters and sparsity are those of its "
        f"text model ({spec.family.title}){rest}{heads}"
    )
