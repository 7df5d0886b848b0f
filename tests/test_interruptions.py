"""Kills at random moments, signals, two commands in one folder, full disks: what is left of a run.

LONG=1: 12 kills of each stage; else 2.
"""

import json
import os
import shutil
import signal
import subprocess

import numpy as np
import pytest
from conftest import LONG, log, ok, refused, same_networks, state

from engine import files
from engine.config import UserError


@pytest.mark.parametrize("script", ["translate_cyclegan", "warmup", "selftrain"])
def test_killed_at_random_moments_a_stage_ends_as_if_undisturbed(finished, run, process, script):
    section = {"translate_cyclegan": "translation"}.get(script, script)
    options = [f"{section}.steps=24", "save_every=3", "log_every=3", "selftrain.rounds=1"]
    options += ["warmup.crdomix=false", "selftrain.crdomix=false", "selftrain.align_logits=1"]
    undisturbed, killed = (finished.parent / name for name in ("undisturbed", "killed"))
    for folder in (undisturbed, killed):
        folder.mkdir()
        shutil.copy(finished / "warmup.pth", folder / "init.pth")
    more = ["--init", "init.pth"] if script == "selftrain" else []
    ok(run(script, *options, *more, "name=undisturbed"))
    result = {"translate_cyclegan": "translator"}.get(script, script)
    rng, kills, lock = np.random.default_rng(0), 0, killed / ".lock"
    for attempt in range(60):
        before = lock.stat().st_mtime_ns if lock.exists() else 0
        command = process(script, *options, *more, "name=killed", f"workers={attempt % 3}")
        if kills == (12 if LONG else 2):
            ok(command.end())
            break
        begun = lambda t=before: lock.exists() and lock.stat().st_mtime_ns > t  # noqa: E731
        command.wait_for(begun)
        command.process.join(rng.uniform(0, 2.5))
        kills += command.process.exitcode is None
        command.kill()
        command.end()
        for path in killed.glob("*.pth"):
            assert state(path)  # complete, whenever the kill came
    assert same_networks(undisturbed / f"{result}.pth", killed / f"{result}.pth")
    if script == "translate_cyclegan":
        for path in (undisturbed / "translated").iterdir():
            assert path.read_bytes() == (killed / "translated" / path.name).read_bytes()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_a_stage_after_the_step_with_a_checkpoint(dataset, process, number, code):
    options = ("warmup.crdomix=false", "warmup.steps=400", "save_every=1000", "log_every=5")
    command = process("warmup", *options, "workers=1")
    path = dataset / "runs/test/log.jsonl"
    command.wait_for(path.exists)
    # to the loader's processes as well, as a terminal, timeout and SLURM do
    os.killpg(command.pid, number)
    found, _, err = command.end()
    assert found == code, err
    assert len(err.splitlines()) == 1
    assert f"stopped by signal {number.value}; the same command goes on" in err
    saved = state(dataset / "runs/test/warmup.unfinished.pth")
    assert 0 < saved["step"] < 400
    assert log(path.parent)[-1]["step"] == saved["step"]


def test_two_commands_in_one_folder(dataset, process):
    options = ("warmup.crdomix=false", "log_every=1")
    first = process("warmup", *options, "warmup.steps=100000")
    first.wait_for((dataset / "runs/test/log.jsonl").exists)
    second = process("warmup", *options, "warmup.steps=2").end()
    first.kill()
    first.end()
    refused(second, "runs/test: another process is at work here; wait until it ends")
    (dataset / "runs/test/warmup.unfinished.pth").unlink(missing_ok=True)
    ok(process("warmup", *options, "warmup.steps=2").end())  # the dead hold no lock


def test_a_full_disk_leaves_the_last_checkpoint(dataset, process):
    disk = dataset / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", disk]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("tmpfs cannot be mounted here")
    try:
        options = ("warmup.crdomix=false", "output=disk", "warmup.steps=100000", "save_every=5")
        command = process("warmup", *options)
        checkpoint = disk / "test/warmup.unfinished.pth"
        command.wait_for(checkpoint.exists)
        with (disk / "filler").open("wb") as file, pytest.raises(OSError):
            while True:
                file.write(bytes(1 << 20))
                file.flush()
        refused(command.end())
        assert state(checkpoint)["step"] % 5 == 0
    finally:
        subprocess.run(["umount", "-l", disk], check=False)


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file"
    files.write_text(path, "old")
    before = path.open()

    def fail(temporary):
        temporary.write_text("half")
        raise OSError("no")

    with pytest.raises(UserError, match="cannot be written"):
        files.write_atomically(path, fail)
    assert path.read_text() == "old"
    files.write_text(path, "new")
    assert path.read_text() == "new"
    assert before.read() == "old"  # who had it open still has the old one, complete
    assert list(tmp_path.iterdir()) == [path]


def test_a_forced_run_replaces_a_result_only_by_a_finished_one(finished, run, process, template):
    result, unfinished = finished / "warmup.pth", finished / "warmup.unfinished.pth"
    old, steps = result.read_bytes(), log(finished)
    forced = ("--force", "warmup.steps=16", "save_every=1", "log_every=1", "seed=5")
    command = process("warmup", *forced)
    command.wait_for(unfinished.exists)
    os.killpg(command.pid, signal.SIGTERM)
    assert command.end()[0] == 143
    assert result.read_bytes() == old
    ok(run("warmup"))  # the finished result is that of this command
    step = state(unfinished)["step"]
    before = len(log(finished))
    ok(run("warmup", *forced))
    assert log(finished)[before]["step"] == step + 1
    images = f"translation.images={finished}/translated"
    ok(run("warmup", *forced[1:], "name=whole", images))
    assert same_networks(result, finished.parent / "whole/warmup.pth")
    # an unfinished checkpoint of a start without --force is not gone on from
    shutil.copy(template / "warmup.unfinished.pth", unfinished)
    before = len(log(finished))
    ok(run("warmup", "--force", "warmup.crdomix=false", "log_every=1"))
    assert log(finished)[before]["step"] == 1
    assert json.dumps(steps) == json.dumps(log(finished)[: len(steps)])


def test_a_fault_of_the_code_is_a_traceback_and_waits_for_no_worker(dataset, process):
    (dataset / "fault.py").write_text("import models\nmodels.ema_update = None\n")
    options = ("warmup.crdomix=false", "workers=1", "--import", "fault.py")
    code, _, err = process("warmup", *options).end(60)
    assert code == 1
    assert "TypeError: 'NoneType' object is not callable" in err
