"""Memory that is taken again and again."""

from __future__ import annotations

import torch
from tiny_models import CPU

from frugal_bonsai.stream.scratch import Scratch


def test_memory_is_reused_and_grows() -> None:
    scratch = Scratch(CPU)
    first = scratch.take(4, 6, torch.float32)
    assert (first.shape, first.dtype) == ((4, 6), torch.float32)
    assert scratch.take(3, 8, torch.float32).data_ptr() == first.data_ptr()
    assert scratch.take(4, 6, torch.int8).data_ptr() != first.data_ptr(), "one block a dtype"
    larger = scratch.take(5, 6, torch.float32)
    assert larger.shape == (5, 6)
    assert scratch.take(4, 6, torch.float32).data_ptr() == larger.data_ptr()


def test_it_is_usable_in_and_out_of_inference_mode() -> None:
    scratch = Scratch(CPU)
    with torch.inference_mode():
        scratch.take(2, 2, torch.float32).fill_(1.0)
    scratch.take(2, 2, torch.float32).fill_(2.0)
