"""The soak kills, resumes and compares; and it would see a difference."""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import kill_and_resume  # noqa: E402
from kill_and_resume import Moment, Pace, Started, draw_moment, fingerprint  # noqa: E402


@pytest.fixture
def soak(tmp_path, monkeypatch):
    """The command, with what it writes below tmp_path; returns (exit code, record)."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(sys, "warnoptions", list(sys.warnoptions))

    def run(*words):
        code = kill_and_resume.main([*words, "--output", str(tmp_path / "record.json")])
        return code, json.loads((tmp_path / "record.json").read_text())

    return run


def test_a_run_that_is_killed_twice_ends_as_the_uninterrupted_one(soak, capsys):
    code, record = soak("--kills", "2", "--steps", "30")
    out = capsys.readouterr().out
    assert code == 0 and record["differing"] == [] and record["killed"] == record["uninterrupted"], out
    assert len(record["kills"]) >= 1 and "EQUAL after" in out
    assert set(record["killed"]) >= {"weights", "averaged weights", "optimizer", "published model", "metrics", "scores"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [("--kills", "8"), ("--kills", "8", "--streaming"), ("--kills", "3", "--streaming", "--num_processes", "2")],
    ids=["resident", "streamed", "two processes"],
)
def test_a_run_that_is_killed_often_ends_as_the_uninterrupted_one(soak, words):
    code, record = soak(*words, "--steps", "200", "--seed", "3")
    assert code == 0 and record["differing"] == []
    assert all(kill.get("others_ended_after", 0) < kill_and_resume.LONGEST_END for kill in record["kills"])


# ---------------------------------------------------------------- what would be seen


FILES = {
    "weights": "checkpoints/step-000020/model.safetensors",
    "averaged weights": "checkpoints/step-000020/averaged.safetensors",
    "optimizer": "checkpoints/step-000020/optimizer.safetensors",
    "published model": "model/model.safetensors",
}


def finished_run(folder, **changes):
    """A folder as a finished run leaves it; changes: the content of one of FILES, `loss`, `speed` or `accuracy`."""
    for name, file in FILES.items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text(changes.get(name, name))
    row = {"step": 20, "loss": changes.get("loss", 0.5), "images_per_second": changes.get("speed", 9.0)}
    (folder / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    (folder / "results.json").write_text(json.dumps({"test_accuracy": changes.get("accuracy", 0.75), "seconds": 3}))
    return folder


@pytest.mark.parametrize(
    "change, differing",
    [({name: "other"}, {name}) for name in FILES]
    + [({"loss": 0.25}, {"metrics"}), ({"accuracy": 0.5}, {"scores"}), ({"speed": 8.0}, set())],
)
def test_a_difference_in_anything_but_the_timings_is_seen(tmp_path, change, differing):
    first = fingerprint(finished_run(tmp_path / "first"))
    second = fingerprint(finished_run(tmp_path / "second", **change))
    assert {name for name in first if first[name] != second[name]} == differing


# ---------------------------------------------------------------- when and whom it strikes


def test_moments_are_drawn_from_the_seed_and_share_the_steps():
    def moments(seed, num_processes=1):
        rng = np.random.default_rng(seed)
        return [draw_moment(rng, 100, 1000, left, Pace(1, 0.02, 2, 30), num_processes) for left in range(50, 0, -1)]

    assert moments(1) == moments(1) != moments(2)
    assert {moment.kind for seed in range(9) for moment in moments(seed)} == {
        "start-up", "training", "saving", "ending",
    }  # fmt: skip
    assert all(100 < moment.after_step < 1000 for moment in moments(1))
    assert np.mean([moment.after_step for moment in moments(1)[:10]]) < 160  # 50 kills are to come in 900 steps
    assert all(moment.rank is None for moment in moments(1))
    ranks = [moment.rank for moment in moments(1, 2) if moment.kind != "start-up"]
    assert {0, 1, None} == set(ranks)


def test_a_kill_takes_the_whole_family():
    launched = subprocess.Popen(["sh", "-c", "sleep 300 & sleep 300 & wait"])
    process = psutil.Process(launched.pid)
    deadline = time.monotonic() + 20
    while len(process.children()) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    family = [process, *process.children()]
    Started(Path(), Path(), 0.0, process, launched.poll).kill_all()
    assert launched.returncode == -9 and len(family) == 3
    assert psutil.wait_procs(family, timeout=10)[1] == []


def test_what_an_earlier_start_left_is_not_taken_for_this_ones(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 7}\n{"step": 8}\n{"st')
    (tmp_path / "checkpoints" / ".partial-step-000008").mkdir(parents=True)
    (tmp_path / "log").write_text("going on from runs/checkpoints/step-000006\n")
    now = Started(tmp_path, tmp_path / "log", time.time() - 60, psutil.Process(), lambda: None)
    later = Started(tmp_path, tmp_path / "log", time.time() + 60, psutil.Process(), lambda: None)
    assert (now.step(), now.is_saving()) == (8, True) and (later.step(), later.is_saving()) == (0, False)
    assert now.beginning() == "went on from step 6"


def test_a_run_that_ends_before_its_moment_is_said(tmp_path):
    started = Started(tmp_path, tmp_path / "log", 0.0, psutil.Process(), lambda: 0)
    assert not kill_and_resume.wait_for_moment(Moment("training", 5, 0.0), started, 10)


def test_workers_without_a_stream_are_refused(capsys):
    with pytest.raises(SystemExit) as stop:
        kill_and_resume.parse_arguments(["--dataloader_num_workers", "2"])
    assert stop.value.code == 2 and "goes with --streaming" in capsys.readouterr().err
