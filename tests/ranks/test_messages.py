"""What ranks say to each other arrives as it was, to the bit."""

from __future__ import annotations

import socket
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from frugal_bonsai.bonsai.masks.design import Design, GroupDesign, UnitDesign, draw_pools
from frugal_bonsai.bonsai.masks.pairs import Pairs
from frugal_bonsai.errors import RankError
from frugal_bonsai.model.layout import PER_LAYER, layout_rules
from frugal_bonsai.model.units import KeepMask
from frugal_bonsai.ranks import group as ranks_group
from frugal_bonsai.ranks.files import list_files, receive_files, send_files
from frugal_bonsai.ranks.group import Group, describe_process, is_alive
from frugal_bonsai.ranks.launch import launched
from frugal_bonsai.ranks.message import Message
from frugal_bonsai.run.open import open_model


@pytest.fixture
def group() -> Group:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    store = TCPStore("127.0.0.1", port, 1, True, timedelta(seconds=20))
    launch = launched({"RANK": "0", "WORLD_SIZE": "2"})
    assert launch is not None
    return Group(launch, store)


def test_values_of_any_size(group: Group, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks_group, "PART_BYTES", 1000)
    for size in (0, 1, 999, 1000, 1001, 12_345):
        data = bytes(range(256)) * (size // 256) + bytes(size % 256)
        group.put("key", data)
        assert group.get("key") == data
        group.remove("key")
        assert not group.has("key") and not group.has("key#0")


def test_waiting_ends_with_a_failure(group: Group) -> None:
    group.failure = "rank 1 (there, process 7) ended unexpectedly"
    with pytest.raises(RankError, match="ended unexpectedly"):
        group.wait("never")


def test_messages_hold_values_and_tensors() -> None:
    tensors = {
        "windows": torch.arange(12).view(3, 4).T,
        "keep": torch.tensor([True, False]),
        "none": torch.empty(0, 5, dtype=torch.int64),
    }
    values = {"losses": [0.1, 1e-300, 3.0000000000000004], "name": "é"}
    found = Message.from_bytes(Message(values, tensors).to_bytes())
    assert found.values == values
    assert found.tensors.keys() == tensors.keys()
    assert all(torch.equal(found.tensors[name], tensors[name]) for name in tensors)
    assert Message.from_bytes(Message({}).to_bytes()) == Message({})


@pytest.mark.parametrize("level", ["group", "unit"])
def test_pairs_arrive_as_they_were(level: str) -> None:
    with open_model("example", headers_only=True) as model:
        table, rules = model.spec.table, layout_rules(model.spec, PER_LAYER)
    generator = torch.Generator().manual_seed(0)
    mask = KeepMask(table).without(torch.tensor([3, 5]))
    pools = draw_pools(mask, torch.rand(table.units, generator=generator), 0.3, rules)
    units_K = torch.cat(pools.members)
    design: Design = GroupDesign(pools, torch.randint(0, 9, (6, len(pools.members))))
    if level == "unit":
        design = UnitDesign(pools, units_K, torch.rand(6, len(units_K)) < 0.5)
    pairs = Pairs(
        design=design,
        masks_I=torch.arange(6),
        where_I=torch.tensor([0, 0, 1, 1, 2, 2, 0, 1, 2]),
        windows_WS=torch.randint(0, 99, (3, 8)),
    )
    message = Message.from_bytes(Message({}, pairs.tensors()).to_bytes())
    found = Pairs.of(table, message.tensors)
    assert type(found.design) is type(design)
    assert found.key == pairs.key and len(found) == 9
    masks_B = torch.tensor([0, 5])
    for each in table.groups:
        assert torch.equal(found.design.keep(each, masks_B), design.keep(each, masks_B))


def test_files_arrive_in_parts(
    group: Group, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The receiver keeps up with the sender, which waits for each part."""
    for module in ("files", "group"):
        monkeypatch.setattr(f"frugal_bonsai.ranks.{module}.PART_BYTES", 1000)
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    for name, size in (("a", 2500), ("b", 0), ("c", 1000)):
        (source / name).write_bytes(bytes(range(250)) * (size // 250))
    files = list_files(source)
    assert [entry["bytes"] for entry in files] == [2500, 0, 1000]
    send_files(group, "task/0", source, files, receivers=0)
    assert not group.has("task/0/part/0"), "with no receiver nothing is kept"
    monkeypatch.setattr(group, "wait_count", lambda key, value: None)
    monkeypatch.setattr(group, "remove", lambda key: None)
    send_files(group, "task/1", source, files, receivers=1)
    receive_files(group, "task/1", target, files)
    assert [path.name for path in sorted(target.iterdir())] == ["a", "b", "c"]
    assert all((target / n).read_bytes() == (source / n).read_bytes() for n in "abc")


def test_a_process_is_known_by_its_start(group: Group) -> None:
    process = describe_process(group.launch)
    assert is_alive(process)
    assert not is_alive({**process, "created": process["created"] - 100})
    assert not is_alive({**process, "pid": 2**22 - 3})
