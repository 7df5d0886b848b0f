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
from engine.config import UserError, flat, one_line
from engine.images import paint, read_image, resize, threads
from evaluate import STAGES, advice, judged
from layouts import classes
from settings import DEFAULTS, WHOLE, load_config
from tools.runs import gap_closed, in_order, print_table, read_run, settings_of, title
from tools.templates import render

PAINTED = ("labels", "prediction", "truth")  # ends of the names of pictures of classes
SHARES = ("kept", "precision", "probability_accuracy")  # keys of the log, of pseudo-labels
# stages whose losses are the sums of the same terms: one chart
COMPARABLE = ("source_only|source_strong|oracle", "dacs|daformer", r"selftrain(_round\d+)?")
COLOURS = ("#2f7ed8", "#c8641a", "#2e8b57", "#9b59b6", "#808080")
LINES = mpl.cycler(color=COLOURS, marker=list("os^Dx"), linestyle=["-", "--", "-.", ":", "-"])
INK = "#010203"  # replaced by the page's text colour, which light and dark mode set
INKED = "text.color axes.labelcolor axes.edgecolor xtick.color ytick.color grid.color"
mpl.rcParams.update({
    "font.family": "sans-serif", "font.size": 9, "svg.fonttype": "none", "svg.hashsalt": "report",
    "axes.grid": True, "grid.alpha": 0.25, "axes.spines.top": False, "axes.spines.right": False,
    "legend.frameon": False, "lines.markersize": 4, "errorbar.capsize": 3,
    "axes.prop_cycle": LINES, **dict.fromkeys(INKED.split(), INK),
})  # fmt: skip


def main():
    parser = Parser(__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="the folder of a run")
    parser.add_argument("--format", choices=("md", "latex"), help="print a table instead")
    args = parser.parse_args()
    runs = [read_run(Path(folder)) for folder in args.runs]
    if args.format:
        print_table(runs, args.format)
        return
    folder = runs[0]["folder"]
    path = folder / "report.html" if len(runs) == 1 else folder.parent / "comparison.html"
    page = about(runs[0]) if len(runs) == 1 else side_by_side(runs)
    render(path, "report.html.jinja", title=title, **page)
    print(f"report: {path}")


def about(run):
    """Return the template's values for one run."""
    cfg, log, folder = run["config"], run["log"], run["folder"]
    results = {k: x for k, x in run["results"].items() if x["iou"] or x["miou"] is not None}
    own = {stage: entry for stage, entry in results.items() if entry["dataset"] == "val"}
    scored = [s for s in STAGES if s in own and s != "oracle" and own[s]["miou"] is not None]
    trained = [s for s in STAGES if s != "oracle" and (folder / f"{s}.pth").is_file()]
    best = judged(run["results"])[0] or (trained[-1] if trained else None)
    if scored:
        best = max(scored, key=lambda stage: own[stage]["miou"])
    values, defaults = (flat(x, WHOLE) for x in (cfg, load_config(DEFAULTS)))
    changed = [key for key, value in values.items() if defaults.get(key) != value]
    stages = {stage: x for stage, x in log.items() if x[0]}
    ends = [end for _, end in log.values() if end]
    data = datasets_of(cfg)
    return run | {
        "name": folder.name,
        "dates": sorted({end["date"] for end in ends if "date" in end}),
        "hours": sum(end.get("seconds") or 0 for end in ends) / 3600,
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
        "charts": list(curves(stages)),
        "pictures": gallery(run, data["val" if cfg.val.root else "target"][0]) | samples(run),
        "stages": stages,
        "changed": [(key, one_line(defaults.get(key)), one_line(values[key])) for key in changed],
    }


def datasets_of(cfg, some=32):
    """Return name -> (Images or None, root, {size: images}, {class: percent of the labels}).

    Sizes and shares are those of `some` evenly spaced files.
    """
    specs = {"source": cfg.source, "target": cfg.target, "val": cfg.val}
    specs |= {f"more_val.{name}": spec for name, spec in cfg.more_val.items()}
    data = {key: (None, x.root, collections.Counter(), {}) for key, x in specs.items() if x.root}
    for key in data:
        with contextlib.suppress(UserError):  # the images have been moved since
            images = Images(cfg, key, labelled=key != "target")
            few = np.unique(np.linspace(0, len(images) - 1, some, dtype=int)).tolist()
            shapes, _, counts, _ = zip(*threads.map(images.summary, few), strict=True)
            counts = np.sum(counts, axis=0)[: len(classes(cfg))]
            percent = zip(classes(cfg), 100 * counts / max(counts.sum(), 1), strict=True)
            percent = dict(percent) if images.labelled else {}
            data[key] = (images, images.folder, collections.Counter(shapes), percent)
    return data


def curves(log):
    """Yield (title, description, SVG) of the losses and the pseudo-labels."""
    losses = {}
    shares = {}
    before = 0  # steps of the rounds before
    for stage, (steps, _) in log.items():
        kind = next((names for names in COMPARABLE if re.fullmatch(names, stage)), stage)
        losses.setdefault(kind, {})[title(stage)] = [(x["step"], x["loss"]) for x in steps]
        for key in SHARES if stage.startswith("selftrain") else ():
            points = [(before + x["step"], 100 * x[key]) for x in steps if key in x]
            shares |= {key: shares.get(key, []) + points} if points else {}
        before += steps[-1]["step"] if stage.startswith("selftrain") else 0
    for k, lines in enumerate(losses.values()):
        yield f"Loss: {', '.join(lines)}", *line_chart(lines, f"loss{k}", "step")
    if shares:
        axes = ("step, through all rounds", "% of the pixels")
        yield "Pseudo-labels", *line_chart(shares, "shares", *axes, top=100)


def line_chart(lines, name, across, up="", top=None, ticks=None):
    """Return (description, SVG) of lines: label -> [(x, y), ...], or [(x, y, error), ...].

    The SVG has the page's text colour. name: makes its ids unique. across, up: the words at the
    axes. top: the end of the vertical axis, which begins at 0.
    """
    figure = Figure((8, 3.4) if ticks else (4.4, 2.8), layout="constrained")
    axes = figure.add_subplot(xlabel=across, ylabel=up)
    for label, points in lines.items():
        every = max(len(points) // 6, 1)
        axes.errorbar(*zip(*points, strict=True), label=label, markevery=every)
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
    """Return heading -> [("", tiles)]: the last pictures that each stage showed, in their order."""
    rows = {}
    for stage in in_order(path.name for path in (run["folder"] / "samples").glob("*")):
        paths = (run["folder"] / "samples" / stage).glob("*.png")
        paths = sorted(paths, key=lambda path: path.stat().st_mtime_ns)
        named = [(path, path.stem.replace("_", " ")) for path in paths]
        tiles = [tile(x, read_image(path), x.endswith(PAINTED)) for path, x in named]
        rows[f"The last step: {title(stage)}"] = [("", tiles)]
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
    names = [[run["folder"].name for run in group] for group in groups]
    colours = {name: rgb for run in runs for name, rgb in classes(run["config"]).items()}
    stages = in_order(stage for table in found for stage in table)
    last = next((s for s in ("selftrain", "warmup", "source_only") if s in stages), "-")

    def rows(keys):
        """Return name -> the summary of each group, of all (name, stage, figure) with a figure."""
        none = (None, None, [])
        rows = {x: [t.get(stage, {}).get(key, none) for t in found] for x, stage, key in keys}
        return {name: row for name, row in rows.items() if any(figures for *_, figures in row)}

    tables = {
        "mIoU": ("stage", rows((title(s), s, "mIoU") for s in stages)),
        "Percent of the gap closed": ("stage", rows((title(s), s, "gap closed") for s in stages)),
        f"IoU by class: {title(last)}": ("class", rows((name, last, name) for name in colours)),
    }
    lines = {}
    for k, group in enumerate(names):
        cells = [(x, *row[k]) for x, row in enumerate(tables["mIoU"][1].values())]
        points = [(x, mean, spread or 0) for x, mean, spread, _ in cells if mean is not None]
        more = f" and {len(group) - 1} more" if len(group) > 1 else ""
        lines |= {group[0] + more: points} if points else {}
    ticks = [re.sub(r" (\(|round)", r"\n\1", words) for words in tables["mIoU"][1]]
    values = {key: [x.get(key) for x in settings] for x in settings for key in x}
    return {
        "name": "Runs side by side",
        "tables": {heading: table for heading, table in tables.items() if table[1]},
        "charts": [("mIoU", *line_chart(lines, "miou", "", ticks=ticks))] if lines else [],
        "colours": colours,
        "groups": names,
        "differing": {k: [*map(one_line, x)] for k, x in values.items() if x.count(x[0]) < len(x)},
    }


if __name__ == "__main__":
    command(main)
