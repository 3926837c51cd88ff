"""The command line: `python -m sfast`, or `sfast` where the package is installed.

Each command lives where its subject is and parses its own options, so `sfast COMMAND --help` comes from there,
and a command's imports are paid only by those who call it.
"""

import argparse
import subprocess
import sys
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]  # of a checkout; site-packages when installed from a wheel
BENCHMARKS = ("pipelines", "fusions", "shapes")


def demo(arguments: Sequence[str]) -> int:
    """generate the same prompts eager and compiled with the pipeline that ships with sfast, and compare"""
    from sfast.demo import picture

    return picture.main(arguments)


def doctor(arguments: Sequence[str]) -> int:
    """say what is installed, which GPU there is, what is missing, and the command that adds it"""
    from sfast import doctor

    return doctor.main(arguments)


def cache(arguments: Sequence[str]) -> int:
    """show the folder in which sfast keeps which kernels were fastest, or clear it"""
    from sfast import disk_cache

    return disk_cache.main(arguments)


def bench(arguments: Sequence[str]) -> int:
    """run a benchmark from a checkout: pipelines (whole models), fusions (one row each) or shapes (what a new size costs)"""
    parser = argparse.ArgumentParser(
        prog="sfast bench",
        description="Runs a benchmark of the source checkout; they are not part of the wheel.",
        epilog="Options after the benchmark's name go to it: try `sfast bench pipelines --help`.",
    )
    parser.add_argument("benchmark", choices=BENCHMARKS)
    options, rest = parser.parse_args(arguments[:1]), arguments[1:]
    if not (ROOT / "benchmarks" / f"{options.benchmark}.py").is_file():
        print(
            f"sfast bench: no benchmarks beside {Path(__file__).parent}: they are in the source checkout, not in the "
            "wheel.\nClone the repository and run `make bench` there, or install the clone with `pip install -e .`.",
            file=sys.stderr,
        )
        return 1
    module = f"benchmarks.{options.benchmark}"
    return subprocess.call([sys.executable, "-m", module, *rest], cwd=ROOT)


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {"demo": demo, "doctor": doctor, "cache": cache, "bench": bench}


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    width = max(map(len, COMMANDS))
    listing = "\n".join(f"  {name:<{width}}  {command.__doc__}" for name, command in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="sfast",
        description="Makes a diffusers pipeline fast with one line: pipe = sfast.compile(pipe)",
        epilog=f"commands:\n{listing}\n\n`sfast COMMAND --help` lists a command's options.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=version())
    parser.add_argument("command", nargs="?", choices=COMMANDS, help="what to do")
    options = parser.parse_args(arguments[:1])
    if options.command is None:
        parser.print_help()
        return 0
    return COMMANDS[options.command](arguments[1:])


def version() -> str:
    try:
        return f"sfast {metadata.version('sfast')}"
    except metadata.PackageNotFoundError:
        return "sfast (source tree)"


if __name__ == "__main__":
    sys.exit(main())
