"""A simulated accelerator: finds tensors on the wrong device where there is no GPU.

Tensors "on" it are CPU tensors in disguise. They compute what the CPU computes, but an
operation that mixes them with tensors of the CPU fails as it would with CUDA, and so
does handing them to NumPy or a generator of the other side. What it cannot show:
kernels that round differently, memory, speed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

if torch.cuda.is_available():
    # With two kinds of devices, autograd has streams for one of them only: seen on an
    # H200 with torch 2.11, where every backward pass there failed.
    raise ImportError("there is a GPU, beside which no other can be simulated")

NAME = "simulated"

_ops = torch.ops.aten
_INDEXED = {_ops.index, _ops.index_put, _ops.index_put_, _ops._index_put_impl_}
"""Operations that also take indices from the CPU."""


_setup_privateuseone_for_python_backend(NAME)
# Now, not at the first use: autograd counts the devices at its first backward pass.
_DEVICE = torch.device(NAME, 0)


class _Remote(Tensor):
    """A tensor on the device: a disguise for one on the CPU."""

    local: Tensor

    @staticmethod
    def __new__(cls, local: Tensor) -> _Remote:
        made = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            local.shape,
            strides=local.stride(),
            storage_offset=local.storage_offset(),
            dtype=local.dtype,
            layout=local.layout,
            device=_DEVICE,
        )
        made.local = local
        return made

    def __repr__(self, *, tensor_contents: object = None) -> str:
        return f"{NAME}({self.local!r})"

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return _compute(func, args, kwargs or {})


_drawers: dict[int, torch.Generator] = {}
"""The generators of the device, by address, kept alive so that this is unique."""


class _RemoteGenerator(torch.Generator):
    @property
    def device(self) -> torch.device:
        return _DEVICE


class _Generators(type):
    """Stands in for `torch.Generator` as a class."""

    def __instancecheck__(cls, found: object) -> bool:
        return isinstance(found, _GENERATOR)

    def __call__(cls, device: Any = "cpu") -> torch.Generator:
        if torch.device(device).type != NAME:
            return _GENERATOR(device)
        made = _RemoteGenerator()
        _drawers[made._cdata] = made  # type: ignore[attr-defined]
        return made


class _AnyGenerator(metaclass=_Generators): ...


_GENERATOR = torch.Generator


def _is_remote(value: object) -> bool:
    return isinstance(value, _Remote)


def _place(func: Any, args: Any, kwargs: Any, tensors: list[Tensor]) -> bool:
    """Whether the result is on the device; raises if the arguments do not fit."""
    remote = any(map(_is_remote, tensors))
    if func.overloadpacket is _ops.copy_:
        return _is_remote(args[0])
    if func.overloadpacket is not _ops._to_copy and remote:
        judged = tensors
        if func.overloadpacket in _INDEXED:
            judged = [v for v in (args[0], *args[2:]) if isinstance(v, Tensor)]
            if not _is_remote(args[0]):
                raise RuntimeError(f"{func}: a CPU tensor, indices on {NAME}")
        if any(v.ndim and not _is_remote(v) for v in judged):
            shapes = [f"{tuple(v.shape)} on {v.device}" for v in tensors]
            raise RuntimeError(
                f"{func}: expected all tensors to be on the same device, got "
                + ", ".join(shapes)
            )
    asked = kwargs.get("device")
    there = remote if asked is None else torch.device(asked).type == NAME
    drawer = kwargs.get("generator")
    if drawer is not None and there != (drawer._cdata in _drawers):
        raise RuntimeError(f"{func}: the generator is not on the device of the result")
    return there


def _compute(func: Any, args: Any, kwargs: Any) -> Any:
    """One operation: checked, done on the CPU, disguised again."""
    values, form = tree_flatten((args, kwargs))
    tensors = [v for v in values if isinstance(v, Tensor)]
    there = _place(func, args, kwargs, tensors)
    if there and func is _ops._efficientzerotensor.default:
        func = _ops.zeros.default  # a tensor without memory cannot be disguised

    def bare(value: Any) -> Any:
        if isinstance(value, _Remote):
            return value.local
        if isinstance(value, torch.device) and value.type == NAME:
            return torch.device("cpu")
        return value

    known = {id(v.local): v for v in tensors if isinstance(v, _Remote)}
    args, kwargs = tree_unflatten([bare(v) for v in values], form)
    result = func(*args, **kwargs)
    if func.overloadpacket is _ops._to_copy and result is args[0]:
        result = result.clone()

    def disguise(value: Any) -> Any:
        if not (there and isinstance(value, Tensor)):
            return value
        return known[id(value)] if id(value) in known else _Remote(value)

    return tree_map(disguise, result)


class _Operations(TorchDispatchMode):
    """Sees the operations that have no tensor among their arguments."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return _compute(func, args, kwargs or {})


def _moved(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """``x.to(*args, **kwargs)``."""
    copy = kwargs.pop("copy", False)
    other = kwargs.pop("other", args[0] if args else None)
    if isinstance(other, Tensor):
        device, dtype = other.device, other.dtype
        layout = kwargs.get("memory_format")
    else:
        device, dtype, _, layout = torch._C._nn._parse_to(*args[:2], **kwargs)
    same = device is None or device.type == x.device.type
    if same and dtype in (None, x.dtype) and layout is None and not copy:
        return x
    moves = {} if same else {"device": device}
    if layout is not None:
        moves["memory_format"] = layout
    moved: Tensor = _ops._to_copy.default(x, dtype=dtype or x.dtype, **moves)
    return moved


class _Calls(TorchFunctionMode):
    """Rewrites what torch would do in C++, before any operation is dispatched."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func in (torch.tensor, torch.as_tensor, torch.asarray):
            device = kwargs.pop("device", None)
            made = func(*args, **kwargs)
            return made if device is None else _moved(made, device)
        if func is Tensor.to:
            return _moved(*args, **kwargs)
        if func is Tensor.cpu:
            return _moved(args[0], "cpu")
        if func in (Tensor.tolist, Tensor.__format__) and _is_remote(args[0]):
            return getattr(args[0].local, func.__name__)(*args[1:])
        if func in (Tensor.__getitem__, Tensor.__setitem__) and _is_remote(args[0]):
            key = args[1] if isinstance(args[1], tuple) else (args[1],)
            key = tuple(torch.tensor(k) if isinstance(k, list) else k for k in key)
            args = (args[0], key, *args[2:])
        return func(*args, **kwargs)


@contextmanager
def simulated_device() -> Iterator[torch.device]:
    """While it lasts, the device that it yields can be used like a GPU."""
    with mock.patch("torch.Generator", _AnyGenerator), _Operations(), _Calls():
        yield _DEVICE
