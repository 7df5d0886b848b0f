"""The loop over the steps of a stage: logs, saves and stops between steps."""

from engine import processes, signals
from engine.config import UserError
from engine.log import progress


def part_size(cfg, section):
    """Return the number of images in a part of a step's batch.

    A step has world size x cfg.accumulate equal parts; cfg[section].batch is divided among them.
    Raises UserError where it cannot be.
    """
    batch, parts = cfg[section].batch, processes.world() * cfg.accumulate
    if sum(batch) % parts:
        factors = f"{processes.world()} processes x accumulate = {cfg.accumulate}"
        fault = f"the {sum(batch)} images of a step cannot be divided into {parts} equal parts"
        message = f"{section}.batch = {batch}: {fault} ({factors}); change one of the three"
        raise UserError(message)
    return sum(batch) // parts


def steps(cfg, figures, first, total, images, save):
    """Yield each step from `first` to `total`, of `images` images each.

    After a step: log at cfg.log_every, call save(step) at cfg.save_every, and after a signal do
    both and raise Stopped, in all processes alike. figures: the Log.
    """
    options = {"unit": "img", "desc": figures.stage, "dynamic_ncols": True}
    signals.noted_until_the_step_ends(True)
    with progress(total=total * images, initial=first * images, **options) as bar:
        figures.start(bar, first)
        for step in range(first, total):
            yield step
            figures.step_done(images)
            last = step + 1 == total
            stop = processes.max_over_processes(signals.received())
            saves = stop or ((step + 1) % cfg.save_every == 0 and not last)
            if (step + 1) % cfg.log_every == 0 or saves or last:
                figures.write(step + 1, total, images)
            if saves:
                save(step + 1)
            if stop:
                processes.barrier()  # torchrun stops all processes once one has ended
                raise signals.Stopped(stop)
    signals.noted_until_the_step_ends(False)
    figures.stop()
