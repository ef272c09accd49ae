"""A run: its files, a resumed run equal to one that never stopped, and refusals."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from short_runs import CPU, lines, record_streams, same_tensors, stop_after

import detector.run
import detector.training_run
from detector.build import build_batches
from detector.checkpoint import load_checkpoint, load_training_state
from detector.config import load_config
from detector.data.sources import build_dataset
from detector.describe import describe
from detector.draws import tagged
from detector.engine import NonFiniteLossError
from detector.resume import check_resumable
from detector.run import Run
from detector.stop import Interrupted, StopSignal

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def no_curves(monkeypatch):
    """Curves take longer than the epochs here."""
    monkeypatch.setattr(detector.training_run, "plot_curves", lambda log_path, png_path: None)


# Files


@pytest.fixture(scope="module")
def finished(tiny_config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "shapes"
    return folder, Run(tiny_config(), folder, CPU).train()


def test_a_run_writes_its_files(finished):
    folder, _ = finished
    names = {path.name for path in folder.iterdir()} - {"tensorboard", ".lock"}
    wanted = "best.safetensors last.safetensors training_state.pt config.yaml metrics.jsonl first_batch.jpg curves.png found.jpg"
    assert names == {
        *wanted.split(),
        "best_metrics.json",
        "problems.txt",
        "training_state.previous.pt",
    }  # and no temporary file
    assert all((folder / name).stat().st_size > 100 for name in names)


def test_no_two_uses_draw_from_one_stream(tiny_config, tmp_path, no_curves, monkeypatch):
    uses = record_streams(monkeypatch)
    Run(tiny_config(), tmp_path, CPU).train()
    places = {use for each in uses.values() for use in each}
    trained = {name for name, _, in_evaluation in places if not in_evaluation}
    assert {"loader.py", "transforms.py", "proposals.py", "roi_heads.py", "engine.py"} <= trained
    assert {name for name, _, in_evaluation in places if in_evaluation} >= {"proposals.py", "roi_heads.py"}
    assert [each for each in uses.values() if len({use[::2] for use in each}) > 1] == []


def test_every_key_of_a_stream_begins_with_a_tag_of_its_own():
    """Generated pictures have none: see `detector.draws`."""
    sources = [(path, path.read_text(encoding="utf-8")) for path in (ROOT / "detector").rglob("*.py")]
    tags = [tag for _, text in sources for tag in re.findall(r'tagged\(\s*"([^"]*)"', text)]
    assert len(tags) == len(set(tags)) >= 7 and len({tagged(tag) for tag in tags}) == len(tags)
    untagged = {path.name for path, text in sources if re.search(r"(default_rng|SeedSequence)\(\(", text)}
    assert untagged == {"shapes.py"}
    assert np.random.default_rng((0, 3)).random() == np.random.default_rng((0, 3, 0)).random()


def test_its_pictures_are_pictures_and_its_config_is_the_resolved_one(finished, tiny_config):
    folder, _ = finished
    for name in ("first_batch.jpg", "curves.png", "found.jpg"):
        with Image.open(folder / name) as picture:
            picture.load()
            assert picture.width > 100
    assert load_config(folder / "config.yaml") == tiny_config()


def test_its_log_has_a_line_an_epoch_even_where_epochs_are_shorter_than_log_every(finished):
    folder, metrics = finished
    assert [(line["epoch"], line["step"]) for line in lines(folder, "train")] == [(1, 4), (2, 8)]
    val = lines(folder, "val")
    assert [(line["epoch"], line["step"]) for line in val] == [(1, 4), (2, 8)]
    assert all(line["loss"] > 0 and 0 <= line["AP"] <= line["AP50"] for line in val)
    assert metrics["AP"] == max(line["AP"] for line in val)


def test_its_checkpoint_is_the_model_of_the_last_step(finished, tiny_config):
    folder, metrics = finished
    last, state = (
        load_checkpoint(folder / "last.safetensors"),
        load_training_state(folder / "training_state.pt"),
    )
    assert last.class_names == ("circle", "cross", "triangle", "star") and last.config == tiny_config()
    assert same_tensors(last.state_dict, state["model"])
    assert (state["epoch"], state["batch"], state["step"]) == (2, 0, 8)
    assert load_checkpoint(folder / "best.safetensors").metrics == metrics


def test_resuming_a_finished_run_does_nothing_and_gives_its_best(finished, tiny_config):
    folder, metrics = finished
    before = (folder / "last.safetensors").read_bytes()
    assert Run(tiny_config(), folder, CPU, resume=True).train() == json.loads(json.dumps(metrics))
    assert (folder / "last.safetensors").read_bytes() == before and len(lines(folder, "val")) == 2


def test_what_it_is_about_to_do_is_told(tiny_config):
    config = tiny_config("train.batch_size=3", "model.backbone.frozen_stages=1")
    train_set = build_dataset(config.data, "train")
    model = detector.run.build_model(config.model, 5)
    _, batches, _ = build_batches(config, train_set, CPU)
    told = describe(config, model, train_set, None, batches, CPU)
    counts = train_set.box_counts()
    assert f"train: 8 images, {sum(counts.values())} boxes" in told
    assert all(f"{name} " in told and str(count) in told for name, count in counts.items())
    assert "64x64 (8)" in told and "2 epochs of 3 batches of 3, sgd at 0.01, multistep, on cpu" in told
    frozen = 3 * 8 * 7 * 7 + 2 * 8  # conv1 and its norm
    assert f"frozen {frozen / 1000:.2f} k" in told
    assert "multiply-accumulates: trunk 2.84 M an image of 64x64, head 6.42 M a region" in told


# Resuming


@pytest.mark.parametrize("updates", [(1,), (2,), (3,), (1, 2, 1)])
def test_resuming_equals_not_stopping(varied, unbroken, tmp_path, monkeypatch, no_curves, updates):
    for i, count in enumerate(updates):
        with monkeypatch.context() as patch:
            stop_after(patch, count)
            with pytest.raises(
                Interrupted, match=f"stopped after update {sum(updates[: i + 1])}; continue with --resume"
            ):
                Run(varied, tmp_path, CPU, resume=i > 0).train()
        torch.manual_seed(99)  # a new process has another state
    metrics = Run(varied, tmp_path, CPU, resume=True).train()
    one, two = (load_training_state(folder / "training_state.pt") for folder in (tmp_path, unbroken))
    assert same_tensors(one["model"], two["model"]) and same_tensors(one["ema"], two["ema"])
    assert one["schedule"] == two["schedule"] and one["step"] == two["step"] == 6
    last = [load_checkpoint(folder / "last.safetensors").state_dict for folder in (tmp_path, unbroken)]
    assert same_tensors(*last) and not same_tensors(last[0], one["model"])  # the averages are what is kept
    assert lines(tmp_path, "val") == lines(unbroken, "val")
    assert metrics == json.loads((unbroken / "best_metrics.json").read_text())


def test_a_stop_in_the_last_update_is_a_finished_run(varied, unbroken, tmp_path, monkeypatch, no_curves):
    stop_after(monkeypatch, 6)
    assert Run(varied, tmp_path, CPU).train() == json.loads((unbroken / "best_metrics.json").read_text())


@pytest.mark.parametrize("handler", [signal.default_int_handler, signal.SIG_IGN])
def test_signals_are_as_before_after_a_run_and_an_ignored_one_stays_ignored(handler):
    before = signal.signal(signal.SIGINT, handler)
    try:
        with StopSignal():
            assert (signal.getsignal(signal.SIGINT) is signal.SIG_IGN) == (handler is signal.SIG_IGN)
        assert signal.getsignal(signal.SIGINT) is handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_signals_are_as_before_after_a_whole_run(tiny_config, tmp_path, no_curves):
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    Run(tiny_config(), tmp_path / "run", CPU).train()
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before


def test_settings_of_speed_are_free_to_change_when_a_run_resumes(tiny_config):
    config = tiny_config()
    other = tiny_config("speed={activation_checkpointing: true, sparse_roi_align: false}")
    check_resumable(config, other)
    with pytest.raises(ValueError, match="model.box_nms_thresh was 0.5, now 0.4"):
        check_resumable(config, tiny_config("model.box_nms_thresh=0.4"))


def test_lines_written_after_the_saved_state_are_dropped_on_resuming(
    varied, tmp_path, monkeypatch, no_curves
):
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(Interrupted):
            Run(varied, tmp_path, CPU).train()
    with open(tmp_path / "metrics.jsonl", "a") as file:  # a run killed before it saved again
        file.write('{"kind": "val", "epoch": 9, "step": 400, "AP": 1.0}\n{"kind": "tr')
    Run(varied, tmp_path, CPU, resume=True).train()
    assert [line["epoch"] for line in lines(tmp_path, "val")] == [1, 2, 3]


# Refusals


def test_resuming_without_a_run_is_refused(tiny_config, tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing to resume from: .*training_state.pt does not exist"):
        Run(tiny_config(), tmp_path / "new", CPU, resume=True).train()
    assert not (tmp_path / "new").exists()


def test_a_new_run_into_a_used_folder_is_refused(finished, tiny_config):
    with pytest.raises(
        ValueError, match="holds a run already: continue it with --resume, or give another --output"
    ):
        Run(tiny_config(), finished[0], CPU).train()


def test_resuming_with_other_classes_is_refused(finished, tiny_config):
    config = tiny_config("data.class_names=[cross, circle, star, triangle]")
    with pytest.raises(ValueError, match=r"was trained on classes \['circle', .*\], not \('cross', "):
        train_as_coco(config, finished[0], resume=True)


def test_resuming_with_another_model_is_refused_in_a_sentence(finished, tiny_config):
    with pytest.raises(
        ValueError, match="continues a run with its own settings; model.backbone was .*now .*'width': 16"
    ):
        Run(tiny_config("model.backbone.width=16"), finished[0], CPU, resume=True).train()


def train_as_coco(config, folder, **options):
    """The same pictures read as COCO, which takes a list of classes and a limit."""
    return Run(config.model_copy(update={"data": as_coco(config.data)}), folder, CPU, **options).train()


def as_coco(data, **source):
    splits = {
        split: [{"format": "coco", "images": split, "annotations": f"annotations/{split}.json", **source}]
        for split in ("train", "val")
    }
    return type(data).model_validate({**data.model_dump(), **splits})


def test_limit_takes_the_first_annotated_pictures(tiny_config, tmp_path, no_curves, capsys):
    config = tiny_config("train.epochs=1")
    Run(config.model_copy(update={"data": as_coco(config.data, limit=3)}), tmp_path, CPU).train()
    assert "train: 3 images" in capsys.readouterr().out
    assert lines(tmp_path, "train")[-1]["step"] == 2  # two batches of 2


def spoil(tiny_shapes, folder, change):
    """A copy of the annotations with a change, beside the pictures."""
    annotations = json.loads((tiny_shapes / "annotations" / "train.json").read_text())
    change(annotations)
    path = folder / "train.json"
    path.write_text(json.dumps(annotations))
    return {"format": "coco", "images": str(tiny_shapes / "train"), "annotations": str(path)}


def with_train(config, source, **data):
    changed = type(config.data).model_validate({**config.data.model_dump(), "train": source, **data})
    return config.model_copy(update={"data": changed})


def test_strict_refuses_a_box_without_area_and_otherwise_it_is_told_and_skipped(
    tiny_config, tiny_shapes, tmp_path, no_curves, capsys
):
    source = spoil(tiny_shapes, tmp_path, lambda a: a["annotations"][1].update(bbox=[5, 5, 0, 10]))
    config = tiny_config("train.epochs=1")
    with pytest.raises(ValueError, match=r"1 problem\(s\), and strict=True refuses any:\n.*has no area"):
        Run(with_train(config, source, strict=True), tmp_path / "strict", CPU).train()
    Run(with_train(config, source), tmp_path / "run", CPU).train()
    assert "skipped: " in (out := capsys.readouterr().out) and "has no area" in out


def test_training_data_without_a_box_are_refused(tiny_config, tiny_shapes, tmp_path):
    source = spoil(tiny_shapes, tmp_path, lambda a: a["annotations"].clear())
    with pytest.raises(ValueError, match="the training data have no box to learn$"):
        Run(with_train(tiny_config(), source), tmp_path / "run", CPU).train()


def test_data_of_crowds_alone_are_refused_with_the_setting_that_trains_on_them(
    tiny_config, tiny_shapes, tmp_path
):
    source = spoil(tiny_shapes, tmp_path, lambda a: [entry.update(iscrowd=1) for entry in a["annotations"]])
    message = r"no box to learn: \d+ are crowds; data.crowd=train trains on them"
    with pytest.raises(ValueError, match=message):
        Run(with_train(tiny_config(), source), tmp_path / "run", CPU)
    run = Run(with_train(tiny_config(), source, crowd="train"), tmp_path / "run", CPU)
    assert sum(run.train_set.box_counts().values()) > 0


def test_category_ids_with_gaps_and_pictures_without_objects_train(
    tiny_config, tiny_shapes, tmp_path, no_curves
):
    def change(annotations):
        for each in (*annotations["annotations"], *annotations["categories"]):
            key = "category_id" if "bbox" in each else "id"
            each[key] = each[key] * 10 + 3
        annotations["annotations"] = [a for a in annotations["annotations"] if a["image_id"] > 3]

    source = spoil(tiny_shapes, tmp_path, change)
    metrics = Run(with_train(tiny_config("train.epochs=1"), source), tmp_path / "run", CPU).train()
    assert metrics["epoch"] == 1 and lines(tmp_path / "run", "train")[0]["step"] == 4


# Options


def test_without_validation_data_it_trains_and_keeps_the_last(tiny_config, tmp_path, no_curves):
    assert Run(tiny_config("data.val=null", "train.epochs=1"), tmp_path, CPU).train() == {}
    assert (tmp_path / "last.safetensors").exists() and not (tmp_path / "best.safetensors").exists()


def test_patience_stops_early_and_a_resumed_run_stays_stopped(
    tiny_config, tmp_path, no_curves, monkeypatch, capsys
):
    metrics = iter([0.3, 0.2, 0.3, 0.1])

    def evaluate_coco(ground_truth, results, detections_per_img):
        value = next(metrics)
        return {"AP": value, "AP50": value, "AP75": value, "per_class": {}}

    monkeypatch.setattr(detector.run, "evaluate_coco", evaluate_coco)
    config = tiny_config("train.epochs=10", "train.patience=2")
    assert Run(config, tmp_path, CPU).train()["epoch"] == 1
    assert "no better AP in 2 evaluations: stopping early" in capsys.readouterr().out
    assert [line["AP"] for line in lines(tmp_path, "val")] == [0.3, 0.2, 0.3]
    assert Run(config, tmp_path, CPU, resume=True).train()["epoch"] == 1
    assert len(lines(tmp_path, "val")) == 3


def test_evaluation_comes_every_so_many_epochs_and_after_the_last(tiny_config, tmp_path, no_curves):
    Run(tiny_config("train.epochs=3", "train.eval_every=2"), tmp_path, CPU).train()
    assert [line["epoch"] for line in lines(tmp_path, "val")] == [2, 3]


def test_the_loader_of_a_run_starts_once(tiny_config, tmp_path, no_curves, monkeypatch):
    run = Run(tiny_config("train.epochs=3", "train.eval_every=1"), tmp_path / "run", CPU)
    started, watch = [], run._watched
    monkeypatch.setattr(run, "_watched", lambda on_new: started.append(1) or watch(on_new))
    run.train()
    assert run.training.epoch == 3 and len(started) == 1


def test_log_every_counts_updates(tiny_config, tmp_path, no_curves):
    Run(tiny_config("train.epochs=1", "train.batch_size=1", "train.log_every=3"), tmp_path, CPU).train()
    assert [line["step"] for line in lines(tmp_path, "train")] == [3, 6, 8]


def test_a_diverging_run_stops_with_ids_and_losses(tiny_config, tmp_path, no_curves):
    config = tiny_config("train.lr=1.0e+30", "train.warmup_steps=0")
    with pytest.raises(
        NonFiniteLossError, match=r"image ids \[\d+, \d+\]: loss_classifier .*loss_rpn_box_reg"
    ):
        Run(config, tmp_path, CPU).train()


def test_two_runs_are_equal_whatever_the_number_of_workers(tiny_config, tmp_path, no_curves):
    for workers in (0, 2):
        Run(
            tiny_config("train.epochs=1", f"loader.num_workers={workers}"), tmp_path / str(workers), CPU
        ).train()
    states = [load_checkpoint(tmp_path / str(workers) / "last.safetensors").state_dict for workers in (0, 2)]
    assert same_tensors(*states)


# Ctrl-C


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_all_its_processes_saves_and_the_run_resumes(tiny_config, tmp_path, no_curves, number):
    config = tiny_config("train.epochs=400", "train.eval_every=400", "loader.num_workers=1")
    path, folder = tmp_path / "recipe.yaml", tmp_path / "run"
    path.write_text(config.model_dump_json())  # JSON is YAML
    command = [
        sys.executable,
        str(ROOT / "tools" / "train.py"),
        str(path),
        "--output",
        str(folder),
        "--device",
        "cpu",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 120
        log = folder / "metrics.jsonl"
        while (
            process.poll() is None
            and time.monotonic() < deadline
            and not (log.exists() and log.stat().st_size)
        ):
            time.sleep(0.1)
        os.killpg(process.pid, number)  # as a terminal does, or timeout
        out, _ = process.communicate(timeout=60)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 130, out
    assert out.count("stopping soon") == 1 and "continue with --resume" in out
    assert "Traceback" not in out
    state = load_training_state(folder / "training_state.pt")
    assert 0 < state["step"] < 1600
    resumed = config.model_copy(
        update={"train": config.train.model_copy(update={"patience": 1, "eval_every": 1})}
    )
    Run(resumed, folder, CPU, resume=True).train()
    assert load_training_state(folder / "training_state.pt")["step"] > state["step"]
