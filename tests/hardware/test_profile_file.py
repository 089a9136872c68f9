"""Profiles as TOML: what is written is read again, and what is no profile is refused by name."""

from __future__ import annotations

from pathlib import Path

import profiles
import pytest

from frugal_bonsai.errors import OptionError
from frugal_bonsai.hardware.profile import (
    HardwareProfile,
    find_profile,
    format_profile,
    profile_names,
    read_profile,
    write_profile,
)

SHIPPED = [find_profile(name) for name in profile_names()]


def saved(tmp_path: Path, profile: HardwareProfile) -> Path:
    path = tmp_path / "machine.toml"
    write_profile(profile, path)
    return path


@pytest.mark.parametrize("profile", [profiles.cpu(), profiles.cuda()])
def test_round_trip(tmp_path: Path, profile: HardwareProfile) -> None:
    assert read_profile(saved(tmp_path, profile)) == profile


@pytest.mark.parametrize("name", ['a "quoted" \\ name', "line\nbreak\ttab\x1b\x7f", "é 模型 😀"])
def test_any_name_survives(tmp_path: Path, name: str) -> None:
    assert read_profile(saved(tmp_path, profiles.cpu(name=name))).name == name


def test_the_text_for_people() -> None:
    text = format_profile(profiles.cpu(memory_bytes_per_second=23456789012.0))
    assert "memory_bytes_per_second = 2.346e+10" in text
    assert "host_bytes = 17_179_869_184" in text
    assert text.startswith("# A hardware profile") and "gpu_bytes" not in text
    assert text.split("[products]")[1].split("\n")[1] == "fp32 = 1.000e+11"


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("call_seconds", "cal_seconds", "key 'cal_seconds' is unknown"),
        ("call_seconds = 1.000e-03\n", "", "key 'call_seconds' is missing"),
        ("1.000e-03", '"fast"', "call_seconds is 'fast'"),
        ("int8 =", "int4 =", "products.int4 is unknown"),
        ("=", "", "is no TOML file"),
    ],
)
def test_a_wrong_file_names_file_and_key(tmp_path: Path, old: str, new: str, expected: str) -> None:
    path = saved(tmp_path, profiles.cpu())
    path.write_text(path.read_text(encoding="utf-8").replace(old, new, 1), encoding="utf-8")
    with pytest.raises(OptionError) as refusal:
        read_profile(path)
    assert str(path) in str(refusal.value) and expected in str(refusal.value)


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(OptionError, match=r"model\.safetensors: is no TOML"):
        read_profile(path)


def test_a_file_that_is_not_there_says_where_to_get_one(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="frugal-bonsai profile"):
        read_profile(tmp_path / "none.toml")
    with pytest.raises(OptionError, match="cannot be read"):
        read_profile(tmp_path)


def test_a_profile_is_replaced_and_nothing_else(tmp_path: Path) -> None:
    path = saved(tmp_path, profiles.cpu())
    write_profile(profiles.cuda(), path)
    assert read_profile(path) == profiles.cuda()
    other = tmp_path / "pyproject.toml"
    other.write_text("[project]\nname = 'mine'\n", encoding="utf-8")
    with pytest.raises(OptionError, match=r"pyproject\.toml: exists and is no hardware profile"):
        write_profile(profiles.cpu(), other)
    assert "mine" in other.read_text(encoding="utf-8")


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_profiles_say_where_their_numbers_come_from(path: Path) -> None:
    profile = read_profile(path)
    assert profile.source.startswith(("measured 20", "nominal"))
    text = path.read_text(encoding="utf-8")
    if profile.source.startswith("nominal"):
        assert "derated" in text and text.count("#") >= 5


def test_all_profiles_are_there() -> None:
    names = {path.stem for path in SHIPPED}
    assert names == {
        *("2-core-cpu", "laptop-cpu-16gb", "rtx-8gb", "rtx-12gb", "rtx-24gb"),
        *("a6000-48gb", "h200"),
    }
