"""Run all stages of a configuration, evaluate them and write the report.

    python -m tools.run_all [CONFIG] [key.sub=value ...]

Finished stages are not run again; a stage that was interrupted resumes. With NPROC=N in the
environment, each stage runs in N processes, on a GPU each if there are any.
"""

import importlib
import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path

from engine import signals
from engine.command import arguments, command
from settings import load_config

ROOT = Path(__file__).parent.parent
PLAIN = ("warmup.distill=0", "warmup.crdomix=false")
# stage -> its module, and what follows the user's own overrides
STAGES = {
    "demo_data": ["tools.make_demo_data"],
    "translate": ["translate_cyclegan"],
    "source_only": ["warmup", *PLAIN, "bn_recalibrate=[source]"],
    "warmup": ["warmup"],
    "selftrain": ["selftrain"],
    "oracle": ["warmup", *PLAIN, "bn_recalibrate=[target]", "warmup.labels_from=target"],
    "evaluate": ["evaluate"],
}


def main():
    args = arguments(__doc__).parse_intermixed_args()
    words = args.overrides
    path = words.pop(0) if words and "=" not in words[0] else args.cfg
    if not Path(path).exists() and (ROOT / path).exists():
        path = ROOT / path
    for module, line in commands(path, words):
        run(module, line)


def commands(path, overrides):
    """Yield (module, its arguments) of each stage, the evaluation, the report. Raises UserError."""
    cfg, given = load_config(path, overrides), ["--cfg", str(path), *overrides]
    for stage in [*cfg.stages, "evaluate"]:
        print(f"== {stage}", flush=True)
        module, *more = STAGES[stage]
        yield module, given + more + ["--as", stage] * (module == "warmup")
    yield "tools.report", [str(Path(cfg.output) / cfg.name)]


def run(module, line):
    """Run a command in a process of its own and pass signals on; exit unless it succeeds."""
    count = int(os.environ.get("NPROC") or 1)
    several = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"]
    start = several * (count > 1 and not module.startswith("tools."))
    # by its path: a user may stand in a folder that has a module of the same name
    script = (ROOT / module.replace(".", "/")).with_suffix(".py")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    # in a session of its own, or a terminal and `timeout` would send it each signal a second time
    whole = [sys.executable, *start, str(script), *line]
    stage = subprocess.Popen(whole, start_new_session=True, env=environment, stderr=sys.stderr)

    def stop(number, _):  # `timeout` sends it twice
        signal.signal(number, signal.SIG_IGN)
        stage.send_signal(number)

    # on Windows, a terminal's Ctrl-C reaches both
    on_sigint = signal.SIG_IGN if os.name == "nt" else lambda number, _: stage.send_signal(number)
    handlers = signals.handle(on_sigint, stop)
    hangup = getattr(signal, "SIGHUP", signal.SIGTERM)
    if signal.getsignal(hangup) != signal.SIG_IGN:  # not under nohup
        signal.signal(hangup, stop)
    code = stage.wait()
    signals.handle(*handlers)
    if code:
        sys.exit(code if code > 0 else 128 - code)


def run_all(path, *overrides):
    """Do the same in this process, where networks may be registered. Raises UserError, SystemExit.

    path: the configuration. overrides: texts of the form key.sub=value.
    """
    if multiprocessing.current_process().name == "MainProcess":  # workers may import the caller
        for module, line in commands(path, overrides):
            sys.argv = [f"{module.rpartition('.')[2]}.py", *line]
            command(importlib.import_module(module).main)


if __name__ == "__main__":
    command(main)
