"""Several processes train, evaluate and stop as one. They run on a CPU, over gloo."""

import hashlib
import json
import os
import signal
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import several
import torch
from PIL import Image
from short_runs import CPU, stop_after

import detector.classify.shapes
import detector.data.loader
import detector.data.shapes
import detector.run
import detector.training_run
from detector import processes
from detector.build import build_batches, build_model, build_training
from detector.checkpoint import load_training_state
from detector.classify.shapes import ShapesSource as LabelledShapes
from detector.data.loader import EvalBatches, TrainBatches
from detector.data.shapes import ShapesSource as DetectionShapes
from detector.data.sources import build_dataset
from detector.draws import tagged
from detector.engine import train_one_epoch
from detector.evaluate import Evaluation
from detector.inference import choose_device
from detector.model.sampling import SeededSampler
from detector.run import Run
from detector.stop import Interrupted

# Each picture is of one size and fills its samples, and the norms look at one picture alone.
ALIKE = (
    "model.backbone={name: resnet18, width: 8, norm: group}",
    "model.box_batch_size_per_image=8",
    "augment.horizontal_flip=0.5",
    "augment.brightness=0.3",
    "train.optimizer=adamw",
    "train.lr=0.001",
    "data.train={format: shapes, split: train, num_train: 12, num_val: 7, image_size: 64}",
    "data.val={format: shapes, split: val, num_train: 12, num_val: 7, image_size: 64}",
)


@pytest.fixture(scope="session")
def alike(tiny_config, tmp_path_factory):
    root = tmp_path_factory.mktemp("alike")
    config = tiny_config(*ALIKE, f"data.root={root}")
    for split in ("train", "val"):
        build_dataset(config.data, split)  # draws the pictures, before several processes look for them
    return config


def record_samples(patch):
    """The digests of what each (epoch, image) is trained on: pixels and boxes, anchors and regions."""
    seen = {}
    transformed, draw = detector.data.loader.TransformedDataset.__getitem__, SeededSampler.draw

    def getitem(self, key):
        image, target = transformed(self, key)
        pixels = hashlib.sha256(image.numpy().tobytes() + target["boxes"].numpy().tobytes())
        seen["pixels", key[0], target["image_id"]] = pixels.hexdigest()
        return image, target

    def recorded(self, labels):
        drawn = draw(self, labels)
        first = 0
        for key, own in zip(self.keys, labels, strict=True):
            kinds = [rows[(rows >= first) & (rows < first + len(own))] - first for rows in drawn[:2]]
            seen[("rows", *key[1:])] = [rows.tolist() for rows in kinds]
            first += len(own)
        return drawn

    patch.setattr(detector.data.loader.TransformedDataset, "__getitem__", getitem)
    patch.setattr(SeededSampler, "draw", recorded)
    return seen


def train_steps(config, epochs, dtype, batch_size, accumulate):
    """The losses of each step, the weights after them, and the samples."""
    options = config.train.model_copy(update={"batch_size": batch_size, "accumulate": accumulate})
    config = config.model_copy(update={"train": options})
    train_set = build_dataset(config.data, "train")
    torch.manual_seed(0)
    model = build_model(config.model, len(train_set.class_names) + 1).to(dtype)
    losses = []
    with pytest.MonkeyPatch.context() as patch:
        samples = record_samples(patch)
        _, batches, loader = build_batches(config, train_set, CPU)
        training = build_training(config, model, num_batches=len(batches), device=CPU)
        for epoch in range(epochs):
            batches.set_epoch(epoch)
            train_one_epoch(
                training,
                loader,
                CPU,
                num_batches=len(batches),
                seed=0,
                accumulate=accumulate,
                on_step=lambda read, num_images: losses.extend(read),
            )
    # Queues pass arrays on, and tensors by file handles.
    weights = {name: value.numpy() for name, value in model.state_dict().items()}
    return losses, weights, samples


@pytest.fixture(scope="session")
def ten_steps_alone(alike):
    return train_steps(alike, 5, torch.float64, 6, 1)


def assert_same_losses(one, two, tolerance):
    assert len(one) == len(two) > 0
    for a, b in zip(one, two, strict=True):
        assert a == pytest.approx(b, rel=tolerance)


@pytest.mark.parametrize("count", [2, 3])
def test_ten_steps_in_float64_are_those_of_one_process(alike, ten_steps_alone, count):
    losses, weights, samples = ten_steps_alone
    each = several.run(count, train_steps, alike, 5, torch.float64, 6 // count, 1)
    assert len(losses) == 10
    for its_losses, its_weights, _ in each:
        assert_same_losses(its_losses, losses, 1e-6)
        for name, value in weights.items():
            np.testing.assert_allclose(its_weights[name], value, rtol=0, atol=1e-8)
    shares = [share for *_, share in each]
    assert sum(map(len, shares)) == len(samples)
    merged = {key: value for share in shares for key, value in share.items()}
    assert merged == samples


def test_the_first_step_in_float32_is_that_of_one_process(alike):
    losses, weights, _ = train_steps(alike, 1, torch.float32, 12, 1)
    # Two passes of 3 images in each of two processes make the same update.
    both, found, _ = several.run(2, train_steps, alike, 1, torch.float32, 3, 2)[1]
    means = [{name: np.mean([step[name] for step in both]) for name in both[0]}]
    assert_same_losses(means, losses, 1e-5)
    for name, value in weights.items():
        np.testing.assert_allclose(found[name], value, rtol=0, atol=1e-4)


def place_as(monkeypatch, rank, count):
    monkeypatch.setattr(processes, "rank", lambda: rank)
    monkeypatch.setattr(processes, "world_size", lambda: count)


def test_batches_are_dealt_out_and_the_short_one_is_filled_up(monkeypatch):
    ratios = np.array([0.5, 2.0] * 5 + [0.5])
    alone = TrainBatches(ratios, 6, seed=3)
    shares = []
    for rank in range(3):
        place_as(monkeypatch, rank, 3)
        shares.append(TrainBatches(ratios, 2, seed=3))
    for epoch in range(3):
        for batches in (alone, *shares):
            batches.set_epoch(epoch)
        whole, dealt = list(alone), list(zip(*shares, strict=True))
        assert [len(alone), *map(len, shares)] == [2] * 4
        for batch, parts in zip(whole, dealt, strict=True):
            assert [len(part) for part in parts] == [2, 2, 2]
            assert sum(parts, [])[: len(batch)] == batch
        order = np.random.default_rng(tagged("order", 3, epoch)).permutation(11)
        short = next(i for i, batch in enumerate(whole) if len(batch) == 5)
        assert sum(dealt[short], [])[5:] == [(epoch, order[0])]
    assert shares[0].num_repeated == 1 and alone.num_repeated == 0


def test_a_batch_for_more_images_than_there_are_repeats_them(monkeypatch):
    place_as(monkeypatch, 1, 2)
    (batch,) = TrainBatches(np.ones(3), 4, seed=0, group=False)
    assert len(batch) == 4


def test_evaluation_deals_out_whole_batches(monkeypatch):
    ratios = np.linspace(1, 2, 7)
    whole = list(EvalBatches(ratios, 2))
    place_as(monkeypatch, 1, 3)
    assert list(EvalBatches(ratios, 2)) == [whole[1]]


def evaluate(config, batch_size):
    loading = config.loader.model_copy(update={"eval_batch_size": batch_size})
    config = config.model_copy(update={"loader": loading})
    val_set = build_dataset(config.data, "val")
    torch.manual_seed(processes.rank())  # the buffers are those of the first process
    model = build_model(config.model, len(val_set.class_names) + 1)
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    for buffer in model.buffers():
        if buffer.is_floating_point():
            buffer += torch.rand(()) + processes.rank()
    return Evaluation(val_set, config, CPU).run(model)


@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_evaluation_by_three_processes_is_that_of_one(alike, tiny_config, batch_size):
    config = tiny_config(*ALIKE, f"data.root={alike.data.root}", "model.backbone={name: resnet18, width: 8}")
    results, losses = evaluate(config, batch_size)
    found, means = several.run(3, evaluate, config, batch_size)[0]
    assert len({each["image_id"] for each in results}) == 7
    assert found == results
    assert means == pytest.approx(losses, rel=1e-6)


@pytest.fixture(scope="session")
def of_many_sizes(alike, tmp_path_factory):
    """The recipe, with validation pictures of seven sizes."""
    old, root = Path(alike.data.root), tmp_path_factory.mktemp("sizes")
    content = json.loads((old / "annotations" / "val.json").read_text())
    for number, image in enumerate(content["images"]):
        image["width"], image["height"] = 64 + 5 * number, 100 - 5 * number
        picture = Image.open(old / "val" / image["file_name"]).resize((image["width"], image["height"]))
        picture.save(root / image["file_name"])
    (root / "val.json").write_text(json.dumps(content))
    data = f"data={{root: {root}, train: null, val: {{format: coco, annotations: val.json, images: .}}}}"
    return data, "model.max_size=128"


def test_evaluation_of_mixed_sizes_gives_one_result_whatever_the_batches_and_processes(
    alike, of_many_sizes, tiny_config
):
    config = tiny_config(*ALIKE, *of_many_sizes)
    results, losses = evaluate(config, 1)
    by_image = lambda found: sorted(found, key=lambda each: each["image_id"])  # noqa: E731 the order within stays
    for count, batch_size in ((1, 3), (1, 7), (3, 2)):
        found, means = several.run(count, evaluate, config, batch_size)[0]
        assert means == pytest.approx(losses, rel=1e-5)
        for one, two in zip(by_image(found), by_image(results), strict=True):
            assert one["image_id"] == two["image_id"] and one["category_id"] == two["category_id"]
            assert one["score"] == pytest.approx(two["score"], abs=1e-5)
            assert one["bbox"] == pytest.approx(two["bbox"], abs=1e-2)


def train_run(config, folder, resume=False, stop_at=None):
    """Train in a folder; `stop_at` updates, the second process hears SIGTERM. Returns what ended it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(detector.training_run, "plot_curves", lambda *paths: None)
        if stop_at is not None and processes.rank() == 1:
            stop_after(patch, stop_at, signal.SIGTERM)
        try:
            return Run(config, folder, CPU, resume=resume).train()
        except Interrupted as stop:
            return str(stop)


@pytest.fixture(scope="session")
def of_three(alike, tiny_config):
    """A recipe whose epoch has 3 batches in three processes, with norms and averages that each process has its own of."""
    return tiny_config(
        *ALIKE,
        f"data.root={alike.data.root}",
        "model.backbone={name: resnet18, width: 8, stochastic_depth: 0.3}",
        "train.batch_size=1",
        "train.accumulate=2",
        "train.ema=0.8",
        "train.epochs=3",
    )


def test_a_signal_to_one_process_stops_all_and_they_resume_as_if_it_had_not_come(of_three, tmp_path):
    unbroken, stopped = tmp_path / "unbroken", tmp_path / "stopped"
    metrics, *others = several.run(3, train_run, of_three, unbroken)
    assert others == [{}, {}]
    # An epoch has 4 batches, which are 2 updates.
    ends = several.run(3, train_run, of_three, stopped, False, 3)
    assert ends == ["stopped after update 3; continue with --resume"] * 3
    assert load_training_state(stopped / "training_state.pt")["batch"] == 2
    assert several.run(3, train_run, of_three, stopped, True)[0]["epoch"] == metrics["epoch"]
    one, two = (load_training_state(folder / "training_state.pt") for folder in (unbroken, stopped))
    # torch adds up the gradients of three processes in an order that its first step changes.
    torch.testing.assert_close(one["model"], two["model"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(one["ema"], two["ema"], rtol=1e-4, atol=1e-5)
    assert not {path.name for path in unbroken.iterdir()} ^ {path.name for path in stopped.iterdir()}


def train_until_killed(config, folder):
    """The second process is killed in the third update. The others say whether they take their error for that."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(detector.training_run, "plot_curves", lambda *paths: None)
        if processes.rank() == 1:
            from short_runs import after_update

            after_update(patch, 3, lambda: os.kill(os.getpid(), signal.SIGKILL))
        try:
            Run(config, folder, CPU).train()
        except RuntimeError as error:
            raise AssertionError(f"lost: {processes.is_lost(error)}") from None


def test_a_killed_process_ends_the_others_and_its_run_resumes(of_three, tmp_path):
    crew = several.Crew(3, train_until_killed, of_three, tmp_path)
    crew.processes[1].join(100)
    assert crew.processes[1].exitcode == -signal.SIGKILL
    ended = dict(crew.results.get(timeout=60) for _ in range(2))
    assert sorted(ended) == [0, 2] and all("lost: True" in each for each in ended.values()), ended
    state = load_training_state(tmp_path / "training_state.pt")
    assert state["step"] == 3
    assert several.run(3, train_run, of_three, tmp_path, True)[0]["epoch"] in (1, 2, 3)


def train_with_a_bad_number(config, folder):
    """A loss of the third process becomes NaN in the second update."""
    original, calls = detector.engine.forward, []

    def forward(training, network, **options):
        calls.append(original(training, network, **options))
        if processes.rank() == 2 and training.step == 1:
            calls[-1]["loss_box_reg"] = calls[-1]["loss_box_reg"] * float("nan")
        return calls[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(detector.training_run, "plot_curves", lambda *paths: None)
        patch.setattr(detector.engine, "forward", forward)
        try:
            run = Run(config, folder, CPU)
            run.train()
        except FloatingPointError as error:
            return str(error)
        return run.training.skipped


@pytest.mark.parametrize("on_nonfinite", ["stop", "skip"])
def test_a_bad_number_in_one_process_is_said_by_all_and_changes_no_weight(of_three, tmp_path, on_nonfinite):
    options = of_three.train.model_copy(update={"on_nonfinite": on_nonfinite})
    ends = several.run(3, train_with_a_bad_number, of_three.model_copy(update={"train": options}), tmp_path)
    if on_nonfinite == "skip":
        assert ends == [1, 1, 1]
    else:
        assert len(set(ends)) == 1 and "a loss is not finite" in ends[0]
        assert [path.suffix for path in sorted((tmp_path / "nonfinite").iterdir())] == [".jpg", ".json"]


def test_the_tools_in_two_processes_write_what_one_does(alike, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(alike.model_dump_json())  # JSON is YAML
    run, pictures = tmp_path / "run", Path(alike.data.root) / "val"
    first, second = several.run_tool(2, "train", recipe, "train.epochs=1", "--output", run)
    assert first[0] == second[0] == 0 and second[1] == ""
    assert "3 batches of 2 in each of 2 processes" in first[1] and "an update has 4 images" in first[1]
    assert {"best.safetensors", "curves.png", "found.jpg"} <= {path.name for path in run.iterdir()}
    weights = ("--weights", run / "best.safetensors")
    for name, arguments in {
        "evaluate": weights,
        "infer": (*weights, pictures, "--score-thresh", "0.01"),
        "extract_features": (*weights, pictures),
    }.items():
        outputs = [tmp_path / f"{name}_{count}" for count in (1, 2)]
        for count, output in enumerate(outputs, start=1):
            ends = several.run_tool(count, name, *arguments, "--output", output)
            assert [end[0] for end in ends] == [0] * count
            assert all(end[1] == "" for end in ends[1:])
        alone, shared = ({path.name for path in output.iterdir()} for output in outputs)
        assert alone == shared
        if name == "evaluate":
            one, two = ((output / "metrics.json").read_text() for output in outputs)
            assert one == two
        if name == "infer":
            names = [json.loads((output / "images.json").read_text())["images"] for output in outputs]
            assert len({tuple(each["file_name"] for each in images) for images in names}) == 1
            one, two = (json.loads((output / "detections.json").read_text()) for output in outputs)
            assert [each["image_id"] for each in one] == [each["image_id"] for each in two]
            # A process measures which of two products is faster, so the last digits may differ.
            boxes = [[found["bbox"] for found in results] for results in (one, two)]
            np.testing.assert_allclose(*boxes, rtol=0, atol=1e-3)


def test_an_error_that_all_meet_is_said_once(tmp_path):
    ends = several.run_tool(2, "train", tmp_path / "none.yaml", "--output", tmp_path / "run")
    assert [end[0] for end in ends] == [1, 1]
    assert sorted(end[2].count("none.yaml") for end in ends) == [0, 1]


def test_a_run_resumes_in_fewer_processes_with_larger_shares_of_the_same_batches(of_three, tmp_path):
    assert several.run(3, train_run, of_three, tmp_path, False, 3)[0].startswith("stopped")
    with pytest.raises(ValueError, match="a batch had 3 images, now 1"):
        Run(of_three, tmp_path, CPU, resume=True)
    options = of_three.train.model_copy(update={"batch_size": 3})
    resumed = Run(of_three.model_copy(update={"train": options}), tmp_path, CPU, resume=True)
    assert train_whole(resumed)["epoch"] in (1, 2, 3) and resumed.training.epoch == 3


def train_whole(run):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(detector.training_run, "plot_curves", lambda *paths: None)
        return run.train()


def fail_in_the_second(folder):
    """The second process fails while the first has done its work."""
    import argparse

    from detector.command_line import exit_status

    def call(args):
        if processes.rank() == 1:
            time.sleep(0.5)
            raise ValueError("picture 7 cannot be read")

    return exit_status(call, argparse.Namespace())


def test_a_process_that_is_done_does_not_wait_for_one_that_failed(tmp_path):
    assert several.Crew(2, fail_in_the_second, tmp_path, joins=False).join(60) == [0, 1]


@pytest.mark.parametrize("end", ["all are done", "this one failed", "another one failed", "an exception"])
def test_processes_leave_their_group_only_where_all_have_done_their_work(monkeypatch, end):
    # To leave it, NCCL waits for processes that are in the middle of an operation.
    store, left = torch.distributed.HashStore(), []
    place_as(monkeypatch, 0, 2)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(processes, "rendezvous", lambda url: iter([(store, 0, 2)]))
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *args, **options: None)
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: left.append(True))
    for place in ("failed",) if end == "another one failed" else ("done 1", "left 1"):
        store.set(place, "")
    with suppress(RuntimeError), processes.joined() as peers:
        if end == "an exception":
            raise RuntimeError("out of memory")
        peers.fail("no such file") if end == "this one failed" else peers.wait()
    assert left == [True] * (end == "all are done")


def count_drawn(root):
    """The numbers of pictures in two generated data sets that are not there yet, and of the files of those drawn here."""
    drawn = []
    with pytest.MonkeyPatch.context() as patch:
        for module, name in ((detector.data.shapes, "_write_split"), (detector.classify.shapes, "_write")):
            write = getattr(module, name)
            patch.setattr(module, name, lambda *args, write=write: (drawn.append(args), write(*args)))
        source = DetectionShapes(format="shapes", split="train", num_train=8, num_val=4)
        found = source.select(source.read(root / "detection"), root / "detection")
        labelled = LabelledShapes(format="shapes", root=root / "labelled", num_train=6, num_test=2).load(
            "test"
        )
    return len(found), len(labelled), len(drawn)


def test_the_first_process_draws_the_generated_data_of_all(tmp_path):
    assert several.run(2, count_drawn, tmp_path) == [(8, 2, 4), (8, 2, 0)]


def test_each_process_has_the_gpu_of_its_local_rank(monkeypatch):
    assert processes.own_gpu() == "cuda"
    place_as(monkeypatch, 5, 8)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert processes.own_gpu() == "cuda:1"
    monkeypatch.delenv("LOCAL_RANK")
    with pytest.raises(ValueError, match="start the processes with torchrun"):
        processes.own_gpu()
    for name in ("cuda", torch.device("cuda")):
        monkeypatch.setattr(processes, "own_gpu", lambda: "cpu")
        assert choose_device(name) == torch.device("cpu")
