"""The stand-in itself. Importing it changes torch in this process for good."""

import os
import sys
import types
import weakref
from typing import Any, ClassVar

import torch
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.overrides import TorchFunctionMode

#: What was done, in its order: move, optimizer, forward, backward, step, evaluate, mark.
events: list[str] = []


class OrderError(AssertionError):
    """The program does something in the wrong order."""


class State:
    """What is due."""

    mode = os.environ.get("PT_HPU_LAZY_MODE", "not set")
    due = ""
    depth = 0
    optimizers: ClassVar[Any] = weakref.WeakSet()


def note(event: str) -> None:
    if os.environ.get("PT_HPU_LAZY_MODE", "not set") != State.mode:
        raise OrderError("PT_HPU_LAZY_MODE was changed after the import")
    events.append(event)
    if State.mode == "1":
        due = State.due
        if event == "step" and due == "backward":
            raise OrderError("no mark_step between backward and the optimizer's step")
        if event in ("forward", "evaluate") and due in ("backward", "step"):
            raise OrderError(f"no mark_step after {due}")
        if event in ("forward", "evaluate") and due == "evaluate":
            raise OrderError("no mark_step after a batch of an evaluation")
    if event in ("backward", "step", "evaluate"):
        State.due = event


def mark_step(device_str: str = "", sync: bool = False) -> None:
    note("mark")
    State.due = ""


def finished() -> None:
    """Fail if a mark_step is due still."""
    if State.mode == "1" and State.due:
        raise OrderError(f"no mark_step after {State.due}, at the end")


# Tensors


class HpuTensor(torch.Tensor):  # type: ignore[misc]
    """A tensor that says that it is on hpu."""


#: What asks about a tensor, or moves it, and may see those of two devices.
FREE = {
    "_has_compatible_shallow_copy_type",
    "copy_",
    "__get__",
    "__set__",
    "__getitem__",
    "__setitem__",
    "set_",
    "type_as",
}
READS = {
    "item",
    "tolist",
    "__float__",
    "__int__",
    "__bool__",
    "__index__",
    "__repr__",
    "__format__",
}


def is_hpu(device: Any) -> bool:
    if isinstance(device, HpuTensor):
        return True
    if isinstance(device, torch.Tensor) or device is None:
        return False
    return str(device).partition(":")[0] == "hpu"


def tensors(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from tensors(each)
    elif isinstance(value, dict):
        yield from tensors(list(value.values()))


def tagged(value: Any) -> Any:
    """Say of plain tensors that they are on hpu."""
    if isinstance(value, torch.Tensor):
        return value if isinstance(value, HpuTensor) else value.as_subclass(HpuTensor)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(tagged, value))
    if isinstance(value, (list, tuple)):
        return type(value)(map(tagged, value))
    return value


class Stand(TorchFunctionMode):  # type: ignore[misc]
    """Sees each call of torch."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = dict(kwargs or {}), getattr(func, "__name__", "")
        first: Any = args[0] if args else None
        with torch._C.DisableTorchFunctionSubclass():
            if func == torch.Tensor.device.__get__:
                return torch.device("hpu", 0) if isinstance(first, HpuTensor) else first.device
            if func is torch.Tensor.to:
                return moved(first, args[1:], kwargs)
            if name == "cpu" and isinstance(first, HpuTensor):
                return first.as_subclass(torch.Tensor).clone()
            if name in ("numpy", "__array__") and isinstance(first, HpuTensor):
                raise TypeError("can't convert hpu:0 device type tensor to numpy; use .cpu() first")
            made = kwargs.get("device")
            if is_hpu(made):
                acquire()
                del kwargs["device"]
            seen = list(tensors([*args, kwargs]))
            here = any(isinstance(each, HpuTensor) for each in seen)
            if (
                here
                and name not in FREE
                and any(not isinstance(each, HpuTensor) and each.dim() for each in seen)
            ):
                raise RuntimeError(f"Expected all tensors to be on the same device ({name})")
            if func is torch.Tensor.backward and here:
                note("backward")
            found = func(*args, **kwargs)
            if (here and name not in READS) or is_hpu(made):
                return tagged(found)
            return found


def acquire() -> None:
    """What the first use of a Gaudi does."""
    if os.environ.get("STAND_IN_HPU") == "busy":
        raise RuntimeError("synStatus=20 [Device already acquired] Device acquire failed.")


def moved(tensor: torch.Tensor, args: Any, kwargs: dict[str, Any]) -> torch.Tensor:
    """What Tensor.to does, for the devices hpu and cpu."""
    given = [*args, *kwargs.values()]
    places = [each for each in given if isinstance(each, (torch.device, str, torch.Tensor))]
    types = [each for each in given if isinstance(each, torch.dtype)]
    here = isinstance(tensor, HpuTensor)
    there = is_hpu(places[0]) if places else here
    found = tensor.as_subclass(torch.Tensor)
    if here == there and not kwargs.get("copy") and (not types or types[0] == tensor.dtype):
        return tensor
    if there:
        acquire()
    found = found.clone().to(types[0]) if types else found.clone()
    return tagged(found) if there else found


# Modules and optimizers

_to, _init = torch.nn.Module.to, torch.optim.Optimizer.__init__


def move(module: torch.nn.Module, *args: Any, **kwargs: Any) -> torch.nn.Module:
    """What Module.to does; a move to hpu makes new parameters."""
    device = torch._C._nn._parse_to(*args, **kwargs)[0]
    mine = [each for each in module.parameters() if not isinstance(each, HpuTensor)]
    if not is_hpu(device) or not mine:
        return _to(module, *args, **kwargs)
    note("move")
    known = {id(each) for each in mine}
    for optimizer in State.optimizers:
        if any(id(each) in known for group in optimizer.param_groups for each in group["params"]):
            raise OrderError("the optimizer was made before the model was moved to hpu")
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        return _to(module, *args, **kwargs)
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)


def made(self: Any, *args: Any, **kwargs: Any) -> None:
    _init(self, *args, **kwargs)
    State.optimizers.add(self)
    note("optimizer")


def stepping(optimizer: Any, args: Any, kwargs: Any) -> None:
    if any(isinstance(p, HpuTensor) for group in optimizer.param_groups for p in group["params"]):
        note("step")


def entering(module: Any, inputs: Any) -> None:
    if not any(isinstance(each, HpuTensor) for each in tensors(list(inputs))):
        return
    if not State.depth:
        if torch.is_inference_mode_enabled():
            raise OrderError("Gaudi has no inference mode")
        note("forward" if torch.is_grad_enabled() else "evaluate")
    State.depth += 1


def leaving(module: Any, inputs: Any, output: Any) -> None:
    if any(isinstance(each, HpuTensor) for each in tensors(list(inputs))):
        State.depth -= 1


hpu: Any = types.ModuleType("torch.hpu")
hpu.is_available = lambda: os.environ.get("STAND_IN_HPU") != "absent"
hpu.device_count = lambda: int(hpu.is_available())
hpu.get_device_name = lambda index=0: "GAUDI-STAND-IN"
hpu.get_device_properties = lambda index=0: "(name='GAUDI-STAND-IN', total_memory=1GB)"
hpu.current_device = lambda: 0
hpu.synchronize = lambda *_: events.append("synchronize")

if "torch.hpu" not in sys.modules:
    torch._register_device_module("hpu", hpu)
    torch.nn.Module.to = move
    torch.optim.Optimizer.__init__ = made
    register_optimizer_step_pre_hook(stepping)
    register_module_forward_pre_hook(entering)
    register_module_forward_hook(leaving)
    Stand().__enter__()
