"""Measurements as tables and plots."""

from collections.abc import Sequence
from typing import Any

from detector.files import write_atomically
from detector.tables import format_table


def format_times(case: dict[str, Any], title: str, parts: Sequence[str]) -> str:
    """A table of each form's median seconds by part, and then of their ratios to stock's."""
    memory = case["memory"] or {}
    rows = [
        (
            form,
            times["total"]["median"],
            times["total"]["min"],
            times["total"]["max"],
            case["images_per_second"][form],
            *(times[part]["median"] if part in times else None for part in parts),
            round(memory[form]["peak_mb"]) if form in memory else None,
        )
        for form, times in case["times"].items()
    ]
    for form, ratio in case["ratios"].items():
        peak = memory.get(form, {}).get("ratio")
        rows.append(
            (f"{form} / stock", ratio["total"], "", "", "", *(ratio.get(part) for part in parts), peak)
        )
    return format_table(rows, header=(title, "median", "min", "max", "images/s", *parts, "peak MB"))


def format_limit(case: dict[str, Any]) -> str:
    """A table of each form's time over the limit, with the rates of matrix products below it."""
    rates = ", ".join(
        f"{d} {rate / 1e9:.1f}" for d, rate in case["matrix_product"]["macs_per_second"].items()
    )
    rows = [
        (form, limit["head"], limit["trunk"], case["difference"].get(form))
        for form, limit in case["over_limit"].items()
    ]
    rows = [(*row[:3], None if row[3] is None else f"{row[3]:.1e}") for row in rows]
    table = format_table(rows, header=("time over limit", "head", "trunk", "difference of features"))
    return f"{table}\nmatrix products, GMAC/s: {rates}"


def save_figure(path: str, figure: Any) -> None:
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=110))


def new_figure(num_panels: int, panel_height: float) -> tuple[Any, list[Any]]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, panel_height * num_panels), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(num_panels, squeeze=False)[:, 0])


def plot_parts(path: str, cases: list[dict[str, Any]], counted: str, parts: Sequence[str]) -> None:
    """Plot a panel for each case and a bar for each form, with its parts side by side.

    The black line goes from the fastest to the slowest round.
    """
    figure, panels = new_figure(len(cases), 1.2 + 0.4 * len(cases[0]["times"]))
    for axes, case in zip(panels, cases, strict=True):
        forms = list(case["times"])
        left = [0.0] * len(forms)
        for part in parts:
            widths = [case["times"][form].get(part, {"median": 0.0})["median"] for form in forms]
            axes.barh(forms, widths, left=left, label=part)
            left = [a + b for a, b in zip(left, widths, strict=True)]
        totals = [case["times"][form]["total"] for form in forms]
        for form, total in zip(forms, totals, strict=True):
            axes.plot([total["min"], total["max"]], [form, form], color="black", linewidth=1)
        axes.invert_yaxis()
        axes.set_title(f"{case['size'][0]}x{case['size'][1]}, {case[counted]} {counted}")
        axes.set_xlabel("seconds, medians")
    panels[0].legend(fontsize="x-small", ncols=4)
    save_figure(path, figure)


def plot_growth(path: str, growth: dict[str, dict[str, Any]]) -> None:
    """Plot seconds over regions and over pixels with the fitted line, and the peak memory if it was measured."""
    memory = growth["regions"].get("memory")
    figure, panels = new_figure(3 if memory else 2, 3.0)
    for axes, (name, curve) in zip(panels[:2], growth.items(), strict=True):
        medians = [parts["total"]["median"] for parts in curve["times"].values()]
        axes.plot(curve["x"], medians, "o")
        if curve["fit"]:
            line = [curve["fit"]["slope"] * x + curve["fit"]["intercept"] for x in curve["x"]]
            axes.plot(curve["x"], line, label=f"line, R^2 = {curve['fit']['r_squared']:.4f}")
            axes.legend()
        axes.set(xlabel=name, ylabel="seconds", ylim=(0, None))
    if memory:
        panels[2].plot(growth["regions"]["x"], [m["running_mb"] for m in memory], "o-")
        panels[2].set(xlabel="regions", ylabel="peak memory, MB", ylim=(0, None))
    for axes in panels:
        axes.grid(alpha=0.3)
    save_figure(path, figure)
