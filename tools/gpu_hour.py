"""The first hour on a GPU: its tests, the time and memory of every stage. Leaves gpu.json.

    bash tools/gpu_hour.sh                      # what matters most, in 10 minutes
    bash tools/gpu_hour.sh --all --minutes 60   # other configurations and precisions, two GPUs
    python -m tools.gpu_hour --table gpu.json   # prints the tables for docs/performance.md again

A row is printed and written as soon as it is measured. A row that fails has the reason in a note.
The same command measures only what gpu.json lacks, if GPU, PyTorch and commit are the same.
"compile: auto" in a configuration reads gpu.json: see compilation_pays in engine/device.py.
"""

import argparse
import functools
import gc
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from engine.run import Run
from torch import nn

from engine import signals
from engine.command import command
from engine.config import UserError
from engine.device import MEASURED, environment
from engine.files import write_text
from losses import probability_labels
from metrics import sliding_window
from models import build_segmenter
from settings import classes, load_config
from tools import bench, timed

MAIN, STAGES, MODES = "config.yaml", ("warmup", "selftrain"), ("eager", "compiled")
CORES = min(os.cpu_count(), 16)  # loader workers
FILES = 32  # images of each domain, where images per second are measured
NEVER = 10**9  # steps
LARGE = (2160, 3840)


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add("--minutes", type=float, default=10, help="skip rows that would end later (%(default)s)")
    add("--all", action="store_true", help="measure the optional rows too")
    add("--only", default="", metavar="TEXT", help="measure rows with this in their name, again")
    add("--steps", type=int, default=20, help="repetitions of a measurement (%(default)s)")
    add("--out", default=MEASURED, metavar="FILE", help="the JSON file to write (gpu.json)")
    add("--table", metavar="FILE", help="print the tables of this JSON file, measure nothing")
    args = parser.parse_args()
    if args.table:
        return print_tables(json.loads(Path(args.table).read_text(encoding="utf-8")))
    if not torch.cuda.is_available():
        raise UserError("PyTorch finds no GPU here; python -m tools.bench measures a CPU")
    ask = "nvidia-smi --id=0 --query-gpu=driver_version --format=csv,noheader"
    failed, driver = subprocess.getstatusoutput(ask)
    gpu = environment(torch.device("cuda")) | {"driver": None if failed else driver, "rows": {}}
    if Path(args.out).exists():
        found = json.loads(Path(args.out).read_text(encoding="utf-8"))
        if all(found.get(key) == gpu[key] for key in ("device", "torch", "commit")):
            gpu["rows"] = found["rows"]
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        for table, name, seconds, measure in rows(Hour(folder, args.steps, gpu["rows"])):
            known = "note" not in gpu["rows"].get(name, {"note": None})
            wanted = args.only in name if args.only else not known and (seconds or args.all)
            late = time.monotonic() - began + (seconds or 60) > 60 * args.minutes
            if not wanted or (known and late):
                continue
            found = gpu["rows"][name] = {"table": table}
            if late:
                found["note"] = f"skipped: it would end after --minutes {args.minutes:g}"
            else:
                attempt(measure, found)
            words = (f"{key} {_text(value)}" for key, value in found.items() if key != "table")
            print(f"{name}: {', '.join(words)}", flush=True)
            gpu["compile_from_steps"] = compile_from_steps(gpu["rows"])
            write_text(args.out, json.dumps(gpu, indent=1) + "\n")
    return print_tables(gpu)


def rows(hour):
    """Yield (table, name, seconds or None: optional, function that fills the row)."""

    def steps(path, precision, mode, seconds=None, stages=STAGES):
        for stage in stages:
            fill = functools.partial(hour.training, path, stage, precision, mode)
            yield "steps", f"{path} {stage} {precision} {mode}", seconds, fill

    yield from steps(MAIN, "bf16", "eager", 35)
    yield "tests", "pytest -m gpu", 160, run_tests
    for layout in ("channels_last", "contiguous_format"):
        yield "convolutions", layout, 5, functools.partial(hour.convolutions, layout)
    yield from steps(MAIN, "bf16", "eager", 20, ["translator"])
    for name, measure, size in (
        ("pseudo-labels at 1024x2048 and half of it", bench.measure_pseudo_labels, [1024, 2048]),
        ("evaluation at 512x1024", bench.measure_evaluate, [512, 1024]),
    ):
        yield "images", name, 25, functools.partial(hour.images, measure, f"val.size={size}")
    yield "images", "evaluation of 2160x3840 in windows", 10, hour.windows
    for workers in (16, 8, 4):
        yield "loader", f"{workers} workers", 15, functools.partial(hour.loader, workers)
    yield from steps(MAIN, "bf16", "compiled", 120)
    yield from steps(MAIN, "bf16", "compiled", None, ["translator"])
    for precision, path in (
        ("fp16", MAIN),
        ("fp32", MAIN),
        ("bf16", "configs/demo.yaml"),
        ("bf16", "configs/segformer.yaml"),
    ):
        for mode in MODES:
            yield from steps(path, precision, mode)
    for count in (1, 2):
        fill = functools.partial(hour.processes, count)
        yield "processes", f"{count} GPUs, warm-up, eager", None, fill


def attempt(measure, found):
    """Call measure(found), note its failure, and free what it leaves on the GPU."""
    try:
        measure(found)
    except Exception as error:  # whatever it is, the other rows can still be measured
        found["note"] = f"{type(error).__name__}: {' '.join(str(error).split())}"[:160]
    signals.handle(signals.stop, signals.stop)  # a step that failed has left its own
    torch.compiler.reset()
    gc.collect()
    torch.cuda.empty_cache()


def compile_from_steps(rows):
    """Return from how many of MAIN's steps on compilation pays; None: not known."""
    needed = []
    for stage in STAGES:
        eager, compiled = (rows.get(f"{MAIN} {stage} bf16 {mode}", {}) for mode in MODES)
        if "resident ms" in eager and "resident ms" in compiled:
            gain = (eager["resident ms"] - compiled["resident ms"]) / 1000
            once = max(compiled["first step s"] - eager["first step s"], 0)
            needed.append(round(once / gain) if gain > 0 else NEVER)
    return max(needed, default=None)


def print_tables(gpu):
    print(f"\n{gpu['device']}, driver {gpu['driver']}, PyTorch {gpu['torch']}, {gpu['commit']}")
    for table in dict.fromkeys(row["table"] for row in gpu["rows"].values()):
        chosen = {name: row for name, row in gpu["rows"].items() if row["table"] == table}
        keys = dict.fromkeys(itertools.chain(*chosen.values()))
        keys = sorted((key for key in keys if key != "table"), key="note".__eq__)
        print(f"\n| {' | '.join([table, *keys])} |\n|{'---|' * (len(keys) + 1)}")
        for name, row in chosen.items():
            print(f"| {' | '.join([name, *(_text(row.get(key, '')) for key in keys)])} |")


def _text(value):
    return f"{value:.4g}" if isinstance(value, float) else str(value)


# ---------------------------------------------------------------- the rows


def run_tests(found):
    ask = [sys.executable, "-u", "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider"]
    with subprocess.Popen(ask, stdout=subprocess.PIPE, text=True) as tests:
        for line in tests.stdout:
            print(line, end="", flush=True)
    found["outcome"] = line.strip("= \n")
    if tests.returncode:
        found["note"] = f"pytest ended with exit code {tests.returncode}"


class Hour:
    """What fills the rows. folder: for made files. steps: repetitions. rows: name -> row so far."""

    def __init__(self, folder, steps, rows):
        self.folder, self.steps, self.rows, self.files = folder, steps, rows, {}

    def overrides(self, path, *more, count=4):
        """Return the overrides for `path` that let it use `count` made files of each domain."""
        folder = f"{self.folder}/{Path(path).stem}{count}"
        if folder not in self.files:
            self.files[folder] = timed.make_files(load_config(path, []), folder, count)
        total = timed.SETTLE + self.steps + 1
        some = [f"{section}.steps={total}" for section in (*STAGES, "translation")]
        some += ["device=cuda", "bn_recalibrate=[]", f"workers={CORES}"]
        return [*self.files[folder], *some, *more]

    def config(self, path, *more, count=4):
        return load_config(path, self.overrides(path, *more, count=count))

    def training(self, path, stage, precision, mode, found):
        cfg = self.config(path, f"precision={precision}", f"compile={mode == 'compiled'}".lower())
        section = {"translator": "translation"}.get(stage, stage)
        timed.train(timed.Measured(found, cfg, stage, section, self.steps))

    def convolutions(self, layout, found):
        """Time the head's dilated convolutions, forward and backward, on config.yaml's maps."""
        torch.backends.cudnn.benchmark = True
        to = {"device": "cuda", "dtype": torch.bfloat16, "memory_format": getattr(torch, layout)}
        x = torch.randn(6, 2048, 512 // 8, 896 // 8).to(**to).requires_grad_()
        above = torch.randn(6, 256, 512 // 8, 896 // 8).to(**to)

        def both(conv):
            torch.autograd.grad(conv(x), [x, *conv.parameters()], above)

        for d in (6, 12, 18, 24):
            conv = nn.Conv2d(2048, 256, 3, padding=d, dilation=d).to(**to)
            call = functools.partial(both, conv)
            [seconds] = timed.times(x.device, 5 + self.steps, call)
            found[f"dilation {d}, ms"] = 1000 * statistics.median(seconds[5:])

    def images(self, measure, override, found):
        figures = measure(self.config(MAIN, override, count=FILES), 1)
        found["images/s, from file to file"] = FILES / figures["seconds"]
        found["images/s, the networks alone"] = FILES / figures["bare"]

    @torch.no_grad()
    def windows(self, found):
        run = Run(self.config(MAIN), "evaluate", "evaluation")
        model = build_segmenter(num_classes=len(classes(run.cfg)), **run.cfg.model)
        model = run.place(model).eval()
        image = torch.rand(1, 3, *LARGE, device=run.device)

        def predict():
            with run.autocast():
                logits, *_ = sliding_window(model, image, run.cfg.evaluation.tile)
            probability_labels([logits], LARGE)

        [seconds] = timed.times(run.device, 5, predict)
        found["images/s, the networks alone"] = 1 / statistics.median(seconds[2:])
        found["GiB allocated"] = torch.cuda.max_memory_allocated() / 2**30

    def loader(self, workers, found):
        for stage in STAGES:
            more = f"workers={workers}", f"{stage}.steps={6 * workers}"
            run = timed.train(timed.Loading(self.config(MAIN, *more), stage, stage, 0))
            found[f"{stage} batch ms"] = 1000 * run.seconds
            step = self.rows.get(f"{MAIN} {stage} bf16 eager", {}).get("resident ms")
            found[f"{stage} batch / step"] = 1000 * run.seconds / step if step else ""

    def processes(self, count, found):
        """Train with a batch of 4 under torchrun, and read the log's second interval."""
        if count > torch.cuda.device_count():
            raise UserError("there are not so many GPUs here")
        more = f"name=gpus{count}", "warmup.batch=[2,2]", "warmup.steps=60", "log_every=20"
        more = *more, "compile=false", "precision=bf16", f"workers={CORES // count}"
        options = self.overrides(MAIN, *more)
        ask = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        ask += [f"--nproc_per_node={count}", "warmup.py", "--force", "--cfg", MAIN, *options]
        done = subprocess.run(ask, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(done.stderr.strip().rpartition("\n")[2])
        folder = Path(load_config(MAIN, options).output) / f"gpus{count}"
        lines = map(json.loads, (folder / "log.jsonl").read_text("utf-8").splitlines())
        found["images/s"] = [x["images_per_second"] for x in lines if "images_per_second" in x][1]


if __name__ == "__main__":
    command(main)
