"""The machine of a prune: its device, its caps, its rates.

In: the user's options, a hardware profile or none. Out: a :class:`Machine`. Where a prune is
planned for the machine of a profile, no device of this machine is asked. Holds nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

from frugal_bonsai.accelerator import CPU
from frugal_bonsai.errors import OptionError
from frugal_bonsai.hardware.profile import HardwareProfile, find_profile, read_profile
from frugal_bonsai.memory.budget import Budget, Caps, find_device, make_budget
from frugal_bonsai.ranks.launch import launched
from frugal_bonsai.run.options import PruneOptions
from frugal_bonsai.run.profile import quick_profile
from frugal_bonsai.sizes import GIB, format_bytes

# Memory of a card in GB -> the profile of such a machine, of the package.
NOMINAL_PROFILES = {8: "rtx-8gb", 12: "rtx-12gb", 24: "rtx-24gb", 48: "a6000-48gb", 141: "h200"}

# Left to the rest of a profile's machine where the user names no cap.
_LEAVE_HOST_BYTES = GIB


@dataclass(frozen=True, kw_only=True)
class Machine:
    """The machine that a prune runs on, or is planned for.

    Attributes:
        device: Device that computes.
        budget: Caps on its memory.
        profile: Profile that the user names.
        elsewhere: The profile is of another machine, which is only planned for.
    """

    device: torch.device
    budget: Budget
    profile: HardwareProfile | None = None
    elsewhere: bool = False

    @cached_property
    def rates(self) -> HardwareProfile:
        """Rates of the profile, else of a second of measuring here."""
        return self.profile or quick_profile(self.device)


def find_machine(options: PruneOptions, *, elsewhere: bool) -> Machine:
    """Return the machine that computes, with the caps of the options.

    Args:
        options: The user's options.
        elsewhere: The prune is planned for the profile's machine.

    Raises:
        BudgetError: This machine has no such device.
        OptionError: The profile cannot be read, or is of another kind of device.
    """
    profile = None if options.profile is None else read_profile(find_profile(options.profile))
    wanted = options.device
    if elsewhere and profile is not None:
        if wanted is not None and wanted.partition(":")[0] != profile.device:
            raise OptionError(_other_device(f"--device {wanted}", options, profile))
        device, budget = torch.device(profile.device), profile_budget(profile, options.caps)
    else:
        device = find_device(wanted)
        if profile is not None and device.type != profile.device:
            found = f"this run's device is {device.type}"
            raise OptionError(_other_device(found, options, profile))
        budget = make_budget(device, options.caps)
    return Machine(device=device, budget=budget, profile=profile, elsewhere=elsewhere)


def profile_budget(profile: HardwareProfile, caps: Caps) -> Budget:
    """Return the budget of the profile's machine: the user's caps, else its memory."""
    notes: list[str] = []
    host = caps.host_bytes
    if host is None:
        launch = launched()
        ranks = 1 if launch is None else launch.local_ranks
        host = max(profile.host_bytes - _LEAVE_HOST_BYTES, profile.host_bytes // 2) // ranks
    elif host > profile.host_bytes:
        notes.append(_more_than("--max-cpu-mem", host, profile.host_bytes))
    gpu = profile.gpu_bytes
    if gpu is None:
        if caps.gpu_bytes is not None:
            notes.append("--max-gpu-mem has no effect: the profile's machine has no GPU memory")
        return Budget(device=profile.device, host_bytes=host, notes=tuple(notes))
    if caps.gpu_bytes is not None:
        if caps.gpu_bytes > gpu:
            notes.append(_more_than("--max-gpu-mem", caps.gpu_bytes, gpu))
        gpu = min(gpu, caps.gpu_bytes)
    return Budget(device=profile.device, host_bytes=host, gpu_bytes=gpu, notes=tuple(notes))


def _more_than(option: str, cap_bytes: int, own_bytes: int) -> str:
    return (
        f"{option} {format_bytes(cap_bytes)} is more than the profile's {format_bytes(own_bytes)}"
    )


def _other_device(found: str, options: PruneOptions, profile: HardwareProfile) -> str:
    return (
        f"--profile {options.profile}: is of a {profile.device} ({profile.name}), but {found}; "
        f"leave --device out for plan, measure this machine with `frugal-bonsai profile` for prune"
    )


def no_gpu_advice(options: PruneOptions, device: torch.device) -> str | None:
    """Return advice for users who cap a GPU on a machine without one; else None."""
    cap_bytes = options.caps.gpu_bytes
    if cap_bytes is None or options.profile is not None or device.type != CPU:
        return None
    fitting = [size for size in NOMINAL_PROFILES if size * 10**9 >= cap_bytes]
    name = NOMINAL_PROFILES[min(fitting, default=max(NOMINAL_PROFILES))]
    return (
        f"There is no GPU here, so this is a plan for the CPU. For a GPU with this --max-gpu-mem "
        f"add --profile {name}"
    )
