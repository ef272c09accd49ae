"""A recipe for somebody's pictures: each rule, and one command from a folder to a trained detector."""

import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.models import ResNet18_Weights, resnet18

from backbones import create_backbone
from detector.choose import recipe as choosing
from detector.choose import timing
from detector.choose.recipe import choose_recipe
from detector.choose.rules import (
    choose_anchors,
    choose_augmentation,
    choose_network,
    choose_regions,
    choose_size,
    choose_training,
)
from detector.choose.statistics import Machine, Objects
from detector.choose.timing import Pace, choose_epochs
from detector.choose.weights import find_weights
from detector.config import load_config
from detector.data.sources import build_dataset, build_datasets
from detector.data.voc import VocSource
from detector.model.anchor_fit import anchor_recall
from detector.resume import fingerprint
from detector.run import Run

ROOT = Path(__file__).resolve().parent.parent
CPU = Machine(torch.device("cpu"), cores=2, memory=24 * 2**30)
GPU = Machine(torch.device("cuda"), cores=16, memory=80 * 2**30)
SMALL = (
    "model.backbone={name: resnet18, width: 8}",
    "model.min_size=64",
    "model.max_size=64",
    "loader.num_workers=0",
)


def objects(count=400, side=80.0, size=(480, 640), per_picture=1, names=("cell",), seed=0):
    """Square objects of about `side` pixels, evenly over pictures of one size."""
    rng = np.random.default_rng(seed)
    sides = side * np.exp(0.3 * rng.standard_normal((count, 1))) * np.ones((1, 2))
    corners = rng.uniform(0, 1, (count, 2)) * (np.array(size[::-1]) - sides)
    return Objects(
        boxes=np.concatenate([corners, corners + sides], axis=1),
        sizes=np.tile(size, (count, 1)),
        counts=np.full(count // per_picture, per_picture),
        short=min(size),
        long=max(size),
        class_names=names,
    )


# Rules


def test_pictures_of_small_objects_are_enlarged_and_of_large_ones_reduced_within_bounds():
    sides = [choose_size(objects(side=side), CPU)[0]["model"]["min_size"] for side in (8, 40, 200)]
    assert sides == [480, sides[1], 300] and 300 < sides[1] < 480
    assert choose_size(objects(side=8), GPU)[0]["model"]["min_size"] == 800


def test_the_long_side_follows_the_pictures():
    assert choose_size(objects(side=200, size=(480, 640)), CPU)[0]["model"] == {
        "min_size": 300,
        "max_size": 400,
    }


def test_anchors_reach_nearly_all_objects_at_the_networks_size():
    seen = objects()
    settings, reason = choose_anchors(seen, 300, 400)
    chosen = settings["model"]["anchor_sizes"], settings["model"]["aspect_ratios"]
    recall = anchor_recall(seen.shapes_at(300, 400), *chosen)
    assert recall > 0.95 and f"{recall:.1%}" in reason


def test_regions_grow_with_the_objects_of_a_picture():
    few, many = (choose_regions(objects(per_picture=n), CPU)[0]["model"] for n in (1, 20))
    assert few["box_batch_size_per_image"] < many["box_batch_size_per_image"]
    assert many["rpn_post_nms_top_n_test"] >= 10 * 20
    crowded = choose_regions(objects(count=4000, per_picture=500), CPU)[0]["model"]
    assert crowded["rpn_post_nms_top_n_test"] >= 1000 <= crowded["box_detections_per_img"]
    assert crowded["rpn_pre_nms_top_n_test"] >= 2000


@pytest.mark.parametrize(
    ("names", "flip"),
    [(("turn left", "stop"), 0.0), (("7",), 0.0), (("arrow_up",), 0.0), (("Platelets", "b12"), 0.5)],
)
def test_classes_whose_mirror_image_is_another_are_not_flipped(names, flip):
    assert choose_augmentation(objects(names=names))[0]["augment"]["horizontal_flip"] == flip


def test_pictures_with_an_above_and_a_below_are_not_turned_over():
    even = objects(count=2000)
    standing = objects(count=2000)
    standing.boxes[:, [1, 3]] = 240 + standing.boxes[:, [1, 3]] / 2
    flips = [choose_augmentation(seen)[0]["augment"]["vertical_flip"] for seen in (even, standing)]
    assert flips == [0.5, 0.0]


def test_the_network_fits_the_machine_and_the_weights_at_hand():
    assert choose_network(CPU, None, "no")[0]["model"]["backbone"] == {"name": "resnet18", "width": 32}
    published = choose_network(GPU, "imagenet_v2", "cached")[0]["model"]["backbone"]
    assert published == {"name": "resnet50", "weights": "imagenet_v2", "norm": "frozen", "frozen_stages": 2}


def test_a_gpu_gets_larger_batches_a_higher_rate_and_bf16():
    cpu, gpu = (choose_training(machine, False, 1000)[0]["train"] for machine in (CPU, GPU))
    assert (cpu["batch_size"], cpu["lr"], gpu["batch_size"], gpu["lr"]) == (4, 1e-3, 16, 2e-3)
    assert gpu["amp"] == "bf16" and "amp" not in cpu


# Published weights


class Server(SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A folder, and the address of a server of its files."""
    folder = tmp_path_factory.mktemp("served")
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Server, directory=folder)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield folder, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture
def publish(server, tmp_path, monkeypatch):
    """publish(tensors) -> the served file of ResNet-18's published weights, and where torch.hub will keep it."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")

    def publish(tensors):
        torch.save(tensors, buffer := io.BytesIO())
        name = f"resnet18-{hashlib.sha256(buffer.getvalue()).hexdigest()[:8]}.pth"
        monkeypatch.setattr(ResNet18_Weights.IMAGENET1K_V1.value, "url", f"{server[1]}/{name}")
        (server[0] / name).write_bytes(buffer.getvalue())
        return server[0] / name, tmp_path / "torch" / "hub" / "checkpoints" / name

    return publish


def test_published_weights_are_downloaded_once(publish, capsys):
    served, cached = publish({"conv1.weight": torch.zeros(1)})
    assert find_weights("resnet18", offline=True) == (
        None,
        f"{cached} does not hold the published ones, and --offline fetches none",
    )
    assert find_weights("resnet18") == ("imagenet_v1", f"imagenet_v1, now in {cached}")
    assert "downloading resnet18's published weights from http://" in capsys.readouterr().out
    served.unlink()
    for offline in (False, True):
        assert find_weights("resnet18", offline) == ("imagenet_v1", f"imagenet_v1, in {cached}")


def test_a_damaged_file_in_the_cache_is_not_used_and_is_replaced_by_a_download(publish):
    served, cached = publish({"conv1.weight": torch.zeros(1)})
    cached.parent.mkdir(parents=True)
    cached.write_bytes(served.read_bytes()[:-100])
    assert find_weights("resnet18", offline=True) == (
        None,
        f"{cached} is damaged, and --offline fetches none",
    )
    assert find_weights("resnet18")[0] == "imagenet_v1" and cached.read_bytes() == served.read_bytes()


@pytest.mark.parametrize("fault", ["absent", "damaged", "no network"])
def test_weights_that_cannot_be_downloaded_leave_nothing_and_a_sentence(publish, monkeypatch, fault):
    served, cached = publish({"conv1.weight": torch.zeros(1)})
    if fault == "absent":
        served.unlink()
    elif fault == "damaged":
        served.write_bytes(b"PK" + bytes(50))
    else:
        monkeypatch.setattr(ResNet18_Weights.IMAGENET1K_V1.value, "url", f"http://127.0.0.1:9/{served.name}")
    weights, why = find_weights("resnet18")
    reason = {"absent": "404", "damaged": "invalid hash value", "no network": "refused"}[fault]
    assert weights is None and "cannot be downloaded (" in why and reason in why and "\n" not in why
    assert list(cached.parent.iterdir()) == []
    with pytest.raises(
        OSError, match=f"cannot be downloaded .*{reason}.*Fetch http.* by hand and put it into"
    ):
        create_backbone("resnet18", weights="imagenet_v1")


def test_a_chosen_recipe_trains_from_cached_weights_else_from_random_ones_and_says_so(
    publish, folder, tmp_path, monkeypatch
):
    monkeypatch.setattr(choosing, "measure_pace", lambda *args: Pace(0.01, 0.01))
    served, cached = publish(resnet18().state_dict())

    def choose(name):
        return choose_recipe(folder, tmp_path / name, CPU.device, overrides=SMALL[1:], offline=True)

    config, reasons, _ = choose("without")
    assert config.model.backbone == {"name": "resnet18", "width": 32}
    assert any("from random weights, as" in reason and "--offline" in reason for reason in reasons)
    cached.parent.mkdir(parents=True)
    shutil.copy(served, cached)
    config, reasons, datasets = choose("with")
    assert config.model.backbone["weights"] == "imagenet_v1"
    assert any(f"with published weights (imagenet_v1, in {cached})" in reason for reason in reasons)
    model = Run(config, tmp_path / "with", CPU.device, datasets=datasets).training.model
    assert torch.equal(model.backbone.stage1.conv1.weight, torch.load(cached)["conv1.weight"])


# Epochs


def test_a_budget_buys_the_epochs_that_fit_into_it_with_their_evaluations():
    # 1,800 s less a twentieth, less four evaluations of 10 s, over 20 s an epoch.
    epochs, used, (settings, reason) = choose_epochs(Pace(0.1, 0.1), 200, 100, 1800)
    assert (epochs, used) == ((1710 - 40) // 20, 200)
    assert settings["train"]["eval_every"] == -(-epochs // 4) and "10.0 images/s" in reason


def test_a_budget_below_one_epoch_trains_on_a_part_of_the_pictures():
    epochs, used, _ = choose_epochs(Pace(0.1, 0.05), 100_000, 100, 300)
    assert epochs == 1 and used == int((285 - 5) / 0.1)


def test_without_a_budget_small_sets_get_more_epochs():
    assert [choose_epochs(Pace(0.1, 0.1), n, 10, None)[0] for n in (100, 1250, 100_000)] == [100, 20, 12]


# The whole


@pytest.fixture
def folder(tmp_path):
    """Ten pictures with an XML beside each: dark squares on noise."""
    rng = np.random.default_rng(0)
    path = tmp_path / "mine"
    path.mkdir()
    for number in range(10):
        pixels = rng.integers(120, 255, (64, 80, 3), dtype=np.uint8)
        x, y = rng.integers(4, 30, 2)
        pixels[y : y + 24, x : x + 24] = 20
        Image.fromarray(pixels).save(path / f"{number}.png")
        box = f"<xmin>{x + 1}</xmin><ymin>{y + 1}</ymin><xmax>{x + 24}</xmax><ymax>{y + 24}</ymax>"
        (path / f"{number}.xml").write_text(
            f"<annotation><filename>{number}.png</filename><size><width>80</width><height>64</height></size>"
            f"<object><name>square</name><bndbox>{box}</bndbox></object></annotation>"
        )
    return path


def test_a_recipe_is_chosen_with_a_reason_for_each_part_and_a_split(folder, tmp_path):
    config, reasons, _ = choose_recipe(
        folder, tmp_path / "run", CPU.device, overrides=SMALL, minutes=1, offline=True
    )
    told = "\n".join(reasons)
    for part in (
        "format voc",
        "split",
        "anchors of",
        "objects a picture",
        "augmentation",
        "AdamW",
        "epochs of 8 pictures",
    ):
        assert part in told
    assert config.model.backbone["width"] == 8 and config.train.epochs > 10
    listed = [(tmp_path / "run" / f"{part}.txt").read_text().splitlines() for part in ("train", "val")]
    assert [len(lines) for lines in listed] == [8, 2] and not set(listed[0]) & set(listed[1])


def test_a_choice_is_a_function_of_the_data_but_for_the_epochs(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(choosing, "measure_pace", lambda *args: Pace(0.01, 0.01))
    recipes = [
        choose_recipe(folder, tmp_path / "run", CPU.device, overrides=SMALL, offline=True)[0].model_dump()
        for _ in "ab"
    ]
    assert recipes[0] == recipes[1]


@pytest.mark.parametrize("seconds_an_image", [0.01, 10.0])
def test_annotations_are_read_once_and_give_the_data_that_the_recipe_names(
    folder, tmp_path, monkeypatch, seconds_an_image
):
    read, asked = VocSource.read, []
    monkeypatch.setattr(VocSource, "read", lambda *args: asked.append(args) or read(*args))
    monkeypatch.setattr(choosing, "measure_pace", lambda *args: Pace(seconds_an_image, 0.1))
    run = tmp_path / "run"
    config, _, datasets = choose_recipe(folder, run, CPU.device, overrides=SMALL, minutes=1, offline=True)
    trained = Run(config, run, CPU.device, datasets=datasets).fingerprints
    assert len(asked) == 1
    named = build_datasets(config.data)
    assert [trained["train"], trained["val"]] == [fingerprint(dataset) for dataset in named]


def test_norms_over_all_processes_are_timed_by_one_alone(tiny_config, monkeypatch):
    monkeypatch.setattr(timing, "_SECONDS", 0)
    config = tiny_config("model.backbone.norm=sync")
    pace = timing.measure_pace(config, build_dataset(config.data, "train"), CPU.device)
    assert pace.training > 0 and pace.evaluation > 0


def test_a_budget_that_is_too_short_gets_a_smaller_network(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(choosing, "measure_pace", lambda *args: Pace(1.0, 0.1))
    config, reasons, _ = choose_recipe(folder, tmp_path / "run", CPU.device, minutes=1, offline=True)
    assert config.model.backbone == {"name": "resnet18", "width": 16}
    assert any("a larger network would get fewer" in reason for reason in reasons)


def test_a_choice_that_takes_long_leaves_half_of_the_budget_to_the_training(folder, tmp_path, monkeypatch):
    now = [0.0]

    def measure(*args):
        now[0] += 50
        return Pace(0.1, 0.01)

    monkeypatch.setattr(choosing.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(choosing, "measure_pace", measure)
    options = {"overrides": SMALL, "minutes": 1, "offline": True}
    config, *_ = choose_recipe(folder, tmp_path / "run", CPU.device, **options)
    training = config.train.epochs * 8 * 0.1
    assert 25 < training < 30


def test_a_budget_below_one_epoch_draws_its_pictures_from_all_of_them(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(choosing, "measure_pace", lambda *args: Pace(10.0, 0.1))
    config, reasons, _ = choose_recipe(
        folder, tmp_path / "run", CPU.device, overrides=SMALL, minutes=1, offline=True
    )
    dataset = build_dataset(config.data, "train")
    assert config.train.epochs == 1 and len(dataset) == int((57 - 0.2) / 10)
    assert "these pictures are drawn from 8" in reasons[-1]


def test_one_command_trains_from_a_folder_and_resumes(folder, tmp_path):
    run = tmp_path / "run"
    command = [sys.executable, "tools/train.py", str(folder), "--output", str(run), "--offline", *SMALL]

    def train(*arguments):
        return subprocess.run([*command, *arguments], cwd=ROOT, capture_output=True, text=True)

    done = train("train.epochs=1")
    assert done.returncode == 0, done.stderr
    assert "format voc" in done.stdout and "best AP " in done.stdout
    assert load_config(run / "config.yaml").data.class_names == ("square",)
    for name in ("best.safetensors", "found.jpg", "train.txt", "val.txt"):
        assert (run / name).exists(), name
    refused = train("train.epochs=1")
    assert refused.returncode == 1 and "holds a run already" in refused.stderr
    resumed = train("--resume")
    assert resumed.returncode == 0, resumed.stderr
    evaluate = [sys.executable, "tools/evaluate.py", "--weights", str(run / "best.safetensors")]
    done = subprocess.run([*evaluate, "--output", str(run / "val")], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    metrics = json.loads((run / "val" / "metrics.json").read_text())

    # The data move, and the run stays.
    moved = folder.rename(tmp_path / "moved")
    resumed = train("--resume", f"data.root={moved}")
    assert resumed.returncode == 0, resumed.stderr
    evaluate += [f"data.root={moved}", "--output", str(tmp_path / "again")]
    done = subprocess.run(evaluate, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "again" / "metrics.json").read_text()) == metrics


@pytest.mark.slow
def test_a_signal_to_all_its_processes_while_a_recipe_is_chosen_ends_the_command_in_a_sentence(
    folder, tmp_path
):
    large = ("model.min_size=600", "model.max_size=800", "loader.num_workers=1")
    command = [sys.executable, "tools/train.py", str(folder), "--offline", *large]
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    for number in (signal.SIGINT, signal.SIGTERM):
        run = tmp_path / number.name
        process = subprocess.Popen(
            [*command, "--output", str(run)], cwd=ROOT, **pipes, start_new_session=True
        )
        deadline = time.monotonic() + 60
        # After the split comes the timing of some updates.
        while not (run / "val.txt").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(1)
        os.killpg(process.pid, number)
        assert (process.communicate(timeout=60)[1], process.returncode) == ("stopped\n", 130)
