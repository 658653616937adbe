"""How fast `zpipe make-shards` packs a source, against `cp -r` of the same files.

    python benchmarks/packing.py SOURCE [--split train] [--rounds 5]

SOURCE is what `make-shards` takes: a folder, or NAME:PATH with files on this machine. The three take turns in one
process: cp with the copies flushed to disk, make-shards with --no-check, and make-shards as it is.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

from zpipe.pipeline.make_shards import make_shards
from zpipe.pipeline.open_source import SourceConfig, open_source


def copy(source: Path, out: Path) -> None:
    subprocess.run(["cp", "-r", str(source), str(out)], check=True)
    for path in [out] if out.is_file() else out.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)


def pack(source: str, out: Path, split: str, *, check: bool) -> None:
    config = SourceConfig(split=split, check=check)
    make_shards(open_source(source, config, warn=lambda line: None), out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source")
    parser.add_argument("--split", default="train")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    files = Path(args.source.rpartition(":")[2]).expanduser()
    seconds: dict[str, list[float]] = {"cp": [], "no check": [], "check": []}
    with tempfile.TemporaryDirectory() as root:
        out = Path(root) / "out"
        for _ in range(args.rounds):
            for how, values in seconds.items():
                start = time.perf_counter()
                if how == "cp":
                    copy(files, out)
                else:
                    pack(args.source, out, args.split, check=how == "check")
                values.append(time.perf_counter() - start)
                shutil.rmtree(out) if out.is_dir() else out.unlink()
    for how, values in seconds.items():
        ratios = sorted(one / other for one, other in zip(seconds["cp"], values, strict=True))
        spread = f"{statistics.median(ratios):.2f} [{ratios[0]:.2f}, {ratios[-1]:.2f}]"
        print(f"{how}: {statistics.median(values):.2f} s, {spread} times cp")


if __name__ == "__main__":
    main()
