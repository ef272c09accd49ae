"""Convert a checkpoint of another program to ours, or one of ours to Detectron2's.

python tools/convert_weights.py model_final_f97cb7.pkl --output r50_c4.safetensors
python tools/convert_weights.py R-50.pkl --from msra --output r50_msra.safetensors
python tools/convert_weights.py own.pth model.min_size=600 --class-names names.txt --output own.safetensors
python tools/convert_weights.py rgb.pth --config-file config.yaml --output rgb.safetensors
python tools/convert_weights.py best.safetensors --to detectron2 --output best.pkl

Sources: detectron2 (C4 detectors, .pkl and .pth), msra (ImageNet R-50.pkl, R-101.pkl), mmdetection (caffe C4 .pth),
torchvision and timm (classifiers). jwyang is refused with the reasons. The source is guessed from the tensors' names.
Files are read without running code from them. A detector becomes a checkpoint for infer.py, evaluate.py and train.py
--start-from. A classifier becomes weights of a backbone: model.backbone={name: ..., weights: FILE}.
"""

import argparse
import sys
from pathlib import Path

from detector.checkpoint import Checkpoint, load_checkpoint
from detector.command_line import exit_status, make_parser
from detector.convert import SOURCES, convert_file
from detector.convert.class_names import read_class_names
from detector.convert.converted import BackboneWeights, save_converted
from detector.convert.detectron2 import read_settings
from detector.convert.export import EXPORTS


def main() -> int:
    parser = make_parser(__doc__)
    parser.add_argument("file", metavar="FILE", help="the checkpoint to convert")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="settings of a detector, such as model.min_size=600"
    )
    parser.add_argument("--from", dest="source", choices=SOURCES, help="FILE's program (default: guessed)")
    parser.add_argument("--to", choices=EXPORTS, help="write FILE, which is ours, for this program")
    parser.add_argument("--output", required=True, metavar="OUT", help=".safetensors; with --to .pkl or .pth")
    parser.add_argument(
        "--class-names", metavar="FILE", help="one per line, or a JSON list (default: COCO's 80 or VOC's 20)"
    )
    parser.add_argument("--config-file", metavar="FILE", help="Detectron2's config of its detector")
    for name in ("mean", "std"):
        parser.add_argument(
            f"--pixel-{name}", nargs=3, type=float, metavar="X", help="Detectron2's, of 0..255"
        )
    parser.add_argument("--channel-order", choices=("rgb", "bgr"), help="Detectron2's order of channels")
    parser.add_argument("--backbone", metavar="NAME", help="a classifier's network, if it is no ResNet")
    args = parser.parse_intermixed_args()
    return exit_status(export if args.to else convert, args)


def convert(args: argparse.Namespace) -> None:
    if Path(args.output).suffix != ".safetensors":
        raise ValueError(f"--output {args.output}: a name that ends in .safetensors is needed")
    names = None if args.class_names is None else read_class_names(args.class_names)
    said = {} if args.config_file is None else read_settings(args.config_file)
    given = {"PIXEL_MEAN": args.pixel_mean, "PIXEL_STD": args.pixel_std}
    said |= {f"MODEL.{name}": value for name, value in given.items() if value}
    said |= {"INPUT.FORMAT": args.channel_order} if args.channel_order else {}
    source, converted = convert_file(
        args.file,
        args.source,
        class_names=names,
        overrides=tuple(args.overrides),
        backbone=args.backbone,
        settings=said,
    )
    save_converted(args.output, converted.result)
    found = f"{args.file}: {source}" + ("" if args.source else " (by the names of its tensors)")
    print(found, *converted.notes, describe(converted.result, args.output), sep="\n")


def export(args: argparse.Namespace) -> None:
    if any(value for name, value in vars(args).items() if name not in ("file", "to", "output")):
        raise ValueError("--to takes a checkpoint of ours and --output alone")
    print(*EXPORTS[args.to](load_checkpoint(args.file), args.file, args.output), sep="\n")


def describe(result: Checkpoint | BackboneWeights, output: str) -> str:
    image = result.preprocessing
    lines = [
        f"{len(result.state_dict)} tensors; the network expects {image.channel_order.upper()} in 0..{image.scale:g}, "
        f"mean {image.mean}, std {image.std}"
    ]
    if isinstance(result, BackboneWeights):
        options = ", ".join(f"{k}: {v}" for k, v in {**result.backbone, "weights": output}.items())
        return "\n".join([*lines, f"backbone: {{{options}}}"])
    names = result.class_names
    shown = ", ".join(names[:5]) + (f", ... {names[-1]}" if len(names) > 5 else "")
    backbone = ", ".join(f"{k}: {v}" for k, v in result.config.model.backbone.items())
    lines += [f"backbone: {{{backbone}}}", f"{len(names)} classes: {shown}"]
    return "\n".join([*lines, f"python tools/infer.py --weights {output} PICTURES --output DIR"])


if __name__ == "__main__":
    sys.exit(main())
