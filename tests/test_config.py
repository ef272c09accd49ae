"""Configurations: frozen, typed, and every mistake answered with the name that was meant."""

import json
import math
import shlex
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from detector.config import Config, ModelConfig, load_config, parse_config

CONFIGS = sorted((Path(__file__).resolve().parent.parent / "configs").glob("*.yaml"))
SHAPES = {"format": "shapes", "split": "train"}
VALUES = {
    "model": {"backbone": {"name": "resnet18", "width": 8}, "min_size": 64, "max_size": 96},
    "data": {"root": "pictures", "train": SHAPES, "val": [SHAPES | {"split": "val"}]},
    "train": {"epochs": 3, "milestones": [1, 2]},
}


@pytest.fixture
def recipe(tmp_path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(VALUES))
    return path


def test_a_file_becomes_typed_sections_with_defaults(recipe):
    config = load_config(recipe)
    assert config.model.backbone == {"name": "resnet18", "width": 8}
    assert (config.model.min_size, config.model.max_size, config.model.roi_pool) == (64, 96, "align")
    assert config.model.anchor_sizes == (32, 64, 128, 256, 512)
    assert config.data.root == Path("pictures")
    assert [s.format for s in config.data.train] == ["shapes"] and config.data.val[0].split == "val"
    assert config.train.milestones == (1.0, 2.0) and config.train.epochs == 3
    assert load_config(str(recipe)) == config


@pytest.mark.parametrize(
    ("override", "read", "expected"),
    [
        ("train.lr=0.01", lambda c: c.train.lr, 0.01),
        ("train.lr=1e-3", lambda c: c.train.lr, 0.001),
        ("train.weight_decay=0", lambda c: c.train.weight_decay, 0.0),
        ("train.clip_norm=null", lambda c: c.train.clip_norm, None),
        ("train.optimizer=adamw", lambda c: c.train.optimizer, "adamw"),
        ("train.milestones=[4, 8]", lambda c: c.train.milestones, (4.0, 8.0)),
        ("train.milestones.1=7", lambda c: c.train.milestones, (1.0, 7.0)),
        ("data.strict=true", lambda c: c.data.strict, True),
        ("data.root=/data/a=b", lambda c: c.data.root, Path("/data/a=b")),
        ("data.class_names=[cat, dog]", lambda c: c.data.class_names, ("cat", "dog")),
        ("data.val.0.seed=5", lambda c: c.data.val[0].seed, 5),
        ("data.train.num_train=7", lambda c: c.data.train[0].num_train, 7),
        ("data.test={format: voc, split: test}", lambda c: c.data.test[0].one_based, True),
        ("model.backbone.name=resnet34", lambda c: c.model.backbone, {"name": "resnet34", "width": 8}),
        ("model.backbone.frozen_stages=2", lambda c: c.model.backbone["frozen_stages"], 2),
        ("model.anchor_sizes=[16,32]", lambda c: c.model.anchor_sizes, (16.0, 32.0)),
        ("augment.scale=[0.8, 1.25]", lambda c: c.augment.scale, (0.8, 1.25)),
        ("loader.num_workers=0", lambda c: c.loader.num_workers, 0),
    ],
)
def test_an_override_sets_one_value_and_its_type(recipe, override, read, expected):
    value = read(load_config(recipe, [override]))
    assert value == expected and type(value) is type(expected)


def test_later_overrides_win_and_the_given_values_stay(recipe):
    assert load_config(recipe, ["train.epochs=5", "train.epochs=6"]).train.epochs == 6
    values = json.loads(json.dumps(VALUES))
    parse_config(values, ["train.epochs=5", "data.val.0.seed=5", "model.backbone.width=16"])
    assert values == VALUES


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("modle.min_size=5", r"unknown key modle; did you mean 'model'\?"),
        ("model.min_sise=5", r"unknown key model\.min_sise; did you mean 'min_size'\?"),
        ("model.rpn_nms_tresh=0.5", r"unknown key model\.rpn_nms_tresh; did you mean 'rpn_nms_thresh'\?"),
        (
            "model.backbone.widht=5",
            r"model\.backbone: unknown key widht; did you mean 'width'\?",
        ),
        ("model.backbone.name=resnet81", "there is no backbone 'resnet81'; did you mean 'resnet18'"),
        ("data.roott=a", r"unknown key data\.roott; did you mean 'root'\?"),
        ("data.val.0.sed=1", r"unknown key data\.val\.0\.sed; did you mean 'seed'\?"),
        (
            "data.train={format: coco, images: a, anotations: b}",
            r"unknown key .*anotations; did you mean 'annotations'\?",
        ),
        (
            "augment.horizontal_flop=1",
            r"unknown key augment\.horizontal_flop; did you mean 'horizontal_flip'\?",
        ),
        (
            "train.learning_rate=1",
            r"unknown key train\.learning_rate; (did you mean|accepted: epochs, batch_size)",
        ),
        ("train.epoch=1", r"unknown key train\.epoch; did you mean 'epochs'\?"),
        ("loader.workers=1", r"unknown key loader\.workers; did you mean 'num_workers'\?"),
    ],
)
def test_an_unknown_key_at_any_level_is_refused_with_a_suggestion(recipe, override, message):
    with pytest.raises(ValueError, match=message):
        load_config(recipe, [override])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.epochs=many", r"train\.epochs is 'many': .*integer"),
        ("train.epochs=2.5", r"train\.epochs is 2\.5: .*integer"),
        ("train.epochs=0", r"train\.epochs is 0: .*greater than 0"),
        ("train.lr=fast", r"train\.lr is 'fast': .*number"),
        ("train.lr=.inf", r"train\.lr is inf: .*finite"),
        ("train.optimizer=adam", r"train\.optimizer is 'adam'; .*accepted: sgd, adamw"),
        ("train.amp=fp8", r"train\.amp is 'fp8'; .*accepted: none, bf16, fp16"),
        ("data.strict=maybe", r"data\.strict is 'maybe': .*boolean"),
        ("data.train=pictures", r"data\.train is 'pictures': .*list"),
        (
            "data.train.format=cocoa",
            r"data\.train\.format is 'cocoa'; did you mean 'coco'\? accepted: coco, voc, yolo, csv, labelme, shapes",
        ),
        ("data.train={format: coco, images: a}", r"data\.train\.annotations is missing"),
        ("model.backbone.width=wide", r"model\.backbone: width is 'wide': .*integer"),
        ("model.backbone.weights=5", r"model\.backbone: weights is 5: .*string"),
        ("model.backbone=18", r"model\.backbone is 18: .*dictionary"),
        ("model.backbone={width: 8}", r"model\.backbone: backbone needs a name; got \{'width': 8\}"),
        ("model.box_nms_thresh=1.5", r"model\.box_nms_thresh is 1\.5: .*less than or equal to 1"),
        ("model.roi_pool=mean", r"model\.roi_pool is 'mean'; .*accepted: align, max"),
        ("model.backbone.name=[a]", r"model\.backbone: backbone needs a name; got \{'name': \['a'\]"),
        (
            "model.backbone.width=true",
            r"model\.backbone: width is True; true and false are not accepted here",
        ),
        (
            "augment.horizontal_flip=true",
            r"augment\.horizontal_flip is True; true and false are not accepted",
        ),
        ("train.lr=true", r"train\.lr is True; true and false are not accepted here"),
        ("train.milestones=[1, true]", r"train\.milestones is \[1, True\]; true and false are not accepted"),
        ("train.milestones=[-3]", r"train\.milestones\.0 is -3: .*greater than 0"),
        ("train.epochs=9999999999", r"train\.epochs is 9999999999: .*less than or equal to"),
        ("loader.num_workers=100000", r"loader\.num_workers is 100000: .*less than or equal to 256"),
        ("augment.scale=[1000, 1000]", r"augment\.scale is \(1000\.0, 1000\.0\); accepted: two numbers"),
        ("augment.scale=[1e-4, 1e-4]", r"augment\.scale is \(0\.0001, 0\.0001\); accepted: two numbers"),
        ("model.bbox_reg_weights=[0, 0, 0, 0]", r"model\.bbox_reg_weights\.0 is 0: .*greater than 0"),
        ("model.max_size=50000", r"model\.max_size is 50000: .*less than or equal to 32768"),
        ("model.anchor_sizes=[1.0e+300]", r"model\.anchor_sizes is \[1e\+300\]; accepted: positive numbers"),
        ("model.conventions=[detectron2]", r"model\.conventions is \['detectron2'\]"),
        ("model.conventions={name: [a]}", r"there are no conventions \['a'\]; .*accepted: torchvision"),
        ("model.conventions.rpn_min_size=1e9", r"rpn_min_size is '1e9': .*less than or equal to 1000"),
        (
            "model.conventions.size_divisible=100000",
            r"size_divisible is 100000: .*less than or equal to 1024",
        ),
        (
            "model.conventions.roi_align_sampling_ratio=10000",
            r"sampling_ratio is 10000: .*less than or equal",
        ),
        ("data.train.image_size=1000000", r"image_size is 1000000: .*less than or equal to 4096"),
        ("model=null", r"model is None: .*ModelConfig"),
        ("augment.scale=[2, 1]", r"augment\.scale is \(2\.0, 1\.0\); accepted: two numbers from 0\.1 to 10"),
        ("augment.scale=[1, 1, 1]", r"augment\.scale"),
    ],
)
def test_a_wrong_value_is_refused_with_its_name(recipe, override, message):
    with pytest.raises(ValueError, match=message):
        load_config(recipe, [override])


def test_all_mistakes_are_told_at_once_with_the_files_name(recipe):
    with pytest.raises(
        ValueError, match=r"(?s)recipe\.yaml is not a valid config:.*train\.epochs.*loader\.worker"
    ):
        load_config(recipe, ["train.epochs=x", "loader.worker=1"])


def test_a_config_without_a_model_says_so():
    with pytest.raises(ValueError, match="model is missing"):
        parse_config({})


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.lr", r"override 'train\.lr'; accepted: key=value"),
        ("=3", "override '=3'; accepted: key=value"),
        ("train.lr=[1, 2", "is not a YAML value"),
        ("data.val.3.seed=5", "'3' is no index of a list of 1; accepted: 0 to 0"),
        ("data.val.first.seed=5", "'first' is no index of a list of 1"),
        ("train.epochs.x=5", "there is nothing below 3"),
    ],
)
def test_an_override_that_is_none_is_refused(recipe, override, message):
    with pytest.raises(ValueError, match=message):
        load_config(recipe, [override])


def test_a_config_is_frozen(recipe):
    config = load_config(recipe)
    for section, name in (
        (config, "train"),
        (config.train, "lr"),
        (config.model, "min_size"),
        (config.data.val[0], "seed"),
    ):
        with pytest.raises(ValidationError, match="frozen"):
            setattr(section, name, 1)


def test_a_missing_file_is_answered_with_its_neighbours(recipe):
    with pytest.raises(
        FileNotFoundError, match=r"there is no config .*recipes\.yaml; beside it: recipe\.yaml"
    ):
        load_config(recipe.with_name("recipes.yaml"))
    with pytest.raises(FileNotFoundError, match=r"there is no config .*x\.yaml$"):
        load_config(recipe.parent / "nowhere/x.yaml")


@pytest.mark.parametrize("content", [b"model: [1, 2", b"\xff\xfe\x00\x81", b"a: b: c"])
def test_a_file_that_is_not_yaml_is_refused_by_name(tmp_path, content):
    path = tmp_path / "broken.yaml"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"broken\.yaml is not a valid config"):
        load_config(path)


LAUGHS = "a: &a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b]\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("train: {lr: 1}\nmodel: x\ntrain: {epochs: 2}\n", "line 3: 'train' is given twice, first in line 1"),
        ("train: {lr: 1, lr: 2}\n", "line 1: 'lr' is given twice, first in line 1"),
        (LAUGHS, "line 1: &anchors, \\*aliases and !tags are not accepted"),
        ("train: *a\n", "line 1: &anchors, \\*aliases and !tags are not accepted"),
        ("train: !!python/object/apply:os.system [ls]\n", "line 1: &anchors, \\*aliases and !tags"),
        ("<<: {train: {lr: 1}}\n", "unknown key <<"),
        ("[" * 20_000, "line 1: it is nested more than 20 deep"),
        ("train: " + "{a: " * 20_000, "line 1: it is nested more than 20 deep"),
        ("- " * 20_000, "line 1: it is nested more than 20 deep"),
        ("train: {epochs: " + "9" * 5000 + "}", "Exceeds the limit"),
        ("train: {epochs: \x01}", "special characters are not allowed"),
        ("a: 1\n---\nb: 2\n", "another document"),
        ("x" * 2**20 + "x", "has 1,048,577 bytes; a config has at most 1,048,576"),
    ],
)
def test_a_strangers_yaml_is_refused_in_a_short_sentence(tmp_path, content, message):
    path = tmp_path / "strange.yaml"
    path.write_text(content)
    with pytest.raises(ValueError, match=rf"(?s)strange\.yaml .*{message}") as caught:
        load_config(path)
    assert len(str(caught.value)) < 300


def test_a_date_is_text():
    assert parse_config({**VALUES, "data": {"root": "p"}}, ["data.root=2020-01-01"]).data.root == Path(
        "2020-01-01"
    )


def test_a_long_value_and_many_faults_are_told_in_short(recipe):
    wrong = [
        f"train.milestones=[{', '.join(['-1'] * 500)}]",
        f"train.lr={'x' * 5000}",
        f"train.{'y' * 5000}=1",
    ]
    for override in wrong:
        with pytest.raises(ValueError) as caught:
            load_config(recipe, [override])
        assert len(str(caught.value)) < 3000
    with pytest.raises(ValueError, match=r"milestones\.19 is -1: .*\n  and 480 more"):
        load_config(recipe, wrong[:1])


def test_a_name_that_is_not_utf_8_is_refused_before_a_checkpoint_needs_it():
    with pytest.raises(ValueError, match="a name in it is not UTF-8 text"):
        parse_config({**VALUES, "data": {"root": "caf\udce9"}})


@pytest.mark.parametrize(("content", "kind"), [("", "NoneType"), ("- 1\n- 2\n", "list"), ("words", "str")])
def test_a_file_without_sections_is_refused(tmp_path, content, kind):
    path = tmp_path / "flat.yaml"
    path.write_text(content)
    with pytest.raises(
        ValueError,
        match=rf"flat\.yaml holds {kind}; accepted: sections model, speed, data, augment, train, loader",
    ):
        load_config(path)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.name)
def test_a_recipe_loads_and_begins_with_the_command_that_runs_it(path):
    first = path.read_text(encoding="utf-8").splitlines()[0]
    assert first.startswith(f"# python tools/train.py configs/{path.name}")
    command = shlex.split(first.removeprefix("# "))
    assert command[-2] == "--output"
    config = load_config(path, [word for word in command[3:-2] if "=" in word])
    assert config.data.train and config.data.val


def test_there_are_recipes():
    assert "shapes.yaml" in [p.name for p in CONFIGS]


def test_num_classes_adds_the_background():
    assert Config.num_classes(("cat", "dog")) == 3
    assert Config.num_classes(()) == 1


@pytest.mark.parametrize(
    "overrides", [[], ["data.class_names=[a]", "train.ema=0.99", "model.bbox_reg_weights=[1,2,3,4]"]]
)
def test_a_config_survives_json_and_yaml(recipe, overrides):
    config = load_config(recipe, overrides)
    values = config.model_dump(mode="json")
    assert parse_config(json.loads(json.dumps(values))) == config
    assert parse_config(yaml.safe_load(yaml.safe_dump(values))) == config


def test_defaults_are_valid_and_finite():
    config = ModelConfig(backbone={"name": "resnet101"})
    assert all(math.isfinite(s) for s in (*config.anchor_sizes, *config.aspect_ratios))
    assert (config.min_size, config.max_size) == (800, 1333)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("{mean: [1, 2, 3]}", r"preprocessing\.std is missing"),
        ("{mean: [1, 2, 3], std: [1, 1, 1], chanel: bgr}", "preprocessing.chanel"),
    ],
)
def test_preprocessing_is_whole_and_has_no_other_key(recipe, given, message):
    with pytest.raises(ValueError, match=message):
        load_config(recipe, [f"model.preprocessing={given}"])
