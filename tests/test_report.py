"""The report, tables for papers and for the docs: their numbers against the files of runs."""

import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
import yaml
from conftest import CLASSES, ROOT, log, main, make_data, save
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from engine.config import plain
from engine.images import read_image
from engine.log import Figures
from settings import load_config
from tools.entries import pages
from tools.runs import read_log, title

SCORES = {"source_only": 30.0, "warmup": 50.0, "selftrain": 60.0, "oracle": 70.0}


class Page(HTMLParser):
    """A page's text, and its tables by id or number. Raises AssertionError for wrong HTML."""

    def __init__(self, path):
        super().__init__()
        self.text = path.read_text(encoding="utf-8")
        self.open, self.tables = [], {}
        self.feed(self.text)
        assert self.open == []
        ids = re.findall(' id="(.*?)"', self.text)
        links = re.findall('(?:src|href)="(.*?)"', self.text)
        assert len(ids) == len(set(ids))
        assert all(link.startswith("data:") or link[1:] in ids for link in links)  # no address
        assert "<script" not in self.text
        tables = re.findall('<table(?: id="(.*?)")?(.*?)</table>', self.text, re.DOTALL)
        for k, (name, table) in enumerate(tables):
            rows = (re.findall("<t[hd].*?</t[hd]>", row) for row in table.split("<tr")[1:])
            self.tables[name or k] = [[re.sub("<.*?>", "", x) for x in row] for row in rows]

    def handle_starttag(self, tag, attributes):
        if tag not in ("meta", "link", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture
def made(tmp_path, monkeypatch):
    """made(name, scores, key=value, ...) writes the files of a finished run; returns its folder."""
    monkeypatch.chdir(tmp_path)
    make_data(tmp_path)

    def make(name, scores, *overrides):
        folder, results, lines = tmp_path / "runs" / name, {}, []
        for k, (stage, miou) in enumerate(scores.items()):
            scored = {"miou": miou, "pixel_accuracy": 80.0, "teacher_miou": 49.0}
            scored["iou"] = dict(zip(CLASSES, (miou, None, 9.0), strict=True))
            results[stage] = {"information": 70.0 + k} | (scored if miou else {})
            step = {"step": 6, "loss": 2.0 - k / 4, "lr": 1e-3, "memory_gb": 1.5, "kept": 0.9}
            lines.append({"stage": stage, "images_per_second": 9, **step})
            lines.append({"stage": stage, "finished": 6, "seconds": 24.0, "date": "2030-01-02"})
            for i in (4, 5):  # nothing is known of image 5
                label = read_image(tmp_path / f"camera/gtFine/val/b/b_{i}_gtFine_labelIds.png")
                painted = np.zeros_like(label)
                painted[label[..., 0] == (7 if i == 4 else 1)] = CLASSES["road"]
                save(folder / f"predictions/{stage}/b/b_{i}_leftImg8bit.png", painted)
        config = plain(load_config("test.yaml", [f"name={name}", *overrides]))
        del config["compile"], config["evaluation"]["pictures"]  # as of an older version
        (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
        (folder / "results.json").write_text(json.dumps(results))
        (folder / "log.jsonl").write_text("\n".join(map(json.dumps, lines)) + '\n{"stage": "wa')
        return folder

    return make


def test_a_run_with_labels(made):
    folder = made("one", SCORES)
    main("tools.report", folder)
    page = Page(folder / "report.html")
    assert page.tables["scores"][2] == ["warm-up", "50.0", "80.0", "49.0", "50%"]
    assert page.tables["classes"][1][1:] == ["30.0", "60.0", "▲ +30.0", "70.0"]
    assert page.tables["classes"][2][1:] == ["-"] * 4
    assert page.tables["stages"][2] == ["warm-up", "6", "0.4", "9.0", "1.50", "1.750"]
    assert page.tables["data"][2] == ["target", "camera/leftImg8bit/train", "4", "64 \u00d7 48"]
    assert sum(float(row[1]) for row in page.tables["shares"][1:]) == pytest.approx(100, abs=0.1)
    for words in ("2030-01-02; 2 minutes", "runs/one/selftrain.pth", "The warm-up has 6 steps"):
        assert words in page.text
    assert "Without labels" not in page.text
    losses = re.findall("<h3>Loss: (.*?)</h3>", page.text)
    assert losses == ["source only, oracle", "warm-up", "self-training"]
    files = re.findall('<p class="file">b/b_(.*?)_.*accuracy (.*?)%', page.text)
    assert [name for name, _ in files] == ["4", "5", "5", "4"]  # evenly chosen, the lowest first
    assert files[1][1] == "0"
    assert len(re.findall('<img src="data:image/webp;base64,[^"]*" alt="[^"]', page.text)) == 4 * 6


def test_several_runs_and_their_tables(made, capsys):
    runs = [made("one", SCORES)]
    runs.append(made("two", SCORES | {"selftrain": 64.0}, "seed=1", "translation.images=x"))
    runs.append(made("odd_one", {"selftrain": 61.0}, "selftrain.labels=feature"))
    main("tools.report", *runs)
    page = Page(runs[0].parent / "comparison.html")
    assert page.tables[0][0] == ["stage", "one, two", "odd_one"]
    assert page.tables[0][3] == ["self-training", "62.0 ± 2.860.0 64.0 ", "61.0"]
    assert page.tables[3][1:] == [["selftrain.labels", "consensus", "feature"]]
    assert (page.text.count("rgb("), page.text.count("<svg")) == (2, 1)  # two classes have scores
    tables = {}
    for form in ("md", "latex"):
        capsys.readouterr()
        main("tools.report", *runs, "--format", form)
        tables[form] = capsys.readouterr().out.splitlines()
    assert tables["md"][4].startswith("| one | self-training | 2 | 62.0 ± 2.8 | - | 9.0 ± 0.0 |")
    assert tables["latex"][-3] == r"odd\_one & self-training & 1 & 61.0 & - & 9.0 & 61.0 & - \\"
    assert tables["latex"][6].endswith(r" & 62.0 $\pm$ 2.8 & 80.0 $\pm$ 7.1 \\")


def test_the_log_of_a_stage_that_went_on_or_was_cut_off(tmp_path):
    lines = [{"stage": "warmup", "step": step, "loss": 9 - step} for step in (2, 4, 6, 4)]
    path = tmp_path / "log.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)) + '\n{"stage": "warmup", "fini')
    assert read_log(path) == {"warmup": ([lines[0], lines[3]], None)}


def test_what_a_stage_logs(tmp_path, capsys):
    figures = Figures(tmp_path, "warmup", torch.device("cpu"))
    figures.start(0, 1, 2)
    figures.add(loss=torch.tensor(3.0))
    figures.done = 1
    figures.advance(True)
    figures.finish("warmup.pth")
    assert "0.0 min left" in capsys.readouterr().out
    assert log(tmp_path)[-1]["date"].startswith("20")
    events = EventAccumulator(str(tmp_path / "tensorboard/warmup")).Reload()
    assert events.Tags()["scalars"] == ["loss"]


def test_the_tables_of_the_docs_and_names():
    for path, text in pages(ROOT).items():
        assert path.read_text(encoding="utf-8") == text, f"{path}: python -m tools.entries"
    assert title("selftrain_round2_on_night") == "self-training round 2 on night"
