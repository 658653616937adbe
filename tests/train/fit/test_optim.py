"""Optimizers: arguments that fail in the first step, a state that is not theirs, a warm-up that would not end."""

import copy

import pytest
import timm
import torch
from torch import nn

from zpipe.schemas.errors import UsageError, ZpipeError
from zpipe.train.fit.config import TrainConfig
from zpipe.train.fit.optim import make_optimizer, make_scheduler, restore_optimizer, update_weights


def model() -> nn.Module:
    return timm.create_model("deit_tiny_patch16_224", img_size=32, depth=1, num_classes=3)


def stepped(config: TrainConfig) -> dict:
    """The state of an optimizer after a step."""
    network = model()
    optimizer = make_optimizer(network, config)
    for weight in network.parameters():
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    return copy.deepcopy(optimizer.state_dict())


@pytest.mark.parametrize(
    ("opt", "arguments"),
    [
        ("adamw", {"betas": [0.9]}),
        ("adamw", {"eps": "small"}),
        ("adamw", {"lr": 1}),
        ("sgd", {"momentum": None}),
        ("adahessian", {}),  # needs gradients of gradients
        ("adamw", {"betas": {}}),
    ],
)
def test_arguments_that_fail_in_a_step_fail_before_it(opt, arguments):
    with pytest.raises(UsageError, match=f"^optimizer {opt}: .*check train.opt, train.opt_args") as error:
        make_optimizer(model(), TrainConfig(opt=opt, opt_args=arguments))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("opt", ["adamw", "sgd", "muon", "lamb", "adafactor", "lion"])
def test_its_own_state_is_taken(opt):
    config = TrainConfig(opt=opt, layer_decay=0.7)
    state = stepped(config)
    network = model()
    optimizer = make_optimizer(network, config)
    restore_optimizer(optimizer, state)
    for weight in network.parameters():
        weight.grad = torch.ones_like(weight)
    update_weights(network, optimizer, None, config)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda s: s["param_groups"][0].update(weight_decay=3.0), "weight_decay = 3.0, this run has"),
        (lambda s: s["param_groups"][0].update(maximize=True), "maximize = True, this run has False"),
        (lambda s: s["param_groups"].pop(), "parameter group"),
        (lambda s: s["state"][0].update(exp_avg=torch.ones(7)), "exp_avg of its optimizer is"),
        (lambda s: s["state"][0].update(exp_avg=-5), "numbers where it holds tensors"),
        (lambda s: s["state"][0].update(step=torch.tensor(-3.0)), "its optimizer is in step -3"),
        (lambda s: s["state"][3].pop("exp_avg"), "something else for one weight than for another"),
    ],
)
def test_a_state_that_is_not_its_own_is_refused(change, told):
    state = stepped(TrainConfig())
    change(state)
    with pytest.raises(ValueError, match=told):
        restore_optimizer(make_optimizer(model(), TrainConfig()), state)


def test_a_state_without_a_part_of_all_weights_is_one_line():
    state, network = stepped(TrainConfig()), model()
    for held in state["state"].values():
        del held["exp_avg_sq"]
    optimizer = make_optimizer(network, TrainConfig())
    restore_optimizer(optimizer, state)
    for weight in network.parameters():
        weight.grad = torch.ones_like(weight)
    with pytest.raises(ZpipeError, match="the state of the optimizer, from the checkpoint, has no 'exp_avg_sq'"):
        update_weights(network, optimizer, None, TrainConfig())


@pytest.mark.parametrize(("epochs", "warmup", "peak"), [(1.0, 5.0, 5), (4.0, 1.0, 20), (100.0, 5.0, 100)])
def test_a_warmup_takes_a_quarter_of_the_training_at_most(epochs, warmup, peak):
    config = TrainConfig(lr=1.0, epochs=epochs, warmup_epochs=warmup)
    optimizer = make_optimizer(nn.Linear(2, 2), config)
    scheduler = make_scheduler(optimizer, config, total_steps=int(20 * epochs), steps_per_epoch=20)
    rates = []
    for step in range(int(20 * epochs)):
        scheduler.step(step)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates.index(max(rates)) == pytest.approx(peak, abs=1) and rates[-1] < 0.1
