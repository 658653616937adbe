"""Who may import whom: the two programs stay apart, the contracts light, `import zpipe` cheap, a model one file."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = {"zpipe": "zpipe", "schemas": "zpipe.schemas", "pipeline": "zpipe.pipeline", "train": "zpipe.train"}
FILES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
NAMES = [str(path.relative_to(ROOT)) for path in FILES]

# Tars are read by schemas/tar_file.py, without a library, and written by schemas/tar_writer.py with the headers of
# tarfile; webdataset chains the stages of a loader.
TAR_LIBRARY_USERS = {"webdataset": "train/data/worker.py", "tarfile": "schemas/tar_writer.py"}
RAY_USERS = ("pipeline/executor.py", "train/fit/distributed.py")
PURE = ("train/models/", "train/losses.py")
# What models may share: a frozen backbone's parts, the token maths, batches of unequal lengths, and how a model says
# what it can do, starts from a ViT's weights, and takes published ones.
SHARED_BY_MODELS = {
    "backbone",
    "checks",
    "zoom_tokens",
    "packing",
    "operating_points",
    "warm_start",
    "released_weights",
}
# Models that are built on another one (LF-ViT is a CF-ViT that refines one region), or in more than one file.
PARENTS = {
    "cfvit": {"cfvit_released", "cfvit_stages"},
    "lfvit": {"cfvit", "cfvit_stages"},
    "released_zoomvit": {"zoomvit", "zoomer"},
    "sparseformer": {"sparseformer_sampling"},
    "zoomvit": {"zoomvit_embedding"},
}
# The table of the models whose published checkpoints can be opened.
PARENTS["release"] = {"cfvit", "lfvit", "released_zoomvit", "sparseformer"}


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def import_nodes(source: str, *, module_level: bool) -> Iterator[ast.Import | ast.ImportFrom]:
    """The import statements of a module.

    module_level: only those that run when it is imported (not inside functions, not under TYPE_CHECKING).
    """
    todo: list[ast.AST] = [ast.parse(source)]
    while todo:
        node = todo.pop(0)
        if module_level and (
            isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) or is_type_checking(node)
        ):
            continue
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        todo.extend(ast.iter_child_nodes(node))


def imports_of(source: str, *, module_level: bool = False) -> list[str]:
    """Full names that a module imports: `from a.b import c` gives a.b and a.b.c. Relative imports start with a dot."""
    names: list[str] = []
    for node in import_nodes(source, module_level=module_level):
        if isinstance(node, ast.Import):
            names.extend(alias.name for alias in node.names)
        else:
            base = "." * node.level + (node.module or "")
            names += [base, *(f"{base}.{alias.name}" for alias in node.names)]
    return names


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def broken_rules(path: str, source: str) -> list[str]:
    """The import rules that a file breaks, as `name: rule`."""
    names = imports_of(source)
    broken = [f"{name}: imports are absolute" for name in names if name.startswith(".")]

    def forbid(rule: str, *packages: str) -> None:
        broken.extend(f"{name}: {rule}" for name in names if any(within(name, package) for package in packages))

    def ours_but(rule: str, *allowed: str) -> None:
        broken.extend(
            f"{name}: {rule}"
            for name in names
            if within(name, "zpipe") and name != "zpipe" and not any(within(name, package) for package in allowed)
        )

    if path.startswith("schemas/"):
        ours_but("the contracts import nothing else of ours", "zpipe.schemas")
        allowed = set(sys.stdlib_module_names) | {"msgspec", "numpy", "pyarrow", "zarr", "zpipe"}
        own = {"storage.py": {"upath"}, "images.py": {"PIL"}, "map_array.py": {"numcodecs"}}
        own |= {
            "weights.py": {"torch", "safetensors"},
            "devices.py": {"torch"},
            "image_digest.py": {"xxhash"},
            "shard_patterns.py": {"braceexpand"},
        }
        allowed |= own.get(Path(path).name, set())
        broken.extend(
            f"{name}: the contracts are read with msgspec, numpy, pyarrow and zarr alone"
            for name in names
            if name.partition(".")[0] not in allowed
        )
    if path.startswith("pipeline/"):
        ours_but("the pipeline knows only the contracts", "zpipe.schemas", "zpipe.pipeline")
    if path.startswith("train/"):
        ours_but("training knows only the contracts", "zpipe.schemas", "zpipe.train")
    if path.startswith(PURE):
        # The files that authors published are read like all other weights.
        read = ("zpipe.schemas.errors", "zpipe.schemas.weights") if path == "train/models/released_weights.py" else ()
        ours_but("models and losses see no other part of ours", "zpipe.train.models", *read)
        allowed = set(sys.stdlib_module_names) | {"torch", "timm", "zpipe"}
        broken.extend(
            f"{name}: models and losses are torch and timm"
            for name in names
            if name.partition(".")[0] not in allowed | {""}
        )
    if path.startswith("train/models/") and path != "train/models/__init__.py":
        model = Path(path).stem
        allowed = SHARED_BY_MODELS | PARENTS.get(model, set())
        broken.extend(
            f"{name}: models share the modules above, or are built on a documented parent"
            for name in names
            if within(name, "zpipe.train.models") and name != "zpipe.train.models" and name.split(".")[3] not in allowed
        )
    if path.startswith("train/fit/"):
        forbid("fitting and measuring do not know each other", "zpipe.train.evaluation")
    if path.startswith("train/evaluation/"):
        forbid("fitting and measuring do not know each other", "zpipe.train.fit")
    if path.startswith(("train/fit/", "train/evaluation/", "train/data/")):
        forbid("studies and the report look at runs from outside", "zpipe.train.studies", "zpipe.train.report")
    if path not in RAY_USERS:
        forbid("ray stays in one file a program", "ray")
    forbid("transformers is loaded by pipeline/transformers_models.py alone, when a teacher needs it", "transformers")
    for library, user in TAR_LIBRARY_USERS.items():
        if path != user:
            forbid("tars are read in one place, and written in another", library)
    return broken


@pytest.mark.parametrize("path", NAMES)
def test_a_module_imports_only_what_its_layer_may(path):
    assert broken_rules(path, (ROOT / path).read_text()) == []


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("schemas/x.py", "import torch"),
        ("schemas/x.py", "def f():\n    from zpipe.pipeline import worker"),
        ("schemas/x.py", "from zpipe import cli"),
        ("pipeline/x.py", "from zpipe.train.losses import ZoomerLoss"),
        ("pipeline/x.py", "import ray"),
        ("pipeline/transformers_models.py", "from transformers import ViTModel"),
        ("train/evaluation/x.py", "from zpipe.train.fit.loop import Stopped"),
        ("train/fit/x.py", "def f():\n    from zpipe.train.evaluation.evaluate import evaluate"),
        ("train/fit/x.py", "import zpipe.train.studies"),
        ("pipeline/x.py", "from ..train import losses"),
        ("pipeline/x.py", "from tarfile import open"),
        ("train/x.py", "import zpipe.pipeline.relevance"),
        ("train/loop.py", "import webdataset as wds"),
        ("train/losses.py", "import numpy"),
        ("train/models/x.py", "from zpipe.schemas.errors import ZpipeError"),
        ("train/models/x.py", "from zpipe.train.models.zoomvit import ZoomViT"),
        ("train/models/x.py", "from zpipe.train.models import tome"),
        ("train/models/x.py", "from zpipe.train.models import ToMeViT"),
        ("zpipe/x.py", "import ray.data"),
    ],
)
def test_the_rules_notice_a_breach(path, source):
    assert broken_rules(path, source)


MODEL_CLASSES = {
    node.name
    for path in (ROOT / "train" / "models").glob("*.py")
    for node in ast.parse(path.read_text()).body
    if isinstance(node, ast.ClassDef)
}


def model_classes_asked_for(source: str) -> list[str]:
    """The classes of train/models that a module tests objects for, as `line: class`."""
    asked: list[tuple[int, ast.expr]] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and len(node.args) == 2:
            if node.func.id in ("isinstance", "issubclass"):
                asked.append((node.lineno, node.args[1]))
        elif isinstance(node, ast.MatchClass):
            asked.append((node.cls.lineno, node.cls))
    names = [
        (line, part.id if isinstance(part, ast.Name) else part.attr)
        for line, classes in asked
        for part in ast.walk(classes)
        if isinstance(part, ast.Name | ast.Attribute)
    ]
    return [f"{line}: {name}" for line, name in names if name in MODEL_CLASSES]


def test_a_new_model_is_one_file():
    """No file outside train/models depends on what class a model has."""
    asking = {
        path: asked
        for path in NAMES
        if not path.startswith("train/models/") and (asked := model_classes_asked_for((ROOT / path).read_text()))
    }
    assert asking == {}


@pytest.mark.parametrize(
    "source",
    [
        "isinstance(model, ZoomViT)",
        "isinstance(model, (str, models.CFViT | ToMeViT))",
        "match model:\n    case LFViT():\n        pass",
    ],
)
def test_a_question_for_a_class_is_noticed(source):
    assert model_classes_asked_for(source)


def module_name(path: Path) -> str:
    """The name under which a file of ours is imported."""
    folder, *parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join([FOLDERS[folder], *parts]).removesuffix(".__init__")


MODULES = {module_name(path): path for path in FILES}


def modules_run_by(name: str) -> set[str]:
    """Our modules that importing this one imports; `from a import b` counts as a.b if that is a module, else as a."""
    found: set[str] = set()
    for node in import_nodes(MODULES[name].read_text(), module_level=True):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif node.module:
            members = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= members & MODULES.keys()
            if members - MODULES.keys():
                found.add(node.module)
    return (found & MODULES.keys()) - {name}


def test_no_module_imports_itself_through_others():
    try:
        list(TopologicalSorter({name: modules_run_by(name) for name in MODULES}).static_order())
    except CycleError as error:
        pytest.fail(" -> ".join(reversed(error.args[1])))


def module_file(name: str) -> Path | None:
    """The file of a module of ours."""
    for folder, package in sorted(FOLDERS.items(), key=lambda item: -len(item[1])):
        if within(name, package):
            path = ROOT / folder / name[len(package) + 1 :].replace(".", "/")
            return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()), None)
    return None


def test_the_command_line_loads_no_stage_before_it_is_asked_for():
    """Follows the imports of zpipe and zpipe.cli through our modules."""
    todo, seen = ["zpipe", "zpipe.cli"], set()
    while todo:
        name = todo.pop()
        file = module_file(name)
        if file is None or name in seen:
            continue
        seen.add(name)
        for found in imports_of(file.read_text(), module_level=True):
            assert not within(found, "zpipe.pipeline") and not within(found, "zpipe.train"), f"{file}: {found}"
            todo.append(found)
    assert {"zpipe.cli", "zpipe.schemas.errors"} <= seen


@pytest.mark.parametrize("module", ["zpipe", "zpipe.cli", "zpipe.schemas.relevance_maps", "zpipe.pipeline.store_plan"])
def test_importing_it_in_a_fresh_interpreter_is_cheap(module):
    code = f"import sys, {module}; print(*(set(sys.modules) & {{'torch', 'ray', 'timm', 'webdataset', 'sklearn'}}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split() == []


def test_a_teacher_of_timm_loads_no_other_library():
    code = "import sys, zpipe.pipeline.teacher, zpipe.pipeline.families; print('transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split() == ["False"]
    loading = [path for path in NAMES if 'import_module("transformers' in (ROOT / path).read_text()]
    assert loading == ["pipeline/transformers_models.py"]


def test_a_store_is_read_with_four_packages():
    """msgspec, numpy, pyarrow and zarr with their own dependencies, and no other dependency of zpipe."""
    others = {"torch", "torchvision", "timm", "webdataset", "ray", "PIL", "typer", "rich", "safetensors", "matplotlib"}
    others |= {"plotly", "upath"}
    store = ROOT / "tests" / "golden" / "formats" / "v1" / "maps"
    code = f"""import sys, zpipe
maps = zpipe.open_maps({str(store)!r})
assert maps.array().shape == (6, 4, 4) and maps[next(iter(maps))].any() and maps.table().num_rows == 6
print(*(set(sys.modules) & {others!r}))"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split() == []


def test_no_test_module_imports_another():
    """Shared fixtures are in a conftest.py, shared functions in modules such as tiny.py."""
    importing = {
        path.name: names
        for path in (ROOT / "tests").rglob("*.py")
        if (names := [n for n in imports_of(path.read_text()) if n.startswith(("test_", "conftest"))])
    }
    assert importing == {}


def test_no_file_is_named_after_nothing():
    assert [name for name in NAMES if Path(name).stem in ("utils", "helpers", "common", "misc")] == []
