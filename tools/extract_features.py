"""Write vectors of pictures' regions (2048-d for a ResNet-50), with boxes, scores and class probabilities.

python tools/extract_features.py --weights r50_c4.safetensors photos --output features
python tools/extract_features.py --weights best.safetensors photos --boxes boxes.json --output features
python tools/extract_features.py --weights best.safetensors photos --regions proposals --output features.tsv
python tools/extract_features.py --weights best.safetensors photos model.box_score_thresh=0 \\
    model.box_detections_per_img=36 model.class_agnostic_nms=true --output features_36.tsv
torchrun --nproc-per-node 8 tools/extract_features.py --weights best.safetensors photos --output features

npz: a folder with one .npz per picture: boxes (M, 4) xyxy, features (M, C5), scores, labels, class_scores (M, K),
image_size (height, width), path. extraction.json beside them names the labels.
tsv: one file in the format of bottom-up attention, which programs for captioning and question answering read. Its
columns are image_id, image_w, image_h, num_boxes, boxes, features; boxes and features are float32 in base64. It has no
header and no scores.

A stopped run continues where it was. Under torchrun, each process takes its share of the pictures. In the TSV format,
each process writes its own file, such as FILE.0of8.tsv; join them with cat.
"""

import argparse
import sys

from detector.command_line import DEVICE_HELP, PATHS_HELP, exit_status, make_parser, report_skipped
from detector.config import split_overrides
from detector.data.images import list_images
from detector.extraction import FORMATS, extract_features
from detector.features import REGIONS


def main() -> int:
    parser = make_parser(__doc__)
    parser.add_argument("paths", nargs="+", metavar="PATH", help=PATHS_HELP)
    parser.add_argument("--weights", required=True, help="a checkpoint of train.py or convert_weights.py")
    parser.add_argument("--output", required=True, metavar="DIR_OR_FILE", help="a folder, or FILE.tsv")
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--regions", choices=REGIONS, default="detections", help="the detector's own (default)"
    )
    which.add_argument("--boxes", metavar="FILE.json", help='{"a.jpg": [[x1, y1, x2, y2], ...], ...}, pixels')
    parser.add_argument("--format", choices=FORMATS, help="default: tsv if the output ends in .tsv, else npz")
    parser.add_argument(
        "--batch", type=int, default=1, help="pictures at once; those of one padded size run together"
    )
    parser.add_argument("--device", help=DEVICE_HELP)
    return exit_status(extract, parser.parse_intermixed_args())


def extract(args: argparse.Namespace) -> int:
    """Process every readable picture. Unreadable ones are named at the end, with exit status 1."""
    if args.batch < 1:
        raise ValueError(f"--batch is {args.batch}; accepted: 1 or more")
    overrides, pictures = split_overrides(args.paths)
    unlisted: list[str] = []
    unreadable = extract_features(
        args.weights,
        list_images(pictures, unlisted),
        args.output,
        overrides=overrides,
        regions=args.regions,
        boxes_path=args.boxes,
        format=args.format,
        batch_size=args.batch,
        device=args.device,
    )
    return report_skipped(unlisted + unreadable)


if __name__ == "__main__":
    sys.exit(main())
