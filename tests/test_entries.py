"""The tables of the docs against the files that the runs left."""

import json
import shutil

import pytest
from conftest import ROOT

from engine.config import UserError
from evaluate import STAGES
from tools.baselines import METHODS
from tools.entries import KEPT, WORDS, agreements, pages


@pytest.fixture
def copied(tmp_path):
    """A copy of the pages with tables and of the entries' files."""
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    shutil.copy(ROOT / "README.md", tmp_path)
    return tmp_path


def test_every_table_has_the_figures_of_its_runs():
    for path, text in pages(ROOT).items():
        assert path.read_text(encoding="utf-8") == text, f"{path}: python -m tools.entries"


def test_a_changed_figure_is_found(copied):
    entry = next(iter(sorted((copied / "docs/results").glob("*/results.json"))))
    results = json.loads(entry.read_text())
    before = pages(copied)
    results["selftrain"]["miou"] += 0.1
    entry.write_text(json.dumps(results))
    changed = [path for path, text in pages(copied).items() if text != before[path]]
    assert copied / "docs/results.md" in changed
    page = copied / "README.md"
    page.write_text(page.read_text().replace(f"{results['warmup']['miou']:.1f}", "99.9"))
    assert "99.9" not in pages(copied)[page]


def test_a_table_of_an_entry_that_is_not_there(copied):
    shutil.rmtree(copied / "docs/results/demo_seed1")
    with pytest.raises(UserError, match="no entry demo_seed1"):
        pages(copied)


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


def test_other_methods_come_before_diga_wherever_the_last_network_is_the_one_to_use():
    assert tuple(WORDS) == STAGES
    assert set(METHODS) < set(STAGES[: STAGES.index("warmup")])


def test_an_entry_says_what_it_was():
    for entry in (path for path in (ROOT / "docs/results").iterdir() if path.is_dir()):
        assert sorted(path.name for path in entry.iterdir()) == sorted(KEPT)
        assert json.loads((entry / "environment.json").read_text())["commit"]
        assert (entry / "log.jsonl").stat().st_size < 50_000
