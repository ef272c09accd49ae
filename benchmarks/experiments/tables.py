"""Results and plans of experiments as tables."""

from collections.abc import Mapping

from detector.tables import format_cell, format_table

from .experiment import Experiment, Results, by_arm

CORES = 2


def markdown(name: str, experiment: Experiment, results: Results) -> str:
    """An experiment's table. A number that is not measured is an empty cell."""
    header, rows = experiment.table(results)
    lines = [header, ["---"] * len(header), *rows]
    cells = ([("" if value is None else format_cell(value)) for value in line] for line in lines)
    return f"### {name}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in cells)


def format_plan(experiments: Mapping[str, Experiment]) -> str:
    """The hours of each experiment on two cores with a training on each, as estimated from some steps of each arm."""
    rows = [(name, len(each.jobs), estimate_hours(each) / CORES) for name, each in experiments.items()]
    rows.append(("together", *(sum(column) for column in list(zip(*rows, strict=True))[1:])))
    return format_table(rows, header=("experiment", "trainings", f"hours on {CORES} cores"))


def estimate_hours(experiment: Experiment) -> float:
    """CPU hours of all jobs; those of one arm take the same time."""
    arms = by_arm(experiment.jobs)
    return sum(len(jobs) * jobs[0].seconds() for jobs in arms.values()) / 3600
