"""The window that is taken where nobody names one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny_models import tiny_llama

from frugal_bonsai.errors import OptionError
from frugal_bonsai.run.texts import choose_window


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, 2048),
        ({"sliding_window": 2047}, 1984),  # Phi-3-mini: 2,048 tokens would need explicit masks
        ({"sliding_window": 2048}, 1984),
        ({"sliding_window": 4096}, 2048),
        ({"sliding_window": 512}, 2048),  # a quarter: its masks are the smaller loss
        ({"sliding_window": None}, 2048),
        ({"sliding_window": 2047, "use_sliding_window": False}, 2048),
        ({"sliding_window": 1536, "layer_types": ["sliding_attention", "full_attention"]}, 2048),
        ({"sliding_window": 1536, "layer_types": ["sliding_attention"] * 2}, 1472),
    ],
)
def test_default(config: dict[str, Any], expected: int, tmp_path: Path) -> None:
    tiny = tiny_llama(tmp_path / "m")
    spec = replace(tiny.spec, positions=8192, config={**tiny.spec.config, **config})
    assert choose_window(spec, None) == expected
    assert choose_window(replace(spec, positions=128), None) == 128
    assert choose_window(spec, 2048) == 2048, "what is named is taken"
    with pytest.raises(OptionError, match="--window: 9000"):
        choose_window(spec, 9000)
    tiny.checkpoint.close()
