"""One page about a run that needs nothing but a browser: runs/NAME/report.html. About several runs: comparison.html beside them.

python report.py runs/demo
python report.py runs/demo runs/demo_seed1 runs/demo_seed2      # mean and spread over runs that differ in their seed alone
"""

import argparse
import base64
import io
import json
import re
import statistics
from pathlib import Path

import cv2
import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from config import UserError, classes, load_config, load_saved
from engine import FREE_KEYS, command
from evaluate import STAGES, gallery, what_to_segment
from files import render
from images import read_image, resize

TITLES = {
    "source_only": "source only",
    "warmup": "warm-up",
    "selftrain_round1": "self-training, round 1",
    "selftrain": "self-training",
    "translator": "translation",
}
# what training left in samples/STAGE/, by the words under it
SAMPLES = {
    "From the source to the target": ("translator", ("source_image", "translated", "target_image")),
    "The strong view of the warm-up (CrDoMix)": ("warmup", ("source_image", "translated", "strong_view", "source_labels")),
    "Pseudo-labels, and where their two judges agree": (
        "selftrain",
        ("target_image", "probability_labels", "feature_labels", "pseudo_labels", "truth", "mixed_image", "mixed_labels"),
    ),
}  # fmt: skip
LINES = (
    ("#2f7ed8", "-", "o"),
    ("#c8641a", "--", "s"),
    ("#2e8b57", "-.", "^"),
    ("#9b59b6", ":", "D"),
    ("#808080", "-", "x"),
)
INK = "#010203"  # stands for the page's text colour, which light and dark mode set
STYLE = {
    "font.family": "sans-serif", "font.size": 9, "svg.fonttype": "none", "svg.hashsalt": "report", "axes.grid": True, "grid.alpha": 0.25,
    "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False, "hatch.linewidth": 0.6,
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "grid.color"), INK),
}  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="the folder of a run")
    args = parser.parse_args()
    runs = [read_run(Path(folder)) for folder in args.runs]
    if len(runs) == 1:
        path, page = runs[0]["folder"] / "report.html", about(runs[0])
    else:
        path, page = runs[0]["folder"].parent / "comparison.html", side_by_side(runs)
    render(path, "report.html.jinja", titles=TITLES, **page)
    print(f"report: {path}")


# ---------------------------------------------------------------- what a run left behind


def read_run(folder):
    """A run's folder, config, environment, results (as in results.json) and log: stage -> (lines of its steps, its last line)."""
    config = folder / "config.yaml"
    if not config.is_file():
        raise UserError(f"{config}: is missing; give the folder of a run, such as runs/demo")
    try:
        environment, results = ({} if not (folder / name).is_file() else json.loads((folder / name).read_text(encoding="utf-8"))
                                for name in ("environment.json", "results.json"))  # fmt: skip
        log = read_log(folder / "log.jsonl")
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder}: its log or its results cannot be read ({error})") from error
    return {
        "folder": folder,
        "config": load_saved(config, (), config),
        "environment": environment,
        "results": results,
        "log": log,
    }


def read_log(path):
    """log.jsonl by stage: (lines of the steps in order, the line that finished it, or None)."""
    log = {}
    for line in map(json.loads, path.read_text(encoding="utf-8").splitlines() if path.is_file() else ()):
        steps, finished = log.get(line["stage"], ([], None))
        if "finished" in line:
            finished = line
        elif "loss" in line:  # a stage that went on from a checkpoint, or began anew, repeats what comes after
            steps, finished = [*(old for old in steps if old["step"] < line["step"]), line], None
        log[line["stage"]] = (steps, finished)
    order = ["source_only", "translator", *STAGES]
    return dict(sorted(log.items(), key=lambda item: order.index(item[0]) if item[0] in order else len(order)))


def gap_closed(results, stage):
    """The share of the way from source_only's mIoU to the oracle's that a stage has gone, in percent; None without either."""
    if not {"source_only", "oracle"} <= results.keys() or stage in ("source_only", "oracle"):
        return None
    low, high = (results[name]["miou"] for name in ("source_only", "oracle"))
    return 100 * (results[stage]["miou"] - low) / (high - low) if high > low else None


def flat(config, prefix=""):
    """A configuration as key.sub -> value; classes and ids stay whole."""
    values = {}
    for key, value in config.items():
        nested = isinstance(value, dict) and key not in ("classes", "ids", "subsets")
        values |= flat(value, f"{prefix}{key}.") if nested else {prefix + key: value}
    return values


# ---------------------------------------------------------------- the page of one run


def about(run):
    results, log, names = run["results"], run["log"], list(classes(run["config"]))
    own = {stage: entry for stage, entry in results.items() if entry["dataset"] == "val"}
    adapted = [stage for stage in STAGES if stage in own and stage != "oracle"]
    before, after = (adapted[0], adapted[-1]) if len(adapted) > 1 else (None, None)
    defaults = flat(load_config(Path(__file__).parent / "config.yaml"))
    return {
        "name": run["folder"].name,
        "results": results,
        "means": sorted({key for entry in results.values() for key in entry if key.startswith("miou_")}),
        "gaps": {stage: gap_closed(own, stage) for stage in own},
        "before": before,
        "after": after,
        "ious": [(name, *(own[stage]["iou"].get(name) for stage in (before, after))) for name in names] if before else [],
        "oracle": own.get("oracle"),
        "colours": {name: "#" + bytes(colour).hex() for name, colour in classes(run["config"]).items()},
        "charts": list(filter(None, (scores_chart(own), *curves(log)))),
        "gallery": pictures(run),
        "samples": samples(run),
        "stages": {stage: (steps, finished) for stage, (steps, finished) in log.items() if steps},
        "changed": [(k, json.dumps(defaults.get(k)), json.dumps(v)) for k, v in flat(run["config"]).items() if defaults.get(k) != v],
        "environment": run["environment"],
        "comparison": None,
    }  # fmt: skip


def scores_chart(results):
    if not results:
        return None
    figure = Figure((4.4, 0.6 + 0.42 * len(results)), layout="constrained")
    axes = figure.add_subplot()
    for row, (stage, entry) in enumerate(results.items()):
        reference = stage in ("source_only", "oracle")
        axes.barh(row, entry["miou"], color=LINES[4 if reference else 0][0], hatch="///" if reference else None)
        gap = gap_closed(results, stage)
        words = f" {entry['miou']:.1f}" + (f" ({gap:.0f}%)" if gap is not None else "")
        axes.text(entry["miou"], row, words, va="center")
    for stage in sorted({"source_only", "oracle"} & results.keys()):  # in one order, whatever the hashes
        axes.axvline(results[stage]["miou"], color=INK, linewidth=0.8, linestyle=":")
    axes.set_yticks(range(len(results)), [TITLES.get(stage, stage) for stage in results])
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set_xlim(0, 1.3 * max(entry["miou"] for entry in results.values()))
    axes.set_xlabel("mIoU (share of the gap closed)" if "oracle" in results else "mIoU")
    words = ", ".join(f"{TITLES.get(stage, stage)} {entry['miou']:.1f}" for stage, entry in results.items())
    return "mIoU of each stage", f"Bar chart: mIoU of {words}.", svg(figure, "scores")


def curves(log):
    """Loss and learning rate by stage, and what became of the pseudo-labels over all rounds."""
    trained = {stage: steps for stage, (steps, _) in log.items() if steps and stage != "translator"}
    for key, title in (("loss", "Loss"), ("lr", "Learning rate of the backbone")):
        if trained:
            lines = {
                TITLES.get(s, s): ([x["step"] for x in steps], [x[key] for x in steps]) for s, steps in trained.items()
            }
            yield title, f"Line chart over the steps of each stage: {', '.join(lines)}.", line_chart(lines, key)
    rounds = [line for stage, steps in trained.items() if stage.startswith("selftrain") for line in steps]
    shares = {
        "kept": "kept by the consensus",
        "precision": "its precision",
        "probability_accuracy": "accuracy of probability labels",
    }
    lines = {words: (range(1, len(rounds) + 1), [100 * line[key] for line in rounds])
             for key, words in shares.items() if rounds and key in rounds[0]}  # fmt: skip
    if lines:
        words = ", ".join(f"{name} {values[-1]:.1f}%" for name, (_, values) in lines.items())
        yield (
            "Pseudo-labels",
            f"Line chart over all rounds of self-training; at its end: {words}.",
            line_chart(lines, "rounds"),
        )


def line_chart(lines, name):
    figure = Figure((4.4, 2.8), layout="constrained")
    axes = figure.add_subplot()
    for (label, (x, y)), (colour, style, marker) in zip(
        lines.items(), LINES * (len(lines) // len(LINES) + 1), strict=False
    ):
        axes.plot(
            x, y, label=label, color=colour, linestyle=style, marker=marker, markevery=max(len(x) // 6, 1), markersize=4
        )
    axes.set_xlabel("line of the log, through all rounds" if name == "rounds" else "step")
    if name == "rounds":
        axes.set_ylabel("% of the pixels")
    figure.legend(loc="outside lower center", ncols=2)
    return svg(figure, name)


def svg(figure, name):
    """A figure as inline SVG: in the page's text colour, with ids of its own, without size, so that it fits where it stands."""
    file, nothing = io.StringIO(), dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(file, format="svg", transparent=True, metadata=nothing)
    text = file.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    text = re.sub(r'(id="|url\(#|href="#)', rf"\g<1>{name}-", text)
    for side in ("width", "height"):
        text = re.sub(rf'(<svg [^>]*?) {side}="[^"]*"', r"\1", text, count=1)
    return text


# ---------------------------------------------------------------- pictures


def pictures(run, rows=4):
    """Rows of tiles: an image, what each stage makes of it, and its label if it has one."""
    cfg, made = run["config"], run["folder"] / "predictions"
    stages = [stage for stage in STAGES if (made / stage).is_dir() and stage != "selftrain_round1"]
    try:
        whole = next(iter(what_to_segment(cfg).values())) if stages else None
    except UserError:  # the images have been moved since
        return []
    shown = gallery(run["folder"], whole, stages, cfg, rows) if stages else ()
    return [[tile(TITLES.get(t, t), picture, t != "image", cfg) for t, picture in tiles] for tiles in shown]


def samples(run):
    """Rows of tiles by their titles: what training saw last."""
    rows = {}
    for title, (stage, names) in SAMPLES.items():
        paths = [run["folder"] / "samples" / stage / f"{name}.png" for name in names]
        rows[title] = [tile(path.stem.replace("_", " "), read_image(path), "label" in path.stem, run["config"])
                       for path in paths if path.is_file()]  # fmt: skip
    return {title: tiles for title, tiles in rows.items() if tiles}


def tile(title, picture, painted, cfg):
    """(title, what it shows in words, picture as a data URI)."""
    return title, in_words(picture, cfg), embedded(picture, painted)


def in_words(picture, cfg):
    """The four classes that fill most of a painted label map; empty for a photograph."""
    values, counts = np.unique(picture.reshape(-1, 3), axis=0, return_counts=True)
    names = {tuple(colour): name for name, colour in classes(cfg).items()} | {(0, 0, 0): "none"}
    if len(values) > len(names):
        return ""
    shares = sorted(zip(counts / counts.sum(), map(tuple, values.tolist()), strict=True), reverse=True)[:4]
    return ", ".join(f"{names.get(colour, 'other')} {share:.0%}" for share, colour in shares)


def embedded(picture, painted, width=320):
    """A picture (H, W, 3) as a data URI, at most `width` wide; painted label maps without loss."""
    width = min(width, picture.shape[1])
    picture = resize(picture, (round(width * picture.shape[0] / picture.shape[1]), width), labels=painted)
    _, data = cv2.imencode(".webp", picture[..., ::-1], [cv2.IMWRITE_WEBP_QUALITY, 101 if painted else 80])
    return "data:image/webp;base64," + base64.b64encode(data).decode()


# ---------------------------------------------------------------- the page of several runs


def side_by_side(runs):
    groups = {}
    for run in runs:
        settings = {k: v for k, v in flat(run["config"]).items() if k.split(".")[0] not in FREE_KEYS | {"seed"}}
        groups.setdefault(json.dumps(settings), []).append(run)
    settings = [json.loads(key) for key in groups]
    there = dict.fromkeys(stage for run in runs for stage in run["results"])
    stages = sorted(there, key=[*STAGES, *there].index)
    names = dict.fromkeys(name for run in runs for name in classes(run["config"]))

    def figures(read):
        """Per group: mean, spread (None for one run), and the figures of its runs."""
        for group in groups.values():
            values = [x for x in map(read, group) if x is not None]
            spread = statistics.stdev(values) if len(values) > 1 else None
            yield statistics.mean(values) if values else None, spread, values

    last = next((s for s in ("selftrain", "warmup", "source_only") if any(s in r["results"] for r in runs)), None)
    rows = {"miou": {s: list(figures(lambda r, s=s: r["results"].get(s, {}).get("miou"))) for s in stages}}
    rows["gap"] = {
        s: list(figures(lambda r, s=s: gap_closed(r["results"], s) if s in r["results"] else None)) for s in stages
    }
    rows["iou"] = {n: list(figures(lambda r, n=n: r["results"].get(last, {}).get("iou", {}).get(n))) for n in names}
    keys = [key for key in settings[0] | settings[-1] if len({json.dumps(s.get(key)) for s in settings}) > 1]
    return {
        "name": "Runs side by side",
        "comparison": rows,
        "groups": [[run["folder"].name for run in group] for group in groups.values()],
        "last": last,
        "differing": [(key, [json.dumps(s.get(key)) for s in settings]) for key in keys],
    }


mpl.rcParams.update(STYLE)

if __name__ == "__main__":
    command(main)
