"""Batch norm over the parts of all processes, from sums alone: equal counts need no reading back."""

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as collectives
import torch.nn.functional as F
from torch import nn

from config import UserError
from processes import world


class BatchNorm(nn.BatchNorm2d):
    """nn.BatchNorm2d whose statistics in training are those of all processes' equally large batches.

    With momentum None, a cumulative average, the statistics are this process's alone. Batches are counted only then, since
    nothing else needs the count.
    """

    def forward(self, x):
        if not self.training or self.momentum is None:
            return super().forward(x)
        running = (self.running_mean, self.running_var) if self.track_running_stats else (None, None)
        if world() == 1:
            return F.batch_norm(x, *running, self.weight, self.bias, True, self.momentum, self.eps)
        normalised, mean, variance = _Synchronised.apply(x, self.weight, self.bias, self.eps)
        if self.track_running_stats:
            count = world() * x.numel() / x.shape[1]
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * (count / (count - 1)), self.momentum)
        return normalised


def synchronise_batchnorm(network):
    """Makes every nn.BatchNorm2d of a network a BatchNorm, in place. Raises UserError for other kinds of batch norm."""
    for name, module in network.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            if type(module) not in (nn.BatchNorm2d, BatchNorm):
                raise UserError(
                    f"model.network: {name} is a {type(module).__name__}, which cannot be synchronised between GPUs; train on one"
                )
            module.__class__ = BatchNorm
    return network


def _mean_over_processes(tensor):
    """The mean of all processes' tensors, in a form that torch.compile captures."""
    return collectives.wait_tensor(collectives.all_reduce(tensor, "sum", dist.group.WORLD)) / world()


class _Synchronised(torch.autograd.Function):
    """Normalised x (B, C, H, W), the mean (C,) and the biased variance (C,) of all processes' x."""

    @staticmethod
    def forward(ctx, x, weight, bias, eps):
        mean = x.mean((0, 2, 3), dtype=torch.float32)
        square = torch.linalg.vector_norm(x, dim=(0, 2, 3), dtype=torch.float32).square() * x.shape[1] / x.numel()
        mean, square = _mean_over_processes(torch.stack([mean, square]))
        variance = (square - mean.square()).clamp(min=0)
        ctx.save_for_backward(x, weight, mean, variance)
        ctx.eps = eps
        ctx.mark_non_differentiable(mean, variance)
        return F.batch_norm(x, mean, variance, weight, bias, False, 0, eps), mean, variance

    @staticmethod
    def backward(ctx, above, *_):
        x, weight, mean, variance = ctx.saved_tensors
        deviation = (variance + ctx.eps).rsqrt()
        _, of_weight, of_bias = torch.ops.aten.native_batch_norm_backward(
            above, x, weight, None, None, mean, deviation, True, ctx.eps, [False, True, True]
        )
        share = x.shape[1] / x.numel()
        by_deviation, by_mean = _mean_over_processes(torch.stack([of_weight, of_bias]) * share)
        scale = weight * deviation
        slope = -scale * deviation * by_deviation
        shift = -scale * by_mean - slope * mean
        scale, slope, shift = (part[:, None, None] for part in (scale, slope, shift))
        return (above * scale + x * slope + shift).to(x.dtype), of_weight, of_bias, None
