"""`zpipe doctor --gpu` on a CPU and on the pretend device: what it compares, times, provokes, and recommends."""

import sys
from dataclasses import replace
from types import SimpleNamespace

import msgspec
import pytest
import torch
from made_up_gpus import AGREEMENT, GIB, H200

from zpipe import gpu_children, gpu_numbers, gpu_rates, gpu_report, gpu_shortage
from zpipe.gpu_advice import Machine, advise
from zpipe.gpu_children import Part, ask, ask_together
from zpipe.gpu_faults import Poisoned, Sum, SumConfig, is_alive, poison
from zpipe.gpu_numbers import Agreement, Check, NumbersConfig
from zpipe.gpu_rates import RatesConfig
from zpipe.gpu_report import ExaminationConfig, GpuReport, examine_gpu, findings_of
from zpipe.gpu_shortage import Shortage
from zpipe.pipeline.explainer import precisions_of
from zpipe.pipeline.methods import METHODS

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
SMALL = NumbersConfig(images=8, side=64, depth=2, width=48)
BRIEF = RatesConfig(
    seconds=0.01,
    matrix=64,
    copy_bytes=1 << 16,
    photo=(100, 75),
    teacher="deit_tiny_patch16_224",
    student="deit_tiny_patch16_224",
    model_args={"img_size": 32, "depth": 1},
    map_batch=4,
    train_batch=4,
)

# ------------------------------------------------------------------------------------------------------------- numbers


@pytest.fixture(scope="module")
def numbers():
    return gpu_numbers.numbers(CPU, SMALL)


def test_a_cpu_computes_right(numbers):
    expected = [(method, name) for method in METHODS for name in precisions_of(method, "cpu")]
    assert [(each.method, each.precision) for each in numbers.agreement] == expected
    assert all(each.ok for each in numbers.agreement), numbers.agreement
    assert all(check.ok for check in numbers.errors), numbers.errors
    assert len({check.name for check in numbers.errors}) == len(numbers.errors) == 12
    assert numbers.waits == ()


def test_the_made_up_teacher_tells_images_and_classes_apart():
    teacher, pixels = gpu_numbers.made_up_teacher(SMALL), gpu_numbers.made_up_pixels(4, SMALL.side)
    logits = teacher.model(torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255 - 0.5)
    assert logits.std(dim=0).min() > 0.01 and logits.std(dim=1).min() > 0.1


def test_the_pretend_device_computes_right(cuda):
    device = torch.device("cuda")
    checks = gpu_numbers.attention_errors(device, SMALL) + gpu_numbers.zoomvit_errors(device, SMALL)
    assert all(check.ok for check in checks), checks
    assert {"packed flash attention in bfloat16", "packed flash attention in bfloat16, backward"} <= {
        check.name for check in checks
    }
    assert cuda.ops["_flash_attention_forward"] and cuda.ops["_flash_attention_backward"]


def rounded_to_tf32(x):
    return ((x.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


@pytest.mark.parametrize("kind", ["matrix product", "convolution"])
def test_products_in_tf32_are_noticed(monkeypatch, kind):
    name = {"matrix product": "matmul", "convolution": "conv2d"}[kind]
    true = getattr(torch, name)

    def rounding(a, b):
        return true(rounded_to_tf32(a), rounded_to_tf32(b)) if a.dtype == torch.float32 else true(a, b)

    monkeypatch.setattr(torch, name, rounding)
    assert [check.name for check in gpu_numbers.float32_errors(CPU) if not check.ok] == [f"{kind} in float32"]


def test_maps_of_wrong_values_are_noticed(monkeypatch):
    true = gpu_numbers.Explainer.maps_of

    def wrong(explainer, pixels, targets):
        maps = true(explainer, pixels, targets)
        return maps[::-1] if explainer.config.precision == "float64+float32" else maps

    monkeypatch.setattr(gpu_numbers.Explainer, "maps_of", wrong)
    bad = {each.precision for each in gpu_numbers.agreement(CPU, replace(SMALL, depth=1)) if not each.ok}
    assert bad == {"float64+float32"}


def test_what_is_not_finite_is_an_error():
    nan, one = torch.tensor([1.0, torch.nan]), torch.ones(2)
    assert gpu_numbers.relative_error(nan, one) is None and gpu_numbers.relative_error(one, one) == 0
    assert not Check(name="x", value=None, limit=1).ok and not Check(name="x", value=2, limit=1).ok


def test_the_host_waits_as_little_as_the_examination_allows(cuda, tmp_path):
    device = torch.device("cuda")
    batch = gpu_numbers.attribution_batch(device, SMALL)
    step = gpu_numbers.training_step(device, SMALL, tmp_path)
    for run in (batch, step):
        run(), run()
        cuda.reset()
        run()
        (wait,) = cuda.syncs.elements()
        # For an event, which `count_waits` leaves out; a batch may wait for its stream.
        assert wait.startswith("event at " if run is step else ("event at ", "stream at "))


# --------------------------------------------------------------------------------------------------------------- rates


def test_rates_of_a_cpu():
    rates = gpu_rates.rates(CPU, BRIEF)
    assert rates.matmul_tflops.keys() == gpu_rates.PRODUCTS.keys() - {"tf32"}
    assert rates.copy_gb_per_s.keys() == {"pageable", "device"}
    assert rates.decode_images_per_s.keys() == {"one_core", "all_cores"}
    assert list(rates.maps) == precisions_of("transformer-attribution", "cpu") and len(rates.training) == 1
    for rate in (*rates.maps.values(), *rates.training.values()):
        assert rate.images_per_s > 0 and 1 <= rate.batch_size <= 4 and rate.image_bytes is None
    assert all(value > 0 for value in (*rates.matmul_tflops.values(), *rates.decode_images_per_s.values()))


@pytest.fixture
def memory(monkeypatch):
    """The pretend device says that every batch of four takes 4,000 bytes."""
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device=None: 96)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device=None: 4096)


def test_rates_of_the_pretend_device(cuda, memory):
    rates = gpu_rates.rates(torch.device("cuda:0"), BRIEF)
    assert rates.matmul_tflops.keys() == gpu_rates.PRODUCTS.keys()
    assert rates.copy_gb_per_s.keys() == {"pageable", "pinned", "device"}
    assert list(rates.maps) == precisions_of("transformer-attribution", "cuda") and "float32+tf32" in rates.maps
    for rate in rates.maps.values():
        assert rate.images_per_s > 0 and rate.batch_size * rate.image_bytes == 4000


def test_the_pretend_device_trains_in_each_precision(cuda, memory):
    for precision in gpu_rates.LOW:
        rate = gpu_rates.training_rate(precision, torch.device("cuda"), BRIEF)
        assert rate.images_per_s > 0 and rate.batch_size == 4 and rate.image_bytes == 1000


def test_memory_of_the_pretend_device_is_short_and_given_back(cuda, memory, monkeypatch):
    """The limit is half of the batch's bytes beyond what is reserved, and is lifted afterwards."""
    fractions = [1.0]
    total = SimpleNamespace(total_memory=10_000)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: total)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 1000)
    monkeypatch.setattr(
        torch.cuda, "set_per_process_memory_fraction", lambda fraction, device: fractions.append(fraction)
    )
    true = gpu_shortage.Explainer.maps_of

    def halve(explainer, pixels, targets):
        if fractions[-1] < 1:
            explainer.notes.append("halved")
            explainer._batch.failed(4)
        return true(explainer, pixels, targets)

    monkeypatch.setattr(gpu_shortage.Explainer, "maps_of", halve)
    found = gpu_shortage.provoke_shortage(torch.device("cuda"), replace(SMALL, images=2, depth=1))
    assert fractions == [1.0, pytest.approx((1000 + 2000) / 10_000), 1.0]
    assert (
        found == Shortage(notes=("halved",), lowered=True, agreement=1.0, kept_bytes=0, taken_bytes=4000) and found.ok
    )


def test_a_training_batch_that_does_not_fit_is_halved(monkeypatch):
    true = gpu_rates._training_rate

    def tight(precision, device, config, count):
        if count > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return true(precision, device, config, count)

    monkeypatch.setattr(gpu_rates, "_training_rate", tight)
    assert gpu_rates.training_rate("float32", CPU, BRIEF).batch_size == 1


@pytest.mark.parametrize(
    ("float32", "bfloat16", "float16", "chosen"),
    [(50, 650, 650, "bf16"), (8, 4, 65, "fp16"), (1, 1.2, 0.6, "float32")],
)
def test_training_takes_half_precision_where_it_is_fast(float32, bfloat16, float16, chosen):
    rates = {"float32": float32, "bfloat16": bfloat16, "float16": float16}
    assert gpu_rates.training_precision(rates) == chosen


def test_a_photo_has_the_bytes_of_a_photo():
    assert 40_000 < len(gpu_rates.made_up_photo(500, 375)) < 120_000


# ----------------------------------------------------------------------------------------------------------- processes


def test_a_shortage_is_provoked_and_survived():
    settings = NumbersConfig(images=4, side=112, depth=2, width=96)
    answer = ask(Part(name="shortage", device="cpu", answer=Shortage, settings=settings), 300)
    assert answer.problem == "" and answer.value.ok
    assert answer.value.notes[0] == "a batch of 16 did not fit the memory of cpu: lowered to 8"


def test_processes_sum_over_their_devices(tmp_path):
    settings = [SumConfig(rank=rank, count=2, meeting=str(tmp_path / "meeting"), size=4096) for rank in (0, 1)]
    answers = ask_together([Part(name="sum", device="cpu", answer=Sum, settings=each) for each in settings], 300)
    assert all(each.value.right and each.value.gb_per_s > 0 for each in answers), answers


@pytest.mark.parametrize(
    ("script", "problem"),
    [
        ("kill -9 $$", "its process was ended by SIGKILL"),
        ("exec sleep 60", "no answer within 0.5 s"),
        ("echo hello", "its answer can't be read"),
        ("exit 3", "exit code 3"),
        ("echo a text >&2; echo CUDA error: unknown >&2; exit 1", "CUDA error: unknown"),
        ("echo torch.AcceleratorError: CUDA error: x >&2; echo Compile with DSA >&2; exit 1", "torch.AcceleratorError"),
        ("echo a text of a library; echo true", ""),
    ],
)
def test_what_becomes_of_a_child_is_told(monkeypatch, tmp_path, script, problem):
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\n{script}\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    answer = ask(Part(name="alive", device="cpu", answer=bool), 0.5 if "sleep" in script else 60)
    assert answer.problem.startswith(problem) and bool(answer.problem) == bool(problem)
    assert answer.value is (None if problem else True)


def test_a_failed_assertion_is_recognised(monkeypatch):
    def asserted(*_):
        raise torch.AcceleratorError("CUDA error: device-side assert triggered\nmore")

    here = poison(CPU)
    assert here.ok and here.usable and here.fault is None and "out of bounds" in here.message
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "item", asserted)
        patch.setattr(torch.Tensor, "__getitem__", lambda table, index: table)
        found = poison(CPU)
    assert (
        found == Poisoned(message="CUDA error: device-side assert triggered", fault="assert", usable=False) and found.ok
    )
    assert not replace(found, fault=None).ok and is_alive(CPU)


# -------------------------------------------------------------------------------------------------------------- report


@pytest.fixture
def report(numbers):
    """What an H200 might say."""
    chip = gpu_report.chip_of("cpu", 1)
    waits = (Check(name="waits in a training step", value=0, limit=0),)
    return GpuReport(
        zpipe="0.1.0",
        date="2026-12-01T00:00:00+00:00",
        chip=replace(chip, name="NVIDIA H200", memory_bytes=139 * GIB, capability="9.0", cores=16),
        numbers=replace(numbers, agreement=tuple(AGREEMENT), waits=waits),
        shortage=Shortage(
            notes=("a batch of 64 did not fit",), lowered=True, agreement=1.0, kept_bytes=0, taken_bytes=1 << 30
        ),
        poisoned=Poisoned(message="CUDA error: device-side assert triggered", fault="assert", usable=False),
        alive_afterwards=True,
        sums=(),
        rates=H200,
        advice=tuple(advise(Machine(gpus=1, cores=16, memory_bytes=139 * GIB), H200, AGREEMENT)),
        problems={},
    )


def test_findings_of_a_sound_gpu(report):
    findings = {finding.name: finding for finding in findings_of(report)}
    assert all(finding.ok for finding in findings.values())
    assert findings["all-reduce"].value == "one GPU: nothing to reduce"
    assert "float64+bfloat16 0.99970" in findings["maps: transformer-attribution"].value
    assert "bfloat16 650" in findings["matrix products"].value


CHANGES = {
    "maps: legrad": {"agreement": (Agreement(method="legrad", precision="bfloat16", median=0.9, worst=0.5),)},
    "matrix product in float32": {"errors": (Check(name="matrix product in float32", value=3e-4, limit=3e-6),)},
    "ZoomViT": {"errors": (Check(name="ZoomViT", value=None, limit=1e-4),)},
    "waits in a training step": {"waits": (Check(name="waits in a training step", value=2, limit=0),)},
}


@pytest.mark.parametrize("name", CHANGES)
def test_wrong_numbers_are_problems_with_a_remedy(report, name):
    changed = replace(report, numbers=replace(report.numbers, **CHANGES[name]))
    (bad,) = [finding for finding in findings_of(changed) if not finding.ok]
    assert bad.name == name and ("report it" in bad.value or "do not compute with it" in bad.value)


@pytest.mark.parametrize(
    ("changes", "name", "said"),
    [
        (
            {
                "shortage": Shortage(
                    notes=("kernels can't be fused",), lowered=False, agreement=1.0, kept_bytes=0, taken_bytes=1 << 30
                )
            },
            "memory shortage",
            "was not short",
        ),
        (
            {"shortage": Shortage(notes=("x",), lowered=True, agreement=1.0, kept_bytes=1 << 30, taken_bytes=1 << 30)},
            "memory shortage",
            "report it",
        ),
        ({"poisoned": Poisoned(message="odd", fault=None, usable=False)}, "poisoned process", "not recognised"),
        ({"alive_afterwards": False}, "a new process afterwards", "nvidia-smi"),
        (
            {"rates": None, "problems": {"rates": "no answer within 150 s"}},
            "rates",
            "no answer within 150 s; run again when nothing else runs here",
        ),
        ({"numbers": None, "problems": {"numbers": "x"}}, "numbers", "do not compute with it"),
    ],
)
def test_faults_are_problems_with_a_remedy(report, changes, name, said):
    (bad,) = [finding for finding in findings_of(replace(report, **changes)) if not finding.ok]
    assert bad.name == name and said in bad.value


@pytest.mark.parametrize(
    ("sums", "ok"),
    [((True, True), True), ((True, False), False), ((True,), False)],
)
def test_sums_of_all_gpus_are_needed(report, sums, ok):
    several = replace(report, chip=replace(report.chip, count=2), sums=tuple(Sum(right=x, gb_per_s=90) for x in sums))
    (found,) = [finding for finding in findings_of(several) if finding.name == "all-reduce"]
    assert found.ok == ok and "90.0 GB/s" in found.value


def test_the_examination_runs_every_part(monkeypatch, tmp_path):
    """The parts run in this process here; the tests above start real ones."""

    def here(parts, limit_s):
        if parts[0].name == "sum":
            return [gpu_children.Answer(value=Sum(right=True, gb_per_s=1.0)) for _ in parts]
        if parts[0].name == "shortage":
            return [gpu_children.Answer(value=None, problem="no answer within 60 s")]
        (part,) = parts
        answer = gpu_children.compute(part.name, torch.device(part.device), msgspec.json.encode(part.settings).decode())
        return [gpu_children.Answer(value=msgspec.json.decode(msgspec.json.encode(answer), type=part.answer))]

    monkeypatch.setattr(gpu_report, "ask_together", here)
    shown = []
    config = ExaminationConfig(numbers=replace(SMALL, depth=1, images=4), rates=BRIEF)
    report = examine_gpu("cpu", 2, config, lambda stage, done, total, **facts: shown.append((done, total)))
    assert shown == [(number, 6) for number in range(1, 7)]
    assert report.problems == {"shortage": "no answer within 60 s"} and len(report.sums) == 2 and report.advice
    gpu_report.write_report(tmp_path / "report.json", report)
    assert gpu_report.FORMAT.read(tmp_path / "report.json") == report
    assert [line.split()[1] for line in gpu_report.commands_of(report)] == ["extract-teacher-maps", "train-vit"]


# -------------------------------------------------------------------------------------------------------- command line


def test_without_a_gpu_it_says_so(cli, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    done = cli("doctor", "--gpu", "--json", tmp_path / "report.json")
    assert done.code == 1 and done.stdout == "" and done.details == []
    assert done.error.startswith("error: doctor --gpu: no GPU that torch can use: cpu (build: ")
    assert not list(tmp_path.iterdir())


def test_with_a_gpu_it_prints_flags_and_writes_what_it_measured(cli, tmp_path, monkeypatch, report, cuda):
    found = [report, replace(report, alive_afterwards=False)]
    monkeypatch.setattr(gpu_report, "examine_gpu", lambda *args, **options: found.pop(0))
    monkeypatch.chdir(tmp_path)
    done = cli("doctor", "--gpu")
    assert done.code == 0, done.stderr
    assert "zpipe extract-teacher-maps SHARDS --out STORE --device cuda --precision float64+bfloat16" in done.stdout
    assert "all measurements: zpipe-doctor-gpu.json" in done.stdout and "PROBLEM" not in done.stdout
    assert gpu_report.FORMAT.read(tmp_path / "zpipe-doctor-gpu.json") == report
    done = cli("doctor", "--gpu", "--json", "other.json")
    assert done.code == 1 and done.error == "error: 1 problems" and (tmp_path / "other.json").is_file()
    assert done.details[0].startswith("a new process afterwards: can't compute")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--json", "x.json"], "doctor --json x.json: is for --gpu"),
        (["--gpu", "folder"], "doctor --gpu folder: checks no folder"),
        (["--gpu", "--json", "x.txt"], "x.txt: the file that is written ends in .json"),
    ],
)
def test_wrong_usage_is_refused(cli, words, said):
    done = cli("doctor", *words)
    assert done.code == 2 and said in done.error
