"""The doctor passes on a working machine, and names what would fail later."""

import errno
import shutil
import tempfile
import warnings

import pytest
import torch
from typer.testing import CliRunner

from zpipe import doctor, limits
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


def test_shared_memory_is_measured(tmp_path):
    free = shutil.disk_usage(tmp_path).free
    assert limits.shared_memory(tmp_path, 1).ok
    short = limits.shared_memory(tmp_path, 2 * free)
    assert not short.ok and "docker: --shm-size=1g" in short.value
    assert limits.shared_memory(tmp_path / "none", 1).value.startswith("absent")


@pytest.mark.parametrize(
    ("soft", "hard", "ok", "remedy"),
    [(64, 4096, False, "ulimit -n 4096"), (64, 64, False, "nofile"), (1024, -1, True, "")],
)
def test_few_descriptors_are_named(monkeypatch, soft, hard, ok, remedy):
    monkeypatch.setattr(limits.resource, "getrlimit", lambda kind: (soft, hard))
    found = limits.descriptors()
    assert found.ok == ok and remedy in found.value and found.value.startswith(f"{soft} (at most ")


def test_paths_too_long_for_sockets_are_named(monkeypatch, tmp_path):
    deep = tmp_path / ("x" * 100)
    deep.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(deep))
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    ray = limits.sockets()
    assert not ray.ok and ray.value.endswith("set RAY_TMPDIR to a short folder, such as /tmp")
    monkeypatch.setenv("RAY_TMPDIR", "/tmp")
    assert limits.sockets() == limits.Finding(name="sockets of Ray", value="/tmp: 4 bytes of at most 39")


@pytest.mark.parametrize("names", limits.CGROUP_FILES)
def test_a_memory_limit_is_read(monkeypatch, tmp_path, names):
    monkeypatch.setattr(limits, "_cgroup_folders", lambda: [tmp_path / "none", tmp_path])
    assert limits.memory().value == "none"
    for limit, used, ok in ((8 << 30, 1 << 30, True), (8 << 30, (8 << 30) - 5, False)):
        for name, value in zip(names, (limit, used), strict=True):
            (tmp_path / name).write_text(f"{value}\n")
        assert limits.memory().ok == ok and " of 8192 MiB in use" in limits.memory().value
    (tmp_path / names[0]).write_text("max\n" if "max" in names[0] else f"{2**63 - 4096}\n")
    assert limits.memory().value == "none"


def test_a_clock_behind_the_installation_is_named():
    assert limits.clock().ok
    found = limits.clock(now=0)
    assert not found.ok and found.value.startswith("1970-01-01") and "set the clock" in found.value


def test_the_folder_of_the_output_is_examined(tmp_path, monkeypatch):
    result = CliRunner().invoke(app, ["doctor", str(tmp_path / "new" / "store")])
    assert result.exit_code == 0, result.output
    for name in ("space", "inodes", "hard links"):
        assert f"│ ok │ {name} " in result.stdout
    assert not list(tmp_path.iterdir())  # nothing is left behind

    def no_links(*paths):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(limits, "MIN_INODES", 2**62)
    monkeypatch.setattr(limits, "MIN_FOLDER_BYTES", 2**62)
    monkeypatch.setattr(limits.os, "link", no_links)
    space, inodes, links = limits.output_folder(tmp_path)
    assert not space.ok and "free some" in space.value and not inodes.ok and "remove files" in inodes.value
    assert links.ok and links.value.startswith(f"{tmp_path}: none (Operation not permitted); have only one machine")


def test_a_folder_that_cannot_hold_output_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    (found,) = limits.output_folder(tmp_path / "file" / "x")
    assert not found.ok and found.value == f"{tmp_path / 'file'}: no folder; give another"


@pytest.mark.parametrize(
    ("signs", "build", "hidden", "said"),
    [
        (("dev/nvidia0",), "13.2", None, "/dev/nvidia0): torch can't use it (the driver is too old); run nvidia-smi"),
        (("proc/driver/nvidia", "dev/nvidia0"), None, None, "install a torch that is built for CUDA"),
        (("bin/nvidia-smi",), "13.2", None, "there is a GPU (nvidia-smi): torch can't use it"),
        (("dev/nvidia0",), "13.2", "", None),
        ((), "13.2", None, None),
        (("dev/nvidiactl",), "13.2", None, None),
    ],
)
def test_a_gpu_that_torch_cannot_use_is_named(monkeypatch, tmp_path, signs, build, hidden, said):
    def unavailable():
        warnings.warn("the driver is too old\nmore", stacklevel=1)
        return False

    for sign in signs:
        (tmp_path / sign).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / sign).touch(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr(torch.cuda, "is_available", unavailable)
    monkeypatch.setattr(torch.version, "cuda", build)
    monkeypatch.setattr(doctor, "ROOT", tmp_path)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if hidden is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    found = doctor._torch()
    assert found.ok == (said is None) and found.value.startswith("cpu (build: ") and "\n" not in found.value
    assert said is None or said in found.value.replace(str(tmp_path), "")
