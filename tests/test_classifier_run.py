"""Classifiers train on the engine of detectors, and their files start detectors."""

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import several
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file
from short_runs import CPU, lines, record_streams, same_tensors, stop_after

import detector.classify.run
import detector.training_run
from backbones import IMAGENET, Preprocessing, create_backbone
from detector import processes
from detector.build import build_model
from detector.checkpoint import load_checkpoint, load_training_state
from detector.classify.cifar import load_cifar
from detector.classify.classifier import build_classifier
from detector.classify.config import ClassifierConfig
from detector.classify.pictures import measure_preprocessing
from detector.classify.run import ClassifierRun, mean_color
from detector.config import load_config, parse_config
from detector.engine import AMP_DTYPES, NonFiniteLossError
from detector.run_log import RunLog
from detector.stop import Interrupted

ROOT = Path(__file__).resolve().parent.parent
RECIPES = sorted((ROOT / "configs" / "classify").glob("*.yaml"))


@pytest.fixture(autouse=True)
def no_curves(monkeypatch):
    """Curves take longer than the epochs here."""
    monkeypatch.setattr(detector.training_run, "plot_curves", lambda log_path, png_path: None)


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """make("train.epochs=3", ...) -> a recipe on 24 generated pictures in batches of 8."""
    root = tmp_path_factory.mktemp("shapes32")
    recipe = {
        "model": {"backbone": {"name": "cifar_resnet", "depth": 8}},
        "data": {"format": "shapes", "root": str(root), "num_train": 24, "num_test": 10},
        "augment": {"padding": 4},
        "train": {"epochs": 3, "batch_size": 8, "warmup_steps": 0, "ema": 0.8},
    }

    def make(*overrides):
        return parse_config(recipe, overrides, kind=ClassifierConfig)

    make().data.load("train")
    return make


@pytest.fixture(scope="module")
def unbroken(shapes, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "unbroken"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(detector.training_run, "plot_curves", lambda log_path, png_path: None)
        metrics = ClassifierRun(shapes(), folder, CPU).train()
    return folder, metrics


def test_a_run_leaves_weights_numbers_and_pictures(unbroken):
    folder, metrics = unbroken
    names = {path.name for path in folder.iterdir()}
    assert {"best.safetensors", "last.safetensors", "config.yaml", "first_batch.jpg", "found.jpg"} <= names
    assert np.sum(metrics["confusion"]) == metrics["pictures"] == 10
    right = sum(metrics["confusion"][k][k] for k in range(10))
    assert metrics["top1"] == right / 10 and metrics["top5"] >= metrics["top1"]
    logged = lines(folder, "val")
    assert [line["epoch"] for line in logged] == [1, 2, 3]
    assert max(line["top1"] for line in logged) == metrics["top1"]
    assert {"loss", "lr", "images_per_second"} <= lines(folder, "train")[0].keys()


def test_no_two_uses_draw_from_one_stream(shapes, tmp_path, monkeypatch):
    uses = record_streams(monkeypatch)
    train_tiny(shapes(), tmp_path)
    places = {use for each in uses.values() for use in each}
    assert {name for name, *_ in places} >= {"loader.py", "augment.py", "engine.py"}
    assert [each for each in uses.values() if len({use[0] for use in each}) > 1] == []


def test_a_stopped_run_resumes_bit_equal(shapes, unbroken, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_after(patch, 4)
        with pytest.raises(Interrupted, match="after update 4"):
            ClassifierRun(shapes(), tmp_path, CPU).train()
    torch.manual_seed(99)
    metrics = ClassifierRun(shapes(), tmp_path, CPU, resume=True).train()
    one, two = (load_training_state(f / "training_state.pt") for f in (tmp_path, unbroken[0]))
    assert same_tensors(one["model"], two["model"]) and same_tensors(one["ema"], two["ema"])
    assert metrics == unbroken[1] and lines(tmp_path, "val") == lines(unbroken[0], "val")


def test_other_data_settings_and_a_used_folder_are_refused(shapes, unbroken):
    folder, _ = unbroken
    with pytest.raises(ValueError, match="holds a run already"):
        ClassifierRun(shapes(), folder, CPU)
    with pytest.raises(ValueError, match="train.lr was 0.1, now 0.2"):
        ClassifierRun(shapes("train.lr=0.2"), folder, CPU, resume=True)


def train_tiny(config, folder):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(detector.training_run, "plot_curves", lambda *paths: None)
        return ClassifierRun(config, folder, CPU).train()


def test_two_processes_count_every_picture_once(shapes, tmp_path):
    config = shapes("train.batch_size=4", "train.epochs=1", "loader.eval_batch_size=3")
    metrics, nothing = several.run(2, train_tiny, config, tmp_path)
    assert metrics["pictures"] == 10 and nothing == {}


def validate_with_other_statistics(config, folder):
    """The validation of a network whose batch norms have statistics of their own in each process."""
    run = ClassifierRun(config, folder, CPU)
    for name, buffer in run.training.model.named_buffers():
        if name.endswith("running_mean"):
            buffer += processes.rank()
    return run.validate(RunLog(None))


def test_two_processes_validate_with_the_statistics_of_the_first(shapes, tmp_path):
    config = shapes("loader.eval_batch_size=3")
    alone = validate_with_other_statistics(config, tmp_path)
    for metrics in several.run(2, validate_with_other_statistics, config, tmp_path):
        assert metrics["confusion"] == alone["confusion"]
        assert metrics["losses"]["loss"] == pytest.approx(alone["losses"]["loss"], rel=1e-6)


@pytest.mark.parametrize("amp", ["none", "bf16"])
def test_a_backbone_learns_labels_and_its_file_starts_a_detector(shapes, tmp_path, tiny_config, amp):
    config = shapes("model.backbone={name: resnet18, width: 8}", "train.epochs=1", f"train.amp={amp}")
    run = ClassifierRun(config, tmp_path, CPU)
    run.train()
    file = tmp_path / "best.safetensors"
    recipe = tiny_config(f"model.backbone={{name: resnet18, width: 8, weights: {file}}}")
    model = build_model(recipe.model, 5)
    trained = run.training.evaluated_model.network.state_dict()
    assert torch.equal(model.backbone.stage1.conv1.weight, trained["trunk.stage1.conv1.weight"])
    assert model.transform.preprocessing == measure_preprocessing(run.train_set)
    with pytest.raises(ValueError, match="holds tensors but no detector"):
        load_checkpoint(file)
    other = tiny_config(f"model.backbone={{name: resnet18, width: 16, weights: {file}}}")
    with pytest.raises(ValueError, match="does not fit resnet18"):
        build_model(other.model, 5)
    assert AMP_DTYPES[config.train.amp] is (None if amp == "none" else torch.bfloat16)


def test_the_weights_of_a_classifier_come_back(shapes):
    train_set = shapes().data.load("train")
    for backbone in ({"name": "resnet18", "width": 8}, {"name": "cifar_resnet", "depth": 8}):
        one, two = (build_classifier(backbone, 10, measure_preprocessing(train_set)) for _ in range(2))
        two.load_weights(one.weights())
        images = torch.from_numpy(train_set.images[:2])
        assert torch.equal(one.eval()(images), two.eval()(images))


def test_a_backbone_s_own_weights_bring_their_preprocessing(shapes, tmp_path):
    backbone = {"name": "resnet18", "width": 8}
    save_file(create_backbone(**backbone).state_dict(), tmp_path / "w.safetensors")
    measured = measure_preprocessing(shapes().data.load("train"))
    assert build_classifier(backbone, 3, measured).preprocessing == measured
    with_weights = {**backbone, "weights": str(tmp_path / "w.safetensors")}
    assert build_classifier(with_weights, 3, measured).preprocessing == IMAGENET
    # A run that resumes reads no weights, and gives the preprocessing that it was saved with.
    assert build_classifier(with_weights, 3, measured, load_weights=False).preprocessing == measured


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_recipes_are_complete_and_say_their_command(path):
    config = load_config(path, kind=ClassifierConfig)
    first = path.read_text().splitlines()[0]
    assert first.startswith(f"# python tools/train_classifier.py configs/classify/{path.name}")
    build_classifier(config.model.backbone, 10, IMAGENET, load_weights=False)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.backbone=cifar_resnet", "depth is missing"),
        ("model.backbone={name: cifar_resnet, depth: 21}", "depth is 21"),
        ("model.backbone={name: resnet18, widht: 3}", "widht"),
        ("data.format=foldr", "data.format is 'foldr'; did you mean 'folder'"),
        ("data={root: x}", "data.format is missing"),
        ("data.num_train=0", "data.num_train is 0"),
        ("train.best_metric=AP", "train.best_metric is 'AP'; accepted: top1, top5, mean_accuracy"),
        ("model.size=0", "model.size is 0"),
        ("augment.scale=[0.5, 2]", r"augment.scale is \(0.5, 2.0\); accepted: two positive numbers up to 1"),
        ("data={format: folder, root: x}", "model.size is missing; class folders need the side"),
        ("model.size=16", "augment.padding is 4; with model.size, which cuts and resizes, accepted: 0"),
    ],
)
def test_a_wrong_setting_is_a_sentence(shapes, tmp_path, override, message):
    with pytest.raises(ValueError, match=message):
        ClassifierRun(shapes(override), tmp_path, CPU)


def test_a_last_batch_of_one_picture_has_another_beside_it(shapes, tmp_path):
    overrides = ["model.backbone={name: resnet18, width: 8}", "train.batch_size=23", "train.epochs=1"]
    run = ClassifierRun(shapes(*overrides), tmp_path, CPU)
    assert sorted(map(len, run.batches)) == [2, 23]
    run.train()
    assert run.training.step == 2


def test_padding_has_the_colour_that_the_weights_call_mean():
    assert mean_color(Preprocessing((0.5, 0.4, 0.2), (1, 1, 1))) == (128, 102, 51)
    assert mean_color(Preprocessing((103.53, 116.28, 123.675), (1, 1, 1), "bgr", 255.0)) == (124, 116, 104)


def test_a_run_starts_from_weights_that_expect_bgr(shapes, tmp_path, monkeypatch):
    preprocessing = Preprocessing((103.53, 116.28, 123.675), (1, 1, 1), "bgr", 255.0)
    metadata = {"preprocessing": json.dumps(asdict(preprocessing))}
    backbone = {"name": "resnet18", "width": 8}
    save_file(create_backbone(**backbone).state_dict(), tmp_path / "w.safetensors", metadata=metadata)
    monkeypatch.setattr(
        "detector.classify.run.measure_preprocessing", lambda pictures: pytest.fail("measured")
    )
    config = shapes(
        f"model.backbone={{name: resnet18, width: 8, weights: {tmp_path / 'w.safetensors'}}}",
        "train.epochs=1",
    )
    run = ClassifierRun(config, tmp_path / "run", CPU)
    run.train()
    assert run.preprocessing == preprocessing
    assert ClassifierRun(config, tmp_path / "run", CPU, resume=True).preprocessing == preprocessing


@pytest.fixture
def noisy_folders(tmp_path):
    """Two class folders of 12 noisy pictures for training and 6 for validation, one of each cut short."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 6)):
        for name, value in (("dark", 0), ("light", 150)):
            (tmp_path / "data" / split / name).mkdir(parents=True)
            for number in range(count):
                image = Image.fromarray(rng.integers(value, value + 100, (20, 24, 3), np.uint8))
                image.save(tmp_path / "data" / split / name / f"{number}.png")
        cut = tmp_path / "data" / split / "dark" / "3.png"
        cut.write_bytes(cut.read_bytes()[:700])
    return tmp_path / "data"


def folder_recipe(root, *overrides):
    recipe = {
        "model": {"backbone": {"name": "cifar_resnet", "depth": 8}, "size": 16},
        "data": {"format": "folder", "root": str(root)},
        "train": {"epochs": 1, "batch_size": 8, "warmup_steps": 0},
    }
    return parse_config(recipe, overrides, kind=ClassifierConfig)


@pytest.mark.parametrize("workers", [0, 1])
def test_pictures_that_fail_on_decoding_are_replaced_or_left_out(noisy_folders, tmp_path, capsys, workers):
    config = folder_recipe(noisy_folders, f"loader.num_workers={workers}")
    metrics = ClassifierRun(config, tmp_path / "run", CPU).train()
    out = capsys.readouterr().out
    assert metrics["pictures"] == 11
    for split, fate in (("train", "replaced by another"), ("val", "left out")):
        path = noisy_folders / split / "dark" / "3.png"
        assert out.count(f"{fate}: {path}") == 1
    events = lines(tmp_path / "run", "unreadable")
    assert len(events) == 1 and "3.png" in events[0]["message"]


def test_strict_ends_at_a_picture_that_fails_on_decoding(noisy_folders, tmp_path):
    with pytest.raises(ValueError, match="train/dark/3.png"):
        ClassifierRun(folder_recipe(noisy_folders, "data.strict=true"), tmp_path / "run", CPU).train()


def test_a_loss_that_is_not_finite_names_the_files(noisy_folders, tmp_path):
    run = ClassifierRun(folder_recipe(noisy_folders, "train.save_every=0"), tmp_path / "run", CPU)
    with torch.no_grad():
        next(run.training.model.network.parameters()).fill_(float("nan"))
    with pytest.raises(NonFiniteLossError, match=r"Pictures: .*train/(dark|light)/\d+\.png"):
        run.train()
    (path,) = (tmp_path / "run" / "nonfinite").glob("*.json")
    report = json.loads(path.read_text())
    assert len(report["pictures"]) == 8
    assert all(Path(p["file"]).parent.name == p["class"] for p in report["pictures"])


def test_mistakes_are_looked_for_in_all_classes(noisy_folders, tmp_path, monkeypatch):
    """Folders come class by class. Of the eleven readable pictures four are looked at, in both."""
    monkeypatch.setattr(detector.classify.run, "_LOOKED_AT", 4)
    run = ClassifierRun(folder_recipe(noisy_folders), tmp_path / "run", CPU)
    asked, given = [], run.val_loader.dataset.__getitems__
    run.train()
    monkeypatch.setattr(
        run.val_loader.dataset, "__getitems__", lambda keys: asked.extend(keys) or given(keys), False
    )
    run._save_found()
    classes = [run.val_set.labels[index] for _, index in asked]
    assert len(classes) == 4 and set(classes) == {0, 1}


def test_other_pictures_of_the_same_classes_are_refused_on_resuming(noisy_folders, tmp_path):
    config = folder_recipe(noisy_folders)
    ClassifierRun(config, tmp_path / "run", CPU).train()
    (noisy_folders / "val/light/5.png").rename(noisy_folders / "val/light/6.png")
    with pytest.raises(ValueError, match="data.val was 12 pictures, contents .*, now 12 pictures, contents"):
        ClassifierRun(config, tmp_path / "run", CPU, resume=True)


def test_the_tool_trains_class_folders_of_any_size_and_says_how_well(run_tool, tmp_path):
    for name, value in (("dark", 30), ("light", 220)):
        (tmp_path / "data" / name).mkdir(parents=True)
        for number in range(10):
            shape = (20 + number, 30, 3)
            picture = Image.fromarray(np.full(shape, value + number, np.uint8))
            picture.save(tmp_path / "data" / name / f"{number}.png")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        yaml.safe_dump(
            {
                "model": {"backbone": {"name": "cifar_resnet", "depth": 8}, "size": 16},
                "data": {"format": "folder", "root": str(tmp_path / "data")},
                "train": {"epochs": 4, "batch_size": 4, "warmup_steps": 0, "lr": 0.05},
            }
        )
    )
    status, out, error = run_tool("train_classifier", recipe, "--output", tmp_path / "run")
    assert status == 0 and error == ""
    assert "train: 16 pictures of 2 classes" in out and "top-1" in out and "dark" in out
    assert json.loads((tmp_path / "run" / "best_metrics.json").read_text())["top1"] == 1
    status, _, error = run_tool(
        "train_classifier", recipe, f"data.root={tmp_path / 'none'}", "--output", tmp_path / "other"
    )
    assert status == 1 and "none" in error and error.count("\n") == 1


def test_cifar_in_its_binary_form_trains(run_tool, tmp_path, shapes):
    # Generated shapes are written as CIFAR-10 is published.
    root = shapes().data.root
    assert len(load_cifar(root, "train")) == 24
    recipe = next(path for path in RECIPES if path.stem == "cifar10")
    status, out, _ = run_tool(
        "train_classifier",
        recipe,
        f"data.root={root}",
        "model.backbone.depth=8",
        "train.epochs=1",
        "--output",
        tmp_path,
    )
    assert status == 0 and "val: 10 pictures of 10 classes" in out
