"""The tests of one file: `python tests/tests_of.py train/fit/loop.py`, which `make check` runs."""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
# Folders whose files are all tested by one module.
WHOLE_FOLDERS = {"benchmarks": "test_benchmarks.py", "docs": "test_docs.py", "docker": "test_containers.py"}


def tests_of(file: Path) -> list[Path]:
    """Find the tests of a file, the nearest ones only.

    Args:
        file: path relative to the root of the repository. A test file is its own test.

    Returns:
        The first of these that exist: the test of the same name in the mirrored folder, the tests in that folder that
        import the module, all tests that import it, all tests in that folder. Relative to the root, sorted.
    """
    if file.parts[0] == "tests":
        if file.name.startswith("test_"):
            return [file]
        if file.name == "conftest.py":
            return _below(file.parent)
        return _naming(file.stem, _below(Path("tests")))
    if file.parts[0] in WHOLE_FOLDERS:
        return [Path("tests", WHOLE_FOLDERS[file.parts[0]])]
    mirrored = Path("tests") / file.parent
    same_name = mirrored / f"test_{file.stem}.py"
    if (ROOT / same_name).is_file():
        return [same_name]
    if file.suffix != ".py":
        return _below(mirrored)
    return _naming(file.stem, _below(mirrored)) or _naming(file.stem, _below(Path("tests"))) or _below(mirrored)


def _below(folder: Path) -> list[Path]:
    return sorted(path.relative_to(ROOT) for path in (ROOT / folder).rglob("test_*.py"))


def _naming(module: str, tests: list[Path]) -> list[Path]:
    """The tests with an import of a module of this name."""
    imported = re.compile(rf"^\s*(from|import) .*\b{module}\b", re.MULTILINE)
    return [path for path in tests if imported.search((ROOT / path).read_text())]


if __name__ == "__main__":
    tests = tests_of(Path(sys.argv[1]))
    if not tests:
        sys.exit(f"error: {sys.argv[1]} has no tests below tests/")
    print(*tests)
