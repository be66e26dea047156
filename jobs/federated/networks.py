"""The networks: the tutorial's CNN, one of MONAI's by name, or the user's own."""

import inspect
from typing import Any, Dict, Optional

import custom
import torch
from ending import Interrupted
from torch.nn import functional

#: The tutorial's network.
DEFAULT = "cnn"

#: Side of the smallest image that MONAI's networks, which halve it five times, are given.
SMALLEST = 32

#: What MONAI's networks for classification call what they are made of.
MONAI_WORDS = (
    ("in_channels", "out_channels"),
    ("in_channels", "num_classes"),
    ("n_input_channels", "num_classes"),
)


class NetworkError(Exception):
    """There is no such network, or it does not fit the data."""


def block(inputs: int, outputs: int, *, padding: int = 0, pool: bool = False) -> torch.nn.Module:
    """Return a 3x3 convolution with batch norm and ReLU, and a pooling by 2 if asked for."""
    layers = [
        torch.nn.Conv2d(inputs, outputs, kernel_size=3, padding=padding),
        torch.nn.BatchNorm2d(outputs),
        torch.nn.ReLU(),
    ]
    return torch.nn.Sequential(*layers, *([torch.nn.MaxPool2d(2)] if pool else []))


class Tutorial(torch.nn.Module):
    """The CNN of the tutorial PyTorch_MedMNIST_2D of OpenFL, for images of 28x28 pixels.

    Five 3x3 convolutions with 16, 16, 64, 64 and 64 channels, then fully connected layers from
    1024 to 128, 128 and the classes. Of larger images the last feature maps are averaged to 4x4.

    Parameters
    ----------
    channels, classes : int
        Of the images, and outputs.
    """

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.layer1 = block(channels, 16)
        self.layer2 = block(16, 16, pool=True)
        self.layer3 = block(16, 64)
        self.layer4 = block(64, 64)
        self.layer5 = block(64, 64, padding=1, pool=True)
        self.fc = torch.nn.Sequential(
            torch.nn.Linear(64 * 4 * 4, 128),
            torch.nn.ReLU(),
            torch.nn.Linear(128, 128),
            torch.nn.ReLU(),
            torch.nn.Linear(128, classes),
        )

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return the logits, (n, classes), of images, (n, channels, height, width)."""
        x = self.layer5(self.layer4(self.layer3(self.layer2(self.layer1(images)))))
        if x.shape[-1] != 4:
            x = functional.adaptive_avg_pool2d(x, 4)
        return self.fc(x.flatten(1))


class Padded(torch.nn.Module):
    """A network behind a border of zeros, which makes small images as large as it needs them."""

    def __init__(self, net: torch.nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return what the network makes of the images with their border."""
        lacking = SMALLEST - images.shape[-1]
        if lacking > 0:
            low, high = lacking // 2, lacking - lacking // 2
            images = functional.pad(images, (low, high, low, high))
        return self.net(images)


def build(
    name: str, *, channels: int, classes: int, size: int = 28, seed: Optional[int] = None
) -> torch.nn.Module:
    """Return a network with fresh weights, on the CPU.

    Parameters
    ----------
    name : str
        "cnn" for the tutorial's, the name of a network of ``monai.networks.nets``, or the user's
        own as ``package.module:callable`` or ``file.py:callable``, which is called with `channels`
        and `classes` by name.
    channels, classes : int
        Of the images, and outputs.
    size : int
        Height and width of the images in pixels.
    seed : int, optional
        Of the weights; torch's own generator is left as it was.

    Raises
    ------
    NetworkError
        If there is no such network, or it does not turn such images into so many logits.
    custom.CustomError
        If the user's own cannot be loaded.
    """
    with torch.random.fork_rng(devices=[], enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        if name == DEFAULT:
            found: Any = Tutorial(channels, classes)
        elif custom.is_path(name):
            found = _own(name, channels, classes)
        else:
            found = Padded(_monai(name, channels, classes))
        _require_fit(name, found, channels, classes, size)
    return found


def _own(name: str, channels: int, classes: int) -> torch.nn.Module:
    call = custom.load(name)
    try:
        found = call(channels=channels, classes=classes)
    except Interrupted:
        raise
    except (Exception, SystemExit) as error:
        raise NetworkError(f"{name} raises {type(error).__name__}: {error}") from error
    if not isinstance(found, torch.nn.Module):
        raise NetworkError(f"{name} returns {type(found).__name__}, not a torch.nn.Module")
    return found


def _monai(name: str, channels: int, classes: int) -> torch.nn.Module:
    try:
        from monai.networks import nets
    except ImportError as error:
        raise NetworkError(f"there is no network {name!r}: the image has no MONAI") from error
    make = getattr(nets, name, None)
    if not callable(make) or name.startswith("_"):
        raise NetworkError(
            f"there is no network {name!r}: neither {DEFAULT!r} nor one of monai.networks.nets"
        )
    for inputs, outputs in MONAI_WORDS:
        words: Dict[str, Any] = {"spatial_dims": 2, inputs: channels, outputs: classes}
        try:
            found = make(**words)
        except TypeError:  # it calls them otherwise
            continue
        except Exception as error:
            raise NetworkError(f"MONAI's {name} cannot be made: {error}") from error
        if isinstance(found, torch.nn.Module):
            return found
    needs = [
        word
        for word, each in inspect.signature(make).parameters.items()
        if each.default is each.empty and each.kind is each.POSITIONAL_OR_KEYWORD
    ]
    raise NetworkError(
        f"MONAI's {name} cannot be made from channels and classes alone, it takes"
        f" {', '.join(needs) or 'other words'}: write a function that makes it, and name that"
    )


def _require_fit(name: str, net: torch.nn.Module, channels: int, classes: int, size: int) -> None:
    """Fail if a network does not turn such images into so many logits, or cannot be averaged."""
    was = net.training
    net.eval()
    try:
        with torch.no_grad():
            out = net(torch.zeros(2, channels, size, size))
    except Interrupted:
        raise
    except (Exception, SystemExit) as error:
        said = f"{type(error).__name__}: {error}".splitlines()[0]
        raise NetworkError(
            f"{name} cannot take images of {channels}x{size}x{size}: {said}"
        ) from error
    net.train(was)
    shape = tuple(out.shape) if isinstance(out, torch.Tensor) else type(out).__name__
    if shape != (2, classes):
        raise NetworkError(f"{name} makes {shape} of two images, not (2, {classes}) logits")
    if not list(net.parameters()):
        raise NetworkError(f"{name} has no parameters: there is nothing to train")
    for word, each in net.state_dict().items():
        if not isinstance(each, torch.Tensor):
            raise NetworkError(f"{name} has {word} in its state: only tensors can be averaged")
        try:
            each.cpu().numpy()
        except (TypeError, RuntimeError) as error:
            raise NetworkError(f"{name} has {word} of {each.dtype}: NumPy has no such") from error
