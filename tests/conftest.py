"""Small real inputs for all tests: photos, tar shards, a relevance store, a full disk, the command line."""

import io
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from zpipe import interrupts

os.environ.setdefault("PYTHONFAULTHANDLER", "1")  # subprocesses that crash print their stacks

# The grid is not square (4 x 6), so that a test notices when rows and columns are swapped.
TEACHER = {
    "teacher": "deit_tiny_patch16_224",
    "weights": "random",
    "num_classes": 5,
    "teacher_args": {"img_size": [64, 96], "depth": 2, "embed_dim": 48},
    "threads": 1,
}


@pytest.fixture(autouse=True)
def signals_as_before():
    """A command that a signal ended keeps its handlers until its process ends; here the process goes on."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    if any(signal.getsignal(number) is not handler for number, handler in handlers.items()):
        signal.set_wakeup_fd(-1)
        interrupts._watched_by = None
        for number, handler in handlers.items():
            signal.signal(number, handler)


@dataclass(frozen=True)
class Outcome:
    """The output and the exit code of a command."""

    code: int
    stdout: str
    stderr: str

    @property
    def error(self) -> str:
        """The one `error:` line of a failed command. Fails if there is none, several, or a traceback."""
        assert "Traceback" not in self.stdout + self.stderr, self.stderr
        lines = [line for line in self.stderr.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1, self.stderr
        return lines[0]

    @property
    def details(self) -> list[str]:
        """The indented lines after the `error:` line."""
        lines = self.stderr.splitlines()
        after = lines[[line.startswith("error: ") for line in lines].index(True) + 1 :]
        assert all(line.startswith("  ") for line in after), self.stderr
        return [line.strip() for line in after]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Allow slow tests half an hour; pyproject.toml has the limit of the others."""
    for item in items:
        if "slow" in item.keywords and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(1800))


@pytest.fixture(scope="module")
def one_thread():
    """torch uses one thread: faster for small models, and sums are always in the same order."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def cli():
    """Run a `zpipe` command in this process: `cli("maps", "info", store) -> Outcome`. Exceptions are not swallowed."""
    from zpipe.cli import app

    def run(*args: object) -> Outcome:
        result = CliRunner().invoke(app, [str(arg) for arg in args])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return Outcome(result.exit_code, result.stdout, result.stderr)

    return run


@pytest.fixture(scope="session")
def command():
    """The argument list that starts a `zpipe` command in a process of its own."""

    def line(*args: object) -> list[str]:
        return [sys.executable, "-c", "from zpipe.cli import main; main()", *(str(arg) for arg in args)]

    return line


@pytest.fixture(scope="session")
def process(command):
    """Run a `zpipe` command in a process of its own: `process(*args) -> Outcome`."""

    def run(*args: object, timeout: float = 120) -> Outcome:
        done = subprocess.run(command(*args), capture_output=True, text=True, timeout=timeout, stdin=subprocess.DEVNULL)
        return Outcome(done.returncode, done.stdout, done.stderr)

    return run


@pytest.fixture(scope="session")
def teacher_settings() -> dict:
    """Keyword arguments of an ExtractConfig with a tiny random teacher of 5 classes and a 4 x 6 grid."""
    return dict(TEACHER)


@pytest.fixture(scope="session")
def teacher_flags() -> list[str]:
    """The same teacher as flags of `extract-teacher-maps`."""
    flags = ["--teacher", TEACHER["teacher"], "--weights", "random", "--num-classes", "5", "--threads", "1"]
    for name, value in TEACHER["teacher_args"].items():
        flags += ["--model-arg", f"{name}={value}"]
    return flags


@pytest.fixture(scope="session")
def encode():
    """Bytes of a smooth random image: `encode("JPEG", width, height, mode="RGB", seed=0)`."""

    def run(form: str, width: int, height: int, *, mode: str = "RGB", seed: int = 0) -> bytes:
        colours = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
        buffer = io.BytesIO()
        image = Image.fromarray(colours).resize((width, height), Image.Resampling.BICUBIC).convert(mode)
        image.save(buffer, form)
        return buffer.getvalue()

    return run


@pytest.fixture(scope="session")
def photos(tmp_path_factory, encode) -> Path:
    """An ImageFolder tree: classes ant, bee, cat with 6 JPEGs each of different sizes. Leave it unchanged."""
    root = tmp_path_factory.mktemp("photos")
    sizes = np.random.default_rng(7).integers(40, 160, (18, 2))
    for number, (width, height) in enumerate(sizes):
        folder = root / ("ant", "bee", "cat")[number // 6]
        folder.mkdir(exist_ok=True)
        (folder / f"{folder.name}_{number}.jpg").write_bytes(encode("JPEG", int(width), int(height), seed=number))
    return root


@pytest.fixture(scope="session")
def shards(tmp_path_factory, photos) -> Path:
    """Tar shards of `photos`: 5, 5, 5 and 3 samples. Leave them unchanged; copy them to alter them."""
    from zpipe.pipeline.make_shards import FolderSource, make_shards

    out = tmp_path_factory.mktemp("data") / "shards"
    make_shards(FolderSource(photos, shard_size=5, shuffle_seed=0, key_rule="stem"), out)
    return out


@pytest.fixture(scope="session")
def store(tmp_path_factory, shards) -> Path:
    """The relevance store of `shards` under the tiny random teacher. Leave it unchanged; copy it to alter it."""
    from zpipe.pipeline.extract import ExtractConfig, extract_teacher_maps

    out = tmp_path_factory.mktemp("data") / "store"
    extract_teacher_maps(shards, out, ExtractConfig(**TEACHER, executor="local"))
    return out


@pytest.fixture
def store_copy(tmp_path, store) -> Path:
    return Path(shutil.copytree(store, tmp_path / "store"))


@pytest.fixture
def shards_copy(tmp_path, shards) -> Path:
    return Path(shutil.copytree(shards, tmp_path / "shards"))


@pytest.fixture
def cuda():
    """A pretend CUDA device, which counts what makes the host wait, kernels and bytes."""
    from pretend_cuda import pretend_cuda

    with pretend_cuda() as cuda:
        yield cuda


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MiB. `small_disk.fill(leave)` fills it up to `leave` bytes."""
    root = tmp_path / "disk"
    root.mkdir()
    if os.geteuid() != 0:
        pytest.skip("needs root to mount a small file system")
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(root)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"a small file system can't be mounted here: {mounted.stderr.strip()}")
    try:
        yield SmallDisk(root)
    finally:
        subprocess.run(["umount", str(root)], check=True)


@dataclass(frozen=True)
class SmallDisk:
    root: Path

    def fill(self, leave: int = 0) -> None:
        """Leave `leave` bytes free. It may be called again with another number."""
        filler = self.root / "filler"
        filler.unlink(missing_ok=True)
        free = shutil.disk_usage(self.root).free - leave
        filler.write_bytes(bytes(max(0, free)))


@pytest.fixture(scope="session")
def contents():
    """`contents(folder)`: every file below it, temporary ones too, as relative path -> bytes."""

    def run(root: Path) -> dict[str, bytes]:
        return {
            str(path.relative_to(root)): path.read_bytes() for path in sorted(Path(root).rglob("*")) if path.is_file()
        }

    return run
