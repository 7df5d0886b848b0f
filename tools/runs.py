"""Read what runs left, and summarise runs that share their settings."""

import json
import re
import statistics

from engine.config import UserError, flat
from engine.files import FREE_KEYS
from evaluate import STAGES, read_results
from layouts import classes
from settings import WHOLE, load_saved

TITLES = {
    "translator": "translation", "source_only": "source only",
    "source_strong": "source only (strong views)", "dacs": "DACS", "daformer": "DAFormer",
    "mic": "MIC", "warmup": "warm-up", "selftrain": "self-training", "oracle": "oracle",
}  # fmt: skip
BLANK = {"dataset": "val", "miou": None, "iou": {}, "pixel_accuracy": None, "teacher_miou": None}
REFERENCES = ("oracle", "source_only")  # the ends of the gap; no stage of DiGA


def title(stage):
    """Return what the tables call a stage: "selftrain_round1" is "self-training round 1"."""
    name = max((name for name in TITLES if stage.startswith(name)), key=len, default=stage)
    rest = stage[len(name) :].replace("_round", "_round_").replace("_", " ")
    return TITLES.get(name, name) + rest


def read_run(folder):
    """Return a run's folder, config, environment, results and log (as in read_log), as a dict.

    A missing score in results.json is None. Raises UserError for a missing or a broken file.
    """
    config = folder / "config.yaml"
    if not config.is_file():
        raise UserError(f"{config}: is missing; give the folder of a run, such as runs/demo")
    results = read_results(folder / "results.json")
    for stage, entry in results.items():
        results[stage] = BLANK | entry | {"iou": entry.get("iou") or {}}
    return {
        "folder": folder,
        "config": load_saved(config, (), config),
        "results": results,
        "log": read_log(folder / "log.jsonl"),
        "environment": read_results(folder / "environment.json"),
    }


def read_log(path):
    """Return log.jsonl by stage: (lines of the steps in order, the line that ended it or None)."""
    log = {}
    for line in path.read_bytes().split(b"\n") if path.is_file() else ():
        try:
            entry = json.loads(line)
        except ValueError:  # nothing, or half a line of a process that was killed
            continue
        steps, finished = log.get(entry["stage"], ([], None))
        if "finished" in entry:
            finished = entry
        elif "loss" in entry:
            # a stage that was resumed or repeated writes some of its steps again
            steps = [*(old for old in steps if old["step"] < entry["step"]), entry]
            finished = None
        log[entry["stage"]] = (steps, finished)
    return {stage: log[stage] for stage in in_order(log)}


def gap_closed(results, stage):
    """Return how far `stage` is from source_only's mIoU to the oracle's, in percent, or None."""
    high, low, here = (results.get(name, BLANK)["miou"] for name in (*REFERENCES, stage))
    if stage in REFERENCES or None in (low, high, here) or high <= low:
        return None
    return 100 * (here - low) / (high - low)


def in_order(stages):
    """Return stages in the order of the tables, each once."""
    stages = list(dict.fromkeys(stages))
    return sorted(stages, key=["source_only", "translator", *STAGES, *stages].index)


def settings_of(runs):
    """Return [(settings, runs, stage -> figure -> summary), ...].

    Runs share their settings if they differ in FREE_KEYS, seed and translated images alone.
    """
    groups = {}
    for run in runs:
        settings = {k: v for k, v in run["config"].items() if k not in FREE_KEYS | {"seed"}}
        settings = flat(settings, WHOLE) | {"translation.images": None}
        groups.setdefault(repr(settings), (settings, [], {}))[1].append(run)
    for _, group, table in groups.values():
        results = [run["results"] for run in group]
        for stage in in_order(stage for entries in results for stage in entries):
            entries = [x[stage] for x in results if stage in x]
            names = classes(group[0]["config"])
            cells = {name: [x["iou"].get(name) for x in entries] for name in names}
            cells["mIoU"] = [x["miou"] for x in entries]
            cells["gap closed"] = [gap_closed(x, stage) for x in results]
            table[stage] = {name: summary(figures) for name, figures in cells.items()}
    return list(groups.values())


def summary(figures):
    """Return (mean, standard deviation, figures) without None; the first two may be None."""
    figures = [x for x in figures if x is not None]
    spread = statistics.stdev(figures) if len(figures) > 1 else None
    return statistics.mean(figures) if figures else None, spread, figures


def in_words(mean, spread, *_):
    """Return "mean ± deviation", without what is None."""
    return " ± ".join(f"{x:.1f}" for x in (mean, spread) if x is not None) or "-"


def print_table(runs, form):
    """Print mean and deviation by setting and stage as a table; form: md or latex (booktabs)."""
    groups, rows = settings_of(runs), []
    heads = dict.fromkeys(x for *_, stages in groups for cells in stages.values() for x in cells)
    for _, group, stages in groups:
        for stage, cells in stages.items():
            texts = [in_words(*cells.get(head, (None, None))) for head in heads]
            setting, count = group[0]["folder"].name, len(cells["mIoU"][2])
            rows.append([setting, title(stage), str(count), *texts])
    rows.insert(0, ["setting", "stage", "runs", *heads])
    if form == "md":
        rows.insert(1, ["---", "---", *["---:"] * (len(heads) + 1)])
        print("\n".join(f"| {' | '.join(row)} |" for row in rows))
    else:
        rows = [" & ".join(re.sub(r"([&%#_])", r"\\\1", x) for x in row) + r" \\" for row in rows]
        rows = [row.replace("±", r"$\pm$") for row in rows]
        begin = rf"\begin{{tabular}}{{ll{'r' * (len(heads) + 1)}}}"
        lines = [begin, r"\toprule", rows[0], r"\midrule", *rows[1:], r"\bottomrule"]
        print("\n".join([*lines, r"\end{tabular}"]))
