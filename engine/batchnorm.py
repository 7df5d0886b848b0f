"""Batch norm over the images of all processes."""

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as collectives
import torch.nn.functional as F
from torch import nn

from engine.config import UserError
from engine.processes import world


class BatchNorm(nn.BatchNorm2d):
    """nn.BatchNorm2d whose statistics in training are those of all processes' batches.

    All batches must have the same size: sums are enough then, and unlike in nn.SyncBatchNorm the
    host waits for nothing. With momentum None (a cumulative average) the statistics are this
    process's own; only then are batches counted, since nothing else reads the count.
    """

    def forward(self, x):
        if not self.training or self.momentum is None:
            return super().forward(x)
        tracked = self.track_running_stats
        if world() == 1:
            running = (self.running_mean, self.running_var) if tracked else (None, None)
            return F.batch_norm(x, *running, self.weight, self.bias, True, self.momentum, self.eps)
        y, mean, variance = _Synchronised.apply(x, self.weight, self.bias, self.eps)
        if tracked:
            count = world() * x.numel() / x.shape[1]
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * (count / (count - 1)), self.momentum)
        return y


def synchronise_batchnorm(network):
    """Turn every nn.BatchNorm2d of a network into a BatchNorm, in place, and return the network.

    Raises UserError where several processes would share another kind of batch norm.
    """
    for name, module in network.named_modules():
        if type(module) in (nn.BatchNorm2d, BatchNorm):
            module.__class__ = BatchNorm
        elif isinstance(module, nn.modules.batchnorm._BatchNorm) and world() > 1:
            fault = f"{name} is a {type(module).__name__}, which several GPUs cannot share"
            raise UserError(f"model.network: {fault}; use one GPU, or another network")
    return network


def _mean_over_processes(tensor):
    """Return the mean of all processes' tensors, in a form that torch.compile can capture."""
    total = collectives.all_reduce(tensor, "sum", dist.group.WORLD)
    return collectives.wait_tensor(total) / world()


class _Synchronised(torch.autograd.Function):
    """Normalise x (B, C, H, W) by all processes' mean (C,) and biased variance (C,)."""

    @staticmethod
    def forward(ctx, x, weight, bias, eps):
        mean = x.mean((0, 2, 3), dtype=torch.float32)
        norm = torch.linalg.vector_norm(x, dim=(0, 2, 3), dtype=torch.float32)
        moments = torch.stack([mean, norm.square() * x.shape[1] / x.numel()])
        mean, square = _mean_over_processes(moments)
        variance = (square - mean.square()).clamp(min=0)
        ctx.save_for_backward(x, weight, mean, variance)
        ctx.eps = eps
        ctx.mark_non_differentiable(mean, variance)
        return F.batch_norm(x, mean, variance, weight, bias, False, 0, eps), mean, variance

    @staticmethod
    def backward(ctx, grad, *_):
        x, weight, mean, variance = ctx.saved_tensors
        invstd = (variance + ctx.eps).rsqrt()
        _, grad_weight, grad_bias = torch.ops.aten.native_batch_norm_backward(
            grad, x, weight, None, None, mean, invstd, True, ctx.eps, [False, True, True]
        )
        means = torch.stack([grad_weight, grad_bias]) * (x.shape[1] / x.numel())
        mean_weight, mean_bias = _mean_over_processes(means)
        # w/s (grad - mean(grad) - x_hat mean(grad x_hat)), as a linear function of grad and x
        scale = weight * invstd
        slope = -scale * invstd * mean_weight
        shift = -scale * mean_bias - slope * mean
        scale, slope, shift = (part[:, None, None] for part in (scale, slope, shift))
        return (grad * scale + x * slope + shift).to(x.dtype), grad_weight, grad_bias, None
