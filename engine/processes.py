"""One process or, under torchrun, several: rank and world size, collectives, averaged gradients.

Without torchrun there is no process group: the world size is 1, and each function returns what it
was given.
"""

import datetime
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

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
        dist.init_process_group(
            backend, store=_store, rank=number, world_size=count, timeout=TIMEOUT
        )
        if number > 0:
            sys.stdout = open(os.devnull, "w")  # noqa: PTH123, SIM115


def leave():
    """Destroy the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


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


def is_loss_of_another(error):
    """Return whether an exception says that another process cannot be reached."""
    return dist.is_initialized() and (isinstance(error, dist.DistError) or "gloo" in str(error))


def is_first_to_end():
    """Return True in the first process that asks: the one that reports why the job ends."""
    try:
        return _store is None or _store.add("ends", 1) == 1
    except RuntimeError:  # the store is gone, and torchrun with it
        return True


# ---------------------------------------------------------------- collectives


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
    """Yield the tuples of tensors that all processes made of a loader's batches, in batch order.

    With several processes: on the CPU, once all have gone through their batches.
    """
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

    Gradients are reduced in buckets, each once it is complete, in the same order everywhere. Call
    `begin` before the last backward pass of a step and `finish` after it.
    DistributedDataParallel does the same, but makes the host wait for its timers.
    """

    def __init__(self, network, bucket_size=2**23):
        self.buckets, self.bucket_of, size = [[]], {}, 0
        for parameter in reversed([p for p in network.parameters() if p.requires_grad]):
            if size > bucket_size:
                self.buckets.append([])
                size = 0
            size += parameter.numel()
            self.buckets[-1].append(parameter)
            self.bucket_of[parameter] = len(self.buckets) - 1
            parameter.register_post_accumulate_grad_hook(self._count)
        self.missing, self.sent = [], []

    def begin(self):
        self.missing, self.sent = [len(bucket) for bucket in self.buckets], []

    def finish(self):
        while len(self.sent) < len(self.buckets):  # some parameters got no gradient
            self._send()
        for gradients, flat, work in self.sent:
            if gradients:
                work.wait()
                parts = flat.split([gradient.numel() for gradient in gradients])
                parts = [part.view_as(g) for part, g in zip(parts, gradients, strict=True)]
                torch._foreach_copy_(gradients, parts)
        self.missing, self.sent = [], []

    def _count(self, parameter):
        if self.missing:
            self.missing[self.bucket_of[parameter]] -= 1
            while len(self.sent) < len(self.buckets) and not self.missing[len(self.sent)]:
                self._send()

    def _send(self):
        gradients = [p.grad for p in self.buckets[len(self.sent)] if p.grad is not None]
        flat = work = None
        if gradients:
            flat = torch.cat([gradient.flatten() for gradient in gradients]) / world()
            work = dist.all_reduce(flat, async_op=True)
        self.sent.append((gradients, flat, work))
