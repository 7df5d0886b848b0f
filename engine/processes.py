"""One process or, under torchrun, several: joining the group, collectives, loader workers."""

import contextlib
import os
import sys

import torch
import torch.distributed as dist
from torch import nn

from engine.config import UserError


def join():
    """Join torchrun's process group, if there is one; then only rank 0 writes to stdout."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        dist.init_process_group()
        if rank() > 0:
            sys.stdout = open(os.devnull, "w")  # noqa: PTH123, SIM115


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world():
    return dist.get_world_size() if dist.is_initialized() else 1


def sum_over_processes(tensor):
    """Return the sum of all processes' tensors."""
    if world() > 1:
        tensor = tensor.clone()
        dist.all_reduce(tensor)
    return tensor


def max_over_processes(number):
    """Return the maximum of an integer over all processes, reduced on the CPU."""
    number = torch.tensor(number)
    if world() > 1:
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
    """Return the tuples of tensors that all processes made of batches, in batch order."""
    if world() == 1:
        return results
    shares = [None] * world()
    dist.all_gather_object(shares, [[tensor.cpu() for tensor in result] for result in results])
    return (shares[n % world()][n // world()] for n in range(sum(map(len, shares))))


def decided_by_first(decide):
    """Return what decide() returns in rank 0, in every process."""
    answer = [decide() if rank() == 0 else None]
    if world() > 1:
        dist.broadcast_object_list(answer)
    return answer[0]


def parallel(network, has_unused):
    """Return the network whose gradients are averaged over all processes; see DDP."""
    if world() == 1:
        return network
    # no buffers: GPUs share their batch norm, and a CPU's statistics are made anew in the end
    buffers = "forward_sync_buffers" if torch.__version__ >= (2, 13) else "broadcast_buffers"
    options = {buffers: False, "find_unused_parameters": has_unused}
    return nn.parallel.DistributedDataParallel(network, gradient_as_bucket_view=True, **options)


def accumulating(networks):
    """Return a context in which the gradients of `networks` are not averaged yet."""
    contexts = contextlib.ExitStack()
    for network in networks if world() > 1 else ():
        contexts.enter_context(network.no_sync())
    return contexts


def synchronise_batchnorm(network):
    """Return the network with nn.SyncBatchNorm in place of batch norm. Raises UserError."""
    for name, module in network.named_modules() if world() > 1 else ():
        is_norm = isinstance(module, nn.modules.batchnorm._BatchNorm)
        if is_norm and type(module) is not nn.BatchNorm2d:
            fault = f"{name} is a {type(module).__name__}, which several GPUs cannot share"
            raise UserError(f"model.network: {fault}; use one GPU, or another network")
    return nn.SyncBatchNorm.convert_sync_batchnorm(network) if world() > 1 else network
