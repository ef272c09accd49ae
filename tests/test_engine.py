"""The loops of training and evaluation, on built objects: updates, schedules, averages, losses, results."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

from backbones import create_backbone
from benchmarks.models import ForcedProposals, set_case
from detector.build import build_model, build_training
from detector.engine import (
    LOSSES,
    DetectorTask,
    LossMonitor,
    NonFiniteLossError,
    Training,
    WeightAverage,
    autocast,
    build_schedule,
    coco_results,
    evaluate,
    parameter_groups,
    to_device,
    train_one_epoch,
)
from detector.model.faster_rcnn import build_faster_rcnn

CPU = torch.device("cpu")
GROUP = "model.backbone={name: resnet18, width: 8, norm: group}"  # no state but the weights: images are independent


def sample(image_id, boxes=((8, 8, 40, 40),), labels=None, size=(64, 64)):
    """One image of the loader's kind: uint8 noise of 64 x 64, at network size."""
    pixels = np.random.default_rng(image_id).integers(0, 256, (3, *size), dtype=np.uint8)
    labels = [1 + i % 2 for i in range(len(boxes))] if labels is None else labels
    return torch.from_numpy(pixels), {
        "boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        "labels": torch.tensor(labels, dtype=torch.int64),
        "image_id": image_id,
        "original_size": size,
    }


def batch_of(*samples):
    return [image for image, _ in samples], [dict(target) for _, target in samples]


@pytest.fixture
def model(tiny_config):
    torch.manual_seed(0)
    return build_model(tiny_config(GROUP).model, 3)


def training_of(model, lr=0.01, scaler=False, ema=None):
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    schedule = build_schedule(optimizer, 1000, kind="multistep")
    averages = None if ema is None else WeightAverage(model, ema)
    return Training(
        model, DetectorTask(model), optimizer, schedule, torch.amp.GradScaler("cpu", enabled=scaler), averages
    )


def train(training, batches, **options):
    read = []
    finished = train_one_epoch(
        training,
        batches,
        CPU,
        num_batches=options.pop("num_batches", len(batches)),
        seed=options.pop("seed", 0),
        on_step=options.pop("on_step", lambda losses, num_images: read.extend(losses)),
        **options,
    )
    assert all(math.isfinite(value) for losses in read for value in losses.values())
    return finished, read


def gradients(model, batch, position):
    """Gradients of one batch, with the samples that training draws at that place of the run."""
    model = copy.deepcopy(model).train()
    images, targets = to_device(batch, CPU)
    model.seed_sampling([(0, position, target["image_id"]) for target in targets])
    sum(model(images, targets).values()).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


# Parameter groups


def test_norms_and_biases_do_not_decay_by_default(model):
    decayed, others = parameter_groups(model, 0.05, norm_decay=False)
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.05, 0.0)
    names = {id(p): name for name, p in model.named_parameters()}
    kept = {names[id(p)] for p in others["params"]}
    norms = {
        f"{prefix}.{name}"
        for prefix, module in model.named_modules()
        if isinstance(module, nn.GroupNorm)
        for name in ("weight", "bias")
    }
    assert kept == norms | {name for name in names.values() if name.endswith(".bias")}
    assert len(decayed["params"]) + len(others["params"]) == len(names)


def test_with_norm_decay_everything_decays(model):
    (group,) = parameter_groups(model, 0.05, norm_decay=True)
    assert group["weight_decay"] == 0.05 and len(group["params"]) == len(list(model.parameters()))


def test_frozen_parameters_are_in_no_group(tiny_config):
    options = "model.backbone={name: resnet18, width: 8, norm: group, frozen_stages: 2}"
    model = build_model(tiny_config(options).model, 3)
    grouped = {id(p) for group in parameter_groups(model, 0.1, norm_decay=False) for p in group["params"]}
    frozen = {id(p) for stage in model.backbone.stages[:2] for p in stage.parameters()}
    assert frozen and not frozen & grouped and len(frozen) + len(grouped) == len(list(model.parameters()))


# Schedules


def rates(total_steps, **options):
    """The learning rate of each update, at a base of 1."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule, seen = build_schedule(optimizer, total_steps, **options), []
    for _ in range(total_steps + 1):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return seen


def test_warm_up_rises_linearly_from_the_factor_to_the_rate():
    seen = rates(20, kind="multistep", warmup_steps=4, warmup_factor=0.2)
    np.testing.assert_allclose(seen[:6], [0.2, 0.4, 0.6, 0.8, 1, 1])


@pytest.mark.parametrize("warmup_steps", [0, 3])
def test_multistep_falls_at_its_updates_with_and_without_warm_up(warmup_steps):
    seen = rates(12, kind="multistep", milestones=[8, 10], gamma=0.1, warmup_steps=warmup_steps)
    np.testing.assert_allclose(seen[warmup_steps:], [1] * (8 - warmup_steps) + [0.1] * 2 + [0.01] * 3)


@pytest.mark.parametrize("warmup_steps", [0, 4])
def test_cosine_ends_at_zero_after_the_last_update(warmup_steps):
    seen = rates(20, kind="cosine", warmup_steps=warmup_steps)
    assert seen[20] == pytest.approx(0, abs=1e-9) and seen[19] > 0
    middle = (20 + warmup_steps) // 2
    assert seen[middle] == pytest.approx(0.5)
    assert all(a > b for a, b in zip(seen[warmup_steps:20], seen[warmup_steps + 1 :], strict=True))


@pytest.mark.parametrize("kind", ["cosine", "multistep"])
def test_a_warm_up_longer_than_the_run_is_cut_to_half_of_it(kind):
    seen = rates(10, kind=kind, warmup_steps=1000)
    assert seen[5] == pytest.approx(1) and seen[4] < 1
    assert rates(1, kind=kind, warmup_steps=1000)[0] == pytest.approx(1)


# Training


def test_accumulating_two_batches_steps_by_the_mean_of_their_gradients(model):
    first, second = batch_of(sample(1)), batch_of(sample(2))
    wanted = [gradients(model, batch, 0) for batch in (first, second)]
    before = weights(model)
    training = training_of(model, lr=1.0)
    train(training, [first, second], accumulate=2)
    assert training.step == 1
    for name, after in weights(model).items():
        mean = (wanted[0][name] + wanted[1][name]) / 2
        torch.testing.assert_close(before[name] - after, mean, rtol=1e-4, atol=1e-6)


def test_a_short_last_accumulation_is_an_update_too(model):
    training = training_of(model)
    assert train(training, [batch_of(sample(i)) for i in range(3)], accumulate=2)[0]
    assert (training.step, training.epoch, training.batch) == (2, 1, 0)


def test_the_last_update_of_an_epoch_has_the_mean_gradient_of_its_own_batches(model):
    batches = [batch_of(sample(i)) for i in range(1, 6)]
    training = training_of(model, lr=1.0)
    # 5 batches by 3 are an update of 3 and one of 2: the last is asked for alone, as a resumed run does.
    training.batch, training.step = 3, 1
    before = weights(model)
    wanted = [gradients(model, batch, 0) for batch in batches[3:]]
    assert train(training, batches[3:], num_batches=5, accumulate=3)[0] and training.step == 2
    for name, after in weights(model).items():
        mean = (wanted[0][name] + wanted[1][name]) / 2
        torch.testing.assert_close(before[name] - after, mean, rtol=1e-4, atol=1e-6)


def test_clipping_bounds_the_gradients_norm(model):
    before = weights(model)
    train(training_of(model, lr=1.0), [batch_of(sample(1))], clip_norm=0.01)
    change = math.sqrt(sum(float((before[k] - v).square().sum()) for k, v in weights(model).items()))
    assert change == pytest.approx(0.01, rel=1e-3)
    total = math.sqrt(sum(float(g.square().sum()) for g in gradients(model, batch_of(sample(1)), 0).values()))
    assert total > 0.1  # so that there was something to clip


def test_a_stop_waits_for_the_whole_update_and_the_rest_of_the_epoch_follows(model):
    batches = [batch_of(sample(i)) for i in range(5)]
    unbroken = copy.deepcopy(model)
    train(training_of(unbroken), batches, accumulate=2)
    training = training_of(model)
    finished, _ = train(training, batches, accumulate=2, on_step=lambda losses, num_images: True)
    assert not finished and (training.step, training.epoch, training.batch) == (1, 0, 2)
    assert train(training, batches[2:], num_batches=5, accumulate=2)[0]
    for name, value in weights(unbroken).items():
        assert torch.equal(weights(model)[name], value)


def test_every_step_is_told_with_its_losses_and_images(model):
    _, read = train(training_of(model), [batch_of(sample(1), sample(2)), batch_of(sample(3))])
    assert len(read) == 2 and all(tuple(losses) == LOSSES for losses in read)


def test_losses_read_seldom_are_all_told_at_the_end_of_the_epoch():
    monitor = LossMonitor(torch.device("cuda"), interval=3)  # the tensors may be anywhere
    assert [len(monitor.add(torch.full((4,), 0.5))) for _ in range(4)] == [0, 0, 3, 0]
    assert len(monitor.read()) == 1 and monitor.read() == []


def test_losses_and_samples_do_not_depend_on_the_global_random_state(model):
    batches, seen = [batch_of(sample(1), sample(2))], []
    for seed in (1, 2):
        torch.manual_seed(seed)
        seen.append(train(training_of(copy.deepcopy(model)), batches)[1])
    assert seen[0] == seen[1]
    assert train(training_of(copy.deepcopy(model)), batches, seed=5)[1] != seen[0]


@pytest.mark.parametrize(("amp", "enabled"), [("none", False), ("bf16", False), ("fp16", True)])
def test_only_fp16_scales_the_loss(tiny_config, amp, enabled):
    config = tiny_config(GROUP, f"train.amp={amp}")
    training = build_training(config, build_model(config.model, 3), num_batches=4, device=CPU)
    assert training.scaler.is_enabled() == enabled


def test_bf16_trains_float32_weights_close_to_the_float32_step(model):
    batch, exact = batch_of(sample(1), sample(2)), copy.deepcopy(model)
    _, losses = train(training_of(exact), [batch])
    before = weights(model)
    _, half = train(training_of(model), [batch], amp_dtype=torch.bfloat16)
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert any(not torch.equal(before[name], p) for name, p in weights(model).items())
    assert half[0] != losses[0]
    assert sum(half[0].values()) == pytest.approx(sum(losses[0].values()), rel=0.1)


def test_bf16_losses_of_a_large_picture_are_within_two_percent_with_the_same_proposals():
    torch.manual_seed(0)
    # Eight bits cannot count 1333 pixels.
    model = build_faster_rcnn(create_backbone("resnet18", width=16), 5, box_batch_size_per_image=128).train()
    ForcedProposals(model.rpn)
    set_case(model, (800, 1333), 2000)
    boxes = torch.tensor([[100.0, 50, 700, 500], [900, 300, 1300, 780], [20, 600, 90, 700]])
    batch = [torch.rand(3, 800, 1333)], [{"boxes": boxes, "labels": torch.tensor([1, 2, 4])}]
    exact, half = {}, {}
    for dtype, losses in ((None, exact), (torch.bfloat16, half)):
        with autocast(CPU, dtype):
            losses |= model(*copy.deepcopy(batch))
    assert exact != half
    for name, loss in exact.items():
        assert float(half[name].detach()) == pytest.approx(float(loss.detach()), rel=0.02), name


def test_a_scaled_loss_steps_by_the_same_gradients(model):
    batch, plain = batch_of(sample(1)), copy.deepcopy(model)
    train(training_of(plain, lr=0.1), [batch], clip_norm=1.0)
    train(training_of(model, lr=0.1, scaler=True), [batch], clip_norm=1.0)
    for name, value in weights(plain).items():
        torch.testing.assert_close(weights(model)[name], value, rtol=1e-4, atol=1e-6)


def test_averages_follow_the_formula(model):
    training = training_of(model, lr=0.1, ema=0.5)
    history = []
    batches = [batch_of(sample(i)) for i in range(12)]
    train(training, batches, on_step=lambda losses, num_images: history.append(weights(model)))
    wanted = history[0]  # the first update is taken as it is
    for n, newest in enumerate(history[1:], start=1):
        decay = min(0.5, (1 + n) / (10 + n))  # reaches 0.5 at n = 8
        wanted = {name: decay * wanted[name] + (1 - decay) * value for name, value in newest.items()}
    averaged = weights(training.evaluated_model)
    for name, value in wanted.items():
        torch.testing.assert_close(averaged[name], value, rtol=1e-4, atol=1e-6)


def test_an_update_of_the_averages_reads_nothing_from_the_device_and_writes_no_frozen_norm():
    # The meta device has no numbers to read.
    model = nn.Sequential(nn.Conv2d(3, 4, 1), FrozenBatchNorm2d(4), nn.BatchNorm2d(4)).to("meta")
    averages = WeightAverage(model, 0.9)
    frozen = [*averages.module[1].buffers()]
    versions = [buffer._version for buffer in frozen]
    for _ in range(2):
        averages.update_parameters(model)
    assert averages.n_averaged == 2 and versions == [buffer._version for buffer in frozen]
    assert all(
        buffer._version for buffer in (averages.module[2].running_mean, averages.module[2].running_var)
    )


def test_the_averages_are_evaluated_with_averaged_statistics_of_batch_norms(tiny_config):
    model = build_model(tiny_config("model.backbone={name: resnet18, width: 8}").model, 3)
    training = training_of(model, ema=0.9)
    assert training_of(model).evaluated_model is model and training.evaluated_model is not model
    history = []

    def keep(losses, num_images):
        history.append({name: buffer.clone() for name, buffer in model.named_buffers()})

    train(training, [batch_of(sample(i)) for i in range(3)], on_step=keep)
    # The first statistics are taken as they are; the decays after it are 2/11 and 3/12.
    decays, wanted = (2 / 11, 3 / 12), dict(history[0])
    for decay, newest in zip(decays, history[1:], strict=True):
        wanted = {name: decay * wanted[name] + (1 - decay) * value for name, value in newest.items()}
    averaged = dict(training.evaluated_model.named_buffers())
    statistics = [name for name in averaged if name.endswith(("running_mean", "running_var"))]
    assert statistics
    for name, value in averaged.items():
        torch.testing.assert_close(value, wanted[name] if name in statistics else history[-1][name])
    assert any(not torch.equal(averaged[name], history[-1][name]) for name in statistics)


def test_a_state_of_before_statistics_were_averaged_goes_on_from_its_own(tiny_config):
    config = tiny_config("model.backbone={name: resnet18, width: 8}").model
    training = training_of(build_model(config, 3), ema=0.9)
    train(training, [batch_of(sample(i)) for i in range(2)])
    newest = {f"module.{name}": buffer for name, buffer in training.model.named_buffers()}
    state = training.state_dict()
    # Such a state has the newest statistics in both models.
    state["ema"] |= {name: newest[name] for name in state["ema"] if name in newest}
    resumed = training_of(build_model(config, 3), ema=0.9)
    resumed.load_state_dict(copy.deepcopy(state))
    assert all(torch.equal(resumed.ema.state_dict()[name], value) for name, value in state["ema"].items())
    train(resumed, [batch_of(sample(2))])
    last, after = resumed.model.state_dict(), resumed.evaluated_model.state_dict()
    means = [name for name in after if name.endswith("running_mean")]
    # The third average has a decay of 3/12.
    for name in means:
        wanted = 0.25 * newest[f"module.{name}"] + 0.75 * last[name]
        torch.testing.assert_close(after[name], wanted)
    assert means


def test_a_loss_that_is_not_finite_stops_before_the_update_with_ids_and_the_four_losses(model):
    with torch.no_grad():
        model.roi_heads.box_predictor.cls_score.weight.fill_(math.nan)
    before = weights(model)
    pattern = r"image ids \[7, 9\]: loss_classifier nan, loss_box_reg [\d.e-]+, loss_objectness [\d.e-]+, loss_rpn_box_reg [\d.e-]+\."
    with pytest.raises(NonFiniteLossError, match=pattern):
        train(training_of(model), [batch_of(sample(7), sample(9))])
    after = weights(model)
    assert all(torch.equal(after[k], before[k]) for k in before if "cls_score.weight" not in k)


@pytest.mark.parametrize(
    "batch",
    [
        batch_of(sample(1, boxes=())),
        batch_of(sample(1, boxes=()), sample(2, boxes=())),
        batch_of(sample(1, boxes=()), sample(2)),
        batch_of(sample(1, boxes=((0, 0, 64, 64), (0, 0, 1, 1), (63, 63, 64, 64), (0, 20, 64, 21)))),
    ],
    ids=["no object", "a batch without objects", "one of two without", "boxes at the border"],
)
def test_edge_batches_train_with_finite_losses_and_gradients(model, batch):
    training = training_of(model)
    _, read = train(training, [batch, batch])
    assert len(read) == 2 and training.step == 2
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_a_single_class_trains_and_is_evaluated(tiny_config):
    model = build_model(tiny_config(GROUP).model, 2)
    batch = batch_of(sample(1, labels=[1]))
    _, read = train(training_of(model), [batch])
    results, losses = evaluate(model, [batch], CPU, category_ids=[4])
    assert math.isfinite(losses["loss"]) and {result["category_id"] for result in results} <= {4}


def test_the_training_state_comes_back_whole(model, tiny_config):
    config = tiny_config(GROUP, "train.ema=0.9", "train.optimizer=adamw", "train.schedule=cosine")
    training = build_training(config, model, num_batches=4, device=CPU)
    train(training, [batch_of(sample(i)) for i in range(4)])
    training.best, training.evaluations_since_best = 0.25, 2
    other = build_training(config, build_model(config.model, 3), num_batches=4, device=CPU)
    other.load_state_dict(copy.deepcopy(training.state_dict()))
    assert (other.epoch, other.batch, other.step, other.best, other.evaluations_since_best) == (
        1,
        0,
        4,
        0.25,
        2,
    )
    for one, two in ((other.model, training.model), (other.evaluated_model, training.evaluated_model)):
        assert all(torch.equal(weights(one)[k], v) for k, v in weights(two).items())
    for each in (training, other):
        train(each, [batch_of(sample(9))])
    assert all(torch.equal(weights(other.model)[k], v) for k, v in weights(training.model).items())


def test_a_state_without_averages_is_refused_where_they_are_configured(model):
    state = training_of(model).state_dict()
    with pytest.raises(
        ValueError, match="the training state has no ema: resume with the config it was saved with"
    ):
        training_of(model, ema=0.9).load_state_dict(state)


# Batches and evaluation


def test_bytes_become_floats_from_0_to_1_on_the_device():
    image = torch.tensor([0, 51, 255], dtype=torch.uint8).reshape(3, 1, 1).expand(3, 2, 2)
    (moved,), (target,) = to_device(([image], [sample(3)[1]]), CPU)
    assert moved.dtype == torch.float32 and moved[:, 0, 0].tolist() == pytest.approx([0, 0.2, 1])
    assert target["image_id"] == 3 and target["original_size"] == (64, 64)


def test_results_are_xywh_with_the_data_sets_own_category_ids():
    detected = {
        "boxes": torch.tensor([[1.0, 2.0, 11.0, 22.0], [0.0, 0.0, 4.0, 5.0]]),
        "labels": torch.tensor([2, 1]),
        "scores": torch.tensor([0.75, 0.5]),
    }
    assert coco_results(detected, 42, [3, 90]) == [
        {"image_id": 42, "category_id": 90, "bbox": [1, 2, 10, 20], "score": 0.75},
        {"image_id": 42, "category_id": 3, "bbox": [0, 0, 4, 5], "score": 0.5},
    ]


def test_evaluation_gives_results_and_losses_that_repeat_and_leaves_the_mode(model):
    batches = [batch_of(sample(1), sample(2)), batch_of(sample(3, boxes=()))]
    model.train()
    torch.manual_seed(1)
    results, losses = evaluate(model, batches, CPU, category_ids=[3, 90])
    torch.manual_seed(2)
    assert evaluate(model, batches, CPU, category_ids=[3, 90]) == (results, losses)
    assert model.training and model.rpn.fg_bg_sampler.keys is None
    assert (
        results
        and {r["image_id"] for r in results} <= {1, 2, 3}
        and {r["category_id"] for r in results} <= {3, 90}
    )
    assert all(set(r) == {"image_id", "category_id", "bbox", "score"} for r in results)
    assert losses["loss"] == pytest.approx(sum(losses[name] for name in LOSSES)) and math.isfinite(
        losses["loss"]
    )


@pytest.mark.parametrize("normalizer", ["sampled", "batch_size"])
def test_detections_and_losses_of_an_image_do_not_depend_on_its_neighbours_in_the_batch(
    tiny_config, normalizer
):
    conventions = f"model.conventions={{rpn_loss_normalizer: {normalizer}}}"
    # Images differ in size and in the number of samples.
    size = "model.max_size=128"
    torch.manual_seed(0)
    model = build_model(tiny_config(GROUP, conventions, size).model, 3)
    samples = [
        sample(1),
        sample(2, size=(64, 96)),
        sample(3, boxes=(), size=(64, 80)),
        sample(4, boxes=[(4, 4, 20, 40), (30, 8, 60, 50)]),
        sample(5, boxes=[(4, 4, 20, 40)] * 5, size=(64, 70)),
    ]
    apart, losses = evaluate(model, [batch_of(s) for s in samples], CPU, category_ids=[1, 2])
    assert {each["image_id"] for each in apart} == {1, 2, 3, 4, 5}
    for cut in (2, 3, 5):
        batches = [batch_of(*samples[:cut]), batch_of(*samples[cut:])][: 1 + (cut < 5)]
        together, means = evaluate(model, batches, CPU, category_ids=[1, 2])
        assert means == pytest.approx(losses, rel=1e-5)
        for one, two in zip(together, apart, strict=True):
            assert (one["image_id"], one["category_id"]) == (two["image_id"], two["category_id"])
            assert one["score"] == pytest.approx(two["score"], abs=1e-5)
            np.testing.assert_allclose(one["bbox"], two["bbox"], atol=1e-2)


def test_results_are_in_pixels_of_the_original_image(model):
    image, target = sample(1)
    _, twice = sample(1)
    twice["original_size"] = (128, 256)
    small, _ = evaluate(model, [([image], [target])], CPU, category_ids=[1, 2])
    large, _ = evaluate(model, [([image], [twice])], CPU, category_ids=[1, 2])
    for one, two in zip(small, large, strict=True):
        np.testing.assert_allclose(np.multiply(one["bbox"], [4, 2, 4, 2]), two["bbox"], rtol=1e-4, atol=1e-3)


def test_evaluating_nothing_gives_no_result(model):
    assert evaluate(model, [], CPU, category_ids=[1, 2])[0] == []
