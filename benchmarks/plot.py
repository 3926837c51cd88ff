"""Draws the latest run of results.csv: `python -m benchmarks.plot`.

For each model one group of bars, a step's time relative to the slowest, which is eager where that was measured (so that
a 5 ms UNet and a 180 ms transformer share one picture), with the milliseconds written on the bars; below it the seconds
until the first result. Rows whose output was wrong have no time and no bar.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).with_name("results.csv")
PICTURE = Path(__file__).with_name("results.png")
VARIANTS = {  # what is drawn, in this order: label and colour
    "eager": ("eager", "#9aa5b1"),
    "compile-reduce-overhead": ("torch.compile, reduce-overhead", "#e08a3c"),
    "compile-max-autotune": ("torch.compile, max-autotune", "#c9587a"),
    "sfast": ("sfast", "#2f6fb7"),
}

Row = dict[str, str]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.plot", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--out", type=Path, default=PICTURE)
    parser.add_argument("--run", help="name of the run to draw (the one of the last row)")
    options = parser.parse_args(arguments)
    rows = rows_of_run(options.results, options.run)
    draw(rows, options.out)
    print(f"{options.out}: run {rows[0]['run']}, {len(rows)} rows")
    return 0


def rows_of_run(path: Path, run: str | None = None) -> list[Row]:
    """The timed rows of one run (the last one, if not named); what was measured twice counts as last measured."""
    with path.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["ms"]]
    runs = list(dict.fromkeys(row["run"] for row in rows))
    run = run or (rows[-1]["run"] if rows else None)
    if run not in runs:
        raise SystemExit(f"{path} has no timed row of run {run}; it has the runs {', '.join(runs) or 'none'}")
    return list({(name_of(row), row["variant"]): row for row in rows if row["run"] == run}.values())


def name_of(row: Row) -> str:
    """The model with its size, as written under its bars."""
    return f"{row['model']}\n{row['width']}×{row['height']}, {row['batch']}\n{row['precision']}"


def draw(rows: list[Row], path: Path) -> None:
    """Write the picture of one run's rows to `path`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    models = list(dict.fromkeys(name_of(row) for row in rows))
    by_key = {(name_of(row), row["variant"]): row for row in rows}
    shown = [variant for variant in VARIANTS if any((model, variant) in by_key for model in models)]
    figure, (speed, first) = pyplot.subplots(
        2, 1, figsize=(min(max(8.0, 1.9 * len(models) + 2), 24.0), 8.5), height_ratios=(3, 2), layout="constrained"
    )
    width = 0.84 / len(shown)
    for index, variant in enumerate(shown):
        label, colour = VARIANTS[variant]
        for position, model in enumerate(models):
            row = by_key.get((model, variant))
            if row is None:
                continue
            x = position + (index - (len(shown) - 1) / 2) * width
            ms, base = float(row["ms"]), max(float(by_key[model, v]["ms"]) for v in shown if (model, v) in by_key)
            height = ms / base
            low, high = (float(row[name]) / base for name in ("ms_p20", "ms_p80"))
            spread = [[max(height - low, 0)], [max(high - height, 0)]]
            named = label if position == 0 else "_nolegend_"
            speed.bar(x, height, width * 0.94, color=colour, label=named, yerr=spread, error_kw={"ecolor": "#333"})
            _write(speed, x, max(height, high), f"{ms:.1f} ms" if ms < 100 else f"{ms:.0f} ms")
            seconds = float(row["first_call_s"])
            first.bar(x, seconds, width * 0.94, color=colour, label=named)
            _write(first, x, seconds, f"{seconds:.1f} s")
    speed.set_ylabel("time of a step, the slowest = 1")
    speed.set_title(_title(rows), fontsize=11, loc="left")
    speed.set_ylim(0, 1.25)
    speed.legend(loc="upper right", ncols=len(shown), fontsize=9, frameon=False)
    first.set_yscale("log")
    first.set_ylabel("seconds until the first result")
    first.margins(y=0.15)
    for axes in (speed, first):
        axes.set_xticks(range(len(models)), models, fontsize=9)
        axes.tick_params(axis="x", length=0)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.25)
        axes.set_axisbelow(True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _write(axes: Any, x: float, y: float, text: str) -> None:
    axes.annotate(text, (x, y), xytext=(0, 3), textcoords="offset points", ha="center", va="bottom", fontsize=8)


def _title(rows: list[Row]) -> str:
    row = rows[-1]
    what = "One denoiser step (vae: one pass; picture: all of it)"
    return f"{what}, {row['gpu']}, torch {row['torch']}; lower is better"


if __name__ == "__main__":
    sys.exit(main())
