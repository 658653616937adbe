"""Run every benchmark that has a baseline, and compare the ratios with the last committed run.

    python benchmarks/run.py                      # settings near those of docs/benchmarks.md
    python benchmarks/run.py --quick --check      # small settings, compared with benchmarks/last.json
    python benchmarks/run.py --only models --json models.json
    python benchmarks/run.py --measured new.json --check old.json   # compares two files, measures nothing

Each benchmark runs in a process of its own, with a fixed number of threads. All ratios are relative to a baseline that
took turns with the candidate on the same machine; higher is better. They are written as

    {"machine": {cpu, cores, memory_gb, versions, date, quick, threads, device, load, notes},
     "settings": {benchmark: [argument, ...]}, "ratios": {benchmark: {name: [ratio, ...]}}}

No photos and no other loaders are needed: the loader reads generated photos (500 x 375) and is compared with
webdataset's documented pipeline only; benchmarks/loader.py has the others. The exit code is 0, or 1 if a benchmark
failed or something got worse, or 2 if the two runs can't be compared.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
LAST = HERE / "last.json"
PACKAGES = ("torch", "torchvision", "timm", "numpy", "pyarrow", "zarr", "webdataset", "ray", "pillow", "pillow-simd")
MIN_FALL = 0.15

Ratios = dict[str, dict[str, list[float]]]


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """A script of this folder and its arguments. `{scratch}` in them stands for a temporary folder."""

    full: tuple[str, ...]
    """Arguments of a full run."""
    quick: tuple[str, ...]
    """Arguments of a quick run."""
    threads: bool = True
    device: bool = True


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


BENCHMARKS = {
    "relevance": Benchmark(
        full=_words("--methods --batches 1,4,8 --rounds 5"),
        quick=_words("--model deit_tiny_patch16_224 --methods --batches 4 --rounds 5"),
    ),
    "extraction": Benchmark(
        full=_words("--rounds 4 --shards 7"),
        quick=_words("--teacher deit_tiny_patch16_224 --rounds 3 --shards 3 --samples 8"),
    ),
    "loader": Benchmark(
        full=("--copies", "8", "--images", "1280", "--rounds", "5", "--names", "zpipe with maps", "webdataset"),
        quick=("--copies", "2", "--images", "320", "--rounds", "4", "--names", "zpipe with maps", "webdataset"),
        threads=False,
        device=False,
    ),
    "models": Benchmark(
        full=_words("--rounds 7"), quick=_words("--size tiny --batch 16 --train-batch 8 --rounds 5 --memory-rounds 3")
    ),
    "rivals": Benchmark(full=_words("--rounds 7"), quick=_words("--batch 8 --rounds 4")),
    "training": Benchmark(
        full=_words("{scratch} --rounds 6"), quick=_words("{scratch} --image-size 64 --images 512 --rounds 4")
    ),
    "store": Benchmark(
        full=_words("{scratch} --shards 1281 --rounds 3"),
        quick=_words("{scratch} --shards 100 --rounds 5"),
        threads=False,
        device=False,
    ),
}


# ------------------------------------------------------------------------------------------------------------ measuring


def arguments(name: str, *, quick: bool, threads: int, device: str) -> list[str]:
    """The arguments that the script is called with; `{scratch}` is not yet filled in."""
    benchmark = BENCHMARKS[name]
    given = list(benchmark.quick if quick else benchmark.full)
    if benchmark.threads:
        given += ["--threads", str(threads)]
    if benchmark.device and device != "cpu":
        given += ["--device", device]
    return given


def measure(name: str, given: Sequence[str], *, threads: int) -> dict[str, list[float]]:
    """Run one script and return its ratios; what it prints goes to our output. Errors: RuntimeError when it failed."""
    with tempfile.TemporaryDirectory(prefix="zpipe-benchmark-") as scratch:
        output = Path(scratch) / "ratios.json"
        filled = [word.replace("{scratch}", f"{scratch}/data") for word in given]
        own = threads if BENCHMARKS[name].threads else 1
        environment = dict(os.environ, OMP_NUM_THREADS=str(own), MKL_NUM_THREADS=str(own))
        command = [sys.executable, str(HERE / f"{name}.py"), *filled, "--json", str(output)]
        code = subprocess.run(command, env=environment).returncode
        if code:
            raise RuntimeError(f"benchmarks/{name}.py ended with {code}")
        return check_ratios(json.loads(output.read_text())["ratios"])


def check_ratios(ratios: Any) -> dict[str, list[float]]:
    """Return the ratios of one benchmark; raise ValueError unless they are names with lists of positive numbers."""
    whole = isinstance(ratios, dict) and all(
        isinstance(name, str)
        and isinstance(values, list)
        and values
        and all(isinstance(value, float | int) and value > 0 for value in values)
        for name, values in ratios.items()
    )
    if not whole:
        raise ValueError(f"not names with lists of positive ratios: {str(ratios)[:200]}")
    return ratios


def machine(*, quick: bool, threads: int, device: str, notes: Sequence[str]) -> dict[str, Any]:
    """What the ratios may depend on, and when they were taken."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        cpu = next(
            (line.partition(":")[2].strip() for line in info.read_text().splitlines() if "model name" in line), cpu
        )
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9),
        "versions": versions,
        "date": date.today().isoformat(),
        "quick": quick,
        "threads": threads,
        "device": device,
        # Processes that wanted a core when we began: above 1 or so, others were at work.
        "load": round(os.getloadavg()[0], 1),
        "notes": list(notes),
    }


def table(ratios: Ratios) -> list[str]:
    """A line for each ratio: median, smallest and largest."""
    lines = []
    for benchmark, rows in ratios.items():
        lines.append(benchmark)
        for name, values in rows.items():
            spread = f"[{min(values):.3f}, {max(values):.3f}]"
            lines.append(f"  {name:52s}{statistics.median(values):8.3f} {spread}  n={len(values)}")
    return lines


# ------------------------------------------------------------------------------------------------------------ comparing


def got_worse(old: Sequence[float], new: Sequence[float]) -> float | None:
    """The fraction by which the median fell, if that counts as worse; else None.

    A benchmark got worse if the median fell by more than 15 % and the upper quartile of the new ratios is below the
    lower quartile of the old ones. The quartiles alone would raise false alarms: among forty ratios of a few rounds,
    some differ by chance, and some by one per cent. The extremes would raise none: one disturbed round makes them
    overlap. Fewer than three rounds show no spread, so nothing counts as worse.
    """
    if min(len(old), len(new)) < 3:
        return None
    fall = 1 - statistics.median(new) / statistics.median(old)
    lower = statistics.quantiles(old, n=4, method="inclusive")[0]
    upper = statistics.quantiles(new, n=4, method="inclusive")[2]
    return fall if fall > MIN_FALL and upper < lower else None


def not_comparable(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Why two runs can't be compared, a line each: another machine, or other settings of a benchmark that both have.

    Versions of packages are no reason: the yardstick had the same ones in each run.
    """
    reasons = []
    for name in ("cpu", "cores", "device", "threads", "quick"):
        before, now = old["machine"].get(name), new["machine"].get(name)
        if before != now:
            reasons.append(f"{name}: {before} then, {now} now")
    for name in sorted(old["settings"].keys() & new["settings"].keys()):
        before, now = old["settings"][name], new["settings"][name]
        if before != now:
            reasons.append(f"settings of {name}: {' '.join(before)} then, {' '.join(now)} now")
    return reasons


def compare(old: dict[str, Any], new: dict[str, Any]) -> tuple[list[str], list[str]]:
    """What got worse, and what else there is to say (ratios that only one of the runs has), a line each."""
    worse, remarks = [], []
    for benchmark, rows in old["ratios"].items():
        if benchmark not in new["ratios"]:
            remarks.append(f"{benchmark}: not measured now")
            continue
        for name, before in rows.items():
            now = new["ratios"][benchmark].get(name)
            if now is None:
                remarks.append(f"{benchmark}: {name}: gone")
                continue
            fall = got_worse(before, now)
            if fall is not None:
                worse.append(
                    f"{benchmark}: {name}: {fall:.0%} worse, {_spread(before)} on {old['machine']['date']}, "
                    f"{_spread(now)} now"
                )
        remarks += [f"{benchmark}: {name}: new" for name in new["ratios"][benchmark] if name not in rows]
    remarks += [f"{benchmark}: new" for benchmark in new["ratios"] if benchmark not in old["ratios"]]
    changed = {
        name: found
        for name, found in new["machine"]["versions"].items()
        if old["machine"]["versions"].get(name) != found
    }
    remarks += [f"{name} is {found} now, was {old['machine']['versions'].get(name)}" for name, found in changed.items()]
    return worse, remarks


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.3f} [{min(values):.3f}, {max(values):.3f}]"


def check(old: dict[str, Any], new: dict[str, Any]) -> int:
    """Print the comparison; the exit code."""
    reasons = not_comparable(old, new)
    if reasons:
        print("not comparable with the last run:", *reasons, sep="\n  ")
        return 2
    worse, remarks = compare(old, new)
    for line in remarks:
        print(line)
    if worse:
        print("got worse:", *worse, sep="\n  ")
        return 1
    print(f"nothing got worse since {old['machine']['date']}")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small models and few images")
    parser.add_argument("--only", action="append", choices=sorted(BENCHMARKS), help="may be given more than once")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--json", type=Path, default=Path("benchmark-run.json"))
    parser.add_argument(
        "--check", type=Path, nargs="?", const=LAST, metavar="FILE", help=f"default: {LAST.name}, beside this"
    )
    parser.add_argument("--measured", type=Path, metavar="FILE", help="compare this run, measure nothing")
    parser.add_argument("--note", action="append", default=[], help="to be kept with the ratios")
    args = parser.parse_args()
    if args.check and not args.check.is_file():
        parser.error(
            f"--check {args.check}: no such file; --json {args.check} writes one, on a machine that does nothing else"
        )
    failed = []
    if args.measured:
        found = json.loads(args.measured.read_text())
        print("\n".join(table(found["ratios"])))
    else:
        found = {
            "machine": machine(quick=args.quick, threads=args.threads, device=args.device, notes=args.note),
            "settings": {},
            "ratios": {},
        }
        for name in args.only or BENCHMARKS:
            given = arguments(name, quick=args.quick, threads=args.threads, device=args.device)
            print(f"== {name} {' '.join(given)}", flush=True)
            try:
                found["ratios"][name] = measure(name, given, threads=args.threads)
            except RuntimeError as error:
                failed.append(str(error))
                continue
            found["settings"][name] = given
            args.json.write_text(json.dumps(found, indent=1) + "\n")  # after each: what is measured is not lost
        print("\nratios to the yardstick, higher is better: median [smallest, largest]")
        print("\n".join(table(found["ratios"])))
        print(f"load of the machine when it began: {found['machine']['load']} on {found['machine']['cores']} cores")
        print(f"written: {args.json}")
    code = check(json.loads(args.check.read_text()), found) if args.check else 0
    for line in failed:
        print(f"failed: {line}")
    return 1 if failed else code


if __name__ == "__main__":
    sys.exit(main())
