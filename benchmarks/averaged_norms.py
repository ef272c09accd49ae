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
from torch import Tensor, nn

from detector.command_line import make_parser
from detector.config import load_config
from detector.evaluation.coco import evaluate_coco
from detector.files import write_json
from detector.run import Run
from detector.run_log import RunLog
from detector.tables import format_table

from .settings import describe_machine

FORMS = ("not averaged", "own statistics", "averaged statistics")


def statistics(model: nn.Module) -> dict[str, Tensor]:
    """Running means and variances of the batch norms that training changes."""
    names = [name for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)]
    buffers = dict(model.named_buffers())
    return {key: buffers[key] for name in names for key in (f"{name}.running_mean", f"{name}.running_var")}


class BothForms(Run):
    """A run that evaluates the averages with both kinds of statistics. `rows`: of each epoch, AP by form."""

    def _start(self, *parts: Any) -> None:
        super()._start(*parts)
        self.rows: list[dict[str, Any]] = []
        self.averaged: dict[str, Tensor] = {}
        averages = self.training.ema
        self._update, averages.update_parameters = averages.update_parameters, self._update_both

    @torch.no_grad()
    def _update_both(self, model: nn.Module) -> None:
        n, decay = int(self.training.ema.n_averaged), self.training.ema.decay
        self._update(model)
        for name, newest in statistics(model).items():
            old = self.averaged.setdefault(name, newest.clone())
            old.lerp_(newest, 1 - min(decay, (1 + n) / (10 + n)))

    def _measure(self, title: str, log: RunLog) -> dict[str, Any]:
        training, row = self.training, {}
        for form in FORMS:
            model = copy.deepcopy(training.model if form == FORMS[0] else training.ema.module)
            wanted = self.averaged if form == FORMS[2] else statistics(training.model)
            for name, values in statistics(model).items():
                values.copy_(wanted[name])
            metrics = evaluate_coco(self.val_set.to_coco(), self.evaluation.run(model, form)[0])
            row[form] = {name: round(metrics[name], 4) for name in ("AP", "AP50")}
        self.rows.append({"epoch": training.epoch, "step": training.step, **row})
        return super()._measure(title, log)


def measure(recipe: str, overrides: list[str], seeds: list[int]) -> list[dict[str, Any]]:
    """One training for each seed: {"seed": ..., "epochs": [{"epoch": ..., "step": ..., form: {"AP": ..., "AP50": ...}}]}."""
    found: list[dict[str, Any]] = []
    for seed in seeds:
        config = load_config(recipe, [*overrides, f"train.seed={seed}"])
        with tempfile.TemporaryDirectory() as folder:
            run = BothForms(config, folder, torch.device("cpu"))
            run.train()
        found.append({"seed": seed, "epochs": run.rows})
    return found


def main() -> int:
    parser = make_parser(__doc__)
    parser.add_argument("--config", default="configs/shapes.yaml")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--output", metavar="FILE.json")
    parser.add_argument("overrides", nargs="*", help="settings of the recipe, such as train.epochs=4")
    args: argparse.Namespace = parser.parse_args()
    trainings = measure(args.config, ["train.ema=0.999", *args.overrides], args.seeds)
    rows = [
        (training["seed"], row["epoch"], *(row[form]["AP"] for form in FORMS))
        for training in trainings
        for row in training["epochs"]
    ]
    print(format_table(rows, header=("seed", "epoch", *(f"AP, {form}" for form in FORMS))))
    if args.output:
        found = {"machine": describe_machine(), "settings": vars(args), "trainings": trainings}
        write_json(args.output, found, indent=1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
