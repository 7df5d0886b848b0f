"""One stage at work in the folder of its run: where it writes, what it resumes, its steps."""

import contextlib
import functools
import hashlib
import json
from pathlib import Path

import cv2
import numpy as np
import torch
import yaml

from engine import device, files, processes
from engine.config import NAME, UserError, one_line, plain
from engine.loop import Loop
from engine.processes import rank, world


class Run:
    """A stage, which leaves `{stage}.pth` in output/name; section: the key of its part of cfg."""

    def __init__(self, cfg, stage, section):
        if not NAME[1](stage):
            raise UserError(f"--as {stage!r} must be {NAME[0]}")
        self.cfg, self.stage, self.section = cfg, stage, section
        self.folder = Path(cfg.output) / cfg.name
        checkpoints = f"{stage}.pth", f"{stage}.unfinished.pth"
        self.result, self.unfinished = (self.folder / name for name in checkpoints)
        files.remove_partial(self.folder)
        self.device, self.dtype = device.choose(cfg.device, cfg.precision)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        self.gradient_means, self.figures = [], Loop(self.folder, stage, self.device)
        self.force, self.resumes = False, True  # whether --force was given; whether it is resumed
        self.inputs = {}  # file name -> digest; rank 0 alone reads and saves them
        self.shows = None  # the number of steps done, in a step whose pictures are to be shown
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

    def compiled(self, network):
        """Return the network for forward passes in the steps, compiled as cfg.compile says."""
        steps = self.cfg[self.section].steps
        return device.compiled(network, self.cfg.compile, self.device, steps)

    def parallel(self, network):
        """Return the trained network for the steps; its gradients are averaged over processes."""
        if world() > 1:
            self.gradient_means.append(processes.GradientMean(network))
        return self.compiled(network)

    def is_finished(self, force, inputs=()):
        """Lock the run's folder; return whether the stage's result is there. Raises UserError.

        inputs: files of earlier stages. force: make a result that replaces it once it is finished.
        """
        self.force, look = force, functools.partial(self._look, force, inputs)
        finished, self.resumes = processes.decided_by_first(look)
        return finished

    def _look(self, force, inputs):
        """Return whether the stage is finished, and whether its unfinished checkpoint counts."""
        files.lock(self.folder, self.stage)
        for path in filter(Path.is_file, map(Path, inputs)):
            self.inputs[path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
        path = self.result if self.result.exists() and not force else self.unfinished
        saved = {}
        with contextlib.suppress(*[UserError] * force):
            if path.exists():
                saved = files.require_same(path, self.cfg, self.section, self.inputs)
        if path == self.result:
            print(f"{self.stage}: {path} is finished; --force makes it anew")
        return path == self.result, not force or saved.get("forced") is True

    def describe(self):
        """Write config.yaml, as resolved, and environment.json into the folder, in rank 0."""
        if rank() == 0:
            environment = json.dumps(device.environment(self.device), indent=1)
            files.write_text(self.folder / "environment.json", environment + "\n")
            config = yaml.safe_dump(plain(self.cfg), sort_keys=False)
            files.write_text(self.folder / "config.yaml", config)

    def resume(self, state):
        """Load the unfinished checkpoint; return its steps, None without one. Raises UserError."""
        if not self.resumes and rank() == 0:  # not before: the input is checked now
            self.unfinished.unlink(missing_ok=True)
        if not self.resumes or not self.unfinished.exists():
            return None
        saved = files.load_tensors(self.unfinished)
        try:
            for name, part in state.items():
                part.load_state_dict(saved[name])
            self.figures.overall = saved["overall"]
            self.figures.began -= saved["seconds"]
            return saved["step"]
        except (LookupError, ValueError, RuntimeError, TypeError, AttributeError) as error:
            fault = f"does not fit this version of the code, or this device ({one_line(error)})"
            raise UserError(f"{self.unfinished}: {fault}; remove it to begin anew") from error

    def save(self, path, step, state, **more):
        """Write a checkpoint of `state` after `step` steps, and `more`, in rank 0."""
        if rank() == 0:
            saved = {name: part.state_dict() for name, part in state.items()}
            saved |= {"stage": self.stage, "step": step, "config": plain(self.cfg)}
            saved |= {"inputs": self.inputs, **more}
            files.write_atomically(path, lambda temporary: torch.save(saved, temporary))

    def save_unfinished(self, step, state):
        """Write the checkpoint that the stage resumes from."""
        more = {"overall": self.figures.overall, "seconds": self.figures.seconds()}
        self.save(self.unfinished, step, state, forced=self.force, **more)

    def finish(self, steps, state):
        """Write the stage's result and remove its unfinished checkpoint."""
        self.save(self.result, steps, state)
        processes.barrier()
        if rank() == 0:
            self.unfinished.unlink(missing_ok=True)
        self.figures.finish(steps, self.result)

    def steps(self, batches, first, total, state):
        """Yield (step, parts) for each step from `first` to `total`, and save `state` at times.

        parts: this process's, on the device; torch is seeded before each, gradients averaged after.
        """
        images = batches.batch_size * world() * self.cfg.accumulate
        batches, save = iter(batches), functools.partial(self.save_unfinished, state=state)
        for step in self.figures.steps(self.cfg, first, total, images, save):
            shows = (step + 1) % self.cfg.pictures_every == 0 or step + 1 == total
            self.shows = step + 1 if shows and rank() == 0 else None
            self._seed(step, 0)
            yield step, self._parts(step, batches)

    def _parts(self, step, batches):
        for k in range(self.cfg.accumulate):
            self._seed(step, k * world() + rank())
            if k + 1 == self.cfg.accumulate:
                for mean in self.gradient_means:
                    mean.begin()
            yield self.fetch(next(batches))
        for mean in self.gradient_means:
            mean.finish()

    def _seed(self, step, place):
        """Seed torch by (seed, stage, step, place of the part in the batch) alone."""
        sequence = np.random.SeedSequence([self.cfg.seed, *self.stage.encode(), step])
        torch.manual_seed(int(sequence.generate_state(place + 1)[place]))

    def log(self, **figures):
        """Log scalars, or ratios as pairs (numerator, denominator)."""
        self.figures.add(**figures)

    def show(self, colours, **pictures):
        """Show sample pictures; call it where `shows` is set. See Loop.show."""
        self.figures.show(self.shows, colours, pictures)
