"""Which machine a prune is for: its device, its caps, the arithmetic that it does fastest.

In: the user's options, a hardware profile or none. Out: a device, a budget, settings with the
arithmetic decided. For a profile's machine nothing of this one is asked. Holds nothing.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from frugal_bonsai.accelerator import CPU
from frugal_bonsai.bonsai.settings import PruneSettings
from frugal_bonsai.errors import OptionError
from frugal_bonsai.hardware.operations import LayerOperations, int8_wins
from frugal_bonsai.hardware.profile import INT8, HardwareProfile, profile_budget
from frugal_bonsai.memory.budget import Budget
from frugal_bonsai.run.options import PruneOptions

if TYPE_CHECKING:
    import torch

# Memory of a card in GB -> the profile of such a machine, a file in profiles/.
NOMINAL_PROFILES = {8: "rtx-8gb", 12: "rtx-12gb", 24: "rtx-24gb", 48: "a6000-48gb", 141: "h200"}


def with_arithmetic(
    settings: PruneSettings, operations: LayerOperations, rates: HardwareProfile
) -> PruneSettings:
    """``auto`` decided: int8 products where the machine's rates say that they win for this model.

    Raises:
        OptionError: int8 products were asked for and this device has none.
    """
    chosen = settings.arithmetic
    if chosen == "float" or settings.weights != "int8":
        return replace(settings, arithmetic="float")
    if chosen == "int8" and INT8 not in rates.products:
        raise OptionError(
            f"--arithmetic int8: torch multiplies no int8 matrices on {rates.name}; use float"
        )
    wins = chosen == "int8" or int8_wins(operations, rates)
    return replace(settings, arithmetic="int8" if wins else "float")


def choose_device(
    options: PruneOptions, profile: HardwareProfile | None, *, elsewhere: bool
) -> torch.device:
    """Where to compute: on this machine, or on the profile's.

    Raises:
        BudgetError: no such device here.
        OptionError: the profile is of another kind of device.
    """
    import torch

    from frugal_bonsai.memory.budget import find_device

    wanted = options.device
    if elsewhere and profile is not None:
        if wanted is not None and wanted.partition(":")[0] != profile.device:
            raise OptionError(_other_device(f"--device {wanted}", options, profile))
        return torch.device(profile.device)
    device = find_device(wanted)
    if profile is not None and device.type != profile.device:
        raise OptionError(_other_device(f"this run's device is {device.type}", options, profile))
    return device


def _other_device(found: str, options: PruneOptions, profile: HardwareProfile) -> str:
    return (
        f"--profile {options.profile}: is of a {profile.device} ({profile.name}), but {found}; "
        f"leave --device out for plan, measure this machine with `frugal-bonsai profile` for prune"
    )


def no_gpu_advice(options: PruneOptions, device: torch.device) -> str | None:
    """The option that plans for a GPU, for users who give a GPU's cap on a machine without one."""
    from frugal_bonsai.sizes import parse_bytes

    if options.max_gpu_mem is None or options.profile is not None or device.type != CPU:
        return None
    cap = parse_bytes(options.max_gpu_mem, option="--max-gpu-mem")
    fitting = [size for size in NOMINAL_PROFILES if size * 10**9 >= cap]
    name = NOMINAL_PROFILES[min(fitting, default=max(NOMINAL_PROFILES))]
    return (
        f"There is no GPU here, so this is a plan for the CPU. For a GPU under --max-gpu-mem "
        f"{options.max_gpu_mem} add --profile profiles/{name}.toml"
    )


def choose_budget(
    device: torch.device, options: PruneOptions, profile: HardwareProfile | None
) -> Budget:
    """Caps: for the profile's machine if there is one, else for this one."""
    from frugal_bonsai.memory.budget import make_budget

    if profile is not None:
        return profile_budget(profile, options.max_gpu_mem, options.max_cpu_mem)
    return make_budget(device, options.max_gpu_mem, options.max_cpu_mem)
