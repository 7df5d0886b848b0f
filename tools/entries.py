"""Keep what runs were and what they scored in docs/results/; write the tables of the docs from it.

    python -m tools.entries runs/demo runs/demo_seed1     # adds entries, or replaces those so named
    python -m tools.entries                               # writes the tables alone

A table stands below a line `<!-- entries: NAME ... -->`, with a column for each name; below
`<!-- entries: all -->` it has a line for each entry.
"""

import re
from pathlib import Path

from engine.command import Parser, command
from engine.files import write_text
from evaluate import STAGES
from tools.runs import REFERENCES, gap_closed, read_run, title

ROOT = Path(__file__).parent.parent
KEPT = ("config.yaml", "environment.json", "results.json", "log.jsonl")
PAGES = ("README.md", "docs/results.md")
MARK = re.compile(r"(<!-- entries: (.+) -->\n)(?:\n?\|.*\n)*")
HEADS = "entry|source → target|network|source only|warm-up|self-training|oracle|closed|hours|commit"


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
            head, *rows = HEADS.split("|"), *map(line, entries.values())
        else:
            head, *rows = stages([entries[name] for name in found[2].split()])
        rows = [head, ["---"] * len(head), *rows]
        return found[1] + "\n" + "".join(f"| {' | '.join(row)} |\n" for row in rows)

    paths = (root / page for page in PAGES)
    return {path: MARK.sub(table, path.read_text(encoding="utf-8")) for path in paths}


def figures(run, stages):
    """Return the texts of the stages' mIoU, with those of the subsets, and of the closed gap."""
    texts = []
    for scores in (run["results"].get(stage, {}) for stage in stages):
        subsets = (f" ({x:.1f})" for key, x in scores.items() if key.startswith("miou_"))
        miou = scores.get("miou")
        texts.append("-" if miou is None else f"{miou:.1f}{''.join(subsets)}")
    gap = gap_closed(run["results"], "selftrain")
    return [*texts, "-" if gap is None else f"{gap:.0f}%"]


def stages(runs):
    """Return rows of the stages' mIoU, a column for each run."""
    there = [s for s in STAGES if any(s in run["results"] for run in runs)]
    names = ["DiGA, " * s.startswith(("warmup", "selftrain")) + title(s) for s in there]
    columns = [["mIoU", *names, "share of the gap that is closed"]]
    columns += [[run["folder"].name, *figures(run, there)] for run in runs]
    rows = list(zip(*columns, strict=True))
    return rows if {*REFERENCES} <= {*there} else rows[:-1]


def line(run):
    """Return a run's row in the list of all entries; hours are those of all its stages."""
    cfg, commit = run["config"], run["environment"].get("commit") or "-"
    hours = sum(end.get("seconds") or 0 for _, end in run["log"].values() if end) / 3600
    data = f"{cfg.source.root} → {cfg.target.root}".replace("data/", "")
    scores = figures(run, ("source_only", "warmup", "selftrain", "oracle"))
    link = f"[{run['folder'].name}](results/{run['folder'].name})"
    return [link, data, cfg.model.network, *scores, f"{hours:.1f}", commit[:9]]


if __name__ == "__main__":
    command(main)
