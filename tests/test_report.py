"""What a run writes can be read back, continued and plotted; what it prints is short and true."""

import io
import json
import math
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from detector.curves import plot_curves
from detector.model.losses import LOSSES
from detector.progress import Progress, memory_mb
from detector.run_log import RunLog, read_log
from detector.tables import format_count, format_duration, format_table


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def train_line(step: int, **numbers: float) -> dict:
    losses = dict.fromkeys(LOSSES, 1 / step)
    return {"epoch": 1, "step": step, "lr": 0.01, "loss": 4 / step, **losses, **numbers}


# --- metrics.jsonl


def test_lines_are_on_disk_at_once_and_read_back(tmp_path):
    with RunLog(tmp_path / "run", tensorboard=False) as log:
        log.write("train", epoch=1, step=1, loss=torch.tensor(0.5), lr=np.float32(0.25))
        log.write("val", epoch=1, step=1, AP=0.5, per_class={"cat": {"AP": None}})
        assert read_log(tmp_path / "run" / "metrics.jsonl") == [
            {"kind": "train", "epoch": 1, "step": 1, "loss": 0.5, "lr": 0.25},
            {"kind": "val", "epoch": 1, "step": 1, "AP": 0.5, "per_class": {"cat": {"AP": None}}},
        ]


@pytest.mark.parametrize("value", [math.nan, -math.inf, np.float64("nan"), torch.tensor(math.inf)])
def test_what_json_lacks_is_null(tmp_path, value):
    with RunLog(tmp_path, tensorboard=False) as log:
        log.write("train", epoch=1, step=1, loss=value)
    assert json.loads(log.path.read_text(), parse_constant=pytest.fail)["loss"] is None


def test_log_is_continued(tmp_path):
    for step in (1, 2):
        with RunLog(tmp_path, tensorboard=False) as log:
            log.write("train", epoch=1, step=step)
    assert [line["step"] for line in read_log(log.path)] == [1, 2]


def test_torn_last_line_is_dropped_and_the_log_continued(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"kind": "train", "epoch": 1, "step": 1}\n{"kind": "tra')
    assert [line["step"] for line in read_log(path)] == [1]
    with RunLog(tmp_path, tensorboard=False) as log:
        log.write("train", epoch=1, step=2)
    assert [line["step"] for line in read_log(path)] == [1, 2]


def test_torn_line_in_the_middle_is_an_error_with_its_place(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"kind": "tra\n{"kind": "train", "epoch": 1, "step": 1}\n')
    with pytest.raises(ValueError, match=r"metrics.jsonl:1: not a JSON object"):
        read_log(path)


def test_resuming_drops_later_steps(tmp_path):
    with RunLog(tmp_path, tensorboard=False) as log:
        for step in range(1, 6):
            log.write("train", epoch=1, step=step)
    with RunLog(tmp_path, after_step=3, tensorboard=False) as log:
        log.write("val", epoch=1, step=4)
    assert [(line["kind"], line["step"]) for line in read_log(log.path)] == [
        ("train", 1),
        ("train", 2),
        ("train", 3),
        ("val", 4),
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_tensorboard_gets_the_numbers(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with RunLog(tmp_path) as log:
        log.write("train", epoch=1, step=7, loss=0.5, broken=math.nan)
        log.write("train", epoch=1, step=8, loss=9.0)
    with RunLog(tmp_path, after_step=7) as log:
        log.write("val", epoch=1, step=8, AP=0.25)
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(7, 0.5)]
    assert [(e.step, e.value) for e in events.Scalars("val/AP")] == [(8, 0.25)]
    assert "train/broken" not in events.Tags()["scalars"]


def test_tensorboard_is_skipped_where_it_is_absent(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with RunLog(tmp_path) as log:
        log.write("train", epoch=1, step=1, loss=0.5)
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


# --- progress


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until the test moves `clock.now`."""

    class Clock:
        now = 100.0

    monkeypatch.setattr("detector.progress.time.perf_counter", lambda: Clock.now)
    return Clock


def test_plain_lines_come_after_the_first_step_then_by_the_clock_and_at_the_end(clock):
    stream = io.StringIO()
    progress = Progress(100, "epoch 1/3", interval=10, stream=stream)
    for second in range(1, 26):
        clock.now = 100 + second
        progress.update(4)
    counted = [line.split(":")[0] for line in stream.getvalue().splitlines()]
    assert counted == ["epoch 1/3 4/100", "epoch 1/3 44/100", "epoch 1/3 84/100", "epoch 1/3 100/100"]


def test_line_shows_losses_rate_memory_and_time_left(clock):
    stream = io.StringIO()
    progress = Progress(1000, "epoch 1/3", epochs_left=2, stream=stream)
    clock.now += 60  # a slow first step
    progress.update(10, loss=4.0, loss_classifier=2.0, lr=0.02)
    clock.now += 10  # then 2 images a second: 970 are left, and two epochs of 1000
    progress.update(20, loss=2.0, loss_classifier=1.0, lr=0.01)
    assert progress.images_per_second == pytest.approx(2)
    assert progress.seconds_left == pytest.approx((485, 1485))
    line = stream.getvalue().splitlines()[1]
    assert line.startswith("epoch 1/3 30/1000: loss 3.8, classifier 1.9, lr 0.01, 2.0 images/s, ")
    assert line.endswith(" MB, 8 min 5 s left, run 24 min 45 s")


def test_time_left_counts_what_an_epoch_took_with_all_that_belongs_to_it():
    progress = Progress(100, "epoch 2/4", epochs_left=2, epoch_seconds=50.0, stream=io.StringIO())
    progress.update(50)
    epoch, run = progress.seconds_left
    assert run == epoch + 100


def test_terminal_gets_a_bar_in_place_of_lines():
    stream = Terminal()
    with Progress(8, "epoch 1/3", stream=stream) as progress:
        progress.update(8, loss=0.5)
    assert "\r" in stream.getvalue() and "epoch 1/3" in stream.getvalue()
    assert "loss 0.5" in stream.getvalue()


def test_disabled_progress_is_silent_and_still_measures(clock):
    stream = io.StringIO()
    progress = Progress(8, stream=stream, enabled=False)
    assert progress.images_per_second == 0
    clock.now += 2
    progress.update(4, loss=0.5)
    assert progress.images_per_second == pytest.approx(2)
    assert stream.getvalue() == ""


def test_a_loss_that_was_not_finite_does_not_stick():
    stream = io.StringIO()
    progress = Progress(8, stream=stream, interval=0)
    progress.update(4, loss=math.nan)
    progress.update(4, loss=0.5)
    first, second = stream.getvalue().splitlines()
    assert "loss nan" in first and "loss 0.5" in second


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
def test_memory_of_this_process_is_plausible():
    assert 50 < memory_mb() < 500_000


# --- curves


@pytest.mark.parametrize("num_steps", [0, 1, 3, 400])
@pytest.mark.parametrize("evaluated", [False, True])
def test_curves_are_plotted_from_few_lines_and_many(tmp_path, num_steps, evaluated):
    with RunLog(tmp_path, tensorboard=False) as log:
        for step in range(1, num_steps + 1):
            log.write("train", **train_line(step))
        if evaluated:
            log.write("val", epoch=1, step=num_steps, AP=0.4, AP50=0.6, AP75=None, loss=1.5)
    plot_curves(log.path, tmp_path / "curves.png")
    with Image.open(tmp_path / "curves.png") as picture:
        heights = {False: 2, True: 3}  # panels
        assert picture.height == pytest.approx(heights[evaluated] * 3.2 * 110, abs=2)
        assert np.asarray(picture.convert("L")).min() < 128
    assert sorted(path.name for path in tmp_path.iterdir()) == ["curves.png", "metrics.jsonl"]


def test_curves_leave_out_null_losses(tmp_path):
    with RunLog(tmp_path, tensorboard=False) as log:
        log.write("train", **train_line(1))
        log.write("train", **train_line(2, loss=math.nan))
    plot_curves(log.path, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 0


# --- text


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0"),
        (999, "999"),
        (1000, "1.00 k"),
        (52_950_000, "52.95 M"),
        (999_999, "1.00 M"),
        (809e9, "809.00 G"),
        (2.5e12, "2.50 T"),
    ],
)
def test_format_count(count, text):
    assert format_count(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min"),
        (725, "12 min 5 s"),
        (3600, "1 h"),
        (12_000, "3 h 20 min"),
        (187_300, "2 d 4 h"),
        (math.inf, "unknown time"),
    ],
)
def test_format_duration(seconds, text):
    assert format_duration(seconds) == text


def test_format_table_aligns_names_left_and_numbers_right():
    table = format_table([("cat", 7, 0.5), ("elephant", 1234, None)], header=("class", "boxes", "AP"))
    assert table.splitlines() == [
        "class     boxes     AP",
        "--------  -----  -----",
        "cat           7  0.500",
        "elephant   1234      -",
    ]
    assert format_table([]) == ""
    assert format_table([], header=("class", "AP")) == "class  AP\n-----  --"
    with pytest.raises(ValueError, match=r"rows of different length: \[1, 2\]"):
        format_table([(1,), (1, 2)])
