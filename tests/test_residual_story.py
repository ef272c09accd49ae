"""The experiments of benchmarks/residual.py, in their quick form, and the effects that they show."""

import os
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean

import numpy as np
import pytest
import torch
from PIL import Image
from short_runs import stop_after
from torch import nn

from backbones.cifar import cifar_resnet
from benchmarks import residual
from benchmarks.experiments import detectors
from benchmarks.experiments.classifiers import UNTRAINED, ClassifierJob
from benchmarks.experiments.comparisons import degradation, order, shortcuts
from benchmarks.experiments.experiment import by_arm, completed, read_results
from benchmarks.experiments.inside import (
    block_places,
    bypass,
    conv3x3_layers,
    gradient_norms,
    response_deviations,
    with_blocks_swapped,
    without_blocks,
)
from benchmarks.experiments.scale import full_scale, quick_scale, recipe
from benchmarks.experiments.tables import markdown
from detector.data.shapes import draw_picture
from detector.files import read_json
from detector.stop import Interrupted

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tmp_path_factory.mktemp("datasets")


@pytest.fixture
def run(data, tmp_path, capsys):
    """run("why", ...) -> what the quick form of a command printed, with its files in tmp_path."""

    def call(*arguments, status=0):
        output = f"--output={tmp_path / 'output'}"
        found = residual.main([*arguments, "--quick", f"--data={data}", "--processes=1", output])
        out, error = capsys.readouterr()
        assert found == status, error
        return out + error

    return call


def read(tmp_path, name):
    assert (tmp_path / "output" / f"{name}.png").stat().st_size < 100_000
    record = read_json(tmp_path / "output" / f"{name}.json")
    for command in record["commands"]:
        assert {"cpu", "command", "date"} <= command.keys()
    trained = [name for command in record["commands"] for name in command["trainings"]]
    assert sorted(trained) == sorted(record["results"]) and record["seeds"] == [0]
    return record["results"]


def test_degradation_keeps_curves_and_trains_nothing_twice(run, tmp_path, monkeypatch):
    run("degradation", "--only", "plain-14/0")
    assert not list((tmp_path / "output").glob("*.png"))
    printed = run("degradation")
    results = read(tmp_path, "degradation")
    assert list(by_arm(results)) == ["plain-14", "resnet-14"]
    for result in results.values():
        assert [point["step"] for point in result["curve"]] == [2, 4]
        assert all(0 <= p["train_error"] <= 1 and 0 <= p["test_error"] <= 1 for p in result["curve"])
    assert results["plain-14/0"]["parameters"] == results["resnet-14/0"]["parameters"]
    monkeypatch.setattr(ClassifierJob, "__call__", lambda job, folder: pytest.fail("it trains again"))
    table = printed[printed.index("degradation\n| ") :]
    document = tmp_path / "story.md"
    document.write_text("before\n<!-- degradation -->\nold\n<!-- end of degradation -->\nafter\n")
    assert run("degradation") == table == run("degradation", "--tables", f"--document={document}")
    text = document.read_text()
    assert table.partition("\n")[2] in text and "old" not in text
    assert "![degradation](output/degradation.png)" in text
    assert text.startswith("before\n") and text.endswith("after\n")
    assert "holds results of other settings" in run("degradation", "train.lr=0.1", status=1)
    assert "--only names plain-9/0; accepted: plain-14/0, resnet-14/0" in run(
        "degradation", "--only", "plain-9/0", status=1
    )


def test_why_measures_every_layer_and_every_block(run, tmp_path):
    run("why")
    result = read(tmp_path, "why")["resnet-14/0"]
    assert len(result["gradients_at_start"]) == len(result["gradients_after"]) == 13
    assert len(result["response_deviations"]) == 12 and len(result["without_one"]) == 6
    assert set(result["without_several"]) == {"1", "3"} and len(result["two_swapped"]) == 1
    assert result["gradients_at_start"] != result["gradients_after"]
    assert result["error"] == pytest.approx(result["curve"][-1]["test_error"])


def test_very_deep_networks_train_with_recomputed_activations(run, tmp_path):
    run("thousand")
    results = read(tmp_path, "thousand")
    assert list(results) == [f"{d} {o}/0" for d in (29, 14) for o in ("original", "full_preactivation")]
    for result in results.values():
        assert result["curve"][-1]["step"] == 2
        assert result["peak_mb"] > 0 and result["seconds_per_step"] > 0


def test_families_compare_parameters_gates_and_noise(run, tmp_path):
    run("families")
    results = read(tmp_path, "families")
    assert results["densenet121, width 8/0"]["parameters"] < results["resnet18, width 8/0"]["parameters"]
    assert len(results["se/0"]["gate_means"]) == len(results["se/0"]["gate_class_deviations"]) == 3
    assert all(0 < gate < 1 for gate in results["se/0"]["gate_means"])
    assert "shrinkage_cw, noise 60/0" in results


def draw_voc(root):
    """A VOC folder of eight drawn pictures: four to train, and two each to validate and test."""
    for part in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (root / part).mkdir(parents=True)
    for number in range(8):
        image, objects = draw_picture(np.random.default_rng(number), 96)
        Image.fromarray(image).save(root / f"JPEGImages/{number}.jpg")
        parts = "".join(
            f"<object><name>{'cell' if label == 1 else 'bolt'}</name><bndbox><xmin>{a}</xmin><ymin>{b}</ymin>"
            f"<xmax>{c}</xmax><ymax>{d}</ymax></bndbox></object>"
            for label, (a, b, c, d), _ in objects
        )
        size = "<size><width>96</width><height>96</height><depth>3</depth></size>"
        text = f"<annotation><filename>{number}.jpg</filename>{size}{parts}</annotation>"
        (root / f"Annotations/{number}.xml").write_text(text)
    for split, numbers in (("train", "0123"), ("val", "45"), ("test", "67")):
        (root / f"ImageSets/Main/{split}.txt").write_text("\n".join(numbers))


@pytest.fixture(scope="module")
def voc(data):
    for name in detectors.DATA:
        draw_voc(data / name)
    return data


def test_detectors_are_scored_on_the_test_split_where_there_is_one(run, tmp_path, voc, monkeypatch):
    monkeypatch.setattr(detectors, "ARMS", {"original": ()})
    run("detectors")
    results = read(tmp_path, "detectors")
    assert {name: result["split"] for name, result in results.items()} == {
        "bccd original/0": "test",
        "bccd pre-trained/0": "test",
        "foda original/0": "val",
        "foda pre-trained/0": "val",
    }
    for name, result in results.items():
        assert 0 <= result["AP"] <= result["AP50"] <= 1 and result["minutes"] > 0
        assert ("classifier_error" in result) == ("pre-trained" in name)


def test_a_pretrained_detector_trains_as_much_less_as_its_classifier_took(tmp_path, voc, monkeypatch):
    job = detectors.detectors(replace(quick_scale(voc), share=0.5)).jobs["bccd pre-trained/0"]
    monkeypatch.setattr(ClassifierJob, "seconds", lambda job: 30.0)
    monkeypatch.setattr(detectors.DetectorJob, "seconds", lambda job: 140.0)
    assert job.epochs_left(tmp_path / "job") == 11  # of 14, whose time is 140 s
    monkeypatch.setattr(ClassifierJob, "seconds", lambda job: 60.0)
    assert job.epochs_left(tmp_path / "job") == 11  # as it was when the job began


def test_a_stopped_training_goes_on_to_the_same_result(data, tmp_path, monkeypatch):
    job = ClassifierJob(recipe(quick_scale(data), {"name": "cifar_resnet", "depth": 8}, 0))
    whole = job(tmp_path / "whole")
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        with pytest.raises(Interrupted):
            job(tmp_path / "stopped")
    assert job(tmp_path / "stopped")["curve"] == whole["curve"]


def test_a_training_that_overflows_is_a_result_and_the_others_go_on(run, tmp_path, monkeypatch):
    train = ClassifierJob.__call__

    def overflow(job, folder):
        if job.config.model.backbone.get("shortcut") == "dropout":
            raise FloatingPointError("a loss is not finite")
        return train(job, folder) | {"seconds_per_step": float("nan")}

    monkeypatch.setattr(ClassifierJob, "__call__", overflow)
    monkeypatch.setattr(
        "benchmarks.experiments.comparisons.SHORTCUTS", {"dropout": {"shortcut": "dropout"}, "A": {}}
    )
    printed = run("shortcuts")
    results = read(tmp_path, "shortcuts")
    assert results["dropout/0"] == {"failed": "a loss is not finite"}
    assert results["A/0"]["seconds_per_step"] is None
    assert "| dropout | 1 failed |  |  |  | fails |" in printed and "| A | 1 | " in printed
    monkeypatch.setattr(ClassifierJob, "__call__", lambda job, folder: pytest.fail("it trains again"))
    run("shortcuts")


def test_a_row_is_of_the_seeds_that_did_not_fail(tmp_path):
    result = {"parameters": 7, "curve": [{"step": 1, "train_error": 0.25, "test_error": 0.5}]}
    results = {"A/0": result, "A/1": {"failed": "a loss is not finite"}}
    table = markdown(shortcuts(full_scale(tmp_path)), results)
    assert "| A | 1, 1 failed | 7 | 25.0 | 50.0 | 6.61 |" in table


@dataclass(frozen=True)
class ProcessJob:
    """Says the process that it runs in."""

    def __call__(self, folder):
        return {"process": os.getpid()}


@pytest.mark.slow
def test_each_training_has_a_process_of_its_own(tmp_path):
    jobs = {f"A/{seed}": ProcessJob() for seed in range(3)}
    found = {result["process"] for _, result in completed(jobs, tmp_path, processes=2)}
    assert len(found) == 3 and os.getpid() not in found


def test_the_document_s_tables_are_those_of_the_json_files():
    text = (ROOT / "docs" / "residual.md").read_text(encoding="utf-8")
    for name, make in (residual.ALL | residual.APART).items():
        results = read_results(ROOT / "benchmarks" / "residual" / f"{name}.json")
        assert markdown(make(full_scale(Path("datasets"))), results) in text, name


@pytest.mark.parametrize("experiment", [degradation, shortcuts, order])
def test_the_arms_of_a_comparison_differ_in_the_network_alone(experiment, tmp_path):
    jobs = experiment(full_scale(tmp_path)).jobs
    assert {len(jobs) for jobs in by_arm(jobs).values()} == {3}
    seeds = {name: job.config.train.seed for name, job in jobs.items()}
    assert all(name.endswith(f"/{seed}") for name, seed in seeds.items())
    others = {job.config.model_copy(update={"model": None}).model_dump_json() for job in jobs.values()}
    assert len(others) == 3
    networks = {(str(job.config.model.backbone), job.last_norm) for job in jobs.values()}
    assert len(networks) == len(by_arm(jobs))


def test_the_plan_adds_up_the_hours(run, monkeypatch):
    monkeypatch.setattr(ClassifierJob, "seconds", lambda job: 7200.0)
    lines = run("all", "--plan").splitlines()
    assert lines[2].split() == ["degradation", "2", "2.000"]
    assert lines[-1].split() == ["together", "31", "31.000"]


def test_the_estimate_of_a_training_is_positive(data):
    assert ClassifierJob(recipe(quick_scale(data), {"name": "cifar_resnet", "depth": 8}, 0)).seconds() > 0


def test_noise_is_added_to_training_and_test_pictures(data):
    config = recipe(quick_scale(data), {"name": "cifar_resnet", "depth": 8}, 0)
    clean, noisy = (ClassifierJob(config, noise=noise).open(UNTRAINED) for noise in (0, 20))
    for split in ("train_set", "val_set"):
        one, two = (getattr(run, split).images.astype(float) for run in (clean, noisy))
        assert 10 < (one - two).std() < 21


def test_the_last_norm_begins_with_other_weights_and_keeps_what_it_learns(data, tmp_path):
    backbone = {"name": "cifar_resnet", "depth": 8, "order": "full_preactivation"}
    job = ClassifierJob(recipe(quick_scale(data), backbone, 0), last_norm=4.0)

    def first_weights(folder):
        layers = job.open(folder).training.model.network.modules()
        return [layer.weight[0].item() for layer in layers if isinstance(layer, nn.BatchNorm2d)]

    *others, last = first_weights(UNTRAINED)
    assert (set(others), last) == ({1.0}, 4.0)
    job(tmp_path)
    assert first_weights(tmp_path)[-1] not in (1.0, 4.0)


# Looking into networks


def network(depth=20, **options):
    torch.manual_seed(0)
    return cifar_resnet(depth, **options)


def batch(count=16):
    torch.manual_seed(1)
    return torch.randn(count, 3, 16, 16), torch.randint(0, 10, (count,))


def test_gradient_norms_are_those_of_autograd():
    trained, (images, labels) = network().train(), batch()
    found = gradient_norms(trained, images, labels)
    nn.functional.cross_entropy(trained(images), labels).backward()
    expected = [float(layer.weight.grad.norm()) for layer in conv3x3_layers(trained)]
    assert found == pytest.approx(expected, rel=1e-4) and len(found) == 19


def test_a_network_without_a_block_skips_it_and_the_trained_one_stays():
    whole, (images, _) = network().eval(), batch()
    dropped = without_blocks(whole, ["stage1.1"])
    before = whole(images)
    features = whole.stem(images)
    for block in (whole.stage1[0], whole.stage1[2], *whole.stage2, *whole.stage3):
        features = block(features)
    assert torch.equal(dropped(images), whole.fc(features.mean((2, 3))))
    assert torch.equal(whole(images), before)


@pytest.mark.parametrize("shortcut", ["A", "B", "none"])
def test_every_block_can_be_bypassed(shortcut):
    whole, x = network(shortcut=shortcut).eval(), torch.rand(2, 16, 16, 16)
    for block in (*whole.stage1, *whole.stage2):
        assert bypass(block)(x).shape == block(x).shape
        x = block(x)
    assert torch.equal(bypass(network(shortcut="none").stage1[1])(x[:, :16]), x[:, :16])


def test_two_blocks_change_places():
    whole = network().eval()
    swapped = with_blocks_swapped(whole, "stage2.1", "stage2.2")
    assert torch.equal(swapped.stage2[1].branch.conv1.weight, whole.stage2[2].branch.conv1.weight)
    assert torch.equal(swapped.stage2[2].branch.conv1.weight, whole.stage2[1].branch.conv1.weight)


def test_response_deviations_are_those_behind_each_norm():
    whole, (images, _) = network().eval(), batch()
    found = response_deviations(whole, images)
    first = whole.stage1[0].branch
    x = whole.stem(images)
    assert len(found) == 18 and len(block_places(whole)) == 9
    assert found[0] == pytest.approx(first.bn1(first.conv1(x)).std().item(), rel=1e-4)


def test_gradients_of_a_plain_network_grow_by_orders_of_magnitude_and_those_of_a_residual_one_by_about_ten():
    images, labels = batch(32)
    plain, residual_net = (
        gradient_norms(network(56, **options), images, labels) for options in ({"shortcut": "none"}, {})
    )
    assert plain[1] / plain[-1] > 500
    assert 3 < residual_net[1] / residual_net[-1] < 40


def gratings(count, seed):
    """Pictures (count, 3, 16, 16) of stripes in ten directions, with noise, and their labels (count,)."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(10, size=count)
    angles, phases = labels * np.pi / 10, rng.uniform(0, 2 * np.pi, count)
    y, x = np.mgrid[:16, :16]
    waves = x * np.cos(angles)[:, None, None] + y * np.sin(angles)[:, None, None] + phases[:, None, None]
    images = np.sin(waves)[:, None] + rng.normal(0, 0.5, (count, 3, 16, 16))
    return torch.tensor(images, dtype=torch.float32), torch.from_numpy(labels)


def train_on_gratings(trained, steps):
    optimizer = torch.optim.SGD(trained.train().parameters(), lr=0.05, momentum=0.9)
    for step in range(steps):
        images, labels = gratings(64, step)
        loss = nn.functional.cross_entropy(trained(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return trained.eval()


@torch.no_grad()
def error(trained):
    images, labels = gratings(500, 10**6)
    return float((trained(images).argmax(1) != labels).float().mean())


@pytest.mark.slow
def test_residual_networks_lose_little_without_a_block_and_plain_ones_collapse():
    lost = {}
    for kind, options in {"plain": {"shortcut": "none"}, "residual": {}}.items():
        trained = train_on_gratings(network(20, **options), 400)
        assert error(trained) < 0.3
        lost[kind] = [error(without_blocks(trained, [place])) for place in block_places(trained)]
    assert min(lost["plain"]) > 0.5
    assert np.median(lost["residual"]) < 0.1
    assert mean(lost["plain"]) > 3 * mean(lost["residual"])
