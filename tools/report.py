"""Write one self-contained HTML page about a run, or one that compares several runs.

    python -m tools.report runs/demo                       # runs/demo/report.html
    python -m tools.report runs/demo runs/demo_seed1       # runs/comparison.html
    python -m tools.report runs/demo* --format latex       # a table for a paper, on stdout

Runs that differ in nothing but their seed and their translated images share a column of the
comparison, or a row of the table: mean and standard deviation.
"""

import base64
import collections
import contextlib
import io
import json
import re
import sys
from pathlib import Path

import cv2
import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # to be run by its path too

from datasets import IGNORED, Images
from engine.command import Parser, command
from engine.config import UserError, flat
from engine.images import paint, read_image, resize, threads
from evaluate import STAGES, advice, judged
from layouts import classes
from settings import DEFAULTS, WHOLE, load_config
from tools.runs import (
    REFERENCES,
    gap_closed,
    in_order,
    paper_table,
    read_run,
    settings_of,
    summary,
    title,
)
from tools.templates import render

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
# stages whose losses are the sums of the same terms: one chart
COMPARABLE = ("source_only|source_strong|oracle", "dacs|daformer", r"selftrain(_round\d+)?")
# colour -> matplotlib's format of marker and line
LINES = {"#2f7ed8": "o-", "#c8641a": "s--", "#2e8b57": "^-.", "#9b59b6": "D:", "#808080": "x-"}
FEW = 500  # fewer steps of the warm-up are a trial
INK = "#010203"  # replaced by the page's text colour, which light and dark mode set
INKED = "text.color axes.labelcolor axes.edgecolor xtick.color ytick.color grid.color"
mpl.rcParams.update({
    "font.family": "sans-serif", "font.size": 9, "svg.fonttype": "none", "svg.hashsalt": "report",
    "axes.grid": True, "grid.alpha": 0.25, "axes.spines.top": False, "axes.spines.right": False,
    "legend.frameon": False, **dict.fromkeys(INKED.split(), INK),
})  # fmt: skip


def main():
    parser = Parser(__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="the folder of a run")
    words = "print a table of the scores, and write no page"
    parser.add_argument("--format", choices=("md", "latex", "csv"), help=words)
    args = parser.parse_args()
    runs = [read_run(Path(folder)) for folder in args.runs]
    if args.format:
        print(paper_table(runs, args.format), end="")
        return
    path = runs[0]["folder"] / "report.html"
    if len(runs) > 1:
        path = runs[0]["folder"].parent / "comparison.html"
    page = about(runs[0]) if len(runs) == 1 else side_by_side(runs)
    render(path, "report.html.jinja", title=title, **page)
    print(f"report: {path}")


def about(run):
    """Return the template's values for one run."""
    cfg = run["config"]
    log = run["log"]
    folder = run["folder"]
    results = {k: x for k, x in run["results"].items() if x["iou"] or x["miou"] is not None}
    own = {stage: entry for stage, entry in results.items() if entry["dataset"] == "val"}
    scored = [s for s in STAGES if s in own and s != "oracle" and own[s]["miou"] is not None]
    trained = [s for s in STAGES if s != "oracle" and (folder / f"{s}.pth").is_file()]
    best, _ = judged(run["results"])
    if scored:
        best = max(scored, key=lambda stage: own[stage]["miou"])
    elif best is None and trained:
        best = trained[-1]
    values = flat(cfg, WHOLE)
    defaults = flat(load_config(DEFAULTS), WHOLE)
    changed = [key for key, value in values.items() if defaults.get(key) != value]
    ends = [end for _, end in log.values() if end]
    data = datasets_of(cfg)
    return {
        "name": folder.name,
        "folder": folder,
        "config": cfg,
        "dates": sorted({end["date"] for end in ends if "date" in end}),
        "hours": sum(end.get("seconds") or 0 for end in ends) / 3600,
        "few": "warmup" in log and cfg.warmup.steps < FEW,
        "best": best,
        "results": results,
        "advice": advice(run["results"], title),
        "means": sorted({k for entry in results.values() for k in entry if k.startswith("miou_")}),
        "gaps": {stage: gap_closed(own, stage) for stage in own},
        "before": scored[0] if len(scored) > 1 else None,
        "after": scored[-1] if len(scored) > 1 else None,
        "oracle": own.get("oracle"),
        "colours": classes(cfg),
        "data": data,
        "charts": list(curves(log)),
        "pictures": gallery(run, data["val" if cfg.val.root else "target"][0]) | samples(run),
        "stages": {s: (*x, speed(cfg, s, x[1])) for s, x in log.items() if x[0]},
        "changed": [(k, json.dumps(defaults.get(k)), json.dumps(values[k])) for k in changed],
        "environment": run["environment"],
        "tables": None,
    }


def speed(cfg, stage, end):
    """Return the images of a finished stage's steps by its seconds, or None."""
    if not end or not end.get("seconds"):
        return None
    section = "warmup" if stage in ("warmup", *REFERENCES) else "selftrain"
    batch = cfg["translation" if stage == "translator" else section].batch
    return end["finished"] * sum(batch) / end["seconds"]


def datasets_of(cfg, some=32):
    """Return name -> (Images or None, root, {size: images}, {class: percent of the labels}).

    Sizes and shares are those of `some` evenly spaced files.
    """
    specs = {"source": cfg.source, "target": cfg.target, "val": cfg.val}
    specs |= {f"more_val.{name}": spec for name, spec in cfg.more_val.items()}
    roots = {key: spec.root for key, spec in specs.items() if spec.root}
    data = {key: (None, root, collections.Counter(), {}) for key, root in roots.items()}
    for key in data:
        with contextlib.suppress(UserError):  # the images have been moved since
            images = Images(cfg, key, labelled=key != "target")
            few = np.unique(np.linspace(0, len(images) - 1, some, dtype=int)).tolist()
            shapes, _, counts = zip(*threads.map(images.summary, few), strict=True)
            counts = np.sum(counts, axis=0)[: len(classes(cfg))]
            percent = (100 * counts / max(counts.sum(), 1)).tolist()
            percent = dict(zip(classes(cfg), percent, strict=True)) if images.labelled else {}
            data[key] = (images, images.folder, collections.Counter(shapes), percent)
    return data


def curves(log):
    """Yield (title, description, SVG) of the losses, pseudo-labels, and at last learning rates."""
    losses = {}
    rates = {}
    shares = {}
    before = 0  # steps of the rounds before
    for stage, (steps, _) in log.items():
        kind = next((names for names in COMPARABLE if re.fullmatch(names, stage)), stage)
        name = title(stage)
        for line in steps:
            step = line["step"]
            losses.setdefault(kind, {}).setdefault(name, []).append((step, line["loss"]))
            if "lr" in line:
                rates.setdefault(name, []).append((step, line["lr"]))
            for key in SHARES if stage.startswith("selftrain") else ():
                if key in line:
                    shares.setdefault(SHARES[key], []).append((before + step, 100 * line[key]))
        if steps and stage.startswith("selftrain"):
            before += steps[-1]["step"]
    for k, lines in enumerate(losses.values()):
        yield f"Loss: {', '.join(lines)}", *line_chart(lines, f"loss{k}", "step")
    if shares:
        axes = ("step, through all rounds", "% of the pixels")
        yield "Pseudo-labels", *line_chart(shares, "shares", *axes, top=100)
    if rates:
        yield "Learning rate", *line_chart(rates, "rates", "step")


def line_chart(lines, name, across, up="", top=None, ticks=None):
    """Return (description, SVG) of lines: label -> [(x, y), ...], or [(x, y, error), ...].

    The SVG has the page's text colour. name: makes its ids unique. across, up: the words at the
    axes. top: the end of the vertical axis, which begins at 0.
    """
    figure = Figure((8, 3.4) if ticks else (4.4, 2.8), layout="constrained")
    axes = figure.add_subplot(xlabel=across, ylabel=up)
    for k, (label, points) in enumerate(lines.items()):
        colour, look = list(LINES.items())[k % len(LINES)]
        options = {"label": label, "color": colour, "markersize": 4, "capsize": 3, "fmt": look}
        every = max(len(points) // 6, 1)
        axes.errorbar(*zip(*points, strict=True), markevery=every, **options)
    axes.set_ylim(0, top)
    # automatic numbers of ticks change with the layout, which then cuts off their labels
    axes.locator_params("y", nbins=5)
    axes.locator_params("x", nbins=6, integer=True)
    if ticks:
        axes.set_xticks(range(len(ticks)), ticks)
    figure.legend(loc="outside lower center", ncols=2)
    ends = ", ".join(f"{label} {points[-1][1]:.3g}" for label, points in lines.items())
    file = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(file, format="svg", transparent=True, metadata=nothing)
    drawn = file.getvalue().replace(INK, "currentColor")
    drawn = drawn[drawn.index("<svg") :]
    drawn = re.sub(r'(id="|url\(#|href="#)', rf"\g<1>{name}-", drawn)
    return f"Line chart; at the end: {ends}", drawn


def gallery(run, images, even=4, worst=3):
    """Return heading -> [(file, tiles), ...]: evenly chosen images, those of the lowest accuracy.

    The tiles: an image, its prediction by each stage, and its label if it has one.
    """
    folder = run["folder"] / "predictions"
    colours = classes(run["config"])
    stages = [s for s in STAGES if (folder / s).is_dir() and "_round" not in s]
    if not stages or images is None:
        return {}
    files = [Path(name).with_suffix(".png") for name in images.names]
    there = [i for i, x in enumerate(files) if all((folder / s / x).is_file() for s in stages)]
    last = stages[-2] if stages[-1] == "oracle" and len(stages) > 1 else stages[-1]

    def accuracy(i):
        label = images.label(i)
        right = (paint(label, colours) == read_image(folder / last / files[i])).all(-1)
        known = label != IGNORED
        return 100 * right[known].sum() / max(known.sum(), 1)

    def row(i):
        words = images.names[i]
        tiles = [tile("image", images.image(i), False)]
        tiles += [tile(title(s), read_image(folder / s / files[i]), True) for s in stages]
        if images.labelled:
            tiles.append(tile("label", paint(images.label(i), colours), True))
            words += f", pixel accuracy {accuracy(i):.0f}%"
        return words, tiles

    few = [there[j] for j in np.linspace(0, len(there) - 1, min(even, len(there)), dtype=int)]
    rows = {"Evenly chosen": few}
    if images.labelled:
        lowest = f"The lowest pixel accuracy of {len(there)} images, after {title(last)}"
        rows[lowest] = sorted(there, key=accuracy)[:worst]
    return {heading: list(map(row, some)) for heading, some in rows.items() if some}


def samples(run):
    """Return heading -> [("", tiles)]: the last pictures that each stage left."""
    rows = {}
    for heading, (stage, names) in SAMPLES.items():
        paths = [run["folder"] / "samples" / stage / f"{name}.png" for name in names.split()]
        paths = [path for path in paths if path.is_file()]
        tiles = [tile(x.stem.replace("_", " "), read_image(x), "label" in x.stem) for x in paths]
        if tiles:
            rows[heading] = [("", tiles)]
    return rows


def tile(words, picture, is_label):
    """Return (words, data URI) of a picture (H, W, 3) uint8."""
    width = min(1024, picture.shape[1])
    size = (round(width * picture.shape[0] / picture.shape[1]), width)
    small = resize(picture, size, labels=is_label)[..., ::-1]
    quality = [cv2.IMWRITE_WEBP_QUALITY, 101 if is_label else 80]  # above 100: lossless
    data = base64.b64encode(cv2.imencode(".webp", small, quality)[1]).decode()
    return words, f"data:image/webp;base64,{data}"


def side_by_side(runs):
    """Return the template's values for several runs: a column for each setting."""
    settings, groups, found = zip(*settings_of(runs), strict=True)
    colours = {name: rgb for run in runs for name, rgb in classes(run["config"]).items()}
    stages = in_order(stage for table in found for stage in table)
    last = next((s for s in ("selftrain", "warmup", "source_only") if s in stages), "-")

    def rows(keys):
        """Return name -> the summary of each group, of all (name, stage, figure) with a figure."""
        empty = summary([])
        rows = {x: [t.get(stage, {}).get(key, empty) for t in found] for x, stage, key in keys}
        return {name: row for name, row in rows.items() if any(figures for *_, figures in row)}

    tables = {
        "mIoU": ("stage", rows((title(s), s, "mIoU") for s in stages)),
        "Percent of the gap closed": ("stage", rows((title(s), s, "gap closed") for s in stages)),
        f"IoU by class: {title(last)}": ("class", rows((name, last, name) for name in colours)),
    }
    lines = {}
    for k, group in enumerate(groups):
        cells = [(x, *row[k]) for x, row in enumerate(tables["mIoU"][1].values())]
        points = [(x, mean, spread or 0) for x, mean, spread, _ in cells if mean is not None]
        more = f" and {len(group) - 1} more" if len(group) > 1 else ""
        if points:
            lines[group[0]["folder"].name + more] = points
    ticks = [re.sub(r" (\(|round)", r"\n\1", words) for words in tables["mIoU"][1]]
    values = {key: [x.get(key) for x in settings] for x in settings for key in x}
    differing = {key: x for key, x in values.items() if any(value != x[0] for value in x)}
    return {
        "name": "Runs side by side",
        "tables": {heading: table for heading, table in tables.items() if table[1]},
        "charts": [("mIoU", *line_chart(lines, "miou", "", ticks=ticks))] if lines else [],
        "colours": colours,
        "groups": [[run["folder"].name for run in group] for group in groups],
        "differing": {key: list(map(json.dumps, x)) for key, x in differing.items()},
    }


if __name__ == "__main__":
    command(main)
