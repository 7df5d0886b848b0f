"""The tables of the docs against the files that the runs left."""

import json
import shutil

from conftest import ROOT

from tools.entries import agreements, pages


def test_every_table_has_the_figures_of_its_runs():
    for path, text in pages(ROOT).items():
        assert path.read_text(encoding="utf-8") == text, f"{path}: python -m tools.entries"


def test_a_changed_figure_is_found(tmp_path):
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    shutil.copy(ROOT / "README.md", tmp_path)
    entry = next(iter(sorted((tmp_path / "docs/results").glob("*/results.json"))))
    results = json.loads(entry.read_text())
    before = pages(tmp_path)
    results["selftrain"]["miou"] += 0.1
    entry.write_text(json.dumps(results))
    changed = [path for path, text in pages(tmp_path).items() if text != before[path]]
    assert tmp_path / "docs/results.md" in changed
    page = tmp_path / "README.md"
    page.write_text(page.read_text().replace(f"{results['warmup']['miou']:.1f}", "99.9"))
    assert "99.9" not in pages(tmp_path)[page]


def test_the_pairs_that_agreement_ranks(tmp_path):
    found = {"source_only": (30, 80), "warmup": (40, 85), "selftrain": (45, 83), "oracle": (60, 70)}
    results = {stage: {"miou": miou, "agreement": x} for stage, (miou, x) in found.items()}
    runs = [{"folder": tmp_path / name, "results": results} for name in ("a", "b")]
    rows = [*agreements(runs)][2:]
    networks = "source_only 30.0, warmup 40.0, selftrain 45.0"
    assert rows[0] == ("a", networks, "80.0, 85.0, 83.0", "2 of 3")
    assert rows[2][3] == "4 of 6"
    results["warmup"]["agreement"] = results["selftrain"]["agreement"] = None
    assert [*agreements(runs)][2:] == [("all", "", "", "0 of 0")]  # one network ranks nothing
