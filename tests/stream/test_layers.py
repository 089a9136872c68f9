"""Two reused buffers and a background reader."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from tiny_models import CPU, Tiny, random_mask, tiny_llama

from frugal_bonsai.errors import CheckpointError
from frugal_bonsai.stream.layers import LayerStream
from frugal_bonsai.stream.source import LayerSource, Record
from frugal_bonsai.stream.store import INT8, NATIVE, build_store


class Counting:
    """Wraps a source; remembers which layer was read into which memory, and by which thread."""

    def __init__(self, inner: LayerSource) -> None:
        self.inner = inner
        self.reads: list[int] = []
        self.pointers: set[int] = set()
        self.threads: set[str] = set()
        self.announced: list[int] = []

    @property
    def layers(self) -> int:
        return self.inner.layers

    def layer_bytes(self, layer: int) -> int:
        return self.inner.layer_bytes(layer)

    def records(self, layer: int) -> tuple[Record, ...]:
        return self.inner.records(layer)

    def announce(self, layer: int) -> None:
        self.announced.append(layer)
        self.inner.announce(layer)

    def read(self, layer: int, buffer: torch.Tensor) -> None:
        self.reads.append(layer)
        self.pointers.add(buffer.data_ptr())
        self.threads.add(threading.current_thread().name)
        self.inner.read(layer, buffer)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return tiny_llama(tmp_path_factory.mktemp("layers") / "m", num_hidden_layers=5)


def test_each_layer_is_read_once_in_the_background(tiny: Tiny) -> None:
    source = Counting(tiny.source())
    with LayerStream(source, device=CPU, dtype=torch.float32) as stream:
        assert source.reads == [], "nothing is read before the first visit"
        assert [layer for layer, _ in stream.visit()] == [0, 1, 2, 3, 4]
        assert source.reads == [0, 1, 2, 3, 4]
        list(stream.visit())
        assert source.reads == 2 * [0, 1, 2, 3, 4]
    assert source.threads == {"layer-reader_0"}


def test_a_visit_that_was_started_has_its_first_layer_and_hints_at_the_rest(tiny: Tiny) -> None:
    source, behind = Counting(tiny.source()), Counting(tiny.source())
    with LayerStream(source, device=CPU, dtype=torch.float32) as stream:
        stream.start(behind)
        stream.start(behind)  # once is enough
        assert [layer for layer, _ in stream.visit(behind)] == [0, 1, 2, 3, 4]
        assert source.reads == [0, 1, 2, 3, 4]
        assert (source.announced, behind.announced) == ([0, 1, 2, 3, 4], [0, 1, 2, 3, 4])
        assert behind.reads == []
        list(stream.visit())
        assert source.announced == 2 * [0, 1, 2, 3, 4]


@pytest.mark.parametrize("kind", ["checkpoint", INT8, NATIVE])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_lie_in_the_same_memory_at_every_visit(
    kind: str, dtype: torch.dtype, tiny: Tiny, tmp_path: Path
) -> None:
    """Stored bytes in two buffers, dequantised ones in a third: nothing new after the first two."""
    inner: LayerSource = (
        tiny.source()
        if kind == "checkpoint"
        else build_store(tmp_path, tiny.checkpoint, tiny.spec, weights=kind)
    )
    source = Counting(inner)
    with LayerStream(source, device=CPU, dtype=dtype) as stream:
        visits = [
            {name: value.data_ptr() for name, value in parameters.items()}
            for _ in range(2)
            for _, parameters in stream.visit()
        ]
    assert len(source.pointers) == 2
    assert visits[0] == visits[2] == visits[4] == visits[5] == visits[7]
    assert visits[1] == visits[3] == visits[6] == visits[8]
    if kind == INT8:
        # All matrices are dequantised into one buffer, whichever of the two they were stored in.
        assert all(visits[0][n] == visits[1][n] for n in visits[0] if "proj" in n)
    if kind != INT8 and dtype == torch.float32:
        assert all(visits[0][n] != visits[1][n] for n in visits[0]), "used where it lies"


def test_prefetch_does_not_touch_the_layer_in_use(tiny: Tiny) -> None:
    with LayerStream(tiny.source(), device=CPU, dtype=torch.float32) as stream:
        for layer, parameters in stream.visit():
            stream._reader.submit(int).result()  # the next layer has been read by now
            for name, value in parameters.items():
                assert torch.equal(value, tiny.checkpoint.read(tiny.spec.prefix(layer) + name))


def test_layers_of_different_widths_share_the_buffers(tiny: Tiny, tmp_path: Path) -> None:
    mask = random_mask(tiny.spec)
    for group in tiny.spec.table.of_layer(0):
        mask.of(group)[1:] = False  # the first layer is the smallest
    store = build_store(tmp_path, tiny.checkpoint, tiny.spec, weights=INT8, mask=mask)
    with LayerStream(store, device=CPU, dtype=torch.float32) as stream:
        for layer, parameters in stream.visit():
            kept = mask.kept(tiny.spec.table.of_layer(layer)[1])
            assert parameters["mlp.up_proj.weight"].shape == (kept, 24)
            assert parameters["mlp.up_proj.weight"].isfinite().all()


def test_failing_read_reaches_the_caller_and_the_stream_closes(tiny: Tiny) -> None:
    class Failing(Counting):
        def read(self, layer: int, buffer: torch.Tensor) -> None:
            if layer == 2:
                raise CheckpointError("layer 2 is gone")
            super().read(layer, buffer)

    with (
        pytest.raises(CheckpointError, match="layer 2 is gone"),
        LayerStream(Failing(tiny.source()), device=CPU, dtype=torch.float32) as stream,
    ):
        assert [layer for layer, _ in stream.visit()] == []
    assert not any(t.name.startswith("layer-reader") for t in threading.enumerate())


def test_visit_that_is_left_early_can_be_followed_by_a_whole_one(tiny: Tiny) -> None:
    with LayerStream(tiny.source(), device=CPU, dtype=torch.float32) as stream:
        for _layer, _parameters in stream.visit():
            break
        for layer, parameters in stream.visit():
            dense = tiny.checkpoint.read(f"model.layers.{layer}.mlp.up_proj.weight")
            assert torch.equal(parameters["mlp.up_proj.weight"], dense)


def test_one_buffer_gives_the_same_layers_one_after_the_other(tiny: Tiny) -> None:
    source = Counting(tiny.source())
    with LayerStream(source, device=CPU, dtype=torch.float32, buffers=1) as stream:
        for _ in range(2):
            for layer, parameters in stream.visit():
                assert source.reads[-1] == layer, "nothing is read ahead into the only buffer"
                prefix = tiny.spec.prefix(layer)
                for name, value in parameters.items():
                    assert torch.equal(value, tiny.checkpoint.read(prefix + name))
    assert len(source.pointers) == 1 and source.reads == [*range(5), *range(5)]
