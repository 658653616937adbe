"""The flags that follow from what was measured."""

from dataclasses import replace

import pytest
import typer
from made_up_gpus import AGREEMENT, GIB, H200, RTX_4090, T4

from zpipe import cli
from zpipe.gpu_advice import Machine, advise, choose_precision


@pytest.mark.parametrize(
    ("rates", "machine", "extraction", "training"),
    [
        (
            H200,
            Machine(gpus=1, cores=16, memory_bytes=139 * GIB),
            "--device cuda --precision float64+bfloat16 --batch-size 64 --actors 1 --threads 2",
            "--device cuda --set train.precision=bf16 --batch-size 256 --data-workers 14 --num-workers 1",
        ),
        (
            RTX_4090,
            Machine(gpus=2, cores=16, memory_bytes=24 * GIB),
            "--device cuda --precision float32+bfloat16 --batch-size 64 --actors 2 --threads 2",
            "--device cuda --set train.precision=bf16 --batch-size 512 --data-workers 6 --num-workers 2",
        ),
        (
            T4,
            Machine(gpus=1, cores=4, memory_bytes=15 * GIB),
            "--device cuda --precision float32 --batch-size 32 --actors 1 --threads 1",
            "--device cuda --set train.precision=fp16 --batch-size 128 --data-workers 2 --num-workers 1",
        ),
    ],
    ids=["H200", "two RTX 4090", "T4"],
)
def test_recommended_flags(rates, machine, extraction, training):
    advice = advise(machine, rates, AGREEMENT)
    for command, flags in (("extract-teacher-maps", extraction), ("train-vit", training)):
        assert " ".join(each.flag for each in advice if each.command == command) == flags
    assert all(each.reason for each in advice)


def test_too_few_cores_are_a_warning_with_their_number():
    warned = {
        cores: [
            each.reason
            for each in advise(Machine(gpus=1, cores=cores, memory_bytes=139 * GIB), H200, AGREEMENT)
            if "WARNING" in each.reason
        ]
        for cores in (16, 2)
    }
    # 9,000 images/s on 16 cores, and on 2: what a core decodes decides, not the number in the rates.
    assert len(warned[16]) == 0 and len(warned[2]) == 1
    slow = replace(H200, decode_images_per_s={"one_core": 100, "all_cores": 200})
    extraction, training = [
        each.reason
        for each in advise(Machine(gpus=1, cores=2, memory_bytes=139 * GIB), slow, AGREEMENT)
        if "WARNING" in each.reason
    ]
    assert "2 cores decode 200 images/s, and 820 maps/s need 10 cores for each GPU" in extraction
    assert "needs 79" in training


def test_a_precision_that_disagrees_is_not_recommended():
    bad = [replace(each, median=0.9 if each.precision == "float64+bfloat16" else 0.9997) for each in AGREEMENT]
    assert choose_precision(H200, bad) == "float32+bfloat16"
    assert choose_precision(H200, [replace(each, median=0.9) for each in AGREEMENT]) == "float32"
    assert choose_precision(H200, []) == "float32"


def test_recommended_flags_are_flags_of_the_commands():
    commands = typer.main.get_command(cli.app).commands
    for each in advise(Machine(gpus=1, cores=8, memory_bytes=24 * GIB), H200, AGREEMENT):
        option, _, value = each.flag.partition(" ")
        known = [parameter for parameter in commands[each.command].params if option in parameter.opts]
        assert known and value, each.flag
