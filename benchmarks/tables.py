"""Writes the measured tables of the README from the CSV files here, so that no figure there is typed by hand.

`python -m benchmarks.tables` replaces what stands between the markers of each file. For each model, size and batch it takes the
latest run that measured sfast beside torch.compile, and every figure of a line comes from that one run. The first table
has each model at its own size, the second one what else was measured: other sizes and batches, and the strongest
torch.compile there is.
"""

import argparse
import csv
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks.measure import LADDER
from benchmarks.models import MODELS

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = ROOT / "benchmarks"
VARIANTS = ("eager", "compile-reduce-overhead", "sfast", "sfast-again")
STRONGEST = "compile-max-autotune"

Row = dict[str, str]
NONE_YET = "No run of sfast beside torch.compile has been recorded in `benchmarks/results.csv` yet."
HEADER = (
    "| model | size, batch | eager | torch.compile | sfast | against eager / compile "
    "| first call: compile / sfast / again | peak memory: eager / sfast | error: eager / sfast |\n"
    "|---|---|---|---|---|---|---|---|---|"
)
GLANCE = ("sd15", "sdxl", "sd35m", "flux", "wan22-5b")  # of all models, those that stand at the top
OTHERS = "| also | size, batch | torch.compile | sfast | against compile |\n|---|---|---|---|---|"


def latest(rows: Iterable[Row]) -> list[dict[str, Row]]:
    """For each case (model, precision, size, batch), variant -> row of the last run of sfast beside torch.compile."""
    cases: dict[tuple[str, ...], dict[str, dict[str, Row]]] = {}
    for row in rows:
        case = tuple(row[column] for column in ("model", "precision", "width", "height", "batch"))
        cases.setdefault(case, {}).setdefault(row["run"], {})[row["variant"]] = row
    found = []
    for runs in cases.values():
        measured = [variants for variants in runs.values() if _compares(variants)]
        if measured:
            found.append(measured[-1])
    return found


def _compares(variants: dict[str, Row]) -> bool:
    measured = {variant for variant, row in variants.items() if number(row, "ms") is not None}
    return "sfast" in measured and any(variant.startswith("compile-") for variant in measured)


def of_its_own_size(row: Row) -> bool:
    """Whether a row is of its model as the model is usually run."""
    model = MODELS.get(row["model"])
    size = (row["width"], row["height"], row["batch"])
    return model is None or size == (str(model.width), str(model.height), str(model.batch))


def number(row: Row | None, column: str) -> float | None:
    """A figure of the file, or None where the variant or the figure is missing."""
    if row is None or not row.get(column):
        return None
    return float(row[column])


def table(rows: Iterable[Row]) -> str:
    """The Markdown between the markers."""
    rows = list(rows)
    cases = latest(rows)
    if not cases:
        return NONE_YET
    lines = [HEADER, *(line(case) for case in cases if of_its_own_size(case["sfast"]))]
    others = [other for case in cases for other in other_lines(case)]
    if others:
        lines += ["", OTHERS, *others]
    rungs = ladder(rows)
    if rungs:
        lines += ["", *rungs]
    origins = dict.fromkeys(
        f"run {row['run']} on {row['gpu']}, torch {row['torch']}, commit {row['commit'][:9]}"
        for row in (case["sfast"] for case in cases)
    )
    lines += ["", f"From `benchmarks/results.csv`: {'; '.join(origins)}."]
    return "\n".join(lines)


def glance(rows: Iterable[Row]) -> str:
    """Some models at their own sizes, in few columns."""
    cases = {case["sfast"]["model"]: case for case in latest(rows) if of_its_own_size(case["sfast"])}
    shown = [cases[model] for model in GLANCE if model in cases]
    if not shown:
        return NONE_YET
    gpus = " / ".join(dict.fromkeys(case["sfast"]["gpu"] for case in shown))
    lines = [
        f"| one denoiser step, {gpus} | eager | torch.compile | sfast (against eager) | first call: torch.compile / sfast |",
        "|---|---|---|---|---|",
    ]
    for case in shown:
        eager, compiled, ours, _ = (case.get(variant) for variant in VARIANTS)
        assert ours is not None
        ms = [number(row, "ms") for row in (eager, compiled, ours)]
        cells = [
            f"{ours['model']} {ours['precision']}, {size(ours)}",
            *map(milliseconds, ms[:2]),
            f"**{milliseconds(ms[2])}** ({ratio(ms[0], ms[2])})",
            joined([number(row, "first_call_s") for row in (compiled, ours)], "{:.1f}", " s"),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", "How this was measured, and more models: [below](#measured)."])


def line(case: dict[str, Row]) -> str:
    """A model at its own size: every variant, and what it costs."""
    eager, compiled, ours, again = (case.get(variant) for variant in VARIANTS)
    assert ours is not None
    ms = [number(row, "ms") for row in (eager, compiled, ours)]
    cells = [
        f"{ours['model']} {ours['precision']}",
        size(ours),
        *(milliseconds(figure) for figure in ms[:2]),
        f"**{milliseconds(ms[2])}**",
        f"{ratio(ms[0], ms[2])} / {ratio(ms[1], ms[2])}",
        joined([number(row, "first_call_s") for row in (compiled, ours, again)], "{:.1f}", " s"),
        joined([number(row, "peak_gib") for row in (eager, ours)], "{:.1f}", " GiB"),
        joined([number(ours, column) for column in ("eager_error", "error")], "{:.1e}", ""),
    ]
    return f"| {' | '.join(cells)} |"


def other_lines(case: dict[str, Row]) -> list[str]:
    """A model at another size or batch, or against the strongest torch.compile."""
    ours, lines = case["sfast"], []
    for variant in ("compile-reduce-overhead", STRONGEST):
        compiled = number(case.get(variant), "ms")
        if compiled is None or (variant != STRONGEST and of_its_own_size(ours)):
            continue
        name, took = f"{ours['model']} {ours['precision']}", ""
        if variant == STRONGEST:
            name, took = f"{name}, max-autotune", f" after {cell(number(case[variant], 'first_call_s'), '{:.0f} s')}"
        ms = number(ours, "ms")
        cells = [name, size(ours), milliseconds(compiled) + took, f"**{milliseconds(ms)}**", ratio(compiled, ms)]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def ladder(rows: Iterable[Row]) -> list[str]:
    """What each optimization adds to those above it: of each model the latest run that measured all of them."""
    runs: dict[str, dict[str, dict[str, Row]]] = {}
    for row in rows:
        if of_its_own_size(row) and number(row, "ms") is not None:
            runs.setdefault(row["model"], {}).setdefault(row["run"], {})[row["variant"]] = row
    steps = ["eager", *(f"sfast-{rung}" for rung in LADDER)]
    found = {
        model: [run for run in of_model.values() if run.keys() >= set(steps)][-1:] for model, of_model in runs.items()
    }
    whole = {model: run[0] for model, run in found.items() if run}
    if not whole:
        return []
    names = [f"{model}, {size(run['eager'])}" for model, run in whole.items()]
    lines = [f"| each with those above it | {' | '.join(names)} |", f"|---|{'---|' * len(names)}"]
    for i, step in enumerate(steps):
        cells = []
        for run in whole.values():
            ms = number(run[step], "ms")
            gain = f" ({ratio(number(run[steps[i - 1]], 'ms'), ms)})" if i else ""
            cells.append(f"{milliseconds(ms)}{gain}")
        lines.append(f"| {step.removeprefix('sfast-')} | {' | '.join(cells)} |")
    return lines


def size(row: Row) -> str:
    return f"{row['width']}×{row['height']}, {row['batch']}"


def milliseconds(figure: float | None) -> str:
    return cell(figure, "{:.2f} ms" if figure is None or figure < 200 else "{:.0f} ms")


def cell(figure: float | None, form: str) -> str:
    return "–" if figure is None else form.format(figure)


def joined(figures: Sequence[float | None], form: str, unit: str) -> str:
    return " / ".join(cell(figure, form) for figure in figures) + unit


def ratio(slow: float | None, fast: float | None) -> str:
    return "–" if not slow or not fast else f"{slow / fast:.2f}×"


def last_run(rows: Iterable[Row]) -> list[Row]:
    """The rows of the run that was written last."""
    rows = list(rows)
    return [row for row in rows if row["run"] == rows[-1]["run"]]


def adapters(rows: Iterable[Row]) -> str:
    """What changing LoRAs costs: of each variant seconds, and how often it was traced and captured for that."""
    rows = last_run(rows)
    if not rows:
        return "Not measured yet."
    variants = list(dict.fromkeys(row["variant"] for row in rows))
    cells = {(row["operation"], row["variant"]): row for row in rows}
    lines = [f"| seconds | {' | '.join(variants)} | memory |", f"|---|{'---|' * len(variants)}---|"]
    for operation in dict.fromkeys(row["operation"] for row in rows):
        line = [operation]
        for variant in variants:
            row = cells.get((operation, variant))
            seconds = cell(number(row, "seconds"), "{:.2f}")
            counts = [int(number(row, column) or 0) for column in ("retraces", "recaptures")]
            line.append(f"{seconds} ({counts[0]}, {counts[1]})" if any(counts) else seconds)
        memory = [number(cells.get((operation, variant)), "peak_mib") for variant in ("eager", "sfast")]
        lines.append(f"| {' | '.join(line)} | {joined(memory, '{:.0f}', ' MiB')} |")
    return "\n".join([*lines, "", origin(rows[-1], "adapters.csv")])


def shapes(rows: Iterable[Row]) -> str:
    """What each new size costs."""
    rows = last_run(rows)
    if not rows:
        return "Not measured yet."
    lines = ["| size, batch | first loop | again | more | traces, graphs | graph memory |", "|---|---|---|---|---|---|"]
    for row in rows:
        seconds = [cell(number(row, column), "{:.2f} s") for column in ("first_s", "again_s", "extra_s")]
        counts = f"{row['traces']}, {row['graphs']}"
        cells = [size(row), *seconds, counts, cell(number(row, "graph_gib"), "{:.2f} GiB")]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", origin(rows[-1], "shapes.csv")])


def origin(row: Row, name: str) -> str:
    return (
        f"From `benchmarks/{name}`: {row['model']}, run {row['run']} on {row['gpu']}, torch {row['torch']}, "
        f"commit {row['commit'][:9]}."
    )


# Markers in the README -> the CSV file here, and what becomes of its rows.
TABLES = {
    "glance": ("results", glance),
    "results": ("results", table),
    "adapters": ("adapters", adapters),
    "shapes": ("shapes", shapes),
}


def fill(text: str, content: str, name: str = "results") -> str:
    """`text` with what stands between the markers of `name` replaced."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"the text must hold {begin} and, after it, {end}, once each")
    before, rest = text.split(begin)
    return f"{before}{begin}\n{content}\n{end}{rest.split(end)[1]}"


def read(path: Path) -> list[Row]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tables", description="Writes the README's measured table."
    )
    parser.add_argument("--results", type=Path, default=BENCHMARKS, help="the folder of the CSV files")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 if the README is out of date")
    options = parser.parse_args(arguments)
    old = options.readme.read_text()
    new = old
    for name, (file, written) in TABLES.items():
        new = fill(new, written(read(options.results / f"{file}.csv")), name)
    if options.check:
        return int(old != new)
    options.readme.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
