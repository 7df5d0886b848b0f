"""One process or, under torchrun, several: collectives, averaged gradients, batch norm over all."""

import datetime
import functools
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as collectives
import torch.nn.functional as F
from torch import nn
from torch._utils import _unflatten_dense_tensors

from engine.config import UserError

TIMEOUT = datetime.timedelta(minutes=10)  # longer than any process lets the others wait
CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")  # of a container: microseconds, or max, and the period
_store = None  # the job's key-value store; it outlives a single process


def join():
    """Join the process group of torchrun, if there is one; then only rank 0 writes to stdout."""
    global _store
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        store, number, count = next(dist.rendezvous("env://", timeout=TIMEOUT))
        # torchrun's store still holds the addresses of processes that it has restarted since
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT")
        _store = dist.PrefixStore(f"start {attempt}", store)
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        group = {"store": _store, "rank": number, "world_size": count, "timeout": TIMEOUT}
        dist.init_process_group(backend, **group)
        if number > 0:
            sys.stdout = open(os.devnull, "w", errors="replace")  # noqa: PTH123, SIM115


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world():
    """Return the world size."""
    return dist.get_world_size() if dist.is_initialized() else 1


def loader_workers(asked):
    """Return the number of DataLoader workers of this process; "auto" is its share of the cores.

    It is at most 8: a GPU's steps use up what 3 cores load (docs/performance.md).
    """
    if asked != "auto":
        return asked
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if CPU_QUOTA.is_file() and (quota := CPU_QUOTA.read_text().split())[0] != "max":
        cores = min(cores, int(quota[0]) // int(quota[1]))
    return min(max(cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)), 1), 8)


def is_first_to_end():
    """Return True in the first process that asks: the one that reports why the job ends."""
    try:
        return _store is None or _store.add("ends", 1) == 1
    except RuntimeError:  # the store is gone, and torchrun with it
        return True


def sum_over_processes(tensor):
    """Return the sum of all processes' tensors."""
    if world() > 1:
        tensor = tensor.clone()
        dist.all_reduce(tensor)
    return tensor


def max_over_processes(number):
    """Return the maximum of an integer over all processes, reduced on the CPU."""
    if world() == 1:
        return number
    number = torch.tensor(number)
    dist.all_reduce(number, dist.ReduceOp.MAX)
    return number.item()


def barrier():
    """Wait until all processes are here."""
    max_over_processes(0)


def all_gather_rows(rows):
    """Return all processes' rows (M, ...) in the order of their ranks: (N * M, ...)."""
    if world() == 1:
        return rows
    gathered = rows.new_empty(world() * len(rows), *rows.shape[1:])
    dist.all_gather(list(gathered.chunk(world())), rows.contiguous())
    return gathered


def in_batch_order(results):
    """Yield the tuples of tensors that all processes made of a loader's batches, in batch order."""
    if world() == 1:
        yield from results
        return
    shares = [None] * world()
    dist.all_gather_object(shares, [[tensor.cpu() for tensor in result] for result in results])
    for n in range(sum(map(len, shares))):
        yield shares[n % world()][n // world()]


def decided_by_first(decide):
    """Return what decide() returns in rank 0, in every process."""
    answer = [decide() if rank() == 0 else None]
    if world() > 1:
        dist.broadcast_object_list(answer)
    return answer[0]


class GradientMean:
    """Averages the gradients of a network over all processes, during the backward pass.

    Call `begin` before the last one of a step, and `finish` after it. DistributedDataParallel does
    the same, but makes the host wait for its timers. Buckets are reduced in one order everywhere.
    """

    def __init__(self, network, bucket_size=2**23):
        self.buckets, size = [[]], 0
        for parameter in reversed([p for p in network.parameters() if p.requires_grad]):
            if size > bucket_size:
                self.buckets.append([])
                size = 0
            size += parameter.numel()
            self.buckets[-1].append(parameter)
            count = functools.partial(self._count, len(self.buckets) - 1)
            parameter.register_post_accumulate_grad_hook(count)
        self.missing, self.sent, self.works = [], 0, []

    def begin(self):
        self.missing = [len(bucket) for bucket in self.buckets]

    def finish(self):
        while self.sent < len(self.buckets):  # some parameters got no gradient
            self._send()
        for gradients, flat, work in self.works:
            work.wait()
            torch._foreach_copy_(gradients, _unflatten_dense_tensors(flat, gradients))
        self.missing, self.sent, self.works = [], 0, []

    def _count(self, bucket, _):
        if self.missing:
            self.missing[bucket] -= 1
            while self.sent < len(self.buckets) and not self.missing[self.sent]:
                self._send()

    def _send(self):
        gradients = [p.grad for p in self.buckets[self.sent] if p.grad is not None]
        self.sent += 1
        if gradients:
            flat = torch.cat([gradient.flatten() for gradient in gradients]) / world()
            self.works.append((gradients, flat, dist.all_reduce(flat, async_op=True)))


class BatchNorm(nn.BatchNorm2d):
    """nn.BatchNorm2d whose statistics in training are those of all processes' batches.

    All have the same size: sums are enough then, and no host waits as in nn.SyncBatchNorm. With
    momentum None, a cumulative average, they are this process's own; only then is a count needed.
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
    """Return a network whose nn.BatchNorm2d were made BatchNorm, in place. Raises UserError."""
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
