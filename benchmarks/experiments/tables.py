"""Results and plans of experiments as tables."""

from collections.abc import Mapping
from typing import Any

from detector.tables import format_cell, format_table

from .experiment import Experiment, Results, by_arm, finished

CORES = 2


def markdown(experiment: Experiment, results: Results) -> str:
    """A line for each arm, of the seeds that did not fail. What is not measured is an empty cell."""
    header, found, tried = experiment.header, by_arm(finished(results)), by_arm(results)
    lines: list[list[Any]] = [["", "seeds", *header], ["---"] * (2 + len(header))]
    for arm in by_arm(experiment.jobs):
        measures = experiment.row(found[arm]) if arm in found else [None] * len(header)
        lines.append([arm, seeds(len(tried.get(arm, [])), len(found.get(arm, []))), *measures])
    if experiment.published:
        papers = ("paper, test error, %", "---", *map(experiment.published.get, by_arm(experiment.jobs)))
        lines = [[*line, paper] for line, paper in zip(lines, papers, strict=True)]
    cells = (["" if value is None else format_cell(value) for value in line] for line in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def seeds(tried: int, finished: int) -> str | None:
    """How many seeds an arm has, such as "2, 1 failed"; None without any."""
    counts = [str(finished)] if finished else []
    return ", ".join(counts + [f"{tried - finished} failed"] * (tried > finished)) or None


def put_table(document: str, name: str, table: str) -> str:
    """The document with the table of that name in its place, between two comments."""
    begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
    before, _, rest = document.partition(begin)
    return f"{before}{begin}\n{table}\n\n{end}{rest.partition(end)[2]}"


def format_plan(experiments: Mapping[str, Experiment]) -> str:
    """The hours of each experiment on two cores with a training on each, as estimated from some steps of each arm."""
    rows = [(name, len(each.jobs), estimate_hours(each) / CORES) for name, each in experiments.items()]
    rows.append(("together", *(sum(column) for column in list(zip(*rows, strict=True))[1:])))
    return format_table(rows, header=("experiment", "trainings", f"hours on {CORES} cores"))


def estimate_hours(experiment: Experiment) -> float:
    """CPU hours of all jobs; those of one arm take the same time."""
    arms = by_arm(experiment.jobs)
    return sum(len(jobs) * jobs[0].seconds() for jobs in arms.values()) / 3600
