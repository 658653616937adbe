"""The wheel: it holds every file, `import zpipe` needs neither torch nor ray, and its command starts.

Nothing is fetched: the installed setuptools builds the wheel, whose dependencies are those of this environment.
"""

import compileall
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def run(*args: object, **options: object) -> str:
    done = subprocess.run([str(arg) for arg in args], capture_output=True, text=True, timeout=120, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built from a copy of the sources, because setuptools leaves folders behind."""
    pytest.importorskip("setuptools", minversion="77")
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("zpipe", "schemas", "pipeline", "train"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    run(
        sys.executable, "-m", "pip", "wheel", "-q", "--no-build-isolation", "--no-deps", "--no-index", "-w", out, source
    )
    (path,) = out.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory):
    """An environment that holds the wheel and nothing else."""
    root = tmp_path_factory.mktemp("clean")
    venv.create(root, with_pip=False, symlinks=True)
    python = root / "bin" / "python"
    run(sys.executable, "-m", "pip", "-q", "--python", python, "install", "--no-deps", "--no-index", wheel)
    return python


def with_dependencies(python: Path) -> None:
    """Let the clean environment see the packages of this one after its own; zpipe is only an editable link there."""
    (site,) = (python.parents[1] / "lib").glob("python*/site-packages")
    here = sysconfig.get_path("purelib")
    found = [path for path in sys.path if path.endswith("site-packages")]
    (site / "borrowed.pth").write_text("\n".join(dict.fromkeys([here, *found])) + "\n")


def test_every_module_and_the_files_of_the_report_are_in_it(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    for folder, package in (
        ("zpipe", "zpipe"),
        *((name, f"zpipe/{name}") for name in ("schemas", "pipeline", "train")),
    ):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in (".py", ".html", ".css", ".js") and "__pycache__" not in path.parts:
                assert f"{package}/{path.relative_to(ROOT / folder).as_posix()}" in names
    assert not [name for name in names if not name.startswith(("zpipe/", "zpipe-"))]
    assert "zpipe/py.typed" in names  # PEP 561: one marker at the top holds for the packages below, too


def test_it_says_whose_it_is_and_under_what_licence(wheel):
    with zipfile.ZipFile(wheel) as file:
        info = next(name for name in file.namelist() if name.endswith(".dist-info/METADATA"))
        told = Parser().parsestr(file.read(info).decode())
        assert f"{info.partition('/')[0]}/licenses/LICENSE" in file.namelist()
    assert told["License-Expression"] == "Apache-2.0" and told["Author"] == "zpipe developers"
    assert told["Description-Content-Type"] == "text/markdown" and told["Requires-Python"] == ">=3.11"
    assert told["Version"] == PROJECT["project"]["version"]
    for name in ("CHANGELOG.md", "CITATION.cff"):
        assert told["Version"] in (ROOT / name).read_text(), name


def test_the_bare_part_needs_no_dependency(python):
    """`import zpipe` needs no other package; only reading a store does."""
    code = "import sys, zpipe; print(zpipe.__version__, zpipe.__file__, {'torch', 'ray', 'numpy'} & set(sys.modules))"
    version, file, loaded = run(python, "-I", "-c", code).split(maxsplit=2)
    assert version == PROJECT["project"]["version"] and loaded.strip() == "set()"
    assert Path(file).is_relative_to(python.parents[1])


def test_the_command_starts(python, tmp_path):
    with_dependencies(python)
    command, store = python.parent / "zpipe", ROOT / "tests" / "golden" / "formats" / "v1" / "maps"
    assert "extract-teacher-maps" in run(command, "--help", cwd=tmp_path)
    code = "import zpipe.pipeline.verify as verify; print(verify.__file__)"
    assert Path(run(python, "-c", code, cwd=tmp_path).strip()).is_relative_to(python.parents[1])
    assert "intact" in run(command, "maps", "verify", store, cwd=tmp_path)


def test_all_of_it_compiles_on_this_python(tmp_path):
    """For an interpreter without torch, run python3.13 -m compileall zpipe schemas pipeline train."""
    for name in ("zpipe", "schemas", "pipeline", "train"):
        copied = shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
        assert compileall.compile_dir(copied, quiet=1)
