"""Keep what runs were and what they scored in docs/results/; write the tables of the docs from it.

    python -m tools.entries runs/demo runs/demo_seed1     # adds entries, or replaces those so named
    python -m tools.entries                               # writes the tables alone

A table stands below a line `<!-- entries: NAME ... -->`, with a column for each name; below
`<!-- entries: all -->` it has a line for each entry.
"""

import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # to be run by its path too

from engine.command import Parser, command
from engine.config import UserError
from engine.files import write_text
from evaluate import STAGES
from tools.runs import REFERENCES, gap_closed, read_run, title

ROOT = Path(__file__).parent.parent
KEPT = ("config.yaml", "environment.json", "results.json", "log.jsonl")
PAGES = ("README.md", "docs/results.md")
MARK = re.compile(r"(<!-- entries: (.+) -->\n)(?:\n?\|.*\n)*")
COLUMNS = ("entry", "source → target", "network", "source only", "warm-up", "self-training")
COLUMNS += ("oracle", "closed", "hours", "commit")


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
            rows = [COLUMNS, ["---"] * len(COLUMNS), *map(line, entries.values())]
        else:
            names = found[2].split()
            if unknown := {*names} - {*entries}:
                raise UserError(f"docs/results has no entry {min(unknown)}, which a table names")
            rows = stages([entries[name] for name in names])
        return found[1] + "\n" + "".join(f"| {' | '.join(row)} |\n" for row in rows)

    paths = (root / page for page in PAGES)
    return {path: MARK.sub(table, path.read_text(encoding="utf-8")) for path in paths}


def figure(run, stage):
    """Return a stage's mIoU, and in brackets those of cfg.evaluation.subsets; or the gap closed."""
    if stage == "gap":
        gap = gap_closed(run["results"], "selftrain")
        return "-" if gap is None else f"{gap:.0f}%"
    scores = run["results"].get(stage, {})
    if scores.get("miou") is None:
        return "-"
    subsets = [f"({value:.1f})" for key, value in scores.items() if key.startswith("miou_")]
    return " ".join([f"{scores['miou']:.1f}", *subsets])


def stages(runs):
    """Return rows of the stages' mIoU, a column for each run, named by its seed or its name."""
    heads = [f"seed {run['config'].seed}" for run in runs]
    if len(set(heads)) < len(runs):
        heads = [run["folder"].name for run in runs]
    rows = [["mIoU", *heads], ["---"] * (len(runs) + 1)]
    there = [s for s in STAGES if any(s in run["results"] for run in runs)]
    for stage in there:
        method = "DiGA, " if stage.startswith(("warmup", "selftrain")) else ""
        rows.append([method + title(stage), *(figure(run, stage) for run in runs)])
    if set(REFERENCES) <= set(there):
        rows.append(["share of the gap that is closed", *(figure(run, "gap") for run in runs)])
    return rows


def line(run):
    """Return a run's row in the list of all entries; hours are those of all its stages."""
    cfg, commit = run["config"], run["environment"].get("commit") or "-"
    hours = sum(end.get("seconds") or 0 for _, end in run["log"].values() if end) / 3600
    data = f"{cfg.source.root} → {cfg.target.root}".replace("data/", "")
    scores = [figure(run, s) for s in ("source_only", "warmup", "selftrain", "oracle", "gap")]
    name = run["folder"].name
    link = f"[{name}](results/{name})"
    return [link, data, cfg.model.network, *scores, f"{hours:.1f}", commit[:9]]


if __name__ == "__main__":
    command(main)
