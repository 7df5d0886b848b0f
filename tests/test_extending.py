"""docs/extending.md: its blocks of code, applied to a copy of the repository, work."""

import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, log

FENCE = r"```\w*\n(.*?)```"
EDIT = re.compile(rf"In `([^`]+)`, after the line\n{FENCE}\ninsert\n{FENCE}", re.S)
NEW = re.compile(rf"The new file `([^`]+)`:\n{FENCE}", re.S)


def test_a_new_key_and_a_new_loss_as_the_page_adds_them(dataset, finished):
    page, copy = (ROOT / "docs/extending.md").read_text(), dataset / "copy"
    leave_out = shutil.ignore_patterns(".git", "runs", "data", ".venv*", "__pycache__", "tests")
    shutil.copytree(ROOT, copy, ignore=leave_out)
    edits = EDIT.findall(page)
    assert len(edits) == 4
    for file, line, more in edits:
        text = (copy / file).read_text()
        assert text.count(line) == 1, (file, line)
        (copy / file).write_text(text.replace(line, line + more))
    ((test, text),) = NEW.findall(page)
    (copy / test).parent.mkdir()
    (copy / test).write_text(text)

    def python(folder, *arguments):
        line = [sys.executable, *map(str, arguments)]
        done = subprocess.run(line, cwd=folder, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr

    python(copy, "-m", "pytest", "-q", "-n0", "-p", "no:cacheprovider", test)
    config = dataset / "test.yaml"
    config.write_text(config.read_text().replace(str(ROOT), str(copy)))
    for path in ("selftrain.pth", "selftrain_round1.pth", "log.jsonl"):
        (finished / path).unlink()
    options = "selftrain.rounds=1", "selftrain.entropy=0.1"
    python(dataset, copy / "selftrain.py", "--cfg", config, *options)
    line = log(finished)[0]
    without = line["ce"] + line["ce_mix"] + 0.25 * line["kd"]
    assert line["loss"] == pytest.approx(without + 0.1 * line["entropy"], rel=1e-4)
