"""Write one self-contained HTML page about a run, or one that compares several runs.

    python -m tools.report runs/demo                     # runs/demo/report.html
    python -m tools.report runs/demo runs/demo_seed1     # runs/comparison.html

Runs that differ in their seed alone share a column of the comparison: mean and spread.
"""

import base64
import io
import json
import re
import statistics
import sys
from pathlib import Path

import cv2
import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # to be run by its path too

from engine.command import Parser, command
from engine.config import UserError, flat
from engine.files import FREE_KEYS
from engine.images import paint, read_image, resize
from evaluate import STAGES, advice, read_results, what_to_segment
from layouts import classes
from settings import DEFAULTS, WHOLE, load_config, load_saved
from tools.templates import render

TITLES = {
    "source_only": "source only", "source_strong": "source only, strong views",
    "warmup": "warm-up", "translator": "translation",
    "selftrain_round1": "self-training, round 1", "selftrain": "self-training",
}  # fmt: skip
BLANK = {"dataset": "val", "miou": None, "iou": {}, "pixel_accuracy": None, "teacher_miou": None}
# heading -> (STAGE, the pictures of samples/STAGE/ below it)
SAMPLES = {
    "From the source to the target": ("translator", "source_image translated target_image"),
    "The strong view of the warm-up (CrDoMix)":
        ("warmup", "source_image translated strong_view source_labels"),
    "Pseudo-labels, and where their two judges agree":
        ("selftrain", "target_image probability_labels feature_labels pseudo_labels truth "
                      "mixed_image mixed_labels"),
}  # fmt: skip
# key of a log line -> what it is the share of
SHARES = {
    "kept": "kept by the consensus", "precision": "its precision",
    "probability_accuracy": "accuracy of probability labels",
}  # fmt: skip
# colour -> matplotlib's format of marker and line
LINES = {"#2f7ed8": "o-", "#c8641a": "s--", "#2e8b57": "^-.", "#9b59b6": "D:", "#808080": "x-"}
REFERENCES = ("oracle", "source_only")  # the ends of the gap; no stage of DiGA
INK = "#010203"  # replaced by the page's text colour, which light and dark mode set
INKED = "text.color axes.labelcolor axes.edgecolor xtick.color ytick.color grid.color"
mpl.rcParams.update({
    "font.family": "sans-serif", "font.size": 9, "svg.fonttype": "none", "svg.hashsalt": "report",
    "axes.grid": True, "grid.alpha": 0.25, "axes.spines.top": False, "axes.spines.right": False,
    "legend.frameon": False, "hatch.linewidth": 0.6, **dict.fromkeys(INKED.split(), INK),
})  # fmt: skip


def main():
    parser = Parser(__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="the folder of a run")
    runs = [read_run(Path(folder)) for folder in parser.parse_args().runs]
    if len(runs) == 1:
        path, page = runs[0]["folder"] / "report.html", about(runs[0])
    else:
        path, page = runs[0]["folder"].parent / "comparison.html", side_by_side(runs)
    render(path, "report.html.jinja", titles=TITLES, **page)
    print(f"report: {path}")


def read_run(folder):
    """Return a run's folder, config, environment, results and log (as in read_log), as a dict.

    A missing score in results.json is None. Raises UserError for a missing or a broken file.
    """
    config = folder / "config.yaml"
    if not config.is_file():
        raise UserError(f"{config}: is missing; give the folder of a run, such as runs/demo")
    results, environment = read_results(folder / "results.json"), folder / "environment.json"
    for stage, entry in results.items():
        results[stage] = BLANK | entry | {"iou": entry.get("iou") or {}}
    read = {"results": results, "log": read_log(folder / "log.jsonl"), "environment": {}}
    if environment.is_file():
        read["environment"] = read_results(environment)
    return {"folder": folder, "config": load_saved(config, (), config), **read}


def read_log(path):
    """Return log.jsonl by stage: (lines of the steps in order, the line that ended it or None)."""
    log, lines = {}, path.read_bytes().split(b"\n") if path.is_file() else []
    for line in lines:
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
    order = ["source_only", "translator", *STAGES, *log]
    return {stage: log[stage] for stage in sorted(log, key=order.index)}


def gap_closed(results, stage):
    """Return how far `stage` is from source_only's mIoU to the oracle's, in percent, or None."""
    high, low, here = (results.get(name, BLANK)["miou"] for name in (*REFERENCES, stage))
    if stage in REFERENCES or None in (low, high, here) or high <= low:
        return None
    return 100 * (here - low) / (high - low)


def about(run):
    """Return the template's values for one run."""
    config, log = run["config"], run["log"]
    results = {k: x for k, x in run["results"].items() if x["iou"] or x["miou"] is not None}
    own = {stage: entry for stage, entry in results.items() if entry["dataset"] == "val"}
    scored = [s for s in STAGES if s in own and s != "oracle" and own[s]["miou"] is not None]
    before, after = (scored[0], scored[-1]) if len(scored) > 1 else (None, None)
    ious = [own[stage]["iou"] for stage in (before, after) if stage]
    values, defaults = flat(config, WHOLE), flat(load_config(DEFAULTS), WHOLE)
    changed = [key for key, value in values.items() if defaults.get(key) != value]
    return {
        "name": run["folder"].name,
        "results": results,
        "advice": advice(run["results"]),
        "means": sorted({k for entry in results.values() for k in entry if k.startswith("miou_")}),
        "gaps": {stage: gap_closed(own, stage) for stage in own},
        "before": before,
        "after": after,
        "ious": [(name, *(iou.get(name) for iou in ious)) for name in classes(config) if ious],
        "oracle": own.get("oracle"),
        "colours": {name: "#" + bytes(rgb).hex() for name, rgb in classes(config).items()},
        "charts": list(filter(None, (scores_chart(own), *curves(log)))),
        "gallery": pictures(run),
        "samples": samples(run),
        "stages": {stage: (steps, end) for stage, (steps, end) in log.items() if steps},
        "changed": [(k, json.dumps(defaults.get(k)), json.dumps(values[k])) for k in changed],
        "environment": run["environment"],
        "comparison": None,
    }


def scores_chart(results):
    """Return (title, description, SVG) of a bar per stage, or None without a score."""
    scores = {stage: entry["miou"] for stage, entry in results.items()}
    texts = {stage: "-" if x is None else f"{x:.1f}" for stage, x in scores.items()}
    known = [score for score in scores.values() if score is not None]
    if not known:
        return None
    figure = Figure((4.4, 0.6 + 0.42 * len(scores)), layout="constrained")
    axes = figure.add_subplot()
    for row, (stage, score) in enumerate(scores.items()):
        if score is not None:
            colour, hatch = ("#808080", "///") if stage in REFERENCES else ("#2f7ed8", None)
            axes.barh(row, score, color=colour, hatch=hatch)
        gap = gap_closed(results, stage)
        words = f" {texts[stage]}" + ("" if gap is None else f" ({gap:.0f}%)")
        axes.text(score or 0, row, words, va="center")
    for stage in REFERENCES:
        if scores.get(stage) is not None:
            axes.axvline(scores[stage], color=INK, linewidth=0.8, linestyle=":")
    axes.set_yticks(range(len(scores)), [TITLES.get(stage, stage) for stage in scores])
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set_xlim(0, 1.3 * max(known))
    axes.set_xlabel("mIoU (share of the gap closed)" if "oracle" in results else "mIoU")
    words = ", ".join(f"{TITLES.get(stage, stage)} {text}" for stage, text in texts.items())
    return "mIoU of each stage", f"Bar chart: mIoU of {words}.", svg(figure, "scores")


def curves(log):
    """Yield (title, description, SVG) of loss and learning rate by stage, then of pseudo-labels."""
    trained = {stage: steps for stage, (steps, _) in log.items() if steps and stage != "translator"}
    for key, title in (("loss", "Loss"), ("lr", "Learning rate of the backbone")):
        lines = {}
        for stage, steps in trained.items():
            points = [(line["step"], line[key]) for line in steps if line.get(key) is not None]
            lines |= {TITLES.get(stage, stage): points} if points else {}
        if lines:
            words = f"Line chart over the steps of each stage: {', '.join(lines)}."
            yield title, words, line_chart(lines, key, "step")
    rounds = [x for stage, steps in trained.items() if stage.startswith("selftrain") for x in steps]
    lines = {}
    for key, words in SHARES.items():
        points = [(k, 100 * x[key]) for k, x in enumerate(rounds, 1) if x.get(key) is not None]
        lines |= {words: points} if points else {}
    if lines:
        words = ", ".join(f"{name} {points[-1][1]:.1f}%" for name, points in lines.items())
        words = f"Line chart over all rounds of self-training; at its end: {words}."
        across, up = "line of the log, through all rounds", "% of the pixels"
        yield "Pseudo-labels", words, line_chart(lines, "rounds", across, up)


def line_chart(lines, name, across, up=""):
    """Return an SVG of lines: label -> [(x, y), ...]. across, up: the words at the axes."""
    figure = Figure((4.4, 2.8), layout="constrained")
    axes = figure.add_subplot(xlabel=across, ylabel=up)
    for k, (label, points) in enumerate(lines.items()):
        colour, look = list(LINES.items())[k % len(LINES)]
        every = max(len(points) // 6, 1)
        x, y = zip(*points, strict=True)
        axes.plot(x, y, look, label=label, color=colour, markevery=every, markersize=4)
    figure.legend(loc="outside lower center", ncols=2)
    return svg(figure, name)


def svg(figure, name):
    """Return a figure as inline SVG in the page's text colour; `name` makes its ids unique."""
    file, nothing = io.StringIO(), dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(file, format="svg", transparent=True, metadata=nothing)
    text = file.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    text = re.sub(r'(id="|url\(#|href="#)', rf"\g<1>{name}-", text)
    for side in ("width", "height"):
        text = re.sub(rf'(<svg [^>]*?) {side}="[^"]*"', r"\1", text, count=1)
    return text


def pictures(run, rows=4):
    """Return rows of tiles: an image, its prediction by each stage, and its label if it has one."""
    cfg, folder = run["config"], run["folder"]
    stages = [s for s in STAGES if (folder / "predictions" / s).is_dir()]
    stages = [stage for stage in stages if stage != "selftrain_round1"]
    if not stages:
        return []
    try:
        whole = next(iter(what_to_segment(cfg).values()))
    except UserError:  # the images have been moved since
        return []
    shown = gallery(folder, whole, stages, cfg, rows)
    return [[tile(TITLES.get(t, t), x, t != "image", cfg) for t, x in tiles] for tiles in shown]


def gallery(out, whole, stages, cfg, rows=4):
    """Yield [(title, picture), ...] for a few images: image, each stage's prediction, label."""
    folder, names = out / "predictions", [Path(n).with_suffix(".png") for n in whole.images.names]
    shown = [i for i, name in enumerate(names) if all((folder / s / name).exists() for s in stages)]
    few = np.linspace(0, len(shown) - 1, min(rows, len(shown)), dtype=int)
    for i in (shown[j] for j in few):
        row = [("image", whole.images.image(i))]
        row += [(stage, read_image(folder / stage / names[i])) for stage in stages]
        if whole.images.labelled:
            row.append(("label", paint(whole.images.label(i), classes(cfg))))
        yield row


def samples(run):
    """Return rows of tiles by their headings: the last pictures that each stage left."""
    rows = {}
    for heading, (stage, names) in SAMPLES.items():
        for name in names.split():
            path = run["folder"] / "samples" / stage / f"{name}.png"
            if path.is_file():
                what = name.replace("_", " "), read_image(path), "label" in name
                rows.setdefault(heading, []).append(tile(*what, run["config"]))
    return rows


def tile(title, picture, painted, cfg):
    """Return (title, description, data URI) of a picture (H, W, 3) uint8; painted: a label map."""
    width = min(320, picture.shape[1])
    size = (round(width * picture.shape[0] / picture.shape[1]), width)
    small = resize(picture, size, labels=painted)[..., ::-1]
    quality = [cv2.IMWRITE_WEBP_QUALITY, 101 if painted else 80]  # above 100: lossless
    data = base64.b64encode(cv2.imencode(".webp", small, quality)[1]).decode()
    return title, in_words(picture, cfg), f"data:image/webp;base64,{data}"


def in_words(picture, cfg):
    """Return the four largest classes of a painted label map, an empty string for a photograph."""
    values, counts = np.unique(picture.reshape(-1, 3), axis=0, return_counts=True)
    names = {tuple(rgb): name for name, rgb in classes(cfg).items()} | {(0, 0, 0): "none"}
    if len(values) > len(names):
        return ""
    shares = zip(counts / counts.sum(), map(tuple, values.tolist()), strict=True)
    largest = sorted(shares, reverse=True)[:4]
    return ", ".join(f"{names.get(colour, 'other')} {share:.0%}" for share, colour in largest)


def side_by_side(runs):
    """Return the template's values for several runs: a column for each setting."""
    groups = {}
    for run in runs:
        config = {k: v for k, v in run["config"].items() if k not in FREE_KEYS | {"seed"}}
        groups.setdefault(json.dumps(flat(config, WHOLE)), []).append(run)
    settings = [json.loads(key) for key in groups]
    results = [[run["results"] for run in group] for group in groups.values()]
    differing = {key: [json.dumps(s.get(key)) for s in settings] for s in settings for key in s}
    there = dict.fromkeys(stage for run in runs for stage in run["results"])
    stages = sorted(there, key=[*STAGES, *there].index)
    names = dict.fromkeys(name for run in runs for name in classes(run["config"]))
    last = next((s for s in ("selftrain", "warmup", "source_only") if s in there), None)

    def rows(read, keys):
        """Return key -> the summary of each group."""
        return {k: [summary([read(x, k) for x in group]) for group in results] for k in keys}

    return {
        "name": "Runs side by side",
        "comparison": {
            "miou": rows(lambda x, stage: x.get(stage, BLANK)["miou"], stages),
            "gap": rows(gap_closed, stages),
            "iou": rows(lambda x, name: x.get(last, BLANK)["iou"].get(name), names),
        },
        "groups": [[run["folder"].name for run in group] for group in groups.values()],
        "last": last,
        "differing": [(key, values) for key, values in differing.items() if len(set(values)) > 1],
    }


def summary(figures):
    """Return (mean, standard deviation, figures) without None; the first two may be None."""
    figures = [x for x in figures if x is not None]
    spread = statistics.stdev(figures) if len(figures) > 1 else None
    return statistics.mean(figures) if figures else None, spread, figures


if __name__ == "__main__":
    command(main)
