"""`zpipe doctor --gpu`: what this machine's GPU computes right and how fast, and the settings that follow."""

from __future__ import annotations

import platform
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TypeVar

import msgspec
import torch

from zpipe.gpu_advice import Advice, Machine, advise
from zpipe.gpu_children import LATE, Part, ask_together
from zpipe.gpu_faults import Poisoned, Sum, SumConfig
from zpipe.gpu_numbers import Numbers, NumbersConfig
from zpipe.gpu_rates import Rate, Rates, RatesConfig, cores
from zpipe.gpu_shortage import Shortage
from zpipe.limits import Finding
from zpipe.schemas.atomic import write_json
from zpipe.schemas.formats import Format
from zpipe.schemas.progress import Progress, silent

T = TypeVar("T")
DRIVER = Path("/proc/driver/nvidia/version")
WRONG = "do not compute with it; try another torch build, driver or GPU"
IDLE, SO = " when nothing else runs here", f", and if it stays so, {WRONG}"


@dataclass(frozen=True, kw_only=True)
class ExaminationConfig:
    """Sizes and time limits of an examination. The defaults take about two minutes on a fast GPU."""

    numbers: NumbersConfig = field(default_factory=NumbersConfig)
    """What is compared with float64."""
    rates: RatesConfig = field(default_factory=RatesConfig)
    """What is timed."""
    sum_bytes: int = 1 << 28
    """Buffer of a sum over several devices."""
    limit_s: float = 400.0
    """Time limit of the comparison and of the rates."""
    fault_limit_s: float = 200.0
    """Time limit of every other part."""


@dataclass(frozen=True, kw_only=True)
class Chip:
    """What was examined."""

    name: str
    """Name of the first device."""
    count: int
    """Number of devices."""
    memory_bytes: int
    """Memory of the first device; 0 for a CPU."""
    capability: str
    """Compute capability, such as 9.0; empty for a CPU."""
    driver: str
    """First line of `DRIVER`, or nothing."""
    torch: str
    """Version of torch."""
    cuda: str
    """CUDA version of torch, or nothing."""
    cores: int
    """CPU cores that the process may use."""


@dataclass(frozen=True, kw_only=True)
class GpuReport:
    """Everything that was measured. What is None was not: `problems` says why."""

    zpipe: str
    """Version of zpipe."""
    date: str
    """When the examination ended, in UTC."""
    chip: Chip
    """What was examined."""
    numbers: Numbers | None
    """Values against float64, and what the host waits for."""
    shortage: Shortage | None
    """A batch that did not fit the memory."""
    poisoned: Poisoned | None
    """A process after a failed assertion of the device."""
    alive_afterwards: bool | None
    """Whether a new process could use the device then."""
    sums: tuple[Sum, ...]
    """The sum over all devices, as each of them saw it; empty for one device."""
    rates: Rates | None
    """How fast the device and the host are."""
    advice: tuple[Advice, ...]
    """Flags for extraction and training; empty without rates and numbers."""
    problems: dict[str, str]
    """Part of the examination -> why it gave no answer."""


FORMAT = Format(
    name="zpipe-doctor-gpu",
    version=1,
    content=GpuReport,
    what="a report of zpipe doctor --gpu",
    remedy="run zpipe doctor --gpu again",
)


class _Examination:
    """The parts that have been run, and what became of them."""

    def __init__(self, total: int, progress: Progress) -> None:
        self.problems: dict[str, str] = {}
        self._total, self._done, self._progress = total, 0, progress

    def value_of(self, part: Part[T], limit_s: float) -> T | None:
        """The answer of a part, or None."""
        return self.values_of([part], limit_s)[0]

    def values_of(self, parts: Sequence[Part[T]], limit_s: float) -> list[T | None]:
        """The answers of parts that run at the same time."""
        answers = ask_together(parts, limit_s)
        for part, each in zip(parts, answers, strict=True):
            if each.problem:
                self.problems[part.name if len(parts) == 1 else f"{part.name} on {part.device}"] = each.problem
        self._done += 1
        self._progress("doctor-gpu", self._done, self._total, part=parts[0].name)
        return [each.value for each in answers]


def examine_gpu(
    kind: str, count: int, config: ExaminationConfig | None = None, progress: Progress = silent
) -> GpuReport:
    """Examine the first device of a kind, and a sum over all of them.

    Args:
        kind: ``cuda``, or ``cpu`` to try the examination itself.
        count: Number of devices.
        config: Sizes and time limits.
        progress: Reports the parts that are done.
    """
    config = config or ExaminationConfig()
    first = f"{kind}:0" if kind == "cuda" else kind
    run = _Examination(6 if count > 1 else 5, progress)
    numbers = run.value_of(Part(name="numbers", device=first, answer=Numbers, settings=config.numbers), config.limit_s)
    short = Part(name="shortage", device=first, answer=Shortage, settings=config.numbers)
    shortage = run.value_of(short, config.fault_limit_s)
    poisoned = run.value_of(Part(name="poison", device=first, answer=Poisoned), config.fault_limit_s)
    alive = run.value_of(Part(name="alive", device=first, answer=bool), config.fault_limit_s)
    rates = run.value_of(Part(name="rates", device=first, answer=Rates, settings=config.rates), config.limit_s)
    sums: list[Sum | None] = []
    if count > 1:
        with tempfile.TemporaryDirectory(prefix="zpipe-doctor-") as folder:
            sums = run.values_of(_sum_parts(kind, count, Path(folder, "meeting"), config), config.fault_limit_s)
    chip = chip_of(kind, count)
    machine = Machine(gpus=count, cores=chip.cores, memory_bytes=chip.memory_bytes)
    return GpuReport(
        zpipe=version("zpipe"),
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        chip=chip,
        numbers=numbers,
        shortage=shortage,
        poisoned=poisoned,
        alive_afterwards=alive,
        sums=tuple(each for each in sums if each is not None),
        rates=rates,
        advice=() if rates is None or numbers is None else tuple(advise(machine, rates, numbers.agreement)),
        problems=run.problems,
    )


def _sum_parts(kind: str, count: int, meeting: Path, config: ExaminationConfig) -> list[Part[Sum]]:
    places = [f"{kind}:{rank}" if kind == "cuda" else kind for rank in range(count)]
    settings = [SumConfig(rank=rank, count=count, meeting=str(meeting), size=config.sum_bytes) for rank in range(count)]
    return [
        Part(name="sum", device=place, answer=Sum, settings=each) for place, each in zip(places, settings, strict=True)
    ]


def chip_of(kind: str, count: int) -> Chip:
    """What torch and the driver say about the first device of a kind."""
    name, memory, capability = platform.processor() or platform.machine(), 0, ""
    if kind == "cuda":
        properties = torch.cuda.get_device_properties(0)
        name, memory, capability = properties.name, properties.total_memory, f"{properties.major}.{properties.minor}"
    return Chip(
        name=name,
        count=count,
        memory_bytes=memory,
        capability=capability,
        driver=DRIVER.read_text().splitlines()[0].strip() if DRIVER.is_file() else "",
        torch=str(torch.__version__),
        cuda=torch.version.cuda or "",
        cores=cores(),
    )


def write_report(path: Path, report: GpuReport) -> None:
    """Write a report as JSON, in one step."""
    write_json(path, FORMAT.header | msgspec.to_builtins(report))


# ------------------------------------------------------------------------------------------------------------ findings


def findings_of(report: GpuReport) -> list[Finding]:
    """The lines of the table, each with a remedy where something is wrong."""
    chip = report.chip
    kind = f"{chip.name} x {chip.count}, {chip.memory_bytes / 2**30:.0f} GiB, compute capability {chip.capability}"
    findings = [Finding(name="device", value=f"{kind}, torch {chip.torch}, CUDA {chip.cuda or 'none'}; {chip.driver}")]
    findings += [
        Finding(name=name, value=f"{problem}; run again{IDLE if LATE in problem else SO}", ok=False)
        for name, problem in report.problems.items()
    ]
    if report.numbers is not None:
        findings += _of_numbers(report.numbers)
    findings += _of_faults(report)
    findings += _of_sums(report)
    if report.rates is not None:
        findings += _of_rates(report.rates)
    return findings + [Finding(name=each.command, value=f"{each.flag}  ({each.reason})") for each in report.advice]


def _of_numbers(numbers: Numbers) -> list[Finding]:
    findings = []
    for method in dict.fromkeys(each.method for each in numbers.agreement):
        mine = [each for each in numbers.agreement if each.method == method]
        value = ", ".join(f"{each.precision} {each.median:.5f}" for each in mine)
        bad = [f"{each.precision} below {each.needed}" for each in mine if not each.ok]
        value += f"; {', '.join(bad)}: do not use --precision with it here, and report it" if bad else ""
        findings.append(Finding(name=f"maps: {method}", value=value, ok=not bad))
    for check in numbers.errors:
        shown = "not finite" if check.value is None else f"error {check.value:.1e}"
        value = f"{shown}, at most {check.limit:.0e}" + ("" if check.ok else f"; {WRONG}")
        findings.append(Finding(name=check.name, value=value, ok=check.ok))
    if not any(check.name.startswith("packed") for check in numbers.errors):
        value = "not on this device, which has no flash kernels for packed sequences: sequences are padded"
        findings.append(Finding(name="packed flash attention", value=value))
    for check in numbers.waits:
        value = f"{check.value:g}, at most {check.limit:g}" + ("" if check.ok else "; slower, but right: report it")
        findings.append(Finding(name=check.name, value=value, ok=check.ok))
    return findings


def _of_faults(report: GpuReport) -> list[Finding]:
    findings = []
    if (shortage := report.shortage) is not None:
        value = "; ".join(shortage.notes) if shortage.lowered else "memory was not short where it should have been"
        value += f"; the maps agree to {shortage.agreement:.4f}, "
        value += f"{shortage.kept_bytes or 0} bytes are still held" + ("" if shortage.ok else "; report it")
        findings.append(Finding(name="memory shortage", value=value, ok=shortage.ok))
    if (poisoned := report.poisoned) is not None:
        known = "recognised as a failed assertion" if poisoned.fault == "assert" else "the process goes on"
        value = f"{poisoned.message}: {known if poisoned.ok else 'not recognised as a failed assertion: report it'}"
        findings.append(Finding(name="poisoned process", value=value, ok=poisoned.ok))
    if report.alive_afterwards is not None:
        alive = report.alive_afterwards
        value = "computes" if alive else "can't compute; look at nvidia-smi and dmesg, and reset the GPU"
        findings.append(Finding(name="a new process afterwards", value=value, ok=alive))
    return findings


def _of_sums(report: GpuReport) -> list[Finding]:
    if report.chip.count == 1:
        return [Finding(name="all-reduce", value="one GPU: nothing to reduce")]
    if not report.sums:  # `problems` says why
        return []
    right = all(each.right for each in report.sums) and len(report.sums) == report.chip.count
    slowest = min(each.gb_per_s for each in report.sums)
    value = f"{len(report.sums)} GPUs, {slowest:.1f} GB/s" + ("" if right else f"; wrong or missing sums: {WRONG}")
    return [Finding(name="all-reduce", value=value, ok=right)]


def _of_rates(rates: Rates) -> list[Finding]:
    def listed(values: Mapping[str, float], unit: str) -> str:
        return ", ".join(f"{name} {value:.3g}" for name, value in values.items()) + f" {unit}"

    def speeds(values: Mapping[str, Rate]) -> dict[str, float]:
        return {f"{name} (batch {each.batch_size})": each.images_per_s for name, each in values.items()}

    return [
        Finding(name="matrix products", value=listed(rates.matmul_tflops, "TFLOP/s")),
        Finding(name="copies", value=listed(rates.copy_gb_per_s, "GB/s")),
        Finding(name="decoding", value=listed(rates.decode_images_per_s, "images/s")),
        Finding(name="maps", value=listed(speeds(rates.maps), "images/s")),
        Finding(name="training", value=listed(speeds(rates.training), "images/s")),
    ]


def commands_of(report: GpuReport) -> list[str]:
    """The command lines with the advised flags."""
    arguments = {"extract-teacher-maps": "SHARDS --out STORE", "train-vit": "SHARDS --out RUN"}
    return [
        f"zpipe {command} {where} {' '.join(each.flag for each in report.advice if each.command == command)}"
        for command, where in arguments.items()
        if report.advice
    ]
