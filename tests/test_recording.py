"""What a run says on its way: how much time is left, and whether the device waits for data."""

import pytest

from modeling_vit_scratch import ViTScratchConfig
from modeling_vit_scratch.training import recording
from modeling_vit_scratch.training.recording import DataWait, Progress
from modeling_vit_scratch.training.resolution import Resolution


def row(share=0.0, step=1):
    return {"step": step, "loss": 1.0, "train_accuracy": 0.5, "images_per_second": 9.0, "data_wait": share}


# ---------------------------------------------------------------- time left


class Clock:
    """time, of which perf_counter stands still until it is told."""

    def __init__(self):
        self.now = 1000.0

    def perf_counter(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    monkeypatch.setattr(recording, "time", Clock())
    return recording.time


def times_left(capsys):
    return [line.rpartition(", ")[2] for line in capsys.readouterr().out.splitlines()]


def test_the_time_left_knows_that_small_images_cost_less(clock, capsys):
    # 10,000 steps, 6,000 of them at 16 of 32 pixels: those take a second, the others four
    resolution, config = Resolution(16, 0.6), ViTScratchConfig(image_size=32, patch_size=4)
    progress = Progress(10_000, 0, True, work=lambda n: resolution.work(n, 10_000, config))
    for step in (100, 3000, 6000, 8000, 10_000):
        clock.now = 1000.0 + min(step, 6000) + 4 * max(0, step - 6000)
        progress.show(row(step=step))
    assert times_left(capsys) == ["6:05:00 left", "5:16:40 left", "4:26:40 left", "2:13:20 left", "0:00 left"]


def test_the_time_left_counts_from_where_a_run_went_on(clock, capsys):
    progress = Progress(300, 100, True)
    clock.now += 50
    progress.show(row(step=150))
    assert times_left(capsys) == ["2:30 left"]


def test_the_time_left_follows_a_machine_that_becomes_slower(clock, capsys):
    progress = Progress(10_000, 0, True)
    for step in range(100, 6001, 100):
        clock.now += 100 if step <= 3000 else 300
        progress.show(row(step=step))
    said = times_left(capsys)
    assert said[29] == "1:56:40 left" and said[-1] == "3:20:00 left"  # 7,000 steps of 1 s, 4,000 of 3 s
    assert said[39] == "3:20:00 left"  # 6,000 steps of 2 s: half of the last rows were slow


# ---------------------------------------------------------------- waiting for data


def test_a_device_that_waits_for_data_is_told_once_and_what_to_do(capsys):
    progress = Progress(100, 0, True, DataWait(num_workers=1, num_cores=8))
    for step, share in enumerate((0.9, 0.1, 0.3, 0.1, 0.3, 0.4, 0.8), 1):  # the first one is the workers' start
        progress.show(row(share, step))
    lines = [line for line in capsys.readouterr().out.splitlines() if "the device waits" in line]
    remedy = "more --dataloader_num_workers (now 1, of 8 cores), or smaller images"
    assert lines == [f"the device waits for data 23% of the time: {remedy}"]  # the mean of 0.3, 0.1 and 0.3


def test_a_device_that_hardly_waits_is_not_told_and_a_full_machine_gets_other_advice():
    calm, full = DataWait(1, 8), DataWait(8, 8)
    assert not any(calm.advice(row(share)) for share in (0.9, 0.19, 0.1, 0.2, 0.19, 0.15))
    said = [full.advice(row(0.5)) for _ in range(5)]
    assert said == [None, None, None, "the device waits for data 50% of the time: smaller images, or more cores "
                    "(all 8 decode)", None]  # fmt: skip
