"""A pretend CUDA device: tensors that hold values on the CPU and report `cuda:0`.

It shows on any machine what a program would do to a GPU. Inside `pretend_cuda()`, an operation on tensors of two
devices is an error; everything that makes the host wait for the device is counted, with its place in our code, and so
are kernels and the bytes that they read and write; `torch.autocast("cuda")` casts as the lists of PyTorch say. Values
are those of the CPU's kernels, so results equal those on the CPU.

A copy from the device that doesn't wait (`non_blocking`) delivers its values at the next synchronisation of an event or
a stream: before it, the copy holds NaN, or the largest integer. Attention is counted as its products and its softmax.
Only the thread that opens the context sees the device. What CUDA computes in another way (TF32, the order of sums) is
not imitated.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from flash_on_cpu import flash_on_cpu
from pretend_autocast import AUTOCAST, autocast_lists
from pretend_pinned import is_pinned, of_array, pin
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

CUDA = torch.device("cuda", 0)
INNER = torch.device("meta", 1)  # what C++ sees: autograd would ask the driver for the streams of a CUDA device
ROOT = Path(__file__).parents[1]
# Their kernels return as many elements as the values say, so the host reads that number.
SIZED_BY_VALUES = ("nonzero", "masked_select", "_unique", "_unique2", "unique_dim", "unique_consecutive", "bincount")
# Take numbers in CPU tensors of no dimension, beside those that torch tags as pointwise.
TAKE_NUMBERS = ("fill_", "masked_fill", "masked_fill_", "index_put", "index_put_", "_index_put_impl_", "where", "lerp")


# Kernels that only CUDA has. Products of bfloat16 are exact in float32, which sums them.
CUDA_ONLY: dict[str, Callable[..., Any]] = {
    "aten::mm.dtype": lambda a, b, dtype: a.to(dtype) @ b.to(dtype),
    "aten::bmm.dtype": lambda a, b, dtype: a.to(dtype) @ b.to(dtype),
}


class OnDevice(torch.Tensor):
    """A tensor on the pretend device; `inner` holds its values on the CPU."""

    inner: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> OnDevice:
        self = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=INNER,
            _extra_dispatch_keys=AUTOCAST,
        )
        self.inner = inner
        return self

    device = property(lambda self: CUDA)
    is_cuda = property(lambda self: True)
    is_meta = property(lambda self: False)

    def __repr__(self, **kwargs: Any) -> str:
        return f"OnDevice({list(self.shape)}, {self.dtype})"

    def __deepcopy__(self, memo: dict[int, Any]) -> OnDevice:
        copy = OnDevice(self.inner.clone()).requires_grad_(self.requires_grad)
        copy.__dict__ |= {name: value for name, value in self.__dict__.items() if name != "inner"}
        return memo.setdefault(id(self), copy)

    def __reduce_ex__(self, protocol: Any) -> Any:  # a file holds the values, as those of a tensor on a GPU
        return self.detach().cpu().__reduce_ex__(protocol)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(f"{func}: a tensor of the pretend device is used outside of pretend_cuda()")


def host(values: Any) -> Any:
    """Tensors of the pretend device, in any structure, as CPU tensors that share their values; counts nothing."""
    return tree_map(_inner, values)


def _inner(x: Any) -> Any:
    return x.inner if isinstance(x, OnDevice) else x


def _map(function: Callable[[Any], Any], values: Any) -> Any:
    """As `tree_map`, but fast, for what operations take and return: lists, tuples and dictionaries."""
    if isinstance(values, (list, tuple)):
        return type(values)([_map(function, x) for x in values])
    return {k: _map(function, x) for k, x in values.items()} if isinstance(values, dict) else function(values)


def _tensors(values: Any) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    _map(lambda x: found.append(x) if isinstance(x, torch.Tensor) else None, values)
    return found


class PretendCuda(TorchDispatchMode):
    """The device, and what has happened to it since it was made or since `reset`."""

    def __init__(self) -> None:
        super().__init__()
        self._copies: list[Callable[[], Any]] = []  # from the device, not delivered yet
        self.reset()

    def reset(self) -> None:
        """Count from zero."""
        self.syncs: Counter[str] = Counter()
        """How often the host waited, by "what at file:line"."""
        self.ops: Counter[str] = Counter()
        """Kernels by the name of their operation."""
        self.bytes = 0
        """Bytes that the kernels read and wrote."""

    @property
    def kernels(self) -> int:
        """The number of kernels."""
        return self.ops.total()

    def sync(self, what: str, copies: int | None = None) -> None:
        """Let the host wait for the device: for everything, or for the first `copies` copies to the host."""
        self.syncs[f"{what} at {place()}"] += 1
        self.deliver(copies)

    def deliver(self, copies: int | None = None) -> None:
        """Deliver the first `copies` of the copies to the host that don't wait, or all."""
        arrived, self._copies = self._copies[:copies], self._copies[len(self._copies[:copies]) :]
        for copy in arrived:
            copy()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = _tensors((args, kwargs))
        from_device = any(isinstance(x, OnDevice) for x in tensors)
        device = kwargs.get("device")
        to_device = from_device if device is None else device in (INNER, CUDA)  # CUDA: from a hook of a backward pass
        if not from_device and not to_device:
            return func(*args, **kwargs)
        if _decomposes(func):  # under inference mode such operations arrive whole
            with self:
                return func.decompose(*args, **kwargs)
        name = func._schema.name.removeprefix("aten::")
        if name in ("_to_copy", "copy_"):
            return self._copy(func, args, kwargs, to_device)
        self._check(func, name, tensors, args)
        self._count_sync(name, args, kwargs)
        if device is not None:
            kwargs = kwargs | {"device": torch.device("cpu") if to_device else device}
        inner_args, inner_kwargs = _map(_inner, (args, kwargs))
        kernel = CUDA_ONLY.get(func.name(), func)
        return self._on_device(func, tensors, kernel(*inner_args, **inner_kwargs), moved=to_device)

    def _on_device(self, func: Any, tensors: list[torch.Tensor], result: Any, *, moved: bool = True) -> Any:
        """Count a kernel, unless its results are only views, and move the results to the device."""
        outputs = _tensors(result)
        storages = {_inner(x).untyped_storage().data_ptr() for x in tensors}
        views = not func._schema.is_mutable and all(x.untyped_storage().data_ptr() in storages for x in outputs)
        name = func._schema.name.removeprefix("aten::")
        if not (outputs and views) and not name.startswith(("empty", "new_empty")):
            self.ops[name] += 1
            self.bytes += sum(x.numel() * x.element_size() for x in (*tensors, *outputs))
        if not moved:
            return result
        mine = {id(x.inner): x for x in tensors if isinstance(x, OnDevice)}  # what an operation in place returns

        def wrap(x: Any) -> Any:
            return mine.get(id(x)) if id(x) in mine else OnDevice(x) if isinstance(x, torch.Tensor) else x

        # Under inference mode, too, a view of a tensor from outside of it is such a tensor.
        normal = views and not any(x.is_inference() for x in tensors)
        with torch.inference_mode(False) if normal else nullcontext():
            return _map(wrap, result)

    def _copy(self, func: Any, args: Any, kwargs: dict[str, Any], to_device: bool) -> Any:
        """Copy or cast, `_to_copy` or `copy_`; between the devices, wait unless the host's memory is pinned."""
        target = args[0] if func._schema.name == "aten::copy_" else None
        source = args[0] if target is None else args[1]
        kwargs = dict(kwargs)
        waits = not (args[2] if len(args) > 2 else kwargs.pop("non_blocking", False))
        if "device" in kwargs:
            kwargs["device"] = torch.device("cpu")
        inner = _map(_inner, args[:2])
        if to_device if target is None else isinstance(target, OnDevice):
            pinned = isinstance(source, OnDevice) or is_pinned(source)
            if not isinstance(source, OnDevice) and (waits or not pinned):
                self.sync(f"copy from {'pinned' if pinned else 'pageable'} memory")
            return self._on_device(func, list(args[:2]), func(*inner, **kwargs))
        if waits or not (target is None or is_pinned(target)):
            self.sync("copy to the host")
            return func(*inner, **kwargs)
        values = func(*inner, **kwargs) if target is None else source.inner.clone()
        target = pin(torch.empty_like(values)) if target is None else target
        self._copies.append(partial(target.copy_, values))
        if target.dtype == torch.bool:
            return target.fill_(True)
        return target.fill_(torch.nan if target.is_floating_point() else torch.iinfo(target.dtype).max)

    def _check(self, func: Any, name: str, tensors: list[torch.Tensor], args: Any) -> None:
        """Refuse tensors of two devices, but for numbers and indices."""
        numbers = torch.Tag.pointwise in func.tags or name in TAKE_NUMBERS or name.startswith("_foreach")
        others = [x for x in tensors if not isinstance(x, OnDevice) and not (numbers and x.ndim == 0)]
        if name in ("index", "index_put", "index_put_", "_index_put_impl_"):  # indices may be on the CPU
            others = [x for x in others if not any(x is index for index in args[1])]
        changed = func._schema.is_mutable and isinstance(args[0], torch.Tensor) and not isinstance(args[0], OnDevice)
        if others or changed:
            shapes = ", ".join(str(list(x.shape)) for x in others or args[:1])
            raise RuntimeError(f"{func} at {place()}: tensors on cpu ({shapes}) and cuda:0")

    def _count_sync(self, name: str, args: Any, kwargs: dict[str, Any]) -> None:
        """Count an operation that makes the host wait on CUDA."""
        if name == "_local_scalar_dense":
            self.sync("item")
        elif name in (*SIZED_BY_VALUES, "equal"):
            self.sync(name)
        elif name == "repeat_interleave" and kwargs.get("output_size") is None:
            self.sync("repeat_interleave without output_size")
        elif name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            indices = [index for index in args[1] if index is not None]
            # A number is put by masked_fill.
            masks = any(index.dtype in (torch.bool, torch.uint8) for index in indices)
            if masks and not (name != "index" and args[2].ndim == 0):
                self.sync(f"{name} by a mask")
            elif any(not isinstance(index, OnDevice) for index in indices):
                self.sync(f"{name} by indices on the CPU")


class _Calls(TorchFunctionMode):
    """Calls from Python: the device's name becomes the one that C++ sees, and values of the host become tensors."""

    def __init__(self, cuda: PretendCuda) -> None:
        super().__init__()
        self._cuda = cuda

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        mine = bool(args) and isinstance(args[0], OnDevice)
        name = getattr(func, "__name__", "")
        if mine and name == "tolist":
            self._cuda.sync("tolist")
            return args[0].inner.tolist()
        if mine and name in ("numpy", "__array__"):
            raise TypeError("can't convert cuda:0 device type tensor to numpy; use Tensor.cpu() first")
        if name in ("pin_memory", "is_pinned") and args:
            return (pin if name == "pin_memory" else is_pinned)(args[0])
        if name == "cuda":
            func, args = torch.Tensor.to, (args[0], CUDA)
        pinned = kwargs.pop("pin_memory", False)
        place_of = [kwargs.get("device")] if name != "to" else [kwargs.get("device"), *args[1:2]]
        given = any(_is_cuda(device) for device in place_of)
        if name == "new_tensor" and mine and kwargs.get("device") is None:
            kwargs.setdefault("dtype", args[0].dtype)
            func, args, given = torch.tensor, args[1:], True
        if given and func in (torch.tensor, torch.as_tensor, torch.asarray, torch.from_numpy):
            self._cuda.sync("tensor made of values of the host")
            return OnDevice(func(*args, **kwargs | {"device": "cpu"}).detach().clone())
        generator = kwargs.get("generator")
        if generator is not None and (given or mine) and not isinstance(generator, _GeneratorOnDevice):
            raise RuntimeError(f"{name} at {place()}: a generator of the CPU for a tensor on cuda:0")
        if given:
            args = tuple(INNER if _is_cuda(x) else x for x in args)
            kwargs = {name: INNER if _is_cuda(x) else x for name, x in kwargs.items()}
        result = func(*args, **kwargs)
        return pin(result) if pinned else result


def _is_cuda(device: Any) -> bool:
    return device is not None and isinstance(device, (str, torch.device)) and str(device).startswith("cuda")


@cache
def _decomposes(func: Any) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")


def place() -> str:
    """The innermost line of our code that is being run, as file:line; of a test if there is none of the product."""
    frame: Any = sys._getframe(1)
    test = "?"
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(ROOT) and "site-packages" not in path.parts and path != Path(__file__):
            line = f"{path.relative_to(ROOT)}:{frame.f_lineno}"
            if path.relative_to(ROOT).parts[0] not in ("tests", "benchmarks"):
                return line
            test = line if test == "?" else test
        frame = frame.f_back
    return test


# ------------------------------------------------------------------------------------------------ streams and events


class Event:
    """As torch.cuda.Event: `synchronize` waits for what was launched before `record`."""

    cuda: PretendCuda

    def __init__(self, **kwargs: Any) -> None:
        self._copies = 0

    def record(self, stream: Any = None) -> None:
        self._copies = len(self.cuda._copies)

    def wait(self, stream: Any = None) -> None: ...

    def query(self) -> bool:
        self.cuda.deliver(self._copies)
        return True

    def synchronize(self) -> None:
        self.cuda.sync("event", self._copies)

    def elapsed_time(self, end: Event) -> float:
        return 0.0


class Device(nullcontext):
    """As torch.cuda.device, of which there is one."""

    def __init__(self, device: Any) -> None:
        super().__init__()


class Stream:
    """As torch.cuda.Stream; all streams are one."""

    cuda: PretendCuda
    device, cuda_stream = CUDA, 0

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def wait_stream(self, stream: Any) -> None: ...

    def wait_event(self, event: Any) -> None: ...

    def record_event(self, event: Event | None = None) -> Event:
        event = event or torch.cuda.Event()
        event.record()
        return event

    def query(self) -> bool:
        return True

    def is_capturing(self) -> bool:
        return False

    def synchronize(self) -> None:
        self.cuda.sync("stream")


class _GeneratorOnDevice(torch.Generator):
    device = property(lambda self: CUDA)


class Generator(torch.Generator):
    """As torch.Generator, for either device."""

    def __new__(cls, device: Any = "cpu") -> Any:
        return _CPU_GENERATOR.__new__(_GeneratorOnDevice if _is_cuda(device) else _CPU_GENERATOR)


_CPU_GENERATOR = torch.Generator


@contextmanager
def pretend_cuda() -> Iterator[PretendCuda]:
    """Make torch see one CUDA device, in this thread; yields what counts."""
    cuda = PretendCuda()
    event, stream = (type(kind.__name__, (kind,), {"cuda": cuda}) for kind in (Event, Stream))
    state = torch.zeros(16, dtype=torch.uint8)
    stubs: dict[str, Any] = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "_lazy_init": lambda: None,
        "is_bf16_supported": lambda *args, **kwargs: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "device": Device,
        "get_device_name": lambda device=None: "pretend",
        "get_device_capability": lambda device=None: (9, 0),
        "empty_cache": lambda: None,
        "mem_get_info": lambda device=None: (2**36, 2**37),
        "max_memory_allocated": lambda device=None: 0,
        "reset_peak_memory_stats": lambda device=None: None,
        "get_rng_state": lambda device=None: state.clone(),
        "set_rng_state": lambda new, device=None: None,
        "manual_seed_all": lambda seed: None,
        "manual_seed": lambda seed: None,
        "Event": event,
        "Stream": stream,
        "stream": lambda stream: nullcontext(),
        "current_stream": lambda device=None: stream(),
        "default_stream": lambda device=None: stream(),
        "synchronize": lambda device=None: cuda.sync("device"),
        "is_current_stream_capturing": lambda: False,
    }
    shared = {name: stubs[name] for name in ("is_available", "device_count", "current_stream", "synchronize")}
    converted = torch.__future__.get_overwrite_module_params_on_conversion()
    with ExitStack() as stack:
        stack.enter_context(mock.patch.multiple(torch.cuda, **stubs))
        stack.enter_context(mock.patch.multiple(torch.accelerator, **shared))
        stack.enter_context(mock.patch.object(torch, "Generator", Generator))
        stack.enter_context(mock.patch.object(torch, "from_numpy", partial(of_array, torch.from_numpy)))
        # The one of torch refuses a stream that is none of its own.
        stack.enter_context(mock.patch.object(torch.Tensor, "record_stream"))
        stack.enter_context(mock.patch("torch.cuda.amp.common.amp_definitely_not_available", return_value=False))
        optimizers = sys.modules["torch.optim.optimizer"]
        kinds = [*optimizers._foreach_supported_types, OnDevice]
        stack.enter_context(mock.patch.object(optimizers, "_foreach_supported_types", kinds))
        # `param.data = other` would leave the values behind.
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        stack.callback(torch.__future__.set_overwrite_module_params_on_conversion, converted)
        torch._C._set_only_lift_cpu_tensors(True)
        stack.callback(torch._C._set_only_lift_cpu_tensors, False)
        stack.enter_context(torch.compiler.set_stance("force_eager"))  # compilers look for a real device
        stack.enter_context(flash_on_cpu())
        stack.enter_context(autocast_lists(OnDevice))
        stack.enter_context(cuda)
        stack.enter_context(_Calls(cuda))
        yield cuda
