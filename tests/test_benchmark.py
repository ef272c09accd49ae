"""tools/benchmark.py: what it measures is the same work in every form, and its JSON says all of it. No time is asserted."""

import ctypes
import importlib.util
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from backbones.kernels.winograd import WinogradConv2d
from benchmarks import Settings, coco_backends, growth, inference, limit, models
from benchmarks.averaged_norms import FORMS, METRICS, measure
from benchmarks.steady_memory import RECIPE, draw_data, processes_of, slope, watch
from benchmarks.timing import Stopwatch
from detector.build import build_model
from detector.checkpoint import Checkpoint, save_checkpoint
from detector.config import parse_config
from detector.data.sources import build_datasets

ROOT = Path(__file__).resolve().parent.parent
TOOL = ROOT / "tools" / "benchmark.py"
SIZE = (64, 96)
SMALL = ("--backbone", "resnet18", "--repeats", "1", "--warmup", "0", "--matrix-size", "64")


@pytest.fixture
def run_benchmark(monkeypatch, capsys, tmp_path):
    """run_benchmark("inference", argument, ...) -> (exit status, the JSON or None, standard output, standard error)."""
    spec = importlib.util.spec_from_file_location("tool_benchmark", TOOL)
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)

    def run(*arguments):
        output = tmp_path / "measured.json"
        monkeypatch.setattr(sys, "argv", ["benchmark.py", *map(str, arguments), "--output", str(output)])
        status = tool.main(tool.__doc__)
        measured = json.loads(output.read_text()) if output.exists() else None
        return status, measured, *capsys.readouterr()

    return run


def check_summary(times):
    assert set(times) == {"min", "quartile1", "median", "quartile3", "max", "seconds"}
    assert 0 < times["min"] <= times["quartile1"] <= times["median"] <= times["quartile3"] <= times["max"]


def check_machine(measured):
    machine = measured["machine"]
    assert machine["cpu"] and machine["torch"] == torch.__version__ and machine["threads"] >= 1
    assert {"cores", "gpu", "torchvision", "date", "command"} <= set(machine)


def test_inference_writes_times_parts_ratios_and_the_distance_to_the_limit(run_benchmark, tmp_path):
    plot = tmp_path / "parts.png"
    arguments = (
        *SMALL,
        "--sizes",
        "64x96",
        "--proposals",
        "4",
        "--without-winograd",
        "--stock-channels-last",
    )
    status, measured, out, err = run_benchmark("inference", *arguments, "--plot", plot)
    assert (status, err) == (0, "")
    check_machine(measured)
    (case,) = measured["cases"]
    forms = {"stock", "stock_channels_last", "ours", "ours_direct", "ours_optimized"}
    assert set(case["times"]) == set(case["over_limit"]) == set(case["images_per_second"]) == forms
    parts = {"transform", "trunk", "rpn", "roi_align", "head", "predictor", "postprocessing", "other"}
    for times in case["times"].values():
        assert set(times) == parts | {"total"}
        check_summary(times["total"])
    assert set(case["ratios"]) == forms - {"stock"}
    assert all(r > 0 for ratio in case["ratios"].values() for r in ratio.values())
    assert all(limit["head"] > 0 and limit["trunk"] > 0 for limit in case["over_limit"].values())
    assert max(case["difference"].values()) <= 1e-4
    assert case["matrix_product"]["macs_per_second"]["float32"] > 0
    assert "Detectron2 is not installed" in out
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_the_compiled_form_is_timed_by_its_parts_too(run_benchmark):
    arguments = (*SMALL, "--sizes", "64x96", "--proposals", "20", "--skip-stock", "--compile")
    status, measured, _, err = run_benchmark("inference", *arguments)
    assert status == 0, err  # torch's compiler may say of itself what it misses
    times = measured["cases"][0]["times"]
    assert set(times["ours_compiled"]) == set(times["ours_optimized"])
    assert times["ours_compiled"]["trunk"]["median"] > 0


def test_inference_without_stock_has_no_ratios(run_benchmark):
    arguments = (
        *SMALL,
        "--sizes",
        "64x96",
        "--proposals",
        "3",
        "--skip-stock",
        "--dtype",
        "bf16",
        "--batch",
        "2",
    )
    status, measured, _, _ = run_benchmark("inference", *arguments)
    (case,) = measured["cases"]
    assert (
        status == 0 and case["ratios"] == {} and list(case["matrix_product"]["macs_per_second"]) == ["bf16"]
    )


def test_training_writes_the_parts_of_a_step_and_ratios(run_benchmark, tmp_path):
    plot = tmp_path / "steps.png"
    arguments = (*SMALL, "--sizes", "64x96", "--regions", "8", "--checkpointing", "--plot", plot)
    status, measured, _, err = run_benchmark("training", *arguments)
    assert (status, err) == (0, "")
    (case,) = measured["cases"]
    for times in case["times"].values():
        assert set(times) == {"total", "forward", "backward", "update", "other"}
        check_summary(times["total"])
    assert set(case["ratios"]) == {"ours", "ours_checkpointed"}
    assert all(r > 0 for ratio in case["ratios"].values() for r in ratio.values())
    assert max(case["difference"].values()) < 1e-3
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_a_profile_has_the_parts_of_a_recipe_s_batches_and_a_trace(run_benchmark, tiny_config, tmp_path):
    recipe, trace = tmp_path / "recipe.yaml", tmp_path / "trace.json"
    recipe.write_text(tiny_config("train.batch_size=1").model_dump_json())  # JSON is YAML
    arguments = ("training", "--config", recipe, "--profile", trace)
    status, measured, out, _ = run_benchmark(*arguments, "--batches", 4)
    seconds = measured["seconds"]
    assert status == 0 and "images/s" in out
    assert set(seconds) == {"total", "other", "loader", "forward", "backward", "update", "waiting"}
    parts = sum(seconds[part] for part in ("other", "loader", "forward", "backward", "update"))
    assert parts == pytest.approx(seconds["total"], rel=0.05) and seconds["waiting"] == 0
    assert any("conv" in event.get("name", "") for event in json.loads(trace.read_text())["traceEvents"])
    status, _, _, error = run_benchmark(*arguments, "--batches", 9)
    assert status == 1 and "accepted: up to 4 of these data" in error
    status, _, _, error = run_benchmark("training", "--profile", trace)
    assert status == 1 and "--profile needs --config" in error


def test_a_stream_of_pictures_is_measured_whole_and_by_its_parts(
    run_benchmark, tiny_config, tiny_shapes, tmp_path
):
    config = tiny_config()
    model, weights = build_model(config.model, 5), tmp_path / "weights.safetensors"
    save_checkpoint(weights, Checkpoint(model.state_dict(), config, ("a", "b", "c", "d")))
    arguments = ("--weights", weights, "--images", tiny_shapes, "--count", 3, "--repeats", 2)
    status, measured, out, _ = run_benchmark("stream", *arguments)
    assert status == 0 and "of the network's own rate" in out and len(measured["rounds"]) == 2
    for each in measured["rounds"]:
        parts = each["parts"]
        assert each["images"] == 3
        assert set(parts) == {"loading", "decoding", "network", "drawing", "whole"}
        seconds = parts["whole"]["seconds"] - parts["loading"]["seconds"]
        assert each["of_network"] == parts["network"]["seconds"] / seconds


def test_a_classifiers_rate_is_measured_beside_its_trunks_and_its_loader_beside_its_network(
    run_benchmark, monkeypatch
):
    monkeypatch.setattr("benchmarks.classifier.RECORDS", 40)
    options = ("--batch", 2, "--side", 32, "--matrix-size", 64, "--repeats", 1, "--warmup", 0)
    status, measured, out, _ = run_benchmark("classifier", *options)
    assert status == 0 and "of its trunk's in a detector" in out
    rates, seconds = measured["rates"]["macs_per_second"], measured["rates"]["times"]
    for name, macs in measured["rates"]["macs"].items():
        assert rates[name] == pytest.approx(2 * 3 * macs / seconds[name]["total"]["median"])
    assert measured["rates"]["macs"]["classifier"] > measured["rates"]["macs"]["trunk"] > 0
    loader = measured["loader"]
    assert loader["images_per_second"]["loader"] == pytest.approx(
        200 / loader["times"]["loader"]["total"]["median"]
    )


def test_scaling_fits_lines_and_measures_memory_in_processes_of_their_own(run_benchmark, tmp_path):
    plot = tmp_path / "growth.png"
    sizes = ("--size", "64x96", "--sizes", "64x64", "64x96", "--regions", "2", "6")
    arguments = (*SMALL, "--form", "ours", *sizes, "--memory", "--plot", plot)
    status, measured, _, err = run_benchmark("scaling", *arguments)
    assert (status, err) == (0, "")
    assert list(measured["regions"]["times"]) == ["2", "6"] and measured["pixels"]["x"] == [64 * 64, 64 * 96]
    assert set(measured["pixels"]["fit"]) == {"slope", "intercept", "r_squared"}
    for memory in measured["regions"]["memory"]:
        assert memory["peak_mb"] == max(memory["building_mb"], memory["running_mb"]) > 50
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_loader_compares_batches_with_decoding_alone(run_benchmark, tiny_config, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(tiny_config().model_dump_json())
    arguments = ("--config", recipe, "train.batch_size=3", "--min-size", 64, "--images", 10, "--repeats", 2)
    status, measured, _, err = run_benchmark("loader", *arguments, "--workers", 0, 1)
    assert (status, err) == (0, "")
    assert [case["workers"] for case in measured["cases"]] == [0, 1]
    for case in measured["cases"]:
        assert case["images"] >= 10 and case["ratio"] > 0
        assert min(case["images_per_second"].values()) > 0
    assert measured["settings"]["overrides"] == ["train.batch_size=3"]


def test_evaluation_gives_the_same_twelve_numbers_by_every_backend(run_benchmark):
    status, measured, _, err = run_benchmark("evaluation", "--images", 6, "--classes", 3, "--detections", 9)
    assert (status, err) == (0, "")
    assert set(measured["times"]) == set(coco_backends())
    assert all(len(metrics) == 12 for metrics in measured["metrics"].values())
    assert max(measured["difference"].values()) < 1e-9


def test_errors_are_one_line(run_benchmark):
    status, _, _, err = run_benchmark("inference", "--backbone", "densenet121")
    assert status == 1 and "accepted: torchvision's resnet18" in err and err.count("\n") == 1
    with pytest.raises(SystemExit):
        run_benchmark("inference", "train.lr=1")
    with pytest.raises(SystemExit):
        run_benchmark("inference", "--sizes", "600")


def test_multiply_accumulates_are_those_of_the_published_arithmetic():
    # ResNet-101 at 800x1216 with 15 anchors: 135.5 G, 36.2 G, 809 M a region; 603 M of it behind the projections of
    # 1024 x (512 + 2048) products at each of 50 x 76 positions.
    macs = limit.count_macs(Settings(), (800, 1216))
    assert round(macs["trunk"] / 1e9, 1) == 135.5 and round(macs["rpn"] / 1e9, 1) == 36.2
    assert macs["head"] // 10**6 == 809 and macs["projected_head"] // 10**6 == 603
    assert macs["projection"] == 1024 * (512 + 2048) * 50 * 76


def test_a_stopwatch_counts_each_moment_once():
    watch = Stopwatch("cpu")

    def call():
        with watch.part("outer"), watch.part("inner"):
            sum(range(20000))

    seconds = watch.time(call)
    assert set(seconds) == {"total", "other", "outer", "inner"}
    assert sum(v for k, v in seconds.items() if k != "total") <= seconds["total"]
    assert seconds["inner"] > 0


def test_watched_functions_are_put_back():
    class Owner:
        def method(self):
            return 1

    owner, original, watch = Owner(), Owner.method, Stopwatch("cpu")
    with watch.watch([(owner, "method", "a"), (Owner, "method", "b")]):
        assert set(watch.time(owner.method)) == {"total", "other", "a"}
    assert "method" not in vars(owner) and Owner.method is original


def test_every_form_sees_the_forced_number_of_boxes_within_the_image():
    boxes = models.random_boxes(50, SIZE, seed=3)
    assert boxes.shape == (50, 4) and (boxes[:, 2:] > boxes[:, :2]).all()
    assert (boxes >= 0).all() and (boxes <= torch.tensor([96, 64, 96, 64])).all()
    settings = Settings(backbone="resnet18")
    forms = inference.build_inference(settings, ("stock", "ours"), 5)
    for model in forms.values():
        models.set_case(model, SIZE, 5)
        features, logits = inference.head_outputs(model, models.make_images(settings, SIZE))
        assert features.shape == (5, 512) and logits.shape == (5, 91)


def test_forms_that_compute_different_features_are_refused():
    settings = Settings(backbone="resnet18")
    forms = inference.build_inference(settings, ("stock", "ours"), 2)
    for model in forms.values():
        models.set_case(model, SIZE, 2)
    with torch.no_grad():
        forms["ours"].backbone.stage1.conv1.weight[0] += 1
    with pytest.raises(ValueError, match="ours differs by"):
        inference.agree(forms, models.make_images(settings, SIZE), tf32=False)


@pytest.mark.parametrize(("dtype", "used"), [("float32", True), ("bf16", False)])
def test_winograd_products_are_of_float32_only(monkeypatch, dtype, used):
    monkeypatch.setattr("backbones.kernels.winograd._time", lambda *args: 0.5)
    settings, weights = Settings(backbone="resnet18", dtype=dtype), models.random_weights("resnet18")
    head = models.build_form("ours_optimized", settings, weights).roi_heads.box_head
    assert any(isinstance(layer, WinogradConv2d) for layer in head.modules()) == used


def test_a_line_is_fitted():
    fit = growth.fit_line([1, 2, 3], [5, 7, 9])
    assert fit == pytest.approx({"slope": 2, "intercept": 3, "r_squared": 1})
    assert growth.fit_line([1], [1]) is None


# Memory of a long training


def test_the_pictures_of_a_long_training_have_many_sizes(tmp_path):
    data = parse_config({**RECIPE, "data": draw_data(tmp_path, 10)}).data
    train_set, val_set = build_datasets(data)
    sizes = {tuple(size) for size in [*train_set.image_sizes.tolist(), *val_set.image_sizes.tolist()]}
    assert len(sizes) == len(train_set) + len(val_set) >= 10
    assert not train_set.problems and not train_set.left_out


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc")
def test_memory_is_watched_in_a_process_and_those_that_it_starts():
    child = "import time; held = bytearray(50 * 2**20); print('ready', flush=True); time.sleep(60)"
    start = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]])"
    with subprocess.Popen([sys.executable, "-c", start, child], stdout=subprocess.PIPE) as process:
        try:
            process.stdout.readline()
            seen = watch(process, minutes=1 / 60, every=0.1)
        finally:
            for pid in processes_of(process.pid):
                os.kill(pid, signal.SIGKILL)
    assert set(seen) == {"main", "worker 1"}
    assert seen["worker 1"][-1][1] > 50 > seen["main"][-1][1] > 1
    assert [slope([(0, 900), (1, 10), (2, 11), (3, 12)]), slope([(0, 1)])] == [60, None]


def test_one_training_is_evaluated_with_both_kinds_of_statistics(tiny_config, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(tiny_config("train.ema=0.9").model_dump_json(exclude_unset=True), encoding="utf-8")
    measured = measure(recipe, ["train.seed=3"])
    assert measured["seed"] == 3 and [row["epoch"] for row in measured["epochs"]] == [1, 2]
    assert all(row[form].keys() == set(METRICS) for row in measured["epochs"] for form in FORMS)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="no oneDNN")
def test_code_compiled_for_the_sizes_of_images_is_kept_for_the_last_ones_alone():
    program = """
import detector, torch
conv = torch.nn.Conv2d(3, 8, 3)
for width in [*range(20, 200), 20, 20]:
    conv(torch.rand(16, 3, 32, width))
"""
    environment = {**os.environ, "ONEDNN_VERBOSE": "2"}
    environment.pop("ONEDNN_PRIMITIVE_CACHE_CAPACITY", None)
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, cwd=ROOT, capture_output=True, text=True, check=True
    )
    convolutions = [line for line in done.stdout.splitlines() if ",convolution," in line]
    created = [line.split("create:")[1][:10] for line in convolutions if "create:" in line]
    assert created[-2:] == ["cache_miss", "cache_hit,"]


@pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="no glibc of 2021 or newer"
)
@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="no oneDNN")
def test_memory_in_use_stays_where_each_image_has_another_size():
    # Each size holds 28 KB in the cache of torch's wrapper: 300 more would hold 8 MB if that kept 1,024.
    program = """
import ctypes, detector, torch
names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()
class Counts(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in names]
mallinfo2 = ctypes.CDLL(None).mallinfo2
mallinfo2.restype = Counts
conv = torch.nn.Conv2d(8, 16, 3)
used = []
for widths in (range(20, 220), range(220, 520)):
    for width in widths:
        conv(torch.rand(1, 8, 32, width))
    used.append(mallinfo2().uordblks)
print(used[1] - used[0])
"""
    names = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
    environment = {name: value for name, value in os.environ.items() if name not in names}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 2**20
