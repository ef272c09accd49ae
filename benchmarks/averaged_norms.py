"""Evaluate averaged weights (`train.ema`) with the model's own batch-norm statistics, and with averaged ones.

python -m benchmarks.averaged_norms --output benchmarks/averaged_norms.json

Each seed is one training of the recipe. Both forms, and the weights that are not averaged, are evaluated after each epoch.
"""

import argparse
import copy
import sys
import tempfile
from typing import Any

import torch
from torch import nn

from detector.command_line import make_parser
from detector.config import load_config
from detector.evaluation.coco import evaluate_coco
from detector.files import write_json
from detector.run import Run
from detector.run_log import RunLog
from detector.tables import format_table

from .settings import describe_machine

FORMS = ("not averaged", "own statistics", "averaged statistics")
METRICS = ("AP", "AP50")


class BothForms(Run):
    """A run that evaluates the averages with both kinds of statistics. `rows`: of each epoch, AP by form."""

    def _start(self, *parts: Any) -> None:
        super()._start(*parts)
        self.rows: list[dict[str, Any]] = []

    def _measure(self, title: str, log: RunLog) -> dict[str, Any]:
        model = self.training.model
        with_own = copy.deepcopy(self.training.evaluated_model)
        with_own.load_state_dict(dict(model.named_buffers()), strict=False)
        found = [self._score(model, FORMS[0]), self._score(with_own, FORMS[1]), super()._measure(title, log)]
        row = {
            form: {name: round(each[name], 4) for name in METRICS}
            for form, each in zip(FORMS, found, strict=True)
        }
        self.rows.append({"epoch": self.training.epoch, "step": self.training.step, **row})
        return found[-1]

    def _score(self, model: nn.Module, title: str) -> dict[str, Any]:
        return evaluate_coco(self.val_set.to_coco(), self.evaluation.run(model, title)[0])


def measure(recipe: str, overrides: list[str]) -> dict[str, Any]:
    """One training: {"seed": ..., "epochs": [{"epoch": ..., "step": ..., form: {"AP": ..., "AP50": ...}}]}."""
    config = load_config(recipe, overrides)
    with tempfile.TemporaryDirectory() as folder:
        run = BothForms(config, folder, torch.device("cpu"))
        run.train()
    return {"seed": config.train.seed, "epochs": run.rows}


def main() -> int:
    parser = make_parser(__doc__)
    parser.add_argument("--config", default="configs/shapes.yaml")
    parser.add_argument("--ema", type=float, default=0.999)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--output", metavar="FILE.json")
    parser.add_argument("overrides", nargs="*", help="settings of the recipe, such as train.epochs=4")
    args: argparse.Namespace = parser.parse_args()
    trainings: list[dict[str, Any]] = []
    for seed in args.seeds:
        overrides = [f"train.ema={args.ema}", f"train.seed={seed}", *args.overrides]
        trainings.append(measure(args.config, overrides))
        if args.output:
            found = {"machine": describe_machine(), "settings": vars(args), "trainings": trainings}
            write_json(args.output, found, indent=1)
    rows = [
        (training["seed"], row["epoch"], *(row[form]["AP"] for form in FORMS))
        for training in trainings
        for row in training["epochs"]
    ]
    print(format_table(rows, header=("seed", "epoch", *(f"AP, {form}" for form in FORMS))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
