"""One stage at work in the folder of its run: what it resumes, its steps and checkpoints."""

import hashlib
import json
import signal
from pathlib import Path

import cv2
import numpy as np
import torch
import yaml

from engine import device, files, processes
from engine.command import tell
from engine.config import UserError, one_line, plain
from engine.log import Figures
from engine.processes import rank, world


def micro_batch_size(cfg, section):
    """Return how many images each of a step's world x accumulate parts has. Raises UserError."""
    images = sum(cfg[section].batch)
    parts = world() * cfg.accumulate
    if images % parts:
        fault = f"{images} images a step cannot be divided by {world()} processes x accumulate"
        raise UserError(f"{section}.batch: {fault} = {cfg.accumulate}; change one of them")
    return images // parts


class Checkpoints:
    """What a stage leaves in the folder of its run: `{stage}.pth`, once it is finished."""

    def __init__(self, cfg, stage, section):
        self.cfg = cfg
        self.stage = stage
        self.section = section
        self.folder = Path(cfg.output) / cfg.name
        self.result = self.folder / f"{stage}.pth"
        self.unfinished = self.folder / f"{stage}.unfinished.pth"
        self.inputs = {}  # file name -> digest; rank 0 alone reads and saves them
        self.force = False  # whether --force was given
        self.first = 0  # the steps that were done before
        self.state = {}  # name -> what a checkpoint holds

    def is_finished(self, force, inputs=()):
        """Lock the folder; return whether the result of these inputs (files, Images) is there."""
        self.force = force
        return processes.decided_by_first(lambda: self._look(inputs))

    def _look(self, inputs):
        files.lock(self.folder)
        for path in inputs:
            if not isinstance(path, Path):
                self.inputs[path.domain] = path.files()
            elif path.is_file():
                self.inputs[path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
        finished = self.result.exists() and not self.force
        path = self.result if finished else self.unfinished
        if path.exists():
            saved = files.load_tensors(path)
            if self.force and not saved.get("forced"):  # of another attempt
                path.unlink()
            else:
                files.require_same(path, saved, self.cfg, self.section, self.inputs)
        if finished:
            print(f"{self.stage}: {path} is finished; --force makes it anew")
        return finished

    def resume(self, **state):
        """Load the unfinished checkpoint into `state`, name -> part; return if there was one."""
        self.state = state | {"scaler": self.scaler}
        if not self.unfinished.exists():
            return False
        saved = files.load_tensors(self.unfinished)
        try:
            for name, part in self.state.items():
                part.load_state_dict(saved[name])
            self.figures.overall = saved["overall"]
            self.figures.began -= saved["seconds"]
            self.first = saved["step"]
        except (LookupError, ValueError, RuntimeError, TypeError, AttributeError) as error:
            fault = f"does not fit this version of the code, or this device ({one_line(error)})"
            raise UserError(f"{self.unfinished}: {fault}; remove it to begin anew") from error
        return True

    def save(self, path, step, state, **more):
        """Write a checkpoint of `state` after `step` steps, and `more`, in rank 0."""
        if rank() == 0:
            saved = {name: part.state_dict() for name, part in state.items()}
            saved |= {"stage": self.stage, "step": step, "config": plain(self.cfg)}
            saved |= {"inputs": self.inputs, **more}
            files.write_atomically(path, lambda temporary: torch.save(saved, temporary))

    def save_unfinished(self, step):
        """Write the checkpoint that the stage resumes from."""
        more = {"overall": self.figures.overall, "seconds": self.figures.seconds()}
        self.save(self.unfinished, step, self.state, forced=self.force, **more)

    def finish(self, **state):
        """Write the stage's result and remove its unfinished checkpoint."""
        self.save(self.result, self.figures.total, state)
        processes.barrier()
        if rank() == 0:
            self.unfinished.unlink(missing_ok=True)
        self.figures.finish(self.result)


class Run(Checkpoints):
    """A stage at work; section: the key of its part of cfg."""

    def __init__(self, cfg, stage, section):
        super().__init__(cfg, stage, section)
        self.device, self.dtype = device.choose(cfg.device, cfg.precision)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        self.figures = Figures(self.folder, stage, self.device)
        self.log = self.figures.add
        self.show = self.figures.show
        self.networks = []  # whose gradients are averaged over processes
        torch.backends.cudnn.benchmark = True
        torch.manual_seed(cfg.seed)
        cv2.setNumThreads(1)

    def autocast(self):
        """Return a context in which networks compute in the run's precision."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def place(self, module):
        """Return the module on the device, in channels-last; GPUs share their batch norm."""
        if self.device.type == "cuda":
            module = processes.synchronise_batchnorm(module)
        return module.to(self.device, memory_format=torch.channels_last)

    def fetch(self, batch):
        """Return what a loader yields, on the device."""
        return device.fetch(batch, self.device)

    def parallel(self, network):
        """Return the network to train; its gradients are averaged over processes."""
        has_unused = self.cfg.model.network.startswith("smp/")  # some encoders of it
        self.networks.append(processes.parallel(network, has_unused))
        return self.networks[-1]

    def steps(self, batches, total):
        """Yield (step, parts) for each step up to `total`; log, save and stop between steps.

        parts: this process's micro-batches; torch is seeded before each. After SIGINT or SIGTERM in
        any process, save after the step and raise SystemExit.
        """
        received = []
        numbers = signal.SIGINT, signal.SIGTERM
        handlers = [signal.signal(n, lambda number, _: received.append(number)) for n in numbers]
        if rank() == 0:
            self._describe()
        for network in self.state.values() if self.cfg.compile else ():
            if isinstance(network, torch.nn.Module):
                network.compile()
        self.figures.start(self.first, total, batches.batch_size * world() * self.cfg.accumulate)
        batches = iter(batches)
        try:
            for step in range(self.first, total):
                done = self.figures.done = step + 1
                is_shown = done % self.cfg.pictures_every == 0 or done == total
                self.shows = is_shown and rank() == 0
                self._seed(step, 0)
                yield step, self._parts(step, batches)
                stop = processes.max_over_processes(received[0] if received else 0)
                saves = stop or (done % self.cfg.save_every == 0 and done < total)
                self.figures.advance(saves or done % self.cfg.log_every == 0)
                if saves:
                    self.save_unfinished(done)
                if stop:
                    processes.barrier()  # torchrun stops all processes once one has ended
                    words = f"stopped by signal {stop}; the same command goes on from there"
                    raise SystemExit(tell(words, 128 + stop))
        finally:
            for number, handler in zip(numbers, handlers, strict=True):
                signal.signal(number, handler)

    def _parts(self, step, batches):
        for k in range(self.cfg.accumulate):
            self._seed(step, k * world() + rank())
            is_last = k + 1 == self.cfg.accumulate
            with processes.accumulating([] if is_last else self.networks):
                yield self.fetch(next(batches))

    def _seed(self, step, place):
        """Seed torch by (seed, stage, step, place of the part in the batch) alone."""
        sequence = np.random.SeedSequence([self.cfg.seed, *self.stage.encode(), step])
        torch.manual_seed(int(sequence.generate_state(place + 1)[place]))

    def _describe(self):
        """Write config.yaml, as resolved, and environment.json into the folder."""
        environment = json.dumps(device.environment(self.device), indent=1)
        files.write_text(self.folder / "environment.json", environment)
        config = yaml.safe_dump(plain(self.cfg), sort_keys=False)
        files.write_text(self.folder / "config.yaml", config)

    def backward(self, loss):
        """Add the gradients of a micro-batch's loss."""
        self.scaler.scale(loss / self.cfg.accumulate).backward()

    def update(self, *optimizers):
        """Take the step of each optimizer with the gradients that were added."""
        self.log(lr=optimizers[0].param_groups[0]["lr"])
        for optimizer in optimizers:
            self.scaler.step(optimizer)
            optimizer.zero_grad()
        self.scaler.update()
