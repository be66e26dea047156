"""Batch normalisation over the batch of all processes, on devices for which torch has none."""

from typing import Any

import torch
import torch.distributed as dist


class AllReduce(torch.autograd.Function):
    """The sum over all processes; its gradient is the sum of their gradients."""

    @staticmethod
    def forward(context: Any, values: torch.Tensor) -> torch.Tensor:
        """Return the sum."""
        total = values.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> torch.Tensor:
        """Return the sum of the gradients."""
        total = gradient.clone()
        dist.all_reduce(total)
        return total


class BatchNorm(torch.nn.BatchNorm2d):
    """`torch.nn.BatchNorm2d` with the mean and the variance of all processes' parts together.

    As `torch.nn.SyncBatchNorm`, which takes tensors on GPUs alone. Two sums are exchanged in each
    direction, the second of squared differences from the mean, so that nothing cancels out.
    """

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return images, (n, channels, height, width), normalised."""
        if not self.training:
            return super().forward(images)
        own = images.float()
        shape = (1, -1, 1, 1)
        count = own.new_full((1,), own.numel() / own.shape[1])
        sums = AllReduce.apply(torch.cat([own.sum((0, 2, 3)), count]))
        count = sums[-1].detach()
        mean = sums[:-1] / count
        centred = own - mean.view(shape)
        variance = AllReduce.apply((centred * centred).sum((0, 2, 3))) / count
        with torch.no_grad():
            self.num_batches_tracked += 1
            part = self.momentum or 0.0
            self.running_mean.lerp_(mean, part)
            self.running_var.lerp_(variance * (count / (count - 1)), part)
        scale = torch.rsqrt(variance + self.eps) * self.weight
        found = centred * scale.view(shape) + self.bias.view(shape)
        return found.to(images.dtype)


def convert(model: torch.nn.Module) -> torch.nn.Module:
    """Replace all `torch.nn.BatchNorm2d` in a model; their parameters are taken over."""
    for name, child in model.named_children():
        if type(child) is torch.nn.BatchNorm2d:
            own = BatchNorm(child.num_features, eps=child.eps, momentum=child.momentum)
            own.weight, own.bias = child.weight, child.bias
            own.load_state_dict(child.state_dict())
            setattr(model, name, own)
        else:
            convert(child)
    return model
