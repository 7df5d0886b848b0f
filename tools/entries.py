"""Keep what runs were and what they scored in docs/results/; write the tables of the docs from it.

    python -m tools.entries runs/demo runs/demo_seed1     # adds entries, or replaces those so named
    python -m tools.entries                               # writes the tables alone

A table stands below a line `<!-- entries: HEAD=NAME,NAME ... -->`, with a column for each head: the
mean and the deviation of the entries so named. Below `<!-- entries: all -->` each has a line.
"""

import re
from pathlib import Path

from engine.command import Parser, command
from engine.files import write_text
from evaluate import STAGES
from tools.runs import REFERENCES, gap_closed, in_words, read_run, summary, title

ROOT = Path(__file__).parent.parent
KEPT = ("config.yaml", "environment.json", "results.json", "log.jsonl")
PAGES = ("README.md", "docs/results.md")
MARK = re.compile(r"(<!-- entries: (.+) -->\n)(?:\n?\|.*\n)*")
HEAD = "entry|data|network|source only|warm-up|self-training|oracle|closed|hours|commit"


def main():
    parser = Parser(__doc__)
    parser.add_argument("runs", nargs="*", metavar="RUN", help="the folder of a finished run")
    for folder in map(Path, parser.parse_args().runs):
        read_run(folder)  # is it complete?
        for name in KEPT:
            text = (folder / name).read_text(encoding="utf-8")
            write_text(ROOT / "docs/results" / folder.name / name, text)
    for path, text in pages(ROOT).items():
        write_text(path, text)


def pages(root):
    """Return path -> text of the pages that hold tables, with tables from the entries' files."""
    folders = sorted(path.parent for path in (root / "docs/results").glob("*/config.yaml"))
    entries = {folder.name: read_run(folder) for folder in folders}

    def table(found):
        if found[2] == "all":
            head, *rows = HEAD.split("|"), *map(line, entries.values())
        else:
            groups = dict(group.split("=") for group in found[2].split())
            groups = {x: [entries[y] for y in names.split(",")] for x, names in groups.items()}
            head, *rows = stages(groups)
        rows = [head, ["---"] * len(head), *rows]
        return found[1] + "\n" + "".join(f"| {' | '.join(row)} |\n" for row in rows)

    paths = (root / page for page in PAGES)
    return {path: MARK.sub(table, path.read_text(encoding="utf-8")) for path in paths}


def figures(runs, stages):
    """Return the texts of the stages' mIoU, with those of the subsets, and of the closed gap."""
    texts = []
    for stage in stages:
        scores = [run["results"].get(stage, {}) for run in runs]
        keys = ["miou", *sorted({k for x in scores for k in x if k.startswith("miou_")})]
        mean, *subsets = (in_words(*summary([x.get(k) for x in scores])) for k in keys)
        texts.append(mean + "".join(f" ({x})" for x in subsets))
    gap = summary([gap_closed(run["results"], "selftrain") for run in runs])[0]
    return [*texts, "-" if gap is None else f"{gap:.0f}%"]


def stages(groups):
    """Return rows of the stages' mIoU, a column for each group of runs."""
    there = {stage for runs in groups.values() for run in runs for stage in run["results"]}
    there = [stage for stage in STAGES if stage in there]
    names = ["DiGA, " * s.startswith(("warmup", "selftrain")) + title(s) for s in there]
    columns = [["mIoU", *names, "share of the gap that is closed"]]
    columns += [[x.replace("_", " "), *figures(runs, there)] for x, runs in groups.items()]
    rows = list(zip(*columns, strict=True))
    return rows if {*REFERENCES} <= {*there} else rows[:-1]


def line(run):
    """Return a run's row in the list of all entries; hours are those of all its stages."""
    cfg, commit = run["config"], run["environment"].get("commit") or "-"
    hours = sum(end.get("seconds") or 0 for _, end in run["log"].values() if end) / 3600
    data = f"{cfg.source.root} → {cfg.target.root}".replace("data/", "")
    scores = figures([run], ("source_only", "warmup", "selftrain", "oracle"))
    link = f"[{run['folder'].name}](results/{run['folder'].name})"
    return [link, data, cfg.model.network, *scores, f"{hours:.1f}", commit[:9]]


if __name__ == "__main__":
    command(main)
