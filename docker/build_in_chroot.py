"""Carry out the Dockerfile without a container engine: run its instructions in one root folder per stage.

    python docker/build_in_chroot.py TARGET ROOTS [--build-arg NAME=VALUE] [--secret id=pip,src=FILE]
        [--bind SOURCE[:TARGET]]

This is for machines with root, debootstrap and unshare, such as one that builds packages. debootstrap makes ROOTS/base
from the Debian release that BASE names, unless it exists; every other stage is a new folder beside it. Then the
HEALTHCHECK is run as USER. Layers and their cache, labels, cgroups and a separate network are left out.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
DOCKERFILE = REPOSITORY / "docker" / "Dockerfile"


@dataclass(frozen=True)
class Instruction:
    """One instruction: its name in capitals, its flags (`--from=...`), and the rest as one line."""

    name: str
    flags: tuple[str, ...]
    rest: str


@dataclass(frozen=True)
class Stage:
    """What stands between one FROM and the next."""

    name: str
    base: str
    steps: tuple[Instruction, ...]


def parse(text: str) -> tuple[list[Instruction], list[Stage]]:
    """The ARGs before the first FROM, and the stages. Knows what our Dockerfile uses: no here-documents, no escapes."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    arguments: list[Instruction] = []
    stages: list[Stage] = []
    for statement in re.sub(r"\\\n\s*", "", "\n".join(lines)).splitlines():
        if not statement.strip():
            continue
        name, _, rest = statement.strip().partition(" ")
        flags = []
        while found := re.match(r"(--\w\S*)\s+", rest) if name.upper() != "ARG" else None:
            flags.append(found[1])
            rest = rest[found.end() :]
        step = Instruction(name.upper(), tuple(flags), rest.strip())
        if step.name == "FROM":
            base, _, own = re.split(r"\s+", step.rest)
            stages.append(Stage(own, base, ()))
        elif stages:
            last = stages.pop()
            stages.append(Stage(last.name, last.base, (*last.steps, step)))
        else:
            arguments.append(step)
    return arguments, stages


def filled_in(text: str, values: Mapping[str, str]) -> str:
    """`$NAME` and `${NAME}` replaced, as Docker does outside of RUN."""
    return re.sub(r"\$(?:\{(\w+)\}|(\w+))", lambda found: values.get(found[1] or found[2], ""), text)


def pairs(text: str) -> dict[str, str]:
    """The `NAME=VALUE ...` of an ARG, ENV or LABEL; a bare name has the value ""."""
    return {name: value for name, _, value in (part.partition("=") for part in shlex.split(text))}


@dataclass(frozen=True)
class Mount:
    """A file or folder of this machine as a step sees it."""

    source: str
    target: str
    writable: bool = False


@dataclass
class Root:
    """The root of a stage, and what is set in it."""

    path: Path
    environment: dict[str, str] = field(default_factory=dict)
    arguments: dict[str, str] = field(default_factory=dict)
    folder: str = "/"
    user: str = "root"
    healthcheck: list[str] = field(default_factory=list)

    def inside(self, path: str) -> Path:
        """Where a path of the image lies here."""
        return self.path / os.path.normpath(os.path.join(self.folder, path)).lstrip("/")


class Builder:
    """Stages by name, each made once."""

    def __init__(self, roots: Path, arguments: Mapping[str, str], secrets: Mapping[str, str], binds: list[str]) -> None:
        before, stages = parse(DOCKERFILE.read_text())
        self._stages = {stage.name: stage for stage in stages}
        self._given, self._secrets, self._binds = arguments, secrets, binds
        self._globals: dict[str, str] = {}
        for step in before:
            self._globals |= {name: arguments.get(name, value) for name, value in pairs(step.rest).items()}
        self._roots = roots
        self._made: dict[str, Root] = {}

    def stage(self, name: str) -> Root:
        """The root of a stage, with those that it needs made before it."""
        if name not in self._made:
            self._made[name] = self._make(self._stages[name])
        return self._made[name]

    def _base(self, image: str) -> Path:
        path = self._roots / "base"
        if not path.is_dir():
            found = re.fullmatch(r"(?:.*/)?debian:(\w+)(?:-slim)?", image)
            if not found:
                raise SystemExit(f"BASE={image}: only debian:RELEASE can be made by debootstrap")
            subprocess.run(["debootstrap", "--variant=minbase", found[1], str(path)], check=True)
        return path

    def _make(self, stage: Stage) -> Root:
        base = filled_in(stage.base, self._globals)
        path = self._roots / stage.name
        if base in self._stages:
            below = self.stage(base)
            root = Root(path, dict(below.environment), {}, below.folder, below.user, list(below.healthcheck))
        else:
            below, root = Root(self._base(base)), Root(path)
        say(f"{stage.name}: FROM {base}")
        shutil.rmtree(path, ignore_errors=True)
        copy(below.path, path)
        for step in stage.steps:
            begun = time.monotonic()
            say(f"{stage.name}: {step.name} {step.rest[:100]}")
            self._do(root, step)
            if time.monotonic() - begun > 5:
                say(f"{stage.name}: took {time.monotonic() - begun:.0f} s")
        return root

    def _do(self, root: Root, step: Instruction) -> None:
        values = root.arguments | root.environment
        if step.name == "ARG":
            root.arguments |= {
                name: self._given.get(name, filled_in(value, values)) for name, value in pairs(step.rest).items()
            }
        elif step.name == "ENV":
            root.environment |= {name: filled_in(value, values) for name, value in pairs(step.rest).items()}
        elif step.name == "WORKDIR":
            root.folder = os.path.join(root.folder, step.rest)
            root.inside(".").mkdir(parents=True, exist_ok=True)
        elif step.name == "COPY":
            self._copy(root, step)
        elif step.name == "RUN":
            files = [mount_of(flag) for flag in step.flags if flag.startswith("--mount=")]
            mounts = [Mount(*(text.split(":", 1) * 2)[:2]) for text in self._binds]
            for mount in files:
                if mount["type"] == "secret" and mount["id"] in self._secrets:
                    mounts.append(Mount(self._secrets[mount["id"]], mount["target"]))
                if mount["type"] == "cache":
                    cache = self._roots / "cache" / mount["target"].strip("/").replace("/", "-")
                    cache.mkdir(parents=True, exist_ok=True)
                    mounts.append(Mount(str(cache), mount["target"], writable=True))
            run_in(root, ["/bin/sh", "-c", step.rest], mounts)
        elif step.name == "USER":
            root.user = step.rest
        elif step.name == "HEALTHCHECK":
            root.healthcheck = json.loads(step.rest.removeprefix("CMD").strip())
        elif step.name not in ("LABEL", "CMD"):
            raise SystemExit(f"{DOCKERFILE}: {step.name} is not known here")

    def _copy(self, root: Root, step: Instruction) -> None:
        *sources, target = shlex.split(step.rest)
        place = root.inside(target)
        source_of = dict(flag[2:].split("=", 1) for flag in step.flags)
        for source in sources:
            if "from" in source_of:
                copy(self.stage(source_of["from"]).inside(source), place)
                continue
            # As git has it, so that nothing that only this checkout holds gets in.
            listed = subprocess.run(
                ["git", "ls-files", "-co", "--exclude-standard", "--", source],
                cwd=REPOSITORY,
                check=True,
                capture_output=True,
                text=True,
            ).stdout.split()
            for name in listed:
                relative = Path(name).name if (REPOSITORY / source).is_file() else Path(name).relative_to(source)
                (place / relative).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(REPOSITORY / name, place / relative)


def mount_of(flag: str) -> dict[str, str]:
    """The fields of a `--mount=` flag."""
    return dict(part.split("=", 1) for part in flag.removeprefix("--mount=").split(","))


def copy(source: Path, target: Path) -> None:
    """A copy that shares its files' bytes where the file system can; links and owners are kept."""
    target.parent.mkdir(parents=True, exist_ok=True)
    subprocess.run(["cp", "-a", "--reflink=auto", str(source), str(target)], check=True)


def run_in(root: Root, command: list[str], mounts: Iterable[Mount] = ()) -> None:
    """Run a command in the root, in mount and process namespaces of its own: nothing stays mounted or running."""
    script = ["set -e", 'mount --bind "$ROOT" "$ROOT"']
    script += ['mount -t proc proc "$ROOT/proc"', 'mount --rbind /dev "$ROOT/dev"']
    for mount in (*mounts, Mount("/etc/resolv.conf", "/etc/resolv.conf")):
        place = root.inside(mount.target)
        if Path(mount.source).is_dir():
            place.mkdir(parents=True, exist_ok=True)
        elif not place.exists():
            place.parent.mkdir(parents=True, exist_ok=True)
            place.touch()
        script.append(f"mount --bind {shlex.quote(mount.source)} {shlex.quote(str(place))}")
        if not mount.writable:
            script.append(f"mount -o remount,bind,ro {shlex.quote(str(place))}")
    environment = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root"}
    environment |= {"DEBIAN_FRONTEND": "noninteractive"} | root.arguments | root.environment
    if root.user != "root":
        environment |= {"HOME": f"/home/{root.user}"}
    assignments = [f"{name}={value}" for name, value in environment.items()]
    inner = ["env", "-i", *assignments, "sh", "-c", f'cd {shlex.quote(root.folder)} && exec "$@"', "sh", *command]
    who = [] if root.user == "root" else [f"--userspec={root.user}"]
    script.append(f'exec chroot {" ".join(who)} "$ROOT" {shlex.join(inner)}')
    done = subprocess.run(
        ["unshare", "--mount", "--pid", "--fork", "--propagation", "private", "sh", "-c", "\n".join(script)],
        env=os.environ | {"ROOT": str(root.path.resolve())},
        stdin=subprocess.DEVNULL,
    )
    if done.returncode:
        raise SystemExit(f"{root.path.name}: exit code {done.returncode} of {shlex.join(command)[:200]}")


def say(line: str) -> None:
    """A line with the time."""
    print(time.strftime("%H:%M:%S"), line, flush=True)


def main() -> None:
    """Build the target and run its HEALTHCHECK."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("target")
    parser.add_argument("roots", type=Path)
    parser.add_argument("--build-arg", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--secret", action="append", default=[], metavar="id=ID,src=FILE")
    parser.add_argument(
        "--bind", action="append", default=[], metavar="SOURCE[:TARGET]", help="which every RUN can read"
    )
    asked = parser.parse_args()
    if os.geteuid() != 0:
        sys.exit("needs root: chroot and mount")
    asked.roots.mkdir(parents=True, exist_ok=True)
    secrets = {part["id"]: part["src"] for part in (mount_of(text) for text in asked.secret)}
    builder = Builder(asked.roots, pairs(shlex.join(asked.build_arg)), secrets, asked.bind)
    root = builder.stage(asked.target)
    say(f"{asked.target}: HEALTHCHECK {shlex.join(root.healthcheck)} as {root.user}")
    run_in(root, root.healthcheck)
    subprocess.run(["du", "-sh", str(root.path)], check=True)


if __name__ == "__main__":
    main()
