"""The tests for GPUs can be imported and collected on any machine, and `make test` leaves them out."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_they_are_collected_by_their_mark():
    line = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", "-m", "gpu", "tests/gpu"]
    options = os.environ | {"PYTEST_ADDOPTS": ""}  # those of this run would change what is printed
    done = subprocess.run(line, cwd=ROOT, env=options, capture_output=True, text=True, timeout=300)
    names = [line for line in done.stdout.splitlines() if "::" in line]
    assert done.returncode == 0 and len(names) > 20, done.stdout + done.stderr
    assert not any("[cpu" in name for name in names)
    assert {Path(name.partition("::")[0]).stem for name in names} == {
        path.stem for path in Path(__file__).parent.glob("test_*.py") if path != Path(__file__)
    }


def test_make_runs_them_alone():
    makefile = (ROOT / "Makefile").read_text()
    recipe = makefile.partition("\ntest-gpu:")[2].partition("\n\n")[0]
    assert "pytest -m gpu" in recipe and "-n " not in recipe
    for target in ("test", "test-all", "coverage", "check"):
        assert "not gpu" in makefile.partition(f"\n{target}:")[2].partition("\n\n")[0], target
