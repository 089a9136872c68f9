"""Tensors that compute on the CPU and claim to lie on an accelerator.

In: every operation that touches one of them, or that makes one. Out: the same operation on the CPU,
checked as a device would: tensors of two devices do not meet, operations that the device lacks are
refused; what waits for the device or copies from pageable memory is counted with its place.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import weakref
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from stand_in_device.allocator import Block, DeviceAllocator, PinnedAllocator
from stand_in_device.operators import (
    CONTIGUOUS,
    COPIES,
    DOWN,
    GUARDED,
    INDEXED,
    INDEXING,
    META,
    SCALARS,
    UP,
    WAITING,
    asked_by_torch_itself,
    aten,
    attention_in_parts,
    compute,
    has_gradient,
    has_size,
    is_there,
    leaves_of,
    line_of_the_package,
    mapped,
)
from stand_in_device.streams import Order


class MixedDevicesError(RuntimeError):
    """Tensors of two devices met in one operation."""


@dataclass
class Machine:
    """A device, its memory, and what happened on it.

    Attributes:
        device: ``cuda:0`` or another accelerator's name.
        waits: (operation, line of the package) -> how often the host waited for the device.
        pageable: (direction, line of the package) -> copies from or to memory that is not pinned.
        doubles: the device computes in fp64.
    """

    device: torch.device
    memory: DeviceAllocator
    pinned: PinnedAllocator = field(default_factory=PinnedAllocator)
    order: Order = field(default_factory=Order)
    waits: Counter[tuple[str, str]] = field(default_factory=Counter)
    pageable: Counter[tuple[str, str]] = field(default_factory=Counter)
    doubles: bool = True
    _pinned_at: dict[int, int] = field(default_factory=dict)
    _lock: threading.RLock = field(default_factory=threading.RLock)

    # -- memory --------------------------------------------------------------------------------
    def wrap(self, inner: torch.Tensor) -> StandInTensor:
        """A tensor of this device around a CPU tensor, in new memory."""
        with self._lock:
            size = inner.untyped_storage().nbytes()
            block = self.memory.malloc(size, self.order.current_id)
        return StandInTensor(inner, _Holder(self, block))

    def pin(self, inner: torch.Tensor) -> torch.Tensor:
        """Register a CPU tensor's memory as pinned, as long as it lives."""
        storage = inner.untyped_storage()
        address, bucket = storage.data_ptr(), self.pinned.malloc(storage.nbytes())
        self._pinned_at[address] = self._pinned_at.get(address, 0) + 1

        def release() -> None:
            self.pinned.release(bucket)
            self._pinned_at[address] -= 1
            if not self._pinned_at[address]:
                del self._pinned_at[address]

        weakref.finalize(storage, release)
        return inner

    def is_pinned(self, tensor: torch.Tensor) -> bool:
        """True if a CPU tensor lies in pinned memory."""
        address = tensor.untyped_storage().data_ptr()
        return address != 0 and address in self._pinned_at

    # -- operations ----------------------------------------------------------------------------
    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """One operation."""
        if func is torch.ops.prim.device.default:
            own = isinstance(args[0], StandInTensor)
            return self.device if own else args[0].device
        leaves = leaves_of((args, kwargs))
        mine = [leaf for leaf in leaves if isinstance(leaf, StandInTensor)]
        if not mine and "device" not in kwargs and "pin_memory" not in kwargs:
            if func in (aten._pin_memory.default, aten.pin_memory.default):
                return self.pin(args[0].clone())
            return func(*args, **kwargs)
        if kwargs.get("device") == META and asked_by_torch_itself():
            # It takes a tensor's device for what lies under it here.
            kwargs["device"] = self.device
        asked = kwargs.get("device")
        target = None if asked is None else torch.device(asked)
        here = target is not None and target.type == self.device.type
        if not mine and not here:
            pinned = kwargs.pop("pin_memory", None)
            result = func(*args, **kwargs)
            return self.pin(result) if pinned else result
        implicit = torch._C.DispatchKey.CompositeImplicitAutograd
        if torch.is_inference_mode_enabled() and func.has_kernel_for_dispatch_key(implicit):
            with Mode(self):
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        others = [
            leaf
            for leaf in leaves
            if isinstance(leaf, torch.Tensor) and not isinstance(leaf, StandInTensor)
        ]
        self._refuse_mixed(func, args, mine, others)
        self._count(func, args, kwargs, mine, others, target)
        if func is aten._to_copy.default and mine and is_there(args[0], kwargs, here):
            return StandInTensor(args[0].inner, args[0].holder)
        plain = {k: v for k, v in kwargs.items() if k not in ("device", "pin_memory")}
        plain = mapped(_inner, plain)
        if target is not None:
            plain["device"] = torch.device("cpu")
        result = compute(func, mapped(_inner, args), plain)
        on_device = here if target is not None else bool(mine)
        if func is aten.copy_.default:
            on_device = isinstance(args[0], StandInTensor)
        result = self._back(result, mine, on_device)
        self._order(func, args, kwargs, result)
        return result

    def guarded(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """An operation of :data:`GUARDED`."""
        if func in SCALARS:
            self.waits[func.__name__, line_of_the_package()] += 1
            self.order.wait_for_stream()
            return func(args[0].inner.detach())
        if func is torch.Tensor.numpy:
            raise TypeError(f"numpy of a tensor on {self.device} at {line_of_the_package()}")
        if func is torch.nn.functional.scaled_dot_product_attention:
            return self._attention(args, kwargs)
        if func in INDEXED:
            args = self._checked_index(func, args)
        if any(has_gradient(one) for one in leaves_of(args)):
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if func is torch.Tensor.contiguous:
            if args[0].inner.is_contiguous():
                return args[0]
            return self.run(aten.clone.default, args[:1], {"memory_format": CONTIGUOUS})
        if func is torch.Tensor.copy_:
            return self.run(aten.copy_.default, args, kwargs)
        return self._take(*args) if func is torch.Tensor.__getitem__ else self._put(*args)

    def _checked_index(self, func: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Refuse or count what a device would; indices of the host go to the device."""
        tensor, at, *value = args
        own, where = isinstance(tensor, StandInTensor), line_of_the_package()
        indices = [one for one in leaves_of(at) if isinstance(one, torch.Tensor)]
        foreign = bool(value) and has_size(value[0]) and isinstance(value[0], StandInTensor) != own
        if (foreign and indices) or (
            not own and any(isinstance(one, StandInTensor) for one in indices)
        ):
            raise MixedDevicesError(f"indexing at {where}: tensors of two devices")
        if any(one.dtype == torch.bool for one in indices):
            self.waits["index by bool", where] += 1
            self.order.wait_for_stream()

        def move(one: Any) -> Any:
            if not isinstance(one, torch.Tensor) or isinstance(one, StandInTensor):
                return one
            self.pageable["index to the device", where] += int(one.dim() > 0)
            return self.wrap(one)

        return (tensor, mapped(move, at) if own else at, *value)

    def _take(self, source: Any, at: Any) -> Any:
        """``source[at]``."""
        result = source.inner[mapped(_inner, at)]
        made = self._back(result, [source], True)
        if made.holder is not source.holder:
            self._touch([*self._ranges(source, at), *self._range(made, True)], "getitem")
        return made

    def _put(self, target: Any, at: Any, value: Any) -> None:
        """``target[at] = value``."""
        if not any(isinstance(one, torch.Tensor) for one in leaves_of(at)):
            view = target[at]
            if has_size(value):
                self.run(aten.copy_.default, (view, value), {})
            else:
                self.run(aten.fill_.Scalar, (view, float(_inner(value))), {})
            return
        target.inner[mapped(_inner, at)] = _inner(value)
        self._touch([*self._ranges(value, at), *self._range(target, True)], "setitem")

    def _attention(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Fused attention, as one operation."""
        names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        tensors = [one for one in given.values() if isinstance(one, torch.Tensor)]
        if not all(isinstance(one, StandInTensor) for one in tensors):
            raise MixedDevicesError(f"attention at {line_of_the_package()}: tensors of two devices")
        if any(has_gradient(one) for one in tensors):
            return attention_in_parts(**given)
        attend = torch.nn.functional.scaled_dot_product_attention
        out = self.wrap(attend(**{name: _inner(value) for name, value in given.items()}))
        self._touch([*self._ranges(*tensors), *self._range(out, True)], "attention")
        return out

    def _ranges(self, *values: Any) -> list[tuple[int, int, int, bool]]:
        return [one for value in leaves_of(values) for one in self._range(value, False)]

    def _touch(self, uses: list[tuple[int, int, int, bool]], operator: str) -> None:
        if uses:
            self.order.launch(uses, line_of_the_package(), operator)

    def _back(self, result: Any, mine: list[StandInTensor], on_device: bool) -> Any:
        """Results as tensors of this device; those in an argument's memory share its block."""
        by_id = {id(tensor.inner): tensor for tensor in mine}
        holders = {tensor.inner.untyped_storage().data_ptr(): tensor.holder for tensor in mine}

        def back(value: Any) -> Any:
            if not isinstance(value, torch.Tensor):
                return value
            if id(value) in by_id:
                return by_id[id(value)]
            if not on_device or value.device.type != "cpu":
                return value
            if value.dtype == torch.float64 and not self.doubles:
                raise TypeError(f"{self.device.type} has no float64, at {line_of_the_package()}")
            holder = holders.get(value.untyped_storage().data_ptr())
            if holder is None or not value.untyped_storage().nbytes():
                return self.wrap(value)
            return StandInTensor(value, holder)

        return mapped(back, result)

    def _refuse_mixed(
        self,
        func: Any,
        args: tuple[Any, ...],
        mine: list[StandInTensor],
        others: list[torch.Tensor],
    ) -> None:
        if not mine or func in COPIES:
            return
        wrong = [other for other in others if other.dim() > 0]
        if func in INDEXING and isinstance(args[0], StandInTensor):
            value = args[2] if len(args) > 2 else None
            if not any(other is value for other in wrong):
                if wrong:
                    self.pageable["index to the device", line_of_the_package()] += 1
                return
        if wrong:
            raise MixedDevicesError(
                f"{func} at {line_of_the_package()}: {self.device} "
                f"{[tuple(one.shape) for one in mine]} meets {wrong[0].device} "
                f"{[tuple(one.shape) for one in wrong]}"
            )

    def _count(
        self,
        func: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        mine: list[StandInTensor],
        others: list[torch.Tensor],
        target: torch.device | None,
    ) -> None:
        """Count waits for the device, and copies from or to pageable memory."""
        where = line_of_the_package()
        boolean = func in INDEXING and any(
            isinstance(one, torch.Tensor) and one.dtype == torch.bool for one in leaves_of(args[1])
        )
        if (func in WAITING and mine) or boolean:
            self.waits[func.name(), where] += 1
            self.order.wait_for_stream()
        host: torch.Tensor | None = None  # None is memory of its own, which is pageable
        if func is aten._to_copy.default and target is not None:
            direction = DOWN if mine and target.type == "cpu" else UP if not mine else ""
            host = None if mine else args[0]
        elif func is aten.copy_.default and len(mine) == 1 and others:
            direction, host = UP if isinstance(args[0], StandInTensor) else DOWN, others[0]
        else:
            direction = ""
        number = host is not None and host.dim() == 0 and direction == UP
        if not direction or not args[0].numel() or number:
            return
        at_once = bool(kwargs.get("non_blocking") or (len(args) > 2 and args[2]))
        pinned = host is not None and self.is_pinned(host)
        if not pinned:
            self.pageable[direction, where] += 1
        if not (at_once and pinned):
            self.order.wait_for_stream()

    def _order(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        """Tell the order what is read and written."""
        uses: list[tuple[int, int, int, bool]] = []
        schema = func._schema.arguments
        named = [*zip(schema, args, strict=False)]
        named += [(arg, kwargs[arg.name]) for arg in schema if arg.name in kwargs]
        metadata = False
        for argument, value in named:
            alias = argument.alias_info
            if alias is not None and not alias.is_write:
                metadata = True
                continue
            for one in leaves_of(value):
                uses += self._range(one, alias is not None)
        if not metadata:
            known = {id(value) for value in leaves_of((args, kwargs))}
            for one in leaves_of(out):
                if id(one) not in known:
                    uses += self._range(one, True)
        self._touch(uses, func.name())

    def _range(self, value: Any, writes: bool) -> list[tuple[int, int, int, bool]]:
        """(segment, first byte, byte behind the last, is a write) of a tensor."""
        if not isinstance(value, torch.Tensor) or not value.numel():
            return []
        own = isinstance(value, StandInTensor)
        inner = value.inner if own else value
        if not own and not self.is_pinned(inner):
            return []
        size = inner.element_size()
        extent = sum((n - 1) * s for n, s in zip(inner.shape, inner.stride(), strict=True)) + 1
        if own:
            block = value.holder.block
            segment, base = block.segment.address, block.address
        else:
            segment = base = inner.untyped_storage().data_ptr()
        start = base + inner.storage_offset() * size
        return [(segment, start, start + extent * size, writes)]


class _Holder:
    """A block, given back when the last tensor in it is gone."""

    def __init__(self, machine: Machine, block: Block) -> None:
        self._machine, self.block = machine, block

    def __del__(self) -> None:
        with self._machine._lock:
            self._machine.memory.release(self.block)


class StandInTensor(torch.Tensor):
    """A CPU tensor that claims to be on the accelerator."""

    inner: torch.Tensor
    holder: _Holder

    @staticmethod
    def __new__(cls: type, inner: torch.Tensor, holder: _Holder) -> Any:
        with torch._C._DisableTorchDispatch():
            meta = torch.empty_strided(
                inner.shape, inner.stride(), dtype=inner.dtype, device="meta"
            )
        device = holder._machine.device
        made = torch.Tensor._make_subclass(
            cls, meta, False, dispatch_device=False, device_for_backend_keys=device
        )
        made.inner, made.holder = inner, holder
        return made

    @property
    def device(self) -> torch.device:
        return self.holder._machine.device

    @property
    def is_cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def is_meta(self) -> bool:
        return False

    def __repr__(self, **_: Any) -> str:
        return f"StandInTensor({self.inner})"

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func not in GUARDED:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        [machine, *_] = [
            leaf.holder._machine for leaf in leaves_of((args, kwargs)) if isinstance(leaf, cls)
        ]
        return machine.guarded(func, args, dict(kwargs or {}))

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        [machine] = {
            id(leaf.holder._machine): leaf.holder._machine
            for leaf in leaves_of((args, kwargs))
            if isinstance(leaf, StandInTensor)
        }.values()
        return machine.run(func, args, dict(kwargs or {}))


def subclass_maker(make: Any) -> Any:
    """``torch.Tensor._make_subclass`` for classes over tensors of this device too."""

    def make_subclass(cls: type, data: torch.Tensor, *given: Any, **kwargs: Any) -> Any:
        if not isinstance(data, StandInTensor):
            return make(cls, data, *given, **kwargs)
        return StandInTensor.__new__(_over_stand_in(cls), data.inner, data.holder)

    return staticmethod(make_subclass)


@functools.cache
def _over_stand_in(cls: Any) -> type:
    """The same class over tensors of this device."""

    def torch_function(
        own: Any, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.nn.functional.linear:
            return cls.__torch_function__.__func__(own, func, types, args, kwargs)
        if func is torch.Tensor.as_subclass:
            return StandInTensor(args[0].inner, args[0].holder)
        return StandInTensor.__torch_function__.__func__(StandInTensor, func, types, args, kwargs)

    return type(
        cls.__name__, (cls, StandInTensor), {"__torch_function__": classmethod(torch_function)}
    )


class Mode(TorchDispatchMode):
    """Sees what makes tensors; the rest comes by way of the tensors themselves."""

    def __init__(self, machine: Machine) -> None:
        super().__init__()
        self._machine = machine

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        return self._machine.run(func, args, dict(kwargs or {}))


def _inner(value: Any) -> Any:
    return value.inner if isinstance(value, StandInTensor) else value


@contextlib.contextmanager
def modes(machine: Machine) -> Iterator[None]:
    """Within it, this thread's operations reach the machine."""
    with Mode(machine):
        yield
