"""The doctor passes on a working machine, and names what would fail later."""

import tempfile

import pytest
from typer.testing import CliRunner

from zpipe import doctor
from zpipe.cli import app


@pytest.fixture
def examined():
    return CliRunner().invoke(app, ["doctor"])


def test_all_is_well_here(examined):
    assert examined.exit_code == 0, examined.output
    for name in (*doctor.REQUIRED, "zpipe", "python", "PIL", "torch devices", "scikit-learn", "/dev/shm", "temp"):
        assert name in examined.stdout
    assert "PROBLEM" not in examined.stdout and not examined.stderr


@pytest.mark.parametrize("kind", ["missing", "a file"])
def test_a_temporary_folder_that_cannot_be_used_is_named(monkeypatch, tmp_path, kind):
    folder = tmp_path / "temp"
    if kind == "a file":
        folder.write_text("x")
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr(tempfile, "tempdir", None)
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 1 and "PROBLEM" in result.stdout
    first, *details = result.stderr.splitlines()
    assert first == "error: 1 problems"
    assert len(details) == 1 and details[0].startswith(f"  temp: {folder}: ") and "set TMPDIR" in details[0]


@pytest.mark.parametrize(
    ("name", "value", "finding"),
    [("MIN_SHM_BYTES", 2**60, "/dev/shm"), ("MIN_TEMP_BYTES", 2**60, "temp"), ("REQUIRED", ("no_such",), "no_such")],
)
def test_what_is_short_or_absent_is_named(monkeypatch, name, value, finding):
    monkeypatch.setattr(doctor, name, value)
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 1
    assert result.stderr.splitlines()[1].startswith(f"  {finding}: ")


def test_a_package_that_breaks_at_import_is_named(monkeypatch, tmp_path):
    (tmp_path / "broken_package.py").write_text("raise ImportError('libfoo.so: cannot open\\nmore')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(doctor, "REQUIRED", ("broken_package",))
    broken = {finding.name: finding for finding in doctor.examine()}["broken_package"]
    assert not broken.ok and "libfoo.so: cannot open)" in broken.value and "pip install" in broken.value
