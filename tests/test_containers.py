"""Image, compose, KubeRay and Slurm files: they fit their schemas and run commands that zpipe and Ray have."""

import importlib.util
import json
import os
import re
import shlex
import socket
import subprocess
import sys
import tomllib
from pathlib import Path

import kubernetes_validate
import pytest
import typer
import yaml

from zpipe.cli import app

ROOT = Path(__file__).parents[1]
DOCKER = ROOT / "docker"
KUBERAY = ["kuberay-extract.yaml", "kuberay-train.yaml"]


@pytest.fixture(scope="module")
def dockerfile():
    """The stages by name, as read by the script that runs the Dockerfile without a container engine."""
    spec = importlib.util.spec_from_file_location("build_in_chroot", DOCKER / "build_in_chroot.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look up their module
    spec.loader.exec_module(module)
    return {stage.name: stage for stage in module.parse((DOCKER / "Dockerfile").read_text())[1]}


def rests(stage, name):
    return [step.rest for step in stage.steps if step.name == name]


# ------------------------------------------------------------------------------------------------------------ the image


def test_both_images_run_without_root_and_without_build_tools(dockerfile):
    (installed,) = rests(dockerfile["runtime"], "RUN")
    assert not re.search(r"\b(gcc|make|\S+-dev|pip|venv|git)\b", installed)
    for name in ("cpu", "cuda"):
        stage = dockerfile[name]
        assert (stage.base, rests(stage, "USER"), rests(stage, "RUN")) == ("runtime", ["zpipe"], [])
        assert rests(stage, "COPY") == ["/opt/zpipe /opt/zpipe"]
        (copied,) = [step for step in stage.steps if step.name == "COPY"]
        assert copied.flags == ("--from=installed",)
    assert rests(dockerfile["installed"], "RUN")[-1].endswith("&& /opt/zpipe/bin/pip uninstall -y setuptools pip")


def test_its_health_is_what_the_doctor_says(dockerfile):
    (check,) = rests(dockerfile["runtime"], "HEALTHCHECK")
    command = json.loads(check.removeprefix("CMD "))
    assert command == ["zpipe", "doctor"]
    parses(command)


def test_it_is_labelled(dockerfile):
    (labels,) = rests(dockerfile["runtime"], "LABEL")
    keys = {part.partition("=")[0] for part in shlex.split(labels)}
    assert {f"org.opencontainers.image.{name}" for name in ("title", "description", "version", "revision")} <= keys
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert f"VERSION={version}" in rests(dockerfile["runtime"], "ARG")


def test_everything_it_needs_is_copied_and_nothing_else_is_sent(dockerfile):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    sources = [part for rest in rests(dockerfile["build"], "COPY") for part in shlex.split(rest)[:-1]]
    folders = {path.partition("/")[0] for path in project["tool"]["setuptools"]["package-dir"].values()}
    assert folders <= set(sources) and project["project"]["readme"] in sources
    ignored, *rules = [
        line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")
    ]
    assert ignored == "*" and {rule[1:] for rule in rules if rule.startswith("!")} == set(sources)
    assert all((ROOT / source).exists() for source in sources)
    install = rests(dockerfile["installed"], "RUN")[0]
    extras = re.search(r"'\.\[(.*)\]'", install)[1].split(",")
    assert set(extras) <= set(project["project"]["optional-dependencies"])


@pytest.mark.parametrize(("arguments", "simd", "code"), [(["--now"], "auto", 2), ([], "avx512", 2), ([], "none", 0)])
def test_the_pillow_simd_step_knows_what_it_is_asked(arguments, simd, code):
    done = subprocess.run(
        ["sh", DOCKER / "install-pillow-simd.sh", *arguments], env={"BIN": "/none", "SIMD": simd}, capture_output=True
    )
    assert done.returncode == code


@pytest.mark.parametrize("required", [False, True])
def test_without_a_compiler_pillow_stays_or_the_image_fails(tmp_path, required):
    (tmp_path / "python").symlink_to(sys.executable)
    (tmp_path / "grep").symlink_to("/bin/grep")
    done = subprocess.run(
        ["/bin/sh", DOCKER / "install-pillow-simd.sh", *(["--required"] if required else [])],
        env={"BIN": str(tmp_path), "PATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == required and "pillow-simd: no C compiler" in (done.stderr if required else done.stdout)


@pytest.mark.parametrize("path", sorted([*DOCKER.glob("*.sh"), ROOT / ".ci/run"]), ids=lambda path: path.name)
def test_shell_scripts_parse(path):
    shell = "bash" if path.read_text().startswith("#!/bin/bash") else "sh"
    assert subprocess.run([shell, "-n", path], capture_output=True, text=True).stderr == ""


# ---------------------------------------------------------------------------------------------------------- the schemas


def test_compose_fits_its_schema():
    done = subprocess.run(
        [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", DOCKER / "compose.yaml"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


# No package carries KubeRay's own schema. These are the fields of its v1 API reference (RayJobSpec and below) that such
# may use, with their types; pod templates are checked against Kubernetes' own schema.
RAY_JOB = {
    "entrypoint": str,
    "shutdownAfterJobFinishes": bool,
    "ttlSecondsAfterFinished": int,
    "activeDeadlineSeconds": int,
    "backoffLimit": int,
    "rayClusterSpec": dict,
    "runtimeEnvYAML": str,
    "submissionMode": str,
    "suspend": bool,
}
RAY_CLUSTER = {
    "rayVersion": str,
    "headGroupSpec": dict,
    "workerGroupSpecs": list,
    "enableInTreeAutoscaling": bool,
    "authOptions": dict,
}
HEAD = {"rayStartParams": dict, "template": dict, "serviceType": str}
WORKERS = {"groupName": str, "replicas": int, "minReplicas": int, "maxReplicas": int, "numOfHosts": int} | HEAD


def fits(value, fields):
    return all(name in fields and type(item) is fields[name] for name, item in value.items())


def ray_job(name):
    return yaml.safe_load((DOCKER / name).read_text())


def groups(job):
    cluster = job["spec"]["rayClusterSpec"]
    return [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]


@pytest.mark.parametrize("name", KUBERAY)
def test_kuberay_files_fit_what_is_known_of_their_schemas(name):
    job = ray_job(name)
    assert (job["apiVersion"], job["kind"], set(job)) == (
        "ray.io/v1",
        "RayJob",
        {"apiVersion", "kind", "metadata", "spec"},
    )
    assert fits(job["spec"], RAY_JOB) and fits(job["spec"]["rayClusterSpec"], RAY_CLUSTER)
    assert job["spec"]["rayClusterSpec"]["authOptions"] == {"mode": "token"}
    head, *workers = groups(job)
    assert fits(head, HEAD) and workers and all(fits(group, WORKERS) for group in workers)
    for group in (head, *workers):
        assert all(type(value) is str for value in group["rayStartParams"].values())
        whole = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "x"}, "template": group["template"]}
        kubernetes_validate.validate(whole, "1.30", strict=True)
        pod = group["template"]["spec"]
        assert pod["securityContext"]["runAsNonRoot"] and pod["automountServiceAccountToken"] is False
        assert {mount["name"] for mount in pod["containers"][0]["volumeMounts"]} == {v["name"] for v in pod["volumes"]}


@pytest.mark.parametrize("change", [{"volumeMount": []}, {"resources": {"limits": 3}}])
def test_the_schema_notices_a_breach(change):
    (template,) = [group["template"] for group in groups(ray_job(KUBERAY[0]))[:1]]
    template["spec"]["containers"][0] |= change
    with pytest.raises(kubernetes_validate.ValidationError):
        whole = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "x"}, "template": template}
        kubernetes_validate.validate(whole, "1.30", strict=True)


def test_the_cluster_has_the_ray_of_the_image():
    pinned = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split() if "==" in line)
    for name in KUBERAY:
        assert ray_job(name)["spec"]["rayClusterSpec"]["rayVersion"] == pinned["ray"]


def test_as_many_processes_as_gpus_are_trained_in():
    job = ray_job("kuberay-train.yaml")
    words = shlex.split(job["spec"]["entrypoint"])
    (workers,) = groups(job)[1:]
    gpus = int(workers["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"])
    assert int(words[words.index("--num-workers") + 1]) == workers["replicas"] * gpus


def test_no_ray_is_open_to_its_neighbours():
    compose = yaml.safe_load((DOCKER / "compose.yaml").read_text())
    for service in compose["services"].values():
        assert service["environment"]["RAY_AUTH_MODE"] == "token" and "ports" not in service
        assert service["environment"]["RAY_AUTH_TOKEN"].startswith("${RAY_AUTH_TOKEN:?")
    assert "export RAY_AUTH_TOKEN RAY_AUTH_MODE=token" in (DOCKER / "slurm.sh").read_text()


# --------------------------------------------------------------------------------------------------------- the commands


def parses(words):
    """Parse a `zpipe` or `ray` command without running it; fails on an unknown verb or option, or a missing one."""
    program, verb, *arguments = words
    if program == "zpipe":
        group = typer.main.get_command(app)
    else:
        assert program == "ray", words
        from ray.scripts.scripts import cli as group
    group.commands[verb].make_context(verb, arguments)


def shell_commands(text):
    """Every `zpipe` and `ray` command in a piece of shell, with each variable replaced by 1."""
    text = re.sub(r"\\\n\s*|\s+#.*", " ", text).replace('"$@"', "")
    text = re.sub(r"\$\{[^}]*\}|\$\w+", "1", text)
    commands = re.findall(r"(?:^|[;&|]|exec|if|--\S+)\s*((?:ray|zpipe) [a-z][^;&|><\n]*)", text, re.M)
    return [shlex.split(command) for command in commands]


def commands():
    compose = yaml.safe_load((DOCKER / "compose.yaml").read_text())
    for name, service in compose["services"].items():
        command = service["command"]
        if isinstance(command, str):
            yield f"compose {name}", shlex.split(command)
        else:
            for number, words in enumerate(shell_commands(command[-1])):
                yield f"compose {name} {number}", words
        if "healthcheck" in service:
            yield f"compose {name} health", service["healthcheck"]["test"][1:]
    for file in KUBERAY:
        job = ray_job(file)
        yield file, shlex.split(job["spec"]["entrypoint"])
        for number, group in enumerate(groups(job)):
            options = [f"--{name}={value}" for name, value in group["rayStartParams"].items()]
            yield f"{file} {number}", ["ray", "start", *options]
    script = (DOCKER / "slurm.sh").read_text()
    body = script[script.index("set -euo") :].replace('"${common[@]}"', re.search(r"common=\((.*)\)", script)[1])
    for number, words in enumerate(shell_commands(body)):
        yield f"slurm.sh {number}", words


COMMANDS = dict(commands())


@pytest.mark.parametrize("name", COMMANDS)
def test_commands_are_commands_that_there_are(name):
    parses(COMMANDS[name])


def test_no_command_was_overlooked():
    verbs = [" ".join(words[:2]) for words in COMMANDS.values()]
    assert verbs.count("ray start") == 3 + 4 + 2 and verbs.count("ray health-check") == 2
    assert verbs.count("zpipe extract-teacher-maps") == 3 and verbs.count("zpipe train-vit") == 1


@pytest.mark.parametrize(
    "words", [["zpipe", "extract-teacher-map"], ["zpipe", "doctor", "--x"], ["ray", "start", "--prot=1"]]
)
def test_a_command_that_is_none_is_noticed(words):
    with pytest.raises((KeyError, Exception), match="extract-teacher-map|No such option"):
        parses(words)


# --------------------------------------------------------------------------------------------- Slurm, as far as it goes

SRUN = """#!/bin/bash
tasks=1
while [[ $1 == -* ]]; do
    case $1 in --ntasks=*) tasks=${1#*=} ;; esac
    shift
done
begun=()
trap 'kill "${begun[@]}"; wait; exit 143' TERM
for _ in $(seq "$tasks"); do "$@" & begun+=($!); done
wait
"""


@pytest.mark.slow
def test_the_batch_script_extracts_on_two_nodes_and_leaves_nothing(tmp_path, shards, store, contents, teacher_flags):
    """The script itself runs, in order and to its end, with an srun that starts its tasks on this machine."""
    programs = {
        "srun": SRUN,
        "scontrol": f"#!/bin/sh\necho {socket.gethostname()}\necho other\n",
        "ray": f'#!/bin/sh\nexec {sys.executable} -m ray.scripts.scripts "$@"\n',
        "zpipe": f'#!/bin/sh\nexec {sys.executable} -c "from zpipe.cli import main; main()" "$@"\n',
    }
    for name, text in programs.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    environment |= {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_NNODES": "2"}
    environment |= {"SLURM_JOB_ID": str(os.getpid()), "SLURM_CPUS_PER_TASK": "1"}
    done = subprocess.run(
        ["bash", DOCKER / "slurm.sh", shards, tmp_path / "store", *teacher_flags],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "18 maps in 4 shards (4 extracted now)" in done.stdout
    assert contents(tmp_path / "store") == contents(store)
    port = 20000 + os.getpid() % 12000
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((socket.gethostname(), port), 5).close()
