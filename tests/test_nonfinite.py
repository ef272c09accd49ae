"""Numbers that stay finite: updates that are refused, what is said of them, and weights that are never written."""

import json
import math

import pytest
import torch
from PIL import Image
from short_runs import CPU, lines
from test_engine import batch_of, sample, train, training_of, weights

import detector.run
import detector.training_run
from detector.build import build_model
from detector.checkpoint import load_checkpoint, load_training_state
from detector.engine import NonFiniteLossError
from detector.nonfinite import first_nonfinite_layer
from detector.run import Run


@pytest.fixture(autouse=True)
def no_curves(monkeypatch):
    """Curves take longer than the epochs here."""
    monkeypatch.setattr(detector.training_run, "plot_curves", lambda log_path, png_path: None)


def poison(model, is_bad, layer="rpn.head.conv", factor=math.nan):
    """Make a layer's output NaN for batches with pictures of these ids."""
    seen = []
    model.register_forward_pre_hook(
        lambda module, arguments: seen.append(
            any(is_bad(target["image_id"]) for target in arguments[1] or ())
        )
    )
    model.get_submodule(layer).register_forward_hook(
        lambda module, inputs, output: (
            [o * factor for o in output]
            if isinstance(output, list)
            else output * factor
            if seen[-1:] == [True]
            else None
        )
    )


@pytest.fixture
def model(tiny_config):
    torch.manual_seed(0)
    return build_model(tiny_config("model.backbone={name: resnet18, width: 8}").model, 3)


# Updates


@pytest.mark.parametrize(
    "options", [{}, {"ema": 0.5}, {"scaler": True}], ids=["plain", "averages", "fp16's scaler"]
)
def test_a_refused_update_changes_no_weight_no_statistics_and_no_average(model, options):
    training = training_of(model, lr=0.1, **options)
    train(training, [batch_of(sample(1))])
    poison(model, lambda image_id: image_id == 2)
    before, state = weights(model), {k: v.clone() for k, v in training.evaluated_model.state_dict().items()}
    errors = []
    _, read = train(training, [batch_of(sample(2))], on_nonfinite=errors.append)
    assert len(errors) == 1 and read == [] and training.step == 2
    assert all(torch.equal(weights(model)[name], value) for name, value in before.items())
    assert all(
        torch.equal(training.evaluated_model.state_dict()[name], value) for name, value in state.items()
    )
    train(training, [batch_of(sample(3))])
    assert any(not torch.equal(weights(model)[name], value) for name, value in before.items())


@pytest.mark.parametrize("clip_norm", [None, 1.0])
def test_a_gradient_that_is_not_finite_refuses_the_update_too(model, clip_norm):
    next(model.parameters()).register_hook(lambda gradient: gradient * math.inf)
    before = weights(model)
    with pytest.raises(
        NonFiniteLossError, match=r"a gradient is not finite at image ids \[1\]: loss_classifier \d"
    ):
        train(training_of(model), [batch_of(sample(1))], clip_norm=clip_norm)
    assert all(torch.equal(weights(model)[name], value) for name, value in before.items())


def test_fp16_tolerates_an_overflow_only_while_its_scale_is_above_one(model):
    handle = next(model.parameters()).register_hook(lambda gradient: gradient * math.nan)
    training, errors, before = training_of(model, scaler=True), [], weights(model)
    batches = [batch_of(sample(1))] * 20
    train(training, batches, on_nonfinite=errors.append)
    # 65536 is halved 16 times. The next four are reported.
    assert len(errors) == 4 and "a gradient is not finite at image ids [1]" in str(errors[0])
    assert training.scaler.get_scale() == 1 and training.step == 20
    assert all(torch.equal(weights(model)[name], value) for name, value in before.items())
    handle.remove()
    train(training, batches[:1])
    assert any(not torch.equal(weights(model)[name], value) for name, value in before.items())


def test_a_loss_that_is_not_finite_says_nothing_about_fp16s_scale(model):
    training = training_of(model, scaler=True)
    poison(model, lambda image_id: image_id == 2)
    train(training, [batch_of(sample(2))] * 3, on_nonfinite=lambda error: None)
    assert training.scaler.get_scale() == 65536


def test_of_an_update_of_several_batches_the_one_that_failed_is_named(model):
    poison(model, lambda image_id: image_id == 2)
    batches = [batch_of(sample(i)) for i in (1, 2, 3)]
    with pytest.raises(NonFiniteLossError, match=r"image ids \[2\]: "):
        train(training_of(model), batches, accumulate=3)


def test_the_check_costs_one_read_of_the_device_an_update(model, monkeypatch):
    reads, isfinite = [], torch.isfinite
    monkeypatch.setattr(torch, "isfinite", lambda value: reads.append(value.numel()) or isfinite(value))
    train(training_of(model), [batch_of(sample(i)) for i in range(4)], accumulate=2)
    assert reads.count(1) == 2


@pytest.mark.parametrize(
    "layer", ["backbone.stage1.conv1", "rpn.head.conv", "roi_heads.box_predictor.cls_score"]
)
def test_the_first_layer_whose_output_is_not_finite_is_found(model, layer):
    def run():
        return model(
            [torch.rand(3, 64, 64)],
            [{"boxes": torch.tensor([[4.0, 4, 40, 40]]), "labels": torch.tensor([1])}],
        )

    model.train()
    assert first_nonfinite_layer(model, run) is None
    with torch.no_grad():
        next(model.get_submodule(layer).parameters()).mul_(math.nan)
    assert first_nonfinite_layer(model, run).startswith(layer.removesuffix(".conv1"))
    assert not any(module._forward_hooks for module in model.modules())


# Runs


def test_a_loss_that_is_not_finite_names_pictures_boxes_and_layer_and_keeps_the_last_good_state(
    tiny_config, tiny_shapes, tmp_path
):
    run = Run(tiny_config("train.save_every=0"), tmp_path, CPU)
    poison(run.training.model, lambda image_id: image_id == 3)
    file = str(run.train_set.image_paths[list(run.train_set.image_ids).index(3)])
    with pytest.raises(
        NonFiniteLossError, match="The first layer whose .* is rpn.head.conv.*lower train.lr"
    ) as caught:
        run.train()
    assert f"{file} with " in str(caught.value) and "loss_objectness nan" in str(caught.value)
    (report,) = (tmp_path / "nonfinite").glob("*.json")
    said = json.loads(report.read_text())
    assert said["layer"].startswith("rpn.head.conv") and said["losses"]["loss_objectness"] == "nan"
    assert file in [picture["file"] for picture in said["pictures"]] and len(said["pictures"]) == 2
    assert all(len(p["boxes"]) == len(p["labels"]) for p in said["pictures"])
    with Image.open(report.with_suffix(".jpg")) as sheet:
        assert sheet.width > 100
    step = load_training_state(tmp_path / "training_state.pt")["step"]
    assert report.stem == f"update_{step + 1}" and run.training.step == step + 1


def test_bad_updates_may_be_skipped_and_are_counted_and_the_run_resumes_so(tiny_config, tmp_path, capsys):
    run = Run(tiny_config("train.save_every=0"), tmp_path, CPU)
    poison(run.training.model, lambda image_id: image_id == 3)
    with pytest.raises(NonFiniteLossError):
        run.train()
    again = Run(tiny_config("train.on_nonfinite=skip"), tmp_path, CPU, resume=True)
    poison(again.training.model, lambda image_id: image_id == 3)
    again.train()
    assert "is skipped (2 so far): a loss is not finite at image ids" in capsys.readouterr().out
    state = load_training_state(tmp_path / "training_state.pt")
    assert (state["skipped"], state["step"], state["epoch"]) == (2, 8, 2)
    assert all(value.isfinite().all() for value in state["model"].values())
    assert len(list((tmp_path / "nonfinite").glob("*.json"))) == 2


def test_ten_bad_updates_in_a_row_stop_a_run_that_skips(tiny_config, tmp_path):
    run = Run(tiny_config("train.epochs=9", "train.on_nonfinite=skip", "data.val=null"), tmp_path, CPU)
    poison(run.training.model, lambda image_id: run.training.step != 5)
    with pytest.raises(NonFiniteLossError):
        run.train()
    # The sixth update was made.
    assert (run.training.step, run.training.skipped) == (16, 15)


@pytest.mark.parametrize(
    "settings", [["train.batch_size=8", "train.epochs=1"], []], ids=["one update", "several"]
)
def test_a_rate_far_too_high_writes_no_weights_that_overflow(tiny_config, tmp_path, settings):
    config = tiny_config("train.lr=1.0e+10", "train.warmup_steps=0", "train.save_every=0", *settings)
    with pytest.raises(
        FloatingPointError, match=r"lower train.lr \(1e\+10\), raise train.warmup_steps \(0\)"
    ):
        Run(config, tmp_path, CPU).train()
    assert not (tmp_path / "best.safetensors").exists() and not (tmp_path / "last.safetensors").exists()
    state = load_training_state(tmp_path / "training_state.pt")
    assert state["step"] == 0 and all(value.isfinite().all() for value in state["model"].values())


def test_a_loss_that_explodes_in_the_first_updates_says_which_setting_to_change(
    tiny_config, tmp_path, capsys
):
    run = Run(tiny_config("train.epochs=1", "train.lr=1.0e-12", "data.val=null"), tmp_path, CPU)
    poison(run.training.model, lambda image_id: True, "roi_heads.box_predictor.cls_score", 1e4)
    run.train()
    warnings = [
        line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: the loss is")
    ]
    assert len(warnings) == 1 and "at update 1. No update came before" in warnings[0]


# Evaluation


def test_without_a_box_to_validate_by_ap_is_a_dash_and_the_newest_weights_are_the_best(
    tiny_config, tmp_path, capsys
):
    run = Run(tiny_config(), tmp_path, CPU)
    run.val_set.crowd[:] = True
    metrics = run.train()
    out = capsys.readouterr().out
    assert "validate 2/2: AP -, AP50 -, AP75 -, loss" in out
    assert "AP is -: nothing to measure it by. best.safetensors holds the newest weights" in out
    assert metrics["AP"] is None and metrics["epoch"] == 2
    best, last = (load_checkpoint(tmp_path / f"{name}.safetensors").state_dict for name in ("best", "last"))
    assert all(torch.equal(best[name], last[name]) for name in last)


def test_weights_whose_validation_loss_is_not_finite_do_not_become_the_best(tiny_config, tmp_path, capsys):
    run = Run(tiny_config(), tmp_path, CPU)
    evaluate = run.evaluation.run

    def second_is_bad(model, title):
        results, losses = evaluate(model, title)
        return results, losses | ({"loss": math.inf} if title == "validate 2/2" else {})

    run.evaluation.run = second_is_bad
    assert run.train()["epoch"] == 1
    assert "the validation loss is not finite: best.safetensors stays as it is" in capsys.readouterr().out
    assert lines(tmp_path, "val")[1]["loss"] is None
