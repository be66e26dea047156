"""Where a job's Python computes: the choice of the device, and what Gaudi wants of a program.

To be imported before torch: recent torch loads the plug-in of Gaudi by itself, which reads
PT_HPU_LAZY_MODE then and never again. 0 is eager mode, 1 is lazy mode; the releases differ in what
they take by default, so that it is always set here.
"""

import contextlib
import os
import sys
from typing import Any, List, NamedTuple

os.environ.setdefault("PT_HPU_LAZY_MODE", "0")

import torch

#: What may be asked for.
CHOICES = ("auto", "cuda", "rocm", "hpu", "cpu")


class DeviceError(Exception):
    """The device that was asked for is not there, or does not work."""


class Device(NamedTuple):
    """Where a program computes.

    Attributes
    ----------
    torch : torch.device
        As torch calls it; ROCm's is "cuda", too.
    kind : str
        "cuda", "hpu" or "cpu".
    name : str
        Of the model, for people.
    lazy : bool
        Gaudi in lazy mode: what was recorded runs at `mark`.
    """

    torch: torch.device
    kind: str
    name: str
    lazy: bool = False

    def mark(self) -> None:
        """End a graph of Gaudi's lazy mode; nothing on other devices.

        It belongs after the backward pass, after the optimizer's step, and after each batch of an
        evaluation: else the graph grows over all of them, and is compiled anew each time.
        """
        if self.lazy:
            import habana_frameworks.torch.core as core

            core.mark_step()

    def wait(self) -> None:
        """Wait until the device has done all that it was given, so that a clock is right."""
        if self.kind == "cuda":
            torch.cuda.synchronize()
        elif self.kind == "hpu":
            self.mark()
            torch.hpu.synchronize()

    def place(self, model: torch.nn.Module) -> torch.nn.Module:
        """Return a model on the device. Its optimizer is made after this, and not before.

        On Gaudi the move makes new parameters: an optimizer of the old ones would train these.
        """
        return model.to(self.torch)

    def computing(self, bf16: bool) -> Any:
        """Return the context of a forward pass: bf16 where torch holds it safe, if asked for."""
        if not bf16:
            return contextlib.nullcontext()
        return torch.autocast(self.kind, dtype=torch.bfloat16)

    def evaluating(self) -> Any:
        """Return the context of an evaluation; Gaudi has no inference mode."""
        return torch.no_grad() if self.kind == "hpu" else torch.inference_mode()


def choose(asked: str = "auto", *, local_rank: int = 0) -> Device:
    """Return the device to compute on.

    Parameters
    ----------
    asked : {"auto", "cuda", "rocm", "hpu", "cpu"}
        "auto" takes a GPU, else Gaudi, else the CPU.
    local_rank : int
        Which of the node's GPUs this process takes. Of the Gaudis each process gets one that is
        free, by Gaudi's own library.

    Raises
    ------
    DeviceError
        If there is none such, or Gaudi's library cannot use the one that is there.
    """
    if asked not in CHOICES:
        raise DeviceError(f"there is no device {asked!r}, only {', '.join(CHOICES)}")
    if asked in ("auto", "cuda", "rocm"):
        if torch.cuda.is_available():
            index = local_rank % torch.cuda.device_count()
            torch.cuda.set_device(index)
            name = torch.cuda.get_device_name(index)
            return Device(torch.device("cuda", index), "cuda", name)
        if asked != "auto":
            raise DeviceError(f"torch {torch.__version__} sees no {asked} device")
    if asked == "hpu" or (asked == "auto" and has_gaudi()):
        return _gaudi()
    return Device(torch.device("cpu"), "cpu", f"CPU, {torch.get_num_threads()} threads")


def has_gaudi() -> bool:
    """Return whether the image is made for Gaudi and sees one."""
    try:
        import habana_frameworks.torch.core  # noqa: F401  # adds torch.hpu
    except ImportError:
        return False
    except Exception as error:
        print(f"warning: Gaudi's library does not load: {error}", file=sys.stderr)
        return False
    return bool(torch.hpu.is_available())


def _gaudi() -> Device:
    mode = os.environ["PT_HPU_LAZY_MODE"]
    if mode not in ("0", "1"):
        raise DeviceError(f"PT_HPU_LAZY_MODE is {mode!r}: 0 is eager mode, 1 is lazy mode")
    try:
        import habana_frameworks.torch.core  # noqa: F401  # adds torch.hpu
    except ModuleNotFoundError as error:
        raise DeviceError(f"no {error.name} in this image: it cannot use Gaudi") from None
    except Exception as error:
        raise DeviceError(f"Gaudi's library does not load: {error}") from error
    if not torch.hpu.is_available():
        raise DeviceError(f"torch {torch.__version__} sees no hpu device")
    device = torch.device("hpu")
    try:
        # A Gaudi that another process has, or a driver of another release, shows here only.
        float(torch.ones(2).to(device).sum())
    except RuntimeError as error:
        raise DeviceError(
            f"Gaudi cannot be used: {(str(error).splitlines() or ['no reason given'])[0]}"
        ) from error
    return Device(device, "hpu", torch.hpu.get_device_name(), mode == "1")


def precision(asked: str, device: Device) -> str:
    """Return fp32 or bf16; for "auto" bf16 where the device computes in it."""
    if asked != "auto":
        return asked
    if device.kind == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported() else "fp32"
    return "bf16" if device.kind == "hpu" else "fp32"


def on_host(state: Any) -> Any:
    """Return a copy of a state, of dicts, lists and tensors, with the tensors on the CPU."""
    if isinstance(state, torch.Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, dict):
        return {name: on_host(value) for name, value in state.items()}
    if isinstance(state, (list, tuple)):
        return type(state)(on_host(value) for value in state)
    return state


def seen() -> List[str]:
    """Return the properties of each device that torch sees, as it prints them."""
    devices: Any = torch.hpu if has_gaudi() else torch.cuda
    return [str(devices.get_device_properties(i)) for i in range(devices.device_count())]
