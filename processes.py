"""One process or, started by torchrun, many: which one this is, and what all of them share.

Alone, a process is the first of one; it joins no group, and each function here returns what it was given.
"""

import datetime
import os
import sys

import torch
import torch.distributed as dist

TIMEOUT = datetime.timedelta(minutes=10)  # above the longest that one process lets the others wait
_store = None  # the job's key-value store, which outlives a process


def join():
    """Joins the processes that torchrun started, if it did. From then on only the first writes to stdout."""
    global _store
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        store, number, count = next(dist.rendezvous("env://", timeout=TIMEOUT))
        # torchrun's store still holds the addresses of the processes that it has restarted since
        _store = dist.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT')}", store)
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=_store, rank=number, world_size=count, timeout=TIMEOUT)
        if number > 0:
            sys.stdout = open(os.devnull, "w")  # noqa: PTH123, SIM115


def leave():
    """Ends the group, once all that it was for is done."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world():
    return dist.get_world_size() if dist.is_initialized() else 1


def is_loss_of_another(error):
    """Whether an exception says that another process, or the way to it, is gone."""
    return dist.is_initialized() and (isinstance(error, dist.DistError) or "gloo" in str(error))


def is_first_to_end():
    """Whether no other process has asked this before: the one that says why the job ends."""
    try:
        return _store is None or _store.add("ends", 1) == 1
    except RuntimeError:  # the store is gone, and torchrun with it
        return True


def total(tensor):
    """The sum of all processes' tensors."""
    if world() > 1:
        tensor = tensor.clone()
        dist.all_reduce(tensor)
    return tensor


def largest(number):
    """The largest of all processes' integers. Waits for no device."""
    if world() == 1:
        return number
    number = torch.tensor(number)
    dist.all_reduce(number, dist.ReduceOp.MAX)
    return number.item()


def wait():
    """Until all processes are here."""
    largest(0)


def gathered(rows):
    """All processes' rows (M, ...), one process after the other: (N * M, ...)."""
    if world() == 1:
        return rows
    everyones = rows.new_empty(world() * len(rows), *rows.shape[1:])
    dist.all_gather(list(everyones.chunk(world())), rows.contiguous())
    return everyones


def in_order(results):
    """Yields the tuples of tensors that each batch of datasets.loader led to, in the order of the batches.

    With many processes on the CPU, and only once all of them have been through their batches.
    """
    if world() == 1:
        yield from results
        return
    shares = [None] * world()
    dist.all_gather_object(shares, [[tensor.cpu() for tensor in result] for result in results])
    for n in range(sum(map(len, shares))):
        yield shares[n % world()][n // world()]


def from_first(decide):
    """What decide() returns in the first process; the others take its answer."""
    answer = [decide() if rank() == 0 else None]
    if world() > 1:
        dist.broadcast_object_list(answer)
    return answer[0]


class GradientMean:
    """Averages the gradients of a network over all processes while the backward pass goes on.

    Gradients meet in buckets, each as soon as it is complete, and in every process in the same order. For a step: `begin`
    before its last backward pass, `finish` after it. DistributedDataParallel makes the host wait for its timers, and remarks
    on what is no fault.
    """

    def __init__(self, network, bucket_size=2**23):
        self.buckets, self.place, size = [[]], {}, 0
        for parameter in reversed([p for p in network.parameters() if p.requires_grad]):
            if size > bucket_size:
                self.buckets.append([])
                size = 0
            size += parameter.numel()
            self.buckets[-1].append(parameter)
            self.place[parameter] = len(self.buckets) - 1
            parameter.register_post_accumulate_grad_hook(self._complete)
        self.missing, self.sent = [], []

    def begin(self):
        self.missing, self.sent = [len(bucket) for bucket in self.buckets], []

    def _complete(self, parameter):
        if self.missing:
            self.missing[self.place[parameter]] -= 1
            while len(self.sent) < len(self.buckets) and not self.missing[len(self.sent)]:
                self._send()

    def _send(self):
        gradients = [p.grad for p in self.buckets[len(self.sent)] if p.grad is not None]
        flat = torch.cat([gradient.flatten() for gradient in gradients] or [torch.zeros(0)]) / world()
        self.sent.append((gradients, flat, dist.all_reduce(flat, async_op=True) if gradients else None))

    def finish(self):
        while len(self.sent) < len(self.buckets):  # some parameters have no gradient
            self._send()
        for gradients, flat, work in self.sent:
            if gradients:
                work.wait()
                parts = flat.split([gradient.numel() for gradient in gradients])
                torch._foreach_copy_(gradients, [part.view_as(g) for part, g in zip(parts, gradients, strict=True)])
        self.missing, self.sent = [], []
