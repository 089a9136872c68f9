"""A hardware profile: the rates and sizes of one machine, measured or nominal, as a TOML file.

In: rates, or a file. Out: a checked, frozen :class:`HardwareProfile`, or a file. A key of a file
that is unknown, missing or has a wrong value raises an error that names the file and the key. No
device is touched: a prune on a GPU is planned on machines without one. Holds a few numbers.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from frugal_bonsai.accelerator import ACCELERATORS, CPU, CUDA, shares_host_memory
from frugal_bonsai.checkpoint.commit import write_bytes
from frugal_bonsai.errors import OptionError
from frugal_bonsai.plain_json import read_toml
from frugal_bonsai.plain_toml import toml_literal
from frugal_bonsai.sizes import GIB, MIB

FP32, TF32, BF16, INT8 = "fp32", "tf32", "bf16", "int8"
ARITHMETIC = (FP32, TF32, BF16, INT8)
# Arithmetic of sweeps where the user names none.
DEFAULT_ARITHMETIC = {CPU: FP32, **dict.fromkeys(ACCELERATORS, BF16)}
# Memory of a process before the model, on a machine where it cannot be measured: Python, torch and
# transformers; with a GPU also its libraries and the host side of its context.
NOMINAL_BASE_BYTES = {CPU: 600 * MIB, **dict.fromkeys(ACCELERATORS, 2 * GIB)}
_TEXTS = ("name", "source")
# Profiles of the package, which are addressed by name.
_PACKAGED = Path(__file__).parent / "profiles"
_OF_OWN_MEMORY = ("gpu_bytes", "copy_bytes_per_second")


@dataclass(frozen=True, kw_only=True)
class HardwareProfile:
    """Rates and sizes of one machine.

    Attributes:
        name: Name of the machine, for people.
        device: Device that computes layers: ``cpu``, ``cuda``, ``xpu`` or ``mps``.
        source: Date and means of the measurement, or ``nominal`` and the origin of each number.
        host_bytes: Host memory.
        gpu_bytes: Device memory. None where the device computes in the host's memory.
        disk_cold_bytes_per_second: Sequential reads of a file outside of the page cache.
        disk_warm_bytes_per_second: Sequential reads of a file in the page cache.
        disk_write_bytes_per_second: Sequential writes, fsync included.
        copy_bytes_per_second: Copies from pinned host memory to the device. None where the device
            computes in the host's memory.
        memory_bytes_per_second: Bytes read and written by elementwise operations on memory that is
            used again.
        fresh_bytes_per_second: First writes to memory that the system has just given (page faults).
            None where the allocator keeps its blocks, as a GPU's does.
        attention_flops_per_second: Causal attention in torch's fused kernel, counted as 2 S C
            operations a token for windows of S tokens and C query columns.
        solve_flops_per_second: Cholesky factors, inverses and solves in fp32.
        call_seconds: Time of one call of a layer beside its arithmetic.
        start_seconds: Start of a command: imports and the model's skeleton.
        products: Operations a second of matrix products in ``fp32``, ``tf32`` (fp32 with factors
            of 10 bits, on CUDA), ``bf16`` (on a CPU fp32 with factors rounded to bf16) and ``int8``
            (int8 x int8 -> int32). Those that the device lacks are absent.
    """

    name: str
    device: str
    source: str
    host_bytes: int
    gpu_bytes: int | None = None
    disk_cold_bytes_per_second: float
    disk_warm_bytes_per_second: float
    disk_write_bytes_per_second: float
    copy_bytes_per_second: float | None = None
    memory_bytes_per_second: float
    fresh_bytes_per_second: float | None = None
    attention_flops_per_second: float
    solve_flops_per_second: float
    call_seconds: float
    start_seconds: float
    products: Mapping[str, float]

    def __post_init__(self) -> None:
        if not isinstance(self.device, str) or self.device not in DEFAULT_ARITHMETIC:
            known = ", ".join(DEFAULT_ARITHMETIC)
            raise OptionError(f"device is {self.device!r}, expected one of {known}")
        for name in _TEXTS:
            value = getattr(self, name)
            if not isinstance(value, str) or not value.strip():
                raise OptionError(f"{name} is {value!r}, expected a text")
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            absent = value is None and field.default is None
            if field.name not in (*_TEXTS, "device", "products") and not absent:
                _require_positive(field.name, value)
        own = not shares_host_memory(self.device)
        for name in _OF_OWN_MEMORY:
            if (getattr(self, name) is None) is own:
                needs = "needs" if own else "has no"
                raise OptionError(f"a {self.device} profile {needs} {name}")
        self._check_products()

    def _check_products(self) -> None:
        if not isinstance(self.products, Mapping):
            raise OptionError(f"products is {self.products!r}, expected a table of rates")
        for name, rate in self.products.items():
            if name not in ARITHMETIC:
                known = ", ".join(ARITHMETIC)
                raise OptionError(f"products.{name} is unknown, expected one of {known}")
            _require_positive(f"products.{name}", rate)
        for name in (FP32, self.arithmetic):
            if name not in self.products:
                raise OptionError(f"products.{name} is missing; a {self.device} computes in it")

    @property
    def arithmetic(self) -> str:
        """Arithmetic of sweeps."""
        return DEFAULT_ARITHMETIC[self.device]

    @property
    def element_bytes(self) -> int:
        """Bytes of an activation's element in sweeps."""
        return 2 if self.arithmetic == BF16 else 4

    @property
    def gram_arithmetic(self) -> str:
        """Arithmetic of Gram matrices: CUDA sums products of 16-bit activations in fp32."""
        return BF16 if self.device == CUDA else FP32

    def with_fast_products(self) -> HardwareProfile:
        """Return the profile while a CPU's products round their factors to bf16."""
        if self.device != CPU or BF16 not in self.products:
            return self
        return replace(self, products={**self.products, FP32: self.products[BF16]})

    @property
    def update_arithmetic(self) -> str:
        """Arithmetic of channel updates: fp32 products that may round their factors."""
        return TF32 if TF32 in self.products else FP32


def _require_positive(name: str, value: object) -> None:
    """Raise an :class:`OptionError` unless a value is a number above 0; seconds may be 0."""
    kind = "whole number" if name.endswith("_bytes") else "number"
    types = int if kind == "whole number" else int | float
    if isinstance(value, types) and not isinstance(value, bool) and math.isfinite(value):
        if value > 0 or (value == 0 and name.endswith("_seconds")):
            return
    raise OptionError(f"{name} is {value!r}, expected a positive {kind}")


def profile_names() -> list[str]:
    """Return the names of the profiles of the package."""
    return sorted(path.stem for path in _PACKAGED.glob("*.toml"))


def find_profile(name: str | Path) -> Path:
    """Return the file of a profile: a file of the user's, or a profile of the package by its name.

    A name that is neither is returned as it is; reading it says what there is.
    """
    packaged = _PACKAGED / f"{name}.toml"
    is_name = str(name) in profile_names() and not Path(name).is_file()
    return packaged if is_name else Path(name).expanduser()


def read_profile(path: Path) -> HardwareProfile:
    """Read a profile.

    Raises:
        OptionError: The file cannot be read, is not TOML, or is not a profile.
    """
    try:
        values = read_toml(path)
    except OSError as error:
        raise OptionError(
            f"--profile {path}: cannot be read ({error.strerror or error}); `frugal-bonsai profile "
            f"--out FILE` measures this machine; profiles by name: {', '.join(profile_names())}"
        ) from error
    except ValueError as error:
        raise OptionError(f"--profile {path}: is no TOML file: {error}") from error
    fields = {field.name: field for field in dataclasses.fields(HardwareProfile)}
    for key in values:
        if key not in fields:
            known = ", ".join(fields)
            raise OptionError(f"--profile {path}: key {key!r} is unknown; known are {known}")
    for name, field in fields.items():
        if name not in values and field.default is dataclasses.MISSING:
            raise OptionError(f"--profile {path}: key {name!r} is missing")
    try:
        return HardwareProfile(**values)
    except OptionError as error:
        raise OptionError(f"--profile {path}: {error}") from error


def write_profile(profile: HardwareProfile, path: Path) -> None:
    """Write a profile. It replaces another profile, but no other file.

    Raises:
        OptionError: Another file is there.
        OutputError: The system refuses to write.
    """
    require_replaceable(path)
    write_bytes(path, format_profile(profile).encode())


def require_replaceable(path: Path) -> None:
    """Raise unless a path is free or holds a profile.

    Raises:
        OptionError: Another file is there.
    """
    if not path.exists():
        return
    try:
        read_profile(path)
    except OptionError as error:
        raise OptionError(
            f"--out {path}: exists and is no hardware profile, so it is not replaced; name another "
            f"file ({error})"
        ) from error


def format_profile(profile: HardwareProfile) -> str:
    """Return a profile as TOML: a comment, the fields in order, the products as a table."""
    lines = ["# A hardware profile of frugal-bonsai; docs/hardware.md explains the numbers."]
    for field in dataclasses.fields(profile):
        value = getattr(profile, field.name)
        if field.name != "products" and value is not None:
            lines.append(f"{field.name} = {_literal(value)}")
    lines += ["", "[products]  # operations a second"]
    lines += [f"{name} = {_literal(rate)}" for name, rate in profile.products.items()]
    return "\n".join(lines) + "\n"


def _literal(value: str | float) -> str:
    if isinstance(value, str):
        return toml_literal(value)
    # A measurement is worth four digits.
    return f"{value:_}" if isinstance(value, int) else f"{value:.3e}"
