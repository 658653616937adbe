"""The documents are true: their snippets run, their commands parse, and their links have targets."""

import itertools
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from PIL import Image

import zpipe
from zpipe.cli import app

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").glob("*.md")])
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
COMMANDS = set(typer.main.get_command(app).commands)


def blocks(name: str) -> list[tuple[int, str, str]]:
    """(line, language, text) of every fenced block of a page."""
    text = (ROOT / name).read_text()
    return [(text[: match.start()].count("\n") + 2, *match.groups()) for match in BLOCK.finditer(text)]


# ------------------------------------------------------------------------------------------------------- snippets


@pytest.fixture
def here(tmp_path, monkeypatch, shards, store):
    """A working folder with shards/train and maps/train."""
    shutil.copytree(shards, tmp_path / "shards" / "train")
    shutil.copytree(store, tmp_path / "maps" / "train")
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield tmp_path
    torch.set_num_threads(threads)


def run_blocks(name: str, cli, replacing: dict[str, str] | None = None) -> int:
    """Run the python blocks of a page, each on its own, and the commands of its sh blocks, in order."""
    count = 0
    for line, language, text in blocks(name):
        for there, instead in (replacing or {}).items():
            text = text.replace(there, instead)
        if language == "sh":
            for words in commands_in(text):
                assert cli(*words[1:]).code == 0, words
        elif language == "python":
            # Tracebacks name the page and its line.
            exec(compile("\n" * (line - 1) + text, name, "exec"), {"__name__": "__main__"})
            count += 1
    return count


def test_the_python_of_the_readme(here, cli):
    """The snippet as it is in the README, on a smaller data set."""
    smaller = {"n01440764_10026": next(iter(zpipe.open_maps("maps/train"))), "range(100)": "range(1)"}
    smaller |= {"batch_size=128, num_workers=8": "batch_size=4, num_workers=1"}
    assert all(there in (ROOT / "README.md").read_text() for there in smaller)
    assert run_blocks("README.md", cli, smaller) == 2


SMALLER = {
    "--teacher deit_base_patch16_224 --weights pretrained": (
        "--teacher deit_tiny_patch16_224 --weights random --num-classes 3 --model-arg depth=1 --executor local"
    ),
    "--maps maps/train --out zoomer": "--maps maps/train --out zoomer --num-blocks 2 --epochs 0.5 --batch-size 4",
    "--model zoomvit_small_patch16_224": (
        "--model zoomvit_tiny_patch16_224 --model-arg depth=1 --epochs 0.5 --batch-size 4"
    ),
    "--model deit_base_patch16_224 --init-from timm:deit_base_patch16_224": (
        "--model deit_tiny_patch16_224 --model-arg depth=1 --batch-size 4 --epochs 0.5"
    ),
    "--out maps/train --weights teacher": "--out maps/of-teacher --weights teacher --executor local",
}


def test_the_commands_of_the_readme(tmp_path, monkeypatch, cli):
    """The commands as they are in the README, on twelve images of three classes, with small models and short epochs."""
    rng = np.random.default_rng(0)
    for part, name, number in itertools.product(("train", "val"), ("ant", "bee", "cat"), range(4)):
        path = tmp_path / "images" / part / name / f"{name}-{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (60, 80, 3), dtype=np.uint8)).save(path)
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "README.md").read_text()
    page = page[page.index("## With your own images") : page.index("## The cache in ten lines")]
    for there, instead in SMALLER.items():
        assert there in page, there
        page = page.replace(there, instead)
    commands = commands_in(page)
    assert [words[1] for words in commands].count("extract-teacher-maps") == 2
    for words in commands:
        result = cli(*words[1:])
        assert result.code == 0, (words, result.stderr)
    for store in ("train", "of-teacher"):
        assert len(zpipe.open_maps(f"maps/{store}")) == 12
    assert len(json.loads(Path("zoomvit/evaluation.json").read_text())["rows"]) == 5


def test_models_in_python(cli):
    assert run_blocks("docs/models.md", cli) == 1


def test_the_cookbook(here, cli, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", here / "cache")
    assert run_blocks("docs/cookbook.md", cli) == 9


def test_extending(here, cli, monkeypatch):
    from zpipe.pipeline.methods import METHODS
    from zpipe.train.studies.registry import STUDIES

    for registry in (METHODS, STUDIES):
        for key, value in registry.items():
            monkeypatch.setitem(registry, key, value)
    monkeypatch.setitem(METHODS, "gradient-input", None)
    monkeypatch.setitem(STUDIES, "learning-rates", None)
    assert run_blocks("docs/extending.md", cli) == 7
    maps = zpipe.open_maps("maps/gradient-input")
    assert maps.manifest.provenance.method == "gradient-input" and (maps.array() >= 0).all() and maps.array().any()


def test_a_reader_that_knows_only_the_description(store):
    sys.path.insert(0, str(ROOT / "docs" / "examples"))
    try:
        from read_store import read_store
    finally:
        sys.path.pop(0)
    maps = zpipe.open_maps(store)
    samples = {key: (relevance, row) for key, relevance, row in read_store(store)}
    assert list(samples) == list(maps) and len(samples) == 18
    for row in maps.table().drop_columns("shard").to_pylist():
        np.testing.assert_array_equal(samples[row["key"]][0], maps[row["key"]])
        assert samples[row["key"]][1] == row


def test_the_reader_needs_nothing_of_ours(store):
    script = ROOT / "docs" / "examples" / "read_store.py"
    assert "zpipe" not in re.findall(r"^(?:import|from) (\w+)", script.read_text(), re.MULTILINE)
    done = subprocess.run([sys.executable, script, store], capture_output=True, text=True, timeout=60, check=True)
    assert len(done.stdout.splitlines()) == 18


def test_the_description_of_the_store_names_every_column_and_field():
    from zpipe.schemas.manifest import MapShard, Provenance, StoreManifest
    from zpipe.schemas.relevance_store import INDEX_SCHEMA, STATUSES, ShardSeal

    text = (ROOT / "docs" / "store-format.md").read_text()
    names = [*INDEX_SCHEMA.names, *STATUSES]
    for record in (MapShard, Provenance, StoreManifest, ShardSeal):
        names += record.__dataclass_fields__
    assert [name for name in names if f"`{name}`" not in text] == []


# ------------------------------------------------------------------------------------------------------- commands


def commands_in(text: str) -> list[list[str]]:
    """The zpipe command lines of a block, or of a page's inline code."""
    commands = []
    for line in text.replace("\\\n", " ").splitlines():
        line = line.removeprefix("$ ")
        if line.startswith("zpipe "):
            commands.append(shlex.split(line, comments=True))
    return commands


def written_commands() -> list[tuple[str, list[str]]]:
    commands = []
    for name in NAMES:
        text = (ROOT / name).read_text()
        commands += [(name, words) for _, _, block in blocks(name) for words in commands_in(block)]
        inline = re.findall(r"`(zpipe [^`]+)`", BLOCK.sub("", text))
        commands += [(name, words) for code in inline for words in commands_in(re.sub(r"\s+", " ", code))]
    return commands


WRITTEN = written_commands()


def check(words: list[str]) -> None:
    """Raise an exception for a command, a flag or an argument that does not exist."""
    command, context = typer.main.get_command(app), None
    rest = words[1:]
    while hasattr(command, "commands"):
        context = command.make_context("zpipe", [], parent=context, resilient_parsing=True)
        command = command.commands[rest.pop(0)]
    context = command.make_context("x", [], parent=context, resilient_parsing=True)
    context.resilient_parsing = False  # only building the context needed it; the arguments are parsed strictly
    _, extra, _ = command.make_parser(context).parse_args(rest)
    assert extra == [], f"{extra[0]}: no such argument"


def test_there_are_commands_in_the_documents():
    assert len(WRITTEN) > 30 and {words[1] for _, words in WRITTEN} >= COMMANDS - {"demo"}


@pytest.mark.parametrize(("name", "words"), WRITTEN, ids=[" ".join(words)[:60] for _, words in WRITTEN])
def test_a_command_that_is_written_down_parses(name, words):
    check(words)


@pytest.mark.parametrize(
    ("line", "message"),
    [("zpipe maps info x --nope", "nope"), ("zpipe evaluate a b c d", "c: no such"), ("zpipe nothing", "nothing")],
)
def test_a_wrong_command_does_not(line, message):
    with pytest.raises(Exception, match=message):
        check(shlex.split(line))


@pytest.mark.parametrize("name", NAMES)
def test_links_between_files_lead_somewhere(name):
    text = (ROOT / name).read_text()
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not re.match(r"https?:|#", target):
            assert ((ROOT / name).parent / target.partition("#")[0]).exists(), target


@pytest.mark.parametrize("name", NAMES)
def test_make_targets_exist(name):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    code = (
        "\n".join(block for _, _, block in blocks(name))
        + "\n"
        + "\n".join(re.findall(r"`(make [^`]+)`", (ROOT / name).read_text()))
    )
    assert set(re.findall(r"^make ([a-z-]+)", code, re.MULTILINE)) <= targets


# ------------------------------------------------------------------------------------------------------ reference


def test_the_reference_lists_every_module():
    listed = set(
        re.findall(r"^\.\. automodule:: (\S+)", "".join(p.read_text() for p in (ROOT / "docs/api").glob("*.rst")), re.M)
    )
    for folder in ("schemas", "pipeline", "train"):
        for path in (ROOT / folder).rglob("*.py"):
            module = ".".join(["zpipe", *path.relative_to(ROOT).with_suffix("").parts]).removesuffix(".__init__")
            assert module in listed, f"add {module} to docs/api/{folder}.rst"


@pytest.mark.slow
def test_the_reference_builds_without_a_warning(tmp_path):
    pytest.importorskip("sphinx")
    line = [
        sys.executable,
        "-m",
        "sphinx",
        "-q",
        "-W",
        "--keep-going",
        "-E",
        "-b",
        "html",
        ROOT / "docs" / "api",
        tmp_path,
    ]
    done = subprocess.run(line, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
