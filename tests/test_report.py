"""The report: its numbers against results.json and log.jsonl; it needs nothing but itself."""

import json
import re
import shutil
import statistics
from html.parser import HTMLParser

import numpy as np
import yaml
from conftest import CLASSES, ROOT, changed, log, ok, refused
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from engine.images import read_image
from tools.entries import pages
from tools.report import TITLES, read_log


class Page(HTMLParser):
    """Tables as lists of rows of texts, by id or heading; attributes of all tags."""

    def __init__(self, path):
        super().__init__()
        self.tables, self.tags, self.cell = {}, [], False
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag == "table":
            self.rows = self.tables.setdefault(dict(attributes).get("id", len(self.tables)), [])
        elif tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
            self.cell = True

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self.cell = False

    def handle_data(self, data):
        if self.cell:
            self.rows[-1][-1] += data


def one(x):
    return "-" if x is None else f"{x:.1f}"


def test_every_number_is_that_of_the_results_and_the_log(finished):
    page = Page(finished / "report.html")
    check_scores(page, json.loads((finished / "results.json").read_text()))
    check_stages(page, log(finished))
    changed = {row[0]: row[2] for row in page.tables[3][1:]}
    assert changed["warmup.steps"] == "6"
    assert changed["crop"] == "[32, 40]"
    assert "momentum" not in changed

    # nothing but itself: no script, no address; the pictures are inside and described
    text = (finished / "report.html").read_text(encoding="utf-8")
    assert len(text) < 3e6
    assert "<script" not in text
    links = [a.get(key) for _, a in page.tags for key in ("src", "href", "xlink:href")]
    assert all(re.match("data:|#", link) for link in links if link)
    images = [a for tag, a in page.tags if tag == "img"]
    assert len(images) >= 2 * 6 + 3 + 4 + 7
    assert all(a["src"].startswith("data:image/webp;base64,") and a["alt"] for a in images)
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(ids) == len(set(ids))

    # the pictures themselves: the consensus is where both judges agree
    paths = (finished / "samples/selftrain").glob("*.png")
    sample = {path.stem: read_image(path) for path in paths}
    agree = (sample["probability_labels"] == sample["feature_labels"]).all(-1, keepdims=True)
    expected = np.where(agree, sample["probability_labels"], 0)
    np.testing.assert_array_equal(sample["pseudo_labels"], expected)
    colours = {tuple(colour) for colour in sample["truth"].reshape(-1, 3).tolist()}
    assert colours <= {*map(tuple, CLASSES.values()), (0, 0, 0)}
    events = EventAccumulator(str(finished / "tensorboard/warmup"), {"images": 0}).Reload()
    assert [image.step for image in events.Images("warmup/strong_view")] == [4, 6]


def check_scores(page, results):
    """The tables of scores and of classes are those of results.json."""
    low, high = results["source_only"]["miou"], results["oracle"]["miou"]
    head, *rows = page.tables["scores"]
    assert head == ["stage", "mIoU", "pixel accuracy", "teacher's mIoU", "gap closed"]
    for (stage, entry), row in zip(results.items(), rows, strict=True):
        share = 100 * (entry["miou"] - low) / (high - low) if high > low else None
        share = "-" if share is None or stage in ("source_only", "oracle") else f"{share:.0f}%"
        figures = [one(entry.get(key)) for key in ("miou", "pixel_accuracy", "teacher_miou")]
        assert row == [TITLES.get(stage, stage), *figures, share]

    _, *rows = page.tables["classes"]
    stages = ("source_only", "selftrain", "oracle")
    for name, row in zip(CLASSES, rows, strict=True):
        old, new, oracle = (results[stage]["iou"][name] for stage in stages)
        mark = "▲" if new - old > 0.05 else "▼" if new - old < -0.05 else "="
        assert row == [name, one(old), one(new), f"{mark} {new - old:+.1f}", one(oracle)]


def check_stages(page, lines):
    """The table of stages, and what is told of the pseudo-labels, are those of log.jsonl."""
    _, *rows = page.tables["stages"]
    assert len(rows) == 6
    for title, *row in rows:
        stage = next((stage for stage, words in TITLES.items() if words == title), title)
        own = [line for line in lines if line["stage"] == stage]
        steps = [line for line in own if "step" in line and "loss" in line]
        seconds = [line["seconds"] for line in own if "finished" in line][-1]
        memory, last = max(line["memory_gb"] for line in steps), steps[-1]
        expected = [str(last["step"]), one(seconds / 60), one(last["images_per_second"])]
        assert row == [*expected, f"{memory:.2f}", f"{last['loss']:.3f}"]
    last = [line for line in lines if line["stage"] == "selftrain" and "step" in line][-1]
    labels = [a.get("aria-label", "") for _, a in page.tags]
    spoken = next(label for label in labels if "its precision" in label)
    for key, words in (("kept", "kept by the consensus"), ("precision", "its precision")):
        assert f"{words} {100 * last[key]:.1f}%" in spoken


def test_several_runs_with_mean_and_spread(finished, run):
    folders = [finished, finished.parent / "other", finished.parent / "feature"]
    results = json.loads((finished / "results.json").read_text())
    for n, folder in enumerate(folders[1:], 1):
        shutil.copytree(finished, folder)
        for entry in results.values():
            entry["miou"] += n
        (folder / "results.json").write_text(json.dumps(results))
    config = (folders[2] / "config.yaml").read_text()
    (folders[2] / "config.yaml").write_text(config.replace("labels: consensus", "labels: feature"))
    config = (folders[1] / "config.yaml").read_text()
    (folders[1] / "config.yaml").write_text(config.replace("seed: 0", "seed: 1"))
    ok(run("tools.report", *folders))
    page = Page(finished.parent / "comparison.html")
    results = [json.loads((folder / "results.json").read_text()) for folder in folders]
    read = [entry["selftrain"]["miou"] for entry in results]
    row = next(row for row in page.tables[0] if row[0] == "self-training")
    mean, spread = statistics.mean(read[:2]), statistics.stdev(read[:2])
    expected = f"{mean:.1f} ± {spread:.1f}{one(read[0])} {one(read[1])} "
    assert row == ["self-training", expected, one(read[2])]
    assert page.tables[0][0] == ["stage", "test, other", "feature"]
    assert ["selftrain.labels", '"consensus"', '"feature"'] in page.tables[list(page.tables)[-1]]


def test_a_run_without_labels_to_score_with_has_pictures(dataset, run):
    config = (dataset / "test.yaml").read_text()
    (dataset / "test.yaml").write_text(config.replace("road:", "'<script>road':"))
    ids = "{7: <script>road, 26: car, 23: sky, 0: null}"
    given = ("val.root=null", f"source.ids={ids}", "warmup.crdomix=false")
    ok(run("warmup", *given))
    ok(run("evaluate", *given))
    ok(run("tools.report", dataset / "runs/test"))
    text = (dataset / "runs/test/report.html").read_text(encoding="utf-8")
    page = Page(dataset / "runs/test/report.html")
    assert "scores" not in page.tables
    assert sum(tag == "img" for tag, _ in page.tags) == 4 * 2 + 3
    assert "<script" not in text
    assert "&lt;script&gt;road" in text


def test_the_log_of_a_stage_that_went_on_or_began_anew(tmp_path):
    losses = ((2, 9.0), (4, 8.0), (6, 7.0), (4, 8.0))
    lines = [{"stage": "warmup", "step": step, "loss": loss} for step, loss in losses]
    validation = {"stage": "warmup", "step": 4, "val_miou_student": 1.0}
    path = tmp_path / "log.jsonl"
    path.write_text("\n".join(map(json.dumps, [*lines, validation])))
    assert read_log(path) == {"warmup": ([lines[0], lines[3]], None)}
    ended = {"stage": "warmup", "finished": 6, "seconds": 1.0}
    path.write_text("\n".join(map(json.dumps, [*lines, ended])))
    assert read_log(path)["warmup"] == ([lines[0], lines[3]], ended)
    assert read_log(tmp_path / "missing") == {}


def test_what_is_no_run(run):
    refused(run("tools.report", "runs/nothing"), "runs/demo")


def test_a_run_of_a_version_with_fewer_keys(finished, run):
    config = yaml.safe_load((finished / "config.yaml").read_text())
    changed(finished / "warmup.pth", lambda saved: saved["config"].pop("compile"))
    del config["compile"], config["evaluation"]["tile"]
    (finished / "config.yaml").write_text(yaml.safe_dump(config))
    ok(run("evaluate", "--cfg", "", "--weights", finished / "warmup.pth"))
    (finished / "report.html").unlink()
    ok(run("tools.report", finished))
    assert (finished / "report.html").exists()


# ---------------------------------------------------------------- the tables of the docs


def test_every_table_has_the_figures_of_its_runs():
    for path, text in pages(ROOT).items():
        assert path.read_text(encoding="utf-8") == text, f"{path}: python -m tools.entries"
