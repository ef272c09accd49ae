"""The command line of tools/benchmark.py: choose a measurement, print its table, and write its JSON and plot."""

import argparse
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from detector.command_line import exit_status, make_parser
from detector.config import load_config
from detector.data.images import list_images
from detector.files import write_json
from detector.inference import DTYPES as DETECTOR_DTYPES
from detector.inference import choose_device
from detector.tables import format_table

from . import (
    DTYPES,
    INFERENCE_FORMS,
    Settings,
    coco_backends,
    compare_cifar_loader,
    compare_inference,
    compare_rates,
    compare_training,
    describe_machine,
    format_limit,
    format_times,
    has_detectron2,
    measure_evaluation,
    measure_loader,
    measure_scaling,
    measure_stream,
    peak_memory,
    plot_growth,
    plot_parts,
    profile_training,
)

PARTS = ("transform", "trunk", "rpn", "roi_align", "head", "predictor", "postprocessing")
STEP_PARTS = ("forward", "backward", "update")
UNITS = ("seconds", "cpu_seconds")
RATES = {"of_network": "the network's own rate", "of_cpu": "what the parts' CPU seconds allow"}


def main(description: str) -> int:
    """Parse the command line, measure, print and write. Returns the exit status."""
    args = parse_arguments(description)
    return exit_status(args.measure, args)


def parse_arguments(description: str) -> argparse.Namespace:
    parser = make_parser(description)
    commands = parser.add_subparsers(required=True)
    for add in (
        add_inference,
        add_training,
        add_scaling,
        add_loader,
        add_stream,
        add_evaluation,
        add_classifier,
    ):
        add(commands)
    # Overrides may stand anywhere among a subcommand's options.
    args, rest = parser.parse_known_args()
    unknown = [a for a in rest if a.startswith("-") or "=" not in a or not hasattr(args, "overrides")]
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if rest:
        args.overrides = rest
    return args


def add_inference(commands: Any) -> None:
    parser = commands.add_parser("inference", help="detection and its parts, ours against torchvision's")
    parser.set_defaults(measure=measure_inference)
    add_model_arguments(parser)
    parser.add_argument("--sizes", nargs="+", type=size, default=[(600, 800), (800, 1067)], metavar="HxW")
    parser.add_argument("--proposals", nargs="+", type=positive, default=[1000, 300], help="per image")
    parser.add_argument(
        "--without-winograd",
        action="store_true",
        help="also our optimised form with plain 3x3 convolutions, as bf16 always has",
    )
    parser.add_argument("--compile", action="store_true", help="also our form through torch.compile")
    add_stock_arguments(parser)


def add_training(commands: Any) -> None:
    parser = commands.add_parser("training", help="a training step, ours against torchvision's")
    parser.set_defaults(measure=measure_training)
    add_model_arguments(parser)
    parser.add_argument("--sizes", nargs="+", type=size, default=[(600, 800)], metavar="HxW")
    parser.add_argument("--regions", nargs="+", type=positive, default=[512, 128], help="per image")
    parser.add_argument("--checkpointing", action="store_true", help="ours with activation checkpointing too")
    parser.add_argument(
        "--profile",
        metavar="TRACE.json.gz",
        help="in place of all this: where the time of a recipe's training goes, and a trace for Perfetto",
    )
    parser.add_argument("--config", help="with --profile: the recipe; key=value overrides a setting")
    parser.add_argument("--batches", type=positive, default=10, help="with --profile: batches that count")
    parser.set_defaults(overrides=[])
    add_stock_arguments(parser)


def add_scaling(commands: Any) -> None:
    parser = commands.add_parser("scaling", help="time and memory of ours as regions and pixels grow")
    parser.set_defaults(measure=measure_growth)
    add_model_arguments(parser)
    regions, sizes = (
        [100, 300, 500, 1000, 1500, 2000],
        [(300, 400), (450, 600), (600, 800), (750, 1000), (900, 1200)],
    )
    parser.add_argument(
        "--size", type=size, default=(600, 800), metavar="HxW", help="image size for --regions"
    )
    parser.add_argument("--regions", nargs="+", type=positive, default=regions)
    parser.add_argument("--sizes", nargs="+", type=size, default=sizes, metavar="HxW")
    parser.add_argument("--form", choices=INFERENCE_FORMS, default="ours_optimized")


def add_loader(commands: Any) -> None:
    usage = "%(prog)s --config FILE.yaml [key=value ...] [options]"
    parser = commands.add_parser(
        "loader", usage=usage, help="images/s of the training loader and of decoding alone"
    )
    parser.set_defaults(measure=measure_loading, overrides=[])
    parser.add_argument("--config", required=True, help="a recipe with training data and augmentation")
    parser.add_argument("--min-size", type=positive, default=600, help="short side in pixels")
    parser.add_argument(
        "--max-size", type=positive, help="bound of the long side (default: 5/3 of the short one)"
    )
    parser.add_argument("--images", type=positive, default=500, help="images per pass")
    parser.add_argument("--workers", nargs="+", type=int, default=[2], help="processes, one case for each")
    add_output_arguments(parser, repeats=5)


def add_stream(commands: Any) -> None:
    parser = commands.add_parser("stream", help="tools/infer.py against its network alone")
    parser.set_defaults(measure=measure_infer)
    parser.add_argument("--weights", required=True, help="a detector's checkpoint")
    parser.add_argument("--images", nargs="+", required=True, metavar="PATH", help="pictures or folders")
    parser.add_argument("--count", type=positive, default=200, help="of pictures, the first ones")
    parser.add_argument("--batch-size", type=positive, default=1, help="pictures at once (default 1)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=DETECTOR_DTYPES, default="float32", help="as in tools/infer.py")
    add_output_arguments(parser, repeats=3)


def add_evaluation(commands: Any) -> None:
    parser = commands.add_parser("evaluation", help="seconds of COCO evaluation by each backend")
    parser.set_defaults(measure=measure_scoring)
    parser.add_argument("--images", type=positive, default=5000)
    parser.add_argument("--classes", type=positive, default=80)
    parser.add_argument("--boxes", type=positive, help="objects (default: 7.2 per image, as in val2017)")
    parser.add_argument("--detections", type=positive, default=100, help="per image")
    parser.add_argument("--backends", nargs="+", help="default: every installed one")
    add_output_arguments(parser, repeats=1)


def add_classifier(commands: Any) -> None:
    parser = commands.add_parser(
        "classifier", help="a classifier's step beside its trunk's in a detector, and CIFAR's loader"
    )
    parser.set_defaults(measure=measure_classifier)
    parser.add_argument("--backbone", default="resnet18")
    parser.add_argument("--batch", type=positive, default=16, help="pictures at once")
    parser.add_argument("--side", type=positive, default=224, help="of the pictures in pixels")
    parser.add_argument("--matrix-size", type=positive, default=2048, help="as in inference")
    parser.add_argument("--warmup", type=int, default=1, help="rounds before those that count")
    add_output_arguments(parser, repeats=5)


def add_stock_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--skip-stock", action="store_true", help="ours alone, without ratios to torchvision's (stock)"
    )
    parser.add_argument("--stock-channels-last", action="store_true", help="stock in channels-last too")


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--backbone", default="resnet101", help="a ResNet that torchvision also has")
    parser.add_argument("--batch", type=positive, default=1, help="images at once")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="bf16 is under autocast")
    parser.add_argument("--stock-dtype", choices=DTYPES, help="of stock (default: that of ours)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=positive, help="of torch (default: torch's choice)")
    parser.add_argument(
        "--tf32", action="store_true", help="use TF32 for CUDA's float32 products, in every form"
    )
    parser.add_argument(
        "--matrix-size",
        type=positive,
        default=2048,
        help="side of the matrices whose product gives the limit",
    )
    parser.add_argument(
        "--memory", action="store_true", help="also peak memory, each form in its own process"
    )
    parser.add_argument("--warmup", type=int, default=1, help="rounds before those that count")
    parser.add_argument("--plot", metavar="FILE.png")
    add_output_arguments(parser, repeats=5)


def add_output_arguments(parser: argparse.ArgumentParser, repeats: int) -> None:
    parser.add_argument("--repeats", type=positive, default=repeats, help="rounds that count")
    parser.add_argument("--output", metavar="FILE.json")


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not positive")
    return value


def size(text: str) -> tuple[int, int]:
    """Parse height x width in pixels, such as "600x800"."""
    parts = text.lower().split("x")
    if len(parts) != 2 or not all(part.isdigit() and int(part) > 0 for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is no size; accepted: height x width, as 600x800")
    return int(parts[0]), int(parts[1])


def settings_of(args: argparse.Namespace) -> Settings:
    return Settings(**{f.name: getattr(args, f.name) for f in fields(Settings) if hasattr(args, f.name)})


def write(args: argparse.Namespace, **measured: Any) -> None:
    """Write the JSON file of --output: machine, settings, and the measurements so far."""
    if args.output is None:
        return
    settings = {
        name: value for name, value in vars(args).items() if name not in ("measure", "output", "plot")
    }
    machine = describe_machine(getattr(args, "device", "cpu"))
    write_json(args.output, {"machine": machine, "settings": settings, **measured}, indent=1)


# Subcommands


def measure_inference(args: argparse.Namespace) -> None:
    forms = [
        *stock_forms(args),
        "ours",
        *(["ours_direct"] if args.without_winograd else []),
        "ours_optimized",
        *(["ours_compiled"] if args.compile else []),
    ]
    if not has_detectron2(args.backbone):
        print("Detectron2 is not installed, or has no such network: not measured")
    cases = []
    for case in compare_inference(settings_of(args), args.sizes, args.proposals, forms):
        case["memory"] = measure_memory(args, "inference", forms, case["size"], case["proposals"])
        cases.append(case)
        title = f"{case['size'][0]}x{case['size'][1]}, {case['proposals']} proposals, s"
        print(format_times(case, title, PARTS), format_limit(case), sep="\n", end="\n\n", flush=True)
        write(args, benchmark="inference", cases=cases)
    if args.plot:
        plot_parts(args.plot, cases, "proposals", (*PARTS, "other"))


def measure_training(args: argparse.Namespace) -> None:
    if args.profile:
        return measure_profile(args)
    forms = [*stock_forms(args), "ours", *(["ours_checkpointed"] if args.checkpointing else [])]
    cases = []
    for case in compare_training(settings_of(args), args.sizes, args.regions, forms):
        case["memory"] = measure_memory(args, "training", forms, case["size"], case["regions"])
        cases.append(case)
        title = f"{case['size'][0]}x{case['size'][1]}, {case['regions']} regions, s"
        largest = max(case["difference"].values())
        print(
            format_times(case, title, STEP_PARTS), f"difference of losses {largest:.1e}", sep="\n", flush=True
        )
        write(args, benchmark="training", cases=cases)
    if args.plot:
        plot_parts(args.plot, cases, "regions", (*STEP_PARTS, "other"))


def measure_profile(args: argparse.Namespace) -> None:
    if args.config is None:
        raise ValueError("--profile needs --config, the recipe to train")
    config, device = load_config(args.config, args.overrides), choose_device(args.device)
    seconds = profile_training(config, device, args.batches, Path(args.profile))
    images = seconds.pop("images")
    rows = [(part, value, f"{value / seconds['total']:.0%}") for part, value in seconds.items()]
    print(format_table(rows, header=("part", "seconds a batch", "share")))
    print(f"{images / seconds['total']:.2f} images/s; the trace is in {args.profile}")
    write(args, benchmark="profile", seconds=seconds)


def measure_growth(args: argparse.Namespace) -> None:
    growth = measure_scaling(settings_of(args), args.size, args.regions, args.sizes, args.form)
    if args.memory:
        settings = settings_of(args)
        growth["regions"]["memory"] = [
            peak_memory("inference", settings, args.form, args.size, count) for count in args.regions
        ]
    for name, curve in growth.items():
        peaks = [m["running_mb"] for m in curve.get("memory", [])] or [None] * len(curve["x"])
        rows = [
            (key, parts["total"]["median"], parts["total"]["min"], parts["total"]["max"], peak)
            for (key, parts), peak in zip(curve["times"].items(), peaks, strict=True)
        ]
        print(format_table(rows, header=(name, "median s", "min", "max", "peak MB")))
        if curve["fit"]:
            print(
                "seconds = {slope:.3e} x {0} + {intercept:.3f}, R^2 {r_squared:.4f}\n".format(
                    name, **curve["fit"]
                )
            )
    write(args, benchmark="scaling", **growth)
    if args.plot:
        plot_growth(args.plot, growth)


def measure_loading(args: argparse.Namespace) -> None:
    max_size = args.max_size or round(args.min_size * 5 / 3)
    sizes = [f"model.min_size={args.min_size}", f"model.max_size={max_size}"]
    config = load_config(args.config, [*args.overrides, *sizes])
    cases = []
    for case in measure_loader(config, args.images, args.workers, args.repeats):
        cases.append(case)
        write(args, benchmark="loader", augment=config.augment.model_dump(), cases=cases)
    rows = [
        (c["workers"], c["images_per_second"]["loader"], c["images_per_second"]["decoding"], c["ratio"])
        for c in cases
    ]
    print(
        format_table(
            rows, header=("workers", "loader, images/s", "decoding alone", "loader's time of decoding's")
        )
    )


def measure_infer(args: argparse.Namespace) -> None:
    paths = list_images(args.images, [])[: args.count]
    rounds = [
        measure_stream(args.weights, paths, args.device, args.batch_size, args.dtype)
        for _ in range(args.repeats)
    ]
    rows = [
        (part, *(sorted(r["parts"][part][unit] for r in rounds)[args.repeats // 2] for unit in UNITS))
        for part in rounds[0]["parts"]
    ]
    print(format_table(rows, header=("part", *UNITS)))
    for name, meaning in RATES.items():
        print(f"{sorted(r[name] for r in rounds)[args.repeats // 2]:.2f} of {meaning}")
    write(args, benchmark="stream", rounds=rounds)


def measure_classifier(args: argparse.Namespace) -> None:
    rates = compare_rates(settings_of(args), args.side)
    write(args, benchmark="classifier", rates=rates)
    loader = compare_cifar_loader(settings_of(args))
    rows = [(name, value / 1e9) for name, value in rates["macs_per_second"].items()]
    print(format_table(rows, header=(args.backbone, "GMAC/s")))
    print(f"the classifier's rate is {rates['ratio']:.2f} of its trunk's in a detector")
    rows = list(loader["images_per_second"].items())
    print(format_table(rows, header=(f"CIFAR, {loader['workers']} workers", "images/s")))
    write(args, benchmark="classifier", rates=rates, loader=loader)


def measure_scoring(args: argparse.Namespace) -> None:
    backends = args.backends or coco_backends()
    boxes = args.boxes or round(7.2 * args.images)
    measured = measure_evaluation(args.images, args.classes, boxes, args.detections, backends, args.repeats)
    rows = [
        (
            name,
            parts["total"]["median"],
            measured["metrics"][name]["AP"],
            f"{measured['difference'][name]:.1e}",
        )
        for name, parts in measured["times"].items()
    ]
    print(format_table(rows, header=("backend", "seconds", "AP", "largest difference")))
    write(args, benchmark="evaluation", **measured)


def stock_forms(args: argparse.Namespace) -> list[str]:
    wanted = {"stock": not args.skip_stock, "stock_channels_last": args.stock_channels_last}
    return [form for form, is_wanted in wanted.items() if is_wanted]


def measure_memory(
    args: argparse.Namespace, task: str, forms: Sequence[str], image_size: list[int], count: int
) -> dict[str, Any] | None:
    if not args.memory:
        return None
    settings = settings_of(args)
    peaks = {form: peak_memory(task, settings, form, image_size, count) for form in forms}
    stock = peaks.get("stock", {}).get("peak_mb")
    return {form: {**peak, "ratio": stock and peak["peak_mb"] / stock} for form, peak in peaks.items()}
