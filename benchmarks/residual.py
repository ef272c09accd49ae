"""Why residual learning works, measured: train small networks that differ in one option, and look into them.

python benchmarks/residual.py degradation --data datasets
python benchmarks/residual.py all --plan
python benchmarks/residual.py all data='{format: cifar, root: datasets/cifar-10-batches-bin}' augment.padding=4 \\
    --output runs/cifar
python benchmarks/residual.py all --tables

`all` is degradation, shortcuts, order, why, thousand and families; `detectors` is apart. A command that was stopped
goes on where it was. Results are kept in --output, and what is there is not trained again: benchmarks/residual holds
ours. --data holds the VOC folders bccd and foda. docs/residual.md tells the story.
"""

import os
import sys
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

# The package `benchmarks` is not installed.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.experiments.comparisons import degradation, order, shortcuts
from benchmarks.experiments.detectors import detectors
from benchmarks.experiments.experiment import Experiment, read_results, run_experiment
from benchmarks.experiments.families import families
from benchmarks.experiments.figures import save_figure
from benchmarks.experiments.scale import Scale, full_scale, quick_scale
from benchmarks.experiments.tables import format_plan, markdown, put_table
from benchmarks.experiments.thousand import thousand
from benchmarks.experiments.why import why
from detector.command_line import exit_status, make_parser

ALL: dict[str, Callable[[Scale], Experiment]] = {
    "degradation": degradation,
    "shortcuts": shortcuts,
    "order": order,
    "why": why,
    "thousand": thousand,
    "families": families,
}
APART = {"detectors": detectors}
HERE = Path("benchmarks/residual")


def main(arguments: list[str] | None = None) -> int:
    parser = make_parser(__doc__)
    parser.add_argument("name", choices=["all", *ALL, *APART])
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the classifiers' recipes")
    parser.add_argument("--data", type=Path, default=Path("datasets"), help="the folder of bccd and foda")
    parser.add_argument(
        "--output", type=Path, default=HERE, help="of the results, the figures and the trainings"
    )
    parser.add_argument("--processes", type=int, default=2, help="trainings at a time, of one thread each")
    parser.add_argument("--only", nargs="+", default=[], help="names of trainings, such as plain-56/0")
    parser.add_argument("--quick", action="store_true", help="tiny networks, to see that all of it runs")
    parser.add_argument(
        "--document", type=Path, default=Path("docs/residual.md"), help="that --tables writes to"
    )
    shown = parser.add_mutually_exclusive_group()
    shown.add_argument(
        "--plan", action="store_true", help="estimate the hours on two cores and train nothing"
    )
    shown.add_argument(
        "--tables", action="store_true", help="write the results into the document and train nothing"
    )
    return exit_status(run, parser.parse_intermixed_args(arguments))


def run(args) -> None:
    scale = (quick_scale if args.quick else full_scale)(args.data, tuple(args.overrides))
    names = list(ALL) if args.name == "all" else [args.name]
    experiments = {name: (ALL | APART)[name](scale) for name in names}
    check_names(args.only, experiments)
    if args.plan:
        print(format_plan(experiments))
        return
    if args.tables:
        write_tables(args, experiments)
        return
    for name, experiment in experiments.items():
        path, folder = args.output / f"{name}.json", args.output / "runs" / name
        results = run_experiment(experiment, path, folder, scale.describe(), args.processes, args.only)
        save_figure(experiment, results, args.output / f"{name}.png")
        print(f"{name}\n{markdown(experiment, results)}")


def check_names(only: Collection[str], experiments: Mapping[str, Experiment]) -> None:
    """Raise a ValueError where a name is of no training."""
    known = {name: None for experiment in experiments.values() for name in experiment.jobs}
    if unknown := [name for name in only if name not in known]:
        raise ValueError(f"--only names {', '.join(unknown)}; accepted: {', '.join(known)}")


def write_tables(args, experiments: Mapping[str, Experiment]) -> None:
    """Write the results of experiments, as far as they are measured, and their figures into the document."""
    text = args.document.read_text(encoding="utf-8")
    for name, experiment in experiments.items():
        table = markdown(experiment, read_results(args.output / f"{name}.json"))
        print(f"{name}\n{table}")
        figure = args.output / f"{name}.png"
        if figure.exists():
            table += f"\n\n![{name}]({Path(os.path.relpath(figure, args.document.parent)).as_posix()})"
        text = put_table(text, name, table)
    args.document.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
