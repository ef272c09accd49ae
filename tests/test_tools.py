"""The scripts in tools/: arguments in, files and one exit status out, errors in one line."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib import get_data_path
from PIL import Image

import detector.run
import detector.training_run
from detector.build import build_model
from detector.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from detector.command_line import exit_status

TOOLS = Path(__file__).resolve().parent.parent / "tools"
NAMES = ("circle", "cross", "triangle", "star")


@pytest.fixture(scope="module")
def recipe(tiny_config, tmp_path_factory):
    path = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    path.write_text(tiny_config("train.epochs=1").model_dump_json())  # JSON is YAML
    return path


@pytest.fixture(scope="module")
def weights(tiny_config, tmp_path_factory):
    """A checkpoint of random weights: with five classes, scores around 0.2."""
    config = tiny_config("model.box_detections_per_img=10")
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "best.safetensors"
    save_checkpoint(path, Checkpoint(build_model(config.model, 5).state_dict(), config, NAMES))
    return path


@pytest.fixture
def pictures(tmp_path):
    """A folder of pictures of several kinds, one of each name in two folders, and a broken one."""
    folder = tmp_path / "pictures"
    (folder / "more").mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (50, 80, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "a.jpg")
    Image.fromarray(pixels[:, :, 0]).save(folder / "grey.png")
    Image.fromarray(np.dstack([pixels, pixels[:, :, 0]])).save(folder / "transparent.png")
    Image.fromarray(pixels[:40]).save(folder / "more" / "a.jpg")
    return folder


def one_line(error):
    return error.startswith("error: ") and error.count("\n") == 1 and "Traceback" not in error


# train.py


def test_train_writes_weights_and_says_where(run_tool, recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(detector.training_run, "plot_curves", lambda log_path, png_path: None)
    output = tmp_path / "run"
    status, out, _ = run_tool("train", recipe, "train.lr=0.003", "--output", output, "--device", "cpu")
    assert status == 0 and f"weights, curves and pictures are in {output}" in out
    config = load_checkpoint(output / "last.safetensors").config
    assert (config.train.lr, config.train.epochs) == (0.003, 1)
    status, _, error = run_tool("train", recipe, "--output", output)
    assert status == 1 and one_line(error) and "holds a run already" in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no.yaml"], "there is no config no.yaml"),
        (["RECIPE", "train.lr"], "override 'train.lr'; accepted: key=value"),
        (["RECIPE", "--device", "gpu"], "device 'gpu' cannot be used"),
        (["RECIPE", "--resume"], "there is nothing to resume from"),
        (["RECIPE", "data.train=null"], "the config has no data.train"),
    ],
)
def test_train_refuses_in_one_line(run_tool, recipe, tmp_path, arguments, message):
    arguments = [recipe if argument == "RECIPE" else argument for argument in arguments]
    status, _, error = run_tool("train", *arguments, "--output", tmp_path / "run")
    assert status == 1 and one_line(error) and message in error


def test_an_unknown_key_is_refused_with_the_nearest_one(run_tool, recipe, tmp_path):
    status, _, error = run_tool("train", recipe, "train.epoch=3", "--output", tmp_path / "run")
    assert (
        status == 1
        and "unknown key train.epoch; did you mean 'epochs'?" in error
        and "Traceback" not in error
    )
    status, _, error = run_tool("train", recipe, "train.epochs=many", "--output", tmp_path / "run")
    assert status == 1 and "train.epochs is 'many'" in error


def test_an_output_that_is_a_file_is_refused_in_one_line(run_tool, recipe, tmp_path):
    (tmp_path / "file").touch()
    status, _, error = run_tool("train", recipe, "--output", tmp_path / "file")
    assert status == 1 and one_line(error) and "file" in error


def named(output):
    return json.loads((output / "images.json").read_text(encoding="utf-8"))


def detections_of(output):
    """The entries of images.json, each with its results and the names of their classes under "detections"."""
    content, results = named(output), json.loads((output / "detections.json").read_text())
    names = {each["id"]: each["name"] for each in content["categories"]}
    for image in content["images"]:
        own = [r for r in results if r["image_id"] == image["id"]]
        image["detections"] = [{**r, "name": names[r["category_id"]]} for r in own]
    assert sum(len(image["detections"]) for image in content["images"]) == len(results)
    return content["images"]


# evaluate.py


def test_evaluate_scores_on_the_checkpoints_own_data(run_tool, weights, tmp_path):
    status, out, _ = run_tool("evaluate", "--weights", weights, "--output", tmp_path, "--device", "cpu")
    assert status == 0 and "val: 4 images" in out and f"metrics and detections are in {tmp_path}" in out
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert {"AP", "AP50", "AR100", "per_class", "voc", "losses"} <= metrics.keys()
    assert metrics["losses"]["loss"] > 0 and set(metrics["per_class"]) == set(NAMES)
    assert "IoU 0.50:0.95" in out and all(name in out for name in NAMES)
    detections = json.loads((tmp_path / "detections.json").read_text())
    assert detections and {d["category_id"] for d in detections} <= {1, 2, 3, 4}
    assert list(named(tmp_path)) == ["images", "categories"]
    assert [Path(image["file_name"]).name for image in named(tmp_path)["images"]] == [
        f"{n:06d}.jpg" for n in range(1, 5)
    ]


def test_stored_detections_score_as_the_model_that_made_them(run_tool, weights, recipe, tmp_path):
    arguments = ["--config", recipe, "--output"]
    run_tool(
        "evaluate", "--weights", weights, "--split", "train", "--device", "cpu", *arguments, tmp_path / "a"
    )
    detections = tmp_path / "a" / "detections.json"
    status, out, _ = run_tool(
        "evaluate", "--detections", detections, "--split", "train", *arguments, tmp_path / "b"
    )
    assert status == 0 and "train: 8 images" in out
    one, two = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in "ab")
    assert one.pop("losses") and two.pop("losses") == {} and one == two
    assert not (tmp_path / "b" / "detections.json").exists()


def test_infers_detections_and_those_with_file_stems_score_as_evaluates_do(
    run_tool, weights, recipe, tiny_shapes, tmp_path
):
    """The pictures are given to infer in the reverse order, from another place."""
    shutil.copytree(tiny_shapes / "val", tmp_path / "moved")
    pictures = sorted((tmp_path / "moved").iterdir(), reverse=True)
    common = ("--config", recipe, "--output")
    run_tool("infer", "--weights", weights, "--score-thresh", 0.05, "--output", tmp_path / "infer", *pictures)
    run_tool("evaluate", "--weights", weights, "--device", "cpu", *common, tmp_path / "evaluate")
    files = {image["id"]: image["file_name"] for image in named(tmp_path / "evaluate")["images"]}
    results = json.loads((tmp_path / "evaluate" / "detections.json").read_text())
    stems = [{**r, "image_id": Path(files[r["image_id"]]).stem} for r in results]
    (tmp_path / "predictions.json").write_text(json.dumps(stems))
    wanted = json.loads((tmp_path / "evaluate" / "metrics.json").read_text())
    assert wanted["AP"] is not None and len(results) > 0
    for file in (tmp_path / "infer" / "detections.json", tmp_path / "predictions.json"):
        status, _, error = run_tool("evaluate", "--detections", file, *common, tmp_path / "scored")
        assert (status, error) == (0, "")
        scored = json.loads((tmp_path / "scored" / "metrics.json").read_text())
        assert scored["AP"] == pytest.approx(wanted["AP"], abs=1e-3)
        assert scored["voc"]["mAP_allpoint"] == pytest.approx(wanted["voc"]["mAP_allpoint"], abs=1e-3)


def test_perfect_detections_score_one(run_tool, recipe, tiny_shapes, tmp_path):
    truth = json.loads((tiny_shapes / "annotations" / "val.json").read_text())
    keys = ("image_id", "category_id", "bbox")
    (tmp_path / "d.json").write_text(
        json.dumps([{**{k: a[k] for k in keys}, "score": 1.0} for a in truth["annotations"]])
    )
    status, _, _ = run_tool(
        "evaluate", "--detections", tmp_path / "d.json", "--config", recipe, "--output", tmp_path
    )
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert status == 0 and metrics["AP"] == pytest.approx(1) and metrics["AP50"] == pytest.approx(1)


def test_stored_detections_are_scored_without_the_pictures(run_tool, tiny_shapes, tmp_path):
    truth = json.loads((tiny_shapes / "annotations" / "val.json").read_text())
    (tmp_path / "val.json").write_text(json.dumps(truth))
    (tmp_path / "d.json").write_text(
        json.dumps(
            [
                {k: a[k] for k in ("image_id", "category_id", "bbox")} | {"score": 1.0}
                for a in truth["annotations"]
            ]
        )
    )
    source = "{format: coco, images: absent, annotations: val.json}"
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model: {{backbone: resnet18}}\ndata: {{root: {tmp_path}, val: {source}}}\n")
    arguments = ["--config", recipe, "--output", tmp_path / "out"]
    status, _, _ = run_tool("evaluate", "--detections", tmp_path / "d.json", *arguments)
    assert status == 0
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["AP"] == pytest.approx(1)


def test_evaluate_leaves_pictures_that_fail_out_of_the_ground_truth_and_says_so(
    run_tool, weights, tiny_shapes, tmp_path
):
    shutil.copytree(tiny_shapes, tmp_path / "data")
    broken = tmp_path / "data/val/000002.jpg"
    broken.write_bytes(broken.read_bytes()[:-300])
    arguments = ("--weights", weights, "--output", tmp_path, "--device", "cpu", f"data.root={tmp_path}/data")
    status, out, _ = run_tool("evaluate", *arguments)
    assert status == 0 and out.count(f"left out: {broken}: the picture is damaged") == 1
    assert "\n1 of 4 pictures could not be used and are left out of these numbers\n" in out
    assert len(json.loads((tmp_path / "metrics.json").read_text())["left_out"]) == 1
    detections = json.loads((tmp_path / "detections.json").read_text())
    assert {found["image_id"] for found in detections} == {1, 3, 4}
    status, _, error = run_tool("evaluate", *arguments, "data.strict=true")
    assert status == 1 and one_line(error)


def test_evaluate_takes_overrides_of_the_checkpoints_config(run_tool, weights, tiny_shapes, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(tiny_shapes, moved)
    arguments = [
        "--weights",
        weights,
        f"data.root={moved}",
        "loader.eval_batch_size=3",
        "--output",
        tmp_path / "out",
    ]
    assert run_tool("evaluate", *arguments, "--device", "cpu")[0] == 0
    assert (tmp_path / "out" / "metrics.json").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--weights", "gone.safetensors"], "there is no file gone.safetensors"),
        (["--weights", "WEIGHTS", "train.lr:3"], "override 'train.lr:3'; accepted: key=value"),
        (["--weights", "WEIGHTS", "--split", "test"], "the config has no data.test"),
        (["--weights", "WEIGHTS", "--config", "no.yaml"], "there is no config no.yaml"),
        (["--detections", "WEIGHTS"], "--detections needs --config"),
        ([], "give either --weights or --detections"),
        (["--weights", "WEIGHTS", "--detections", "a.json"], "give either --weights or --detections"),
        (["--detections", "gone.json", "--config", "RECIPE"], "gone.json"),
    ],
)
def test_evaluate_refuses_in_one_line(run_tool, weights, recipe, tmp_path, arguments, message):
    arguments = [{"WEIGHTS": weights, "RECIPE": recipe}.get(argument, argument) for argument in arguments]
    status, _, error = run_tool("evaluate", *arguments, "--output", tmp_path / "out")
    assert status == 1 and one_line(error) and message in error


def test_evaluate_names_an_unknown_key(run_tool, weights, tmp_path):
    status, _, error = run_tool(
        "evaluate", "--weights", weights, "data.rot=/data", "--output", tmp_path / "out"
    )
    assert status == 1 and "unknown key data.rot; did you mean 'root'?" in error and "Traceback" not in error


# infer.py


def test_infer_draws_pictures_of_every_kind_and_writes_one_json(run_tool, weights, pictures, tmp_path):
    output = tmp_path / "out"
    status, out, error = run_tool(
        "infer",
        "--weights",
        weights,
        pictures,
        "--output",
        output,
        "--score-thresh",
        "0.1",
        "--device",
        "cpu",
    )
    assert status == 0 and error == ""
    content, images = named(output), detections_of(output)
    assert content["weights"] == str(weights) and [each["name"] for each in content["categories"]] == list(
        NAMES
    )
    assert [image["id"] for image in images] == [1, 2, 3, 4]
    entries = {Path(entry["file_name"]).relative_to(pictures).as_posix(): entry for entry in images}
    assert set(entries) == {"a.jpg", "grey.png", "transparent.png", "more/a.jpg"}
    assert len({entry["drawing"] for entry in entries.values()}) == 4  # two are a.jpg
    for name, entry in entries.items():
        with Image.open(entry["drawing"]) as drawing:
            assert drawing.size == (entry["width"], entry["height"]) == (80, 40 if "more" in name else 50)
    found = [detection for entry in entries.values() for detection in entry["detections"]]
    assert found and f"{len(found)} objects in 4 of 4 pictures" in out
    assert all(
        d["score"] >= 0.1 and d["name"] == NAMES[d["category_id"] - 1] and len(d["bbox"]) == 4 for d in found
    )


def test_infer_takes_files_folders_and_patterns_each_picture_once(run_tool, weights, pictures, tmp_path):
    paths = [pictures / "a.jpg", str(pictures / "*.png"), pictures / "more", pictures / "a.jpg"]
    serif = Path(get_data_path()) / "fonts" / "ttf" / "DejaVuSerif.ttf"
    for folder, font in (("out", []), ("serif", ["--font", serif])):
        arguments = ["--weights", weights, "--score-thresh", "0.1", *font, "--output", tmp_path / folder]
        assert run_tool("infer", *paths, *arguments)[0] == 0
    drawn = [[path.read_bytes() for path in sorted((tmp_path / f).rglob("*.jpg"))] for f in ("out", "serif")]
    assert len(drawn[0]) == len(drawn[1]) == 4 and drawn[0] != drawn[1]
    images = named(tmp_path / "out")["images"]
    names = [Path(entry["file_name"]).relative_to(pictures).as_posix() for entry in images]
    assert names == ["a.jpg", "grey.png", "transparent.png", "more/a.jpg"]


def test_infer_passes_over_its_own_drawings_and_counts_what_is_no_picture(run_tool, weights, pictures):
    (pictures / "clip.mp4").touch()
    Image.open(pictures / "a.jpg").save(pictures / "b.jfif", "JPEG")
    for passed_over in ("1 .mp4", "1 folders of outputs, 1 .mp4"):
        status, out, _ = run_tool("infer", pictures, "--weights", weights, "--output", pictures / "found")
        assert status == 0 and "in 5 of 5 pictures" in out
        assert f"passed over: {passed_over}\n" in out


def test_a_broken_picture_is_named_and_the_others_are_done(run_tool, weights, pictures, tmp_path):
    data = (pictures / "a.jpg").read_bytes()
    (pictures / "broken.jpg").write_bytes(data[: len(data) // 2])
    (pictures / "text.png").write_text("not a picture")
    status, out, error = run_tool("infer", pictures, "--weights", weights, "--output", tmp_path / "out")
    assert status == 1 and "in 4 of 6 pictures" in out
    skipped = error.splitlines()
    assert len(skipped) == 2 and all(line.startswith("skipped: ") for line in skipped)
    assert "broken.jpg" in skipped[0] and "text.png" in skipped[1]
    assert len(list((tmp_path / "out").glob("*.jpg"))) == 4


def test_drawings_never_overwrite_the_pictures(run_tool, weights, pictures):
    before = (pictures / "a.jpg").read_bytes()
    status, _, error = run_tool("infer", pictures / "a.jpg", "--weights", weights, "--output", pictures)
    assert status == 1 and one_line(error) and "would overwrite the pictures" in error
    assert (pictures / "a.jpg").read_bytes() == before and not (pictures / "detections.json").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["PICTURES", "--weights", "gone.safetensors"], "there is no file gone.safetensors"),
        (["gone.jpg", "--weights", "WEIGHTS"], "gone.jpg: no such file or folder"),
        (["gone/*.jpg", "--weights", "WEIGHTS"], "no picture found"),
        (
            ["PICTURES", "--weights", "WEIGHTS", "--font", "gone.ttf"],
            "gone.ttf: not a font that can be read",
        ),
        (
            ["PICTURES", "--weights", "WEIGHTS", "--score-thresh", "50"],
            "score_thresh is 50.0; accepted: 0 to 1",
        ),
        (["PICTURES", "--weights", "WEIGHTS", "--device", "cuda:99"], "device 'cuda:99' cannot be used"),
    ],
)
def test_infer_refuses_in_one_line(run_tool, weights, pictures, tmp_path, arguments, message):
    arguments = [{"WEIGHTS": weights, "PICTURES": pictures}.get(argument, argument) for argument in arguments]
    status, _, error = run_tool("infer", *arguments, "--output", tmp_path / "out")
    assert status == 1 and one_line(error) and message in error


def test_a_real_process_exits_with_the_status_and_prints_one_line(weights, pictures, tmp_path):
    command = [
        sys.executable,
        TOOLS / "infer.py",
        "a.jpg",
        "gone.jpg",
        "--weights",
        weights,
        "--output",
        tmp_path,
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(TOOLS.parent)}
    done = subprocess.run(command, cwd=pictures, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr == "error: gone.jpg: no such file or folder\n"


def test_infer_takes_settings_of_the_recipe_beside_the_pictures(run_tool, weights, pictures, tmp_path):
    for limit in (1, 3):
        setting = f"model.box_detections_per_img={limit}"
        status, _, _ = run_tool(
            "infer",
            "--weights",
            weights,
            pictures,
            setting,
            "--score-thresh",
            0,
            "--output",
            tmp_path / str(limit),
        )
        images = detections_of(tmp_path / str(limit))
        assert status == 0 and images
        assert {len(image["detections"]) for image in images} == {limit}
    status, _, error = run_tool(
        "infer", "--weights", weights, pictures, "model.box_nms_tresh=0.4", "--output", tmp_path / "wrong"
    )
    assert status == 1 and "did you mean 'box_nms_thresh'?" in error


def test_names_of_any_bytes_and_of_any_length_are_drawn_and_written(run_tool, weights, tmp_path):
    folder, output = tmp_path / "pictures", tmp_path / "out"
    folder.mkdir()
    names = [
        b"caf\xe9.jpg",
        "ü".encode() * 125 + b".jpg",
        b"x" * 250 + b".jpg",
        b"x" * 250 + b".png",
        b"a\n\x1b[2J.jpg",
    ]
    for name in names:
        Image.new("RGB", (20, 10)).save(os.path.join(os.fsencode(folder), name), "png")
    status, out, error = run_tool("infer", "--weights", weights, folder, "--output", output)
    assert status == 0 and "in 5 of 5 pictures" in out and error == ""
    entries = detections_of(output)
    assert {os.fsencode(Path(entry["file_name"]).name) for entry in entries} == set(names)
    drawings = {entry["drawing"] for entry in entries}
    assert len(drawings) == 5 and all(Path(drawing).exists() for drawing in drawings)


def test_a_signal_ends_infer_with_the_pictures_that_are_done(
    run_tool, weights, pictures, tmp_path, monkeypatch
):
    many = [shutil.copy(pictures / "a.jpg", tmp_path / f"{number:02}.jpg") for number in range(40)]
    save, saved = Image.Image.save, []

    def save_and_interrupt(*arguments, **options):
        save(*arguments, **options)
        saved.append(arguments)
        if len(saved) == 2:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Image.Image, "save", save_and_interrupt)
    status, out, _ = run_tool("infer", "--weights", weights, *many, "--output", tmp_path / "out")
    # The few pictures that are on their way are done too.
    done = [Path(entry["file_name"]).name for entry in detections_of(tmp_path / "out")]
    assert status == 130 and f"in {len(done)} of 40 pictures" in out
    assert done == [f"{number:02}.jpg" for number in range(len(done))] and 2 <= len(done) < 20


def test_a_full_disk_ends_infer_with_the_pictures_that_are_done(
    run_tool, weights, pictures, tmp_path, monkeypatch
):
    save = Image.Image.save

    def save_one(image, path, **options):
        # Two threads draw, so the second picture may be first.
        if "pictures_a" not in Path(path).name:
            raise OSError(28, "No space left on device")
        save(image, path, **options)

    monkeypatch.setattr(Image.Image, "save", save_one)
    status, _, error = run_tool("infer", "--weights", weights, pictures, "--output", tmp_path / "out")
    assert status == 1 and one_line(error) and "No space left" in error
    assert len(detections_of(tmp_path / "out")) == 1


def test_links_to_nothing_and_unlistable_folders_are_told_and_counted(
    run_tool, weights, pictures, tmp_path, monkeypatch
):
    (pictures / "gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    (pictures / "locked").mkdir()
    scandir = os.scandir

    def refuse(path):
        if Path(path).name == "locked":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    # The tests may run as root, whom no folder refuses.
    monkeypatch.setattr(os, "scandir", refuse)
    status, out, error = run_tool("infer", "--weights", weights, pictures, "--output", tmp_path / "out")
    assert status == 1 and "in 4 of 4 pictures, 2 skipped" in out
    assert sorted(error.splitlines()) == [
        f"skipped: {pictures / 'gone.jpg'}: a link to nothing",
        f"skipped: {pictures / 'locked'}: the folder cannot be listed (Permission denied)",
    ]


def test_a_process_that_fails_in_infer_says_so_and_waits_for_no_other(
    run_tool, weights, pictures, tmp_path, monkeypatch
):
    """The others would never come to it, and its message would come after 30 minutes."""
    monkeypatch.setattr("detector.processes.gather", lambda value: pytest.fail("it waits"))

    def fail(*_, **options):
        raise OSError("No space left on device")

    monkeypatch.setattr("detector.inference.Detector.stream", fail)
    status, _, error = run_tool("infer", "--weights", weights, pictures, "--output", tmp_path / "out")
    assert status == 1 and error.strip().endswith("error: No space left on device")
    assert json.loads((tmp_path / "out/images.json").read_text())["images"] == []


def test_a_picture_that_vanishes_is_skipped(run_tool, weights, pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "detector.data.images.list_images",
        lambda paths, *told: [pictures / "gone.jpg", pictures / "a.jpg"],
    )
    status, out, error = run_tool("infer", "--weights", weights, pictures, "--output", tmp_path / "out")
    assert status == 1 and "in 1 of 2 pictures, 1 skipped" in out and "gone.jpg: no such picture" in error


def test_what_a_stranger_named_reaches_the_terminal_as_escapes(run_tool, tiny_config, tmp_path, tiny_shapes):
    names = ("\x1b[2J\x9b31m", "\u202ecat", "line\nfeed", "back\rhome")
    config = tiny_config()
    path = tmp_path / "best.safetensors"
    save_checkpoint(path, Checkpoint(build_model(config.model, 5).state_dict(), config, names))
    truth = json.loads((tiny_shapes / "annotations" / "val.json").read_text())
    for category, name in zip(truth["categories"], names, strict=True):
        category["name"] = name
    (tmp_path / "val.json").write_text(json.dumps(truth))
    data = f"{{format: coco, images: {tiny_shapes}/val, annotations: {tmp_path}/val.json}}"
    status, out, _ = run_tool("evaluate", "--weights", path, f"data.val={data}", "--output", tmp_path / "out")
    assert status == 0 and not set("\x1b\x9b\u202e\r") & set(out)
    assert all(name in out for name in (r"\x1b[2J\x9b31m", r"\u202ecat", r"line\nfeed", r"back\rhome"))


def test_evaluate_with_another_recipes_data_hears_overrides_of_the_model(run_tool, weights, recipe, tmp_path):
    for limit in (1, 3):
        setting = f"model.box_detections_per_img={limit}"
        arguments = ["--weights", weights, "--config", recipe, "model.box_score_thresh=0", setting]
        status, _, _ = run_tool("evaluate", *arguments, "--output", tmp_path / str(limit))
        found = json.loads((tmp_path / str(limit) / "detections.json").read_text())
        assert status == 0 and len(found) == 4 * limit


def test_an_lfs_pointer_and_weights_of_another_program_are_answered_with_the_way_on(
    run_tool, pictures, tmp_path
):
    for name, content, way in (
        ("best.safetensors", b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        ("model.pth", b"PK\x03\x04", "tools/convert_weights.py"),
    ):
        (tmp_path / name).write_bytes(content)
        status, _, error = run_tool(
            "infer", "--weights", tmp_path / name, pictures, "--output", tmp_path / "out"
        )
        assert status == 1 and one_line(error) and name in error and way in error


@pytest.mark.parametrize("state", ["training_state.pt", "training_state.previous.pt"])
@pytest.mark.parametrize("present", [["best", "last"], ["last"], []])
def test_a_training_state_is_answered_with_the_weights_beside_it(
    run_tool, pictures, tmp_path, state, present
):
    for name in present:
        (tmp_path / f"{name}.safetensors").touch()
    weights = tmp_path / f"{[*present, 'best'][0]}.safetensors"
    for command in (
        ("infer", "--weights", tmp_path / state, pictures),
        ("convert_weights", tmp_path / state),
    ):
        status, _, error = run_tool(*command, "--output", tmp_path / "o.safetensors")
        assert status == 1 and one_line(error)
        assert f"{state} is what a run resumes from; its weights are in {weights}\n" in error


def test_train_refuses_milestones_of_a_cosine(run_tool, recipe, tmp_path):
    arguments = [
        "train.schedule=cosine",
        "train.milestones=[1]",
        "--output",
        tmp_path / "run",
        "--device",
        "cpu",
    ]
    status, _, error = run_tool("train", recipe, *arguments)
    assert status == 1 and one_line(error) and "'cosine', which has none; set train.milestones=[]" in error


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_any_tool_in_a_sentence_with_130(number, capsys):
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    assert exit_status(lambda args: signal.raise_signal(number), None) == 130
    assert capsys.readouterr().err == "stopped\n"
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers


def test_a_signal_while_the_data_are_read_ends_training_in_a_sentence(
    run_tool, recipe, tmp_path, monkeypatch
):
    monkeypatch.setattr(detector.run, "build_datasets", lambda *_: signal.raise_signal(signal.SIGTERM))
    assert run_tool("train", recipe, "--output", tmp_path / "run") == (130, "", "stopped\n")


def test_an_ignored_sigterm_stays_ignored_in_a_tool():
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        assert exit_status(lambda args: signal.raise_signal(signal.SIGTERM), None) == 0
    finally:
        signal.signal(signal.SIGTERM, before)
