"""Run all stages of a configuration, evaluate them and write the report.

    python -m tools.run_all [CONFIG] [key.sub=value ...]

Finished stages are not run again; a stage that was interrupted resumes. With NPROC=N in the
environment, each stage runs in N processes, on a GPU each if there are any.
"""

import importlib
import os
import signal
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # to be run by its path too

from engine.command import arguments, command
from settings import load_config
from tools.runs import read_log

ROOT = Path(__file__).parent.parent
# stage -> its module, and its arguments
STAGES = {
    "demo_data": ["tools.make_demo_data"],
    "translate": ["translate_cyclegan"],
    "source_only": ["tools.baselines", "--method", "source_only"],
    "warmup": ["warmup"],
    "selftrain": ["selftrain"],
    "oracle": ["tools.baselines", "--method", "oracle"],
    "evaluate": ["evaluate"],
}
# passes of the network through an image in a step: 1 forward, 2 backward
PASSES = {"source_only": 3, "warmup": 8, "selftrain": 12, "oracle": 3}


def main():
    args = arguments(__doc__).parse_intermixed_args()
    words = args.overrides
    path = words.pop(0) if words and "=" not in words[0] else args.cfg
    if not Path(path).exists() and (ROOT / path).exists():
        path = ROOT / path
    for module, line in commands(path, words, args.imported):
        run(module, line)


def commands(path, overrides, imported=None):
    """Yield (module, its arguments) of each stage, the evaluation, the report. Raises UserError."""
    cfg = load_config(path, overrides)
    first = ["--import", imported] if imported else []
    stages = [*cfg.stages, "evaluate"]
    for number, stage in enumerate(stages, 1):
        left = minutes_left(cfg, stages[number - 1 :])
        print(f"== {stage} ({number} of {len(stages)}){left}", flush=True)
        module, *more = STAGES[stage]
        yield module, [*more, *first, "--cfg", str(path), *overrides]
    yield "tools.report", [str(Path(cfg.output) / cfg.name)]


def minutes_left(cfg, stages):
    """Return words: the time that trainings take at the pace of the last finished one, or none."""
    work = {}
    for stage, passes in PASSES.items():
        options = cfg.selftrain if stage == "selftrain" else cfg.warmup
        work[stage] = passes * sum(options.batch) * options.steps * options.get("rounds", 1)
    log = read_log(Path(cfg.output) / cfg.name / "log.jsonl")
    ended = {stage: end["seconds"] for stage, (_, end) in log.items() if end}
    # self-training notes the time of its last round alone
    paces = [ended[x] / work[x] for x in ended if x in work and x != "selftrain"]
    later = [work[stage] for stage in stages if stage in work]
    minutes = paces[-1] * sum(later) / 60 if paces else 0
    return f": {minutes:.1f} min of training networks left" if minutes else ""


def run(module, line):
    """Run a command in a process of its own, and pass SIGTERM on; exit unless it succeeds."""
    count = int(os.environ.get("NPROC") or 1)
    start = []
    if count > 1 and module not in ("tools.make_demo_data", "tools.report"):
        start = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"]
    # by its path: a user may stand in a folder that has a module of the same name
    script = (ROOT / module.replace(".", "/")).with_suffix(".py")
    stage = subprocess.Popen([sys.executable, *start, str(script), *line])
    # a terminal's Ctrl-C reaches the stage as well, which saves and ends
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, _: stage.send_signal(number))
    code = stage.wait()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if code:
        sys.exit(code if code > 0 else 128 - code)


def run_all(path, *overrides):
    """Do the same in this process, where networks may be registered. UserError, SystemExit."""
    for module, line in commands(path, overrides):
        sys.argv = [f"{module.rpartition('.')[2]}.py", *line]
        command(importlib.import_module(module).main)


if __name__ == "__main__":
    command(main)
