import copy
import io

import pytest
import timm
import torch
import torch.nn.functional as F
from pretend_cuda import OnDevice, host, pretend_cuda
from timm.utils import ModelEmaV3

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 5}


def on_device(*shape):
    return OnDevice(torch.randn(*shape))


def kinds(cuda):
    """What the host waited for, without the places."""
    return sorted(line.partition(" at ")[0] for line in cuda.syncs.elements())


MIXED = {
    "add": lambda x: x + torch.ones(3),
    "mm": lambda x: x @ torch.ones(3, 2),
    "cat": lambda x: torch.cat([x, torch.ones(1, 3)]),
    "stack": lambda x: torch.stack([x.sum(), torch.ones(())]),
    "gather": lambda x: x.gather(0, torch.zeros(1, 3, dtype=torch.int64)),
    "add_": lambda x: torch.ones(2, 3).add_(x),
    "embedding": lambda x: F.embedding(torch.zeros(2, dtype=torch.int64), x),
}


@pytest.mark.parametrize("operation", MIXED)
def test_an_operation_on_two_devices_is_an_error_that_names_it(cuda, operation):
    with pytest.raises(
        RuntimeError, match=rf"aten\.{operation}\.\w+ at tests/test_pretend_cuda\.py:\d+: tensors on cpu"
    ):
        MIXED[operation](on_device(2, 3))


def test_numbers_of_the_cpu_are_taken_where_cuda_takes_them(cuda):
    x, number = on_device(2, 3), torch.tensor(2.0)
    for result in (
        x + number,
        number * x,
        x.masked_fill(x > 0, number),
        x.clamp(number),
        torch.where(x > 0, x, number),
    ):
        assert isinstance(result, OnDevice)
    assert not cuda.syncs


def test_what_else_cuda_refuses(cuda):
    with pytest.raises(TypeError, match="numpy"):
        on_device(2).numpy()
    with pytest.raises(RuntimeError, match="a generator of the CPU"):
        torch.rand(2, device="cuda", generator=torch.Generator())
    assert torch.rand(2, device="cuda", generator=torch.Generator("cuda")).is_cuda


SYNCS = {
    "item": lambda x: x.sum().item(),
    "float": lambda x: float(x.sum()),
    "bool": lambda x: bool(x.isnan().any()),
    "if": lambda x: 1 if x.sum() > 0 else 0,
    "index by a number": lambda x: torch.arange(6)[x.argmax()],
}
OTHER_SYNCS = {
    "tolist": lambda x: x.tolist(),
    "copy to the host": lambda x: x.cpu(),
    "copy from pageable memory": lambda x: torch.ones(3).to("cuda", non_blocking=True),
    "copy from pinned memory": lambda x: torch.ones(3).pin_memory().to("cuda"),
    "nonzero": lambda x: x.nonzero(),
    "masked_select": lambda x: x.masked_select(x > 0),
    "index by a mask": lambda x: x[x > 0],
    "index_put_ by a mask": lambda x: x.index_put_((x > 0,), x[0, :1]),
    "_unique2": lambda x: x.unique(),
    "equal": lambda x: torch.equal(x, x),
    "repeat_interleave without output_size": lambda x: torch.repeat_interleave(torch.ones(2, device="cuda").long()),
    "tensor made of values of the host": lambda x: torch.tensor([1.0], device="cuda"),
    "stream": lambda x: torch.cuda.current_stream().synchronize(),
    "event": lambda x: torch.cuda.current_stream().record_event().synchronize(),
    "device": lambda x: torch.cuda.synchronize(),
}


@pytest.mark.parametrize("how", SYNCS)
def test_reading_a_value_is_a_sync(cuda, how):
    SYNCS[how](on_device(2, 3))
    assert kinds(cuda) == ["item"]


@pytest.mark.parametrize("what", OTHER_SYNCS)
def test_each_kind_of_sync_is_counted(cuda, what):
    OTHER_SYNCS[what](on_device(2, 3))
    assert kinds(cuda) == [what]
    assert all(" at tests/test_pretend_cuda.py:" in line for line in cuda.syncs)


def test_new_tensor_and_indices_of_the_cpu_are_syncs(cuda):
    x = on_device(2, 3)
    assert host(x.new_tensor([1, 2])).tolist() == [1.0, 2.0]
    assert x.new_tensor([1, 2], dtype=torch.int64).dtype == torch.int64
    x[torch.tensor([0, 1])]
    assert kinds(cuda) == ["index by indices on the CPU", *2 * ["tensor made of values of the host"]]


def test_what_makes_nobody_wait(cuda):
    x = torch.randn(2, 3).pin_memory()[:1].to("cuda", non_blocking=True)  # a view of pinned memory is pinned
    torch.empty(2, pin_memory=True).to("cuda", non_blocking=True)
    x[x > 0] = 0.5
    x[torch.zeros(2, dtype=torch.int64, device="cuda")]
    F.one_hot(torch.arange(3, device="cuda"), 4)
    torch.repeat_interleave(x.argmax(dim=1), torch.ones(1, dtype=torch.int64, device="cuda"), output_size=1)
    torch.full((2,), 0.5, device="cuda")
    x.new_zeros(2)
    torch.linspace(0, 1, 3, device=x.device)
    assert not cuda.syncs


def test_a_copy_that_nobody_waited_for_holds_no_values_yet(cuda):
    x = on_device(3)
    floats, whole = x.to("cpu", non_blocking=True), x.long().to("cpu", non_blocking=True)
    buffer = torch.empty(3).pin_memory()
    buffer.copy_(x, non_blocking=True)
    event = torch.cuda.Event()
    event.record()
    later = x.to("cpu", non_blocking=True)
    assert floats.isnan().all() and buffer.isnan().all() and (whole == torch.iinfo(torch.int64).max).all()
    assert floats.is_pinned() and not cuda.syncs
    event.synchronize()
    assert torch.equal(floats, host(x)) and torch.equal(buffer, host(x)) and torch.equal(whole, host(x).long())
    assert later.isnan().all()
    x.sum().item()
    assert torch.equal(later, host(x))
    assert kinds(cuda) == ["event", "item"]


def test_kernels_and_bytes(cuda):
    x, w = on_device(2, 3), on_device(3, 4)
    x.t().expand(3, 2).unflatten(0, (1, 3))[..., 0].detach()
    torch.empty_like(x)
    assert (cuda.kernels, cuda.bytes) == (0, 0)  # views
    x + x[0]
    assert (cuda.kernels, cuda.bytes) == (1, 4 * (6 + 3 + 6))
    x @ w
    x.mul_(2)
    assert dict(cuda.ops) == {"add": 1, "mm": 1, "mul_": 1}
    cuda.reset()
    assert cuda.kernels == cuda.bytes == 0


@pytest.mark.parametrize("options", [{}, {"foreach": False}, {"fused": True}], ids=str)
def test_a_training_step_equals_that_on_the_cpu(cuda, options):
    def train(model, images, labels):
        optimizer = torch.optim.AdamW(model.parameters(), **options)
        average = ModelEmaV3(model, decay=0.9)
        for _ in range(2):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(images), labels)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            average.update(model)
        return loss, [p.grad for p in model.parameters()], model.state_dict(), average.module.state_dict()

    images, labels = torch.randn(4, 3, 32, 32, dtype=torch.float64), torch.arange(4)
    model = timm.create_model("deit_tiny_patch16_224", **TINY).double()
    there = copy.deepcopy(model).to("cuda")
    assert all(parameter.device == torch.device("cuda:0") for parameter in there.parameters())
    here, images_there, labels_there = train(model, images, labels), images.to("cuda"), labels.to("cuda")
    cuda.reset()
    torch.testing.assert_close(host(train(there, images_there, labels_there)), here)
    assert not cuda.syncs


def test_hooks_of_a_backward_pass_see_the_device(cuda):
    x, made = on_device(3).requires_grad_(), []
    x.register_hook(lambda grad: made.append(torch.ones(3, device=grad.device) + grad))
    x.sum().backward()
    assert host(made[0]).tolist() == [2.0, 2.0, 2.0]


def test_inference_equals_that_on_the_cpu(cuda):
    model, images = timm.create_model("deit_tiny_patch16_224", **TINY).eval(), torch.randn(4, 3, 32, 32)
    here = model(images)
    with torch.inference_mode():
        torch.testing.assert_close(host(model.to("cuda")(images.to("cuda"))), here.detach())


def test_autocast_casts_as_the_lists_for_cuda(cuda):
    x, w, norm = on_device(2, 3), on_device(3, 3), torch.nn.LayerNorm(3).to("cuda")
    labels = torch.zeros(2, dtype=torch.int64, device="cuda")
    image, kernel = on_device(1, 3, 4, 4), on_device(2, 3, 2, 2)
    low, double = torch.bfloat16, OnDevice(torch.ones(2, 3, dtype=torch.float64))
    with torch.autocast("cuda", dtype=low):
        y = x @ w
        q = on_device(1, 2, 4, 8)
        to_low = [y, F.linear(x, w), F.conv2d(image, kernel), torch.einsum("bi,ij->bj", x, w), y + y, y.relu()]
        to_low += [F.scaled_dot_product_attention(q, q, q), F.gelu(y), torch.cat([y, y]), y.mean()]
        to_float = [y.softmax(dim=1), norm(y), y.sum(), y.sum(dim=1), y.square(), y.exp(), y.log_softmax(dim=1), y + x]
        to_float += [F.cross_entropy(y, labels), F.mse_loss(y, y), y.norm(dim=1), y.cumsum(dim=0), torch.cat([y, x])]
        to_float += [torch.addcmul(x, y, y), F.grid_sample(image, on_device(1, 2, 2, 2).to(low), align_corners=False)]
        assert [each.dtype for each in to_low] == len(to_low) * [low]
        assert [each.dtype for each in to_float] == len(to_float) * [torch.float32]
        assert (double @ w.double()).dtype == torch.float64
        with torch.autocast("cuda", enabled=False):
            assert (x @ w).dtype == torch.float32
    assert (x @ w).dtype == torch.float32


def test_under_autocast_gradients_have_the_dtype_of_the_weights(cuda):
    layer, x = torch.nn.Linear(8, 8), torch.randn(4, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = (layer(x) + layer(2 * x)).float().square().sum()
    loss.backward()
    there = copy.deepcopy(layer).to("cuda")
    there.zero_grad()
    x_there = x.to("cuda")
    cuda.reset()
    with torch.autocast("cuda", dtype=torch.bfloat16):
        loss = (there(x_there) + there(2 * x_there)).float().square().sum()
    loss.backward()
    assert cuda.ops["_to_copy"] == 8  # weight and bias are cast once, and their gradients
    for name, parameter in layer.named_parameters():
        assert there.get_parameter(name).grad.dtype == torch.float32
        torch.testing.assert_close(host(there.get_parameter(name).grad), parameter.grad, rtol=0.02, atol=0.02)


def test_modules_and_files(cuda):
    layer = torch.nn.BatchNorm1d(3).to("cuda")
    assert host(layer.half().weight).dtype == torch.float16
    file = io.BytesIO()
    torch.save(layer.float().state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    assert not state["weight"].is_cuda
    layer.load_state_dict(state)
    assert layer.weight.is_cuda and not layer.cpu().weight.is_cuda


def test_afterwards_everything_is_as_before():
    before = (torch.cuda.is_available, torch.Generator, torch.clear_autocast_cache, torch.optim.AdamW.step)
    with pretend_cuda():
        assert torch.cuda.is_available() and torch.cuda.device_count() == 1
        x = on_device(2, 2)
    assert before == (torch.cuda.is_available, torch.Generator, torch.clear_autocast_cache, torch.optim.AdamW.step)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert F.linear(torch.ones(2, 2), torch.ones(2, 2)).dtype == torch.bfloat16
    with pytest.raises(RuntimeError, match="outside"):
        x + x
