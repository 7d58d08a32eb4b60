"""How a network is called: in the dtype it computes in, on tensors of its own.

Networks disagree about their arguments in three ways that are settled here, once for
all that is called a denoiser. In which dtype they compute shows in their parameters,
unless these are stored in another one, or hidden behind a closure. Their time is told
in float32 at least, since half precision would round it by up to 0.4 %: in a list of
ten steps that moves every node. And many take one number per sample where a 0-d tensor
is what broadcasts.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .._common.precision import at_least_single, holds_double
from .._common.types import DenoiserFn, TimeLike
from .processes import as_time

_COMPUTING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

_ABOUT_DTYPE = re.compile(
    r"dtype|scalar type|(input|weight|bias) type|promotion for float8|"
    r"not implemented for '|m1 and m2|mat1 and mat2",
    re.IGNORECASE,
)
"""What torch's kernels say of operands whose dtypes do not go together."""


def unwrap(denoiser: DenoiserFn) -> list[Callable[..., Any]]:
    """A callable and all that it wraps, from outside in.

    What it has as its ``denoiser`` (`CountNFE`), ``functools.partial`` and methods of a
    module, ``torch.compile``, and the modules that spread a network over devices.
    """
    layers: list[Callable[..., Any]] = [denoiser]
    while callable(inner := _inner(layers[-1])):
        # A network with a method called denoiser leads back to itself.
        if any(inner is layer for layer in layers):
            break
        layers.append(inner)
    return layers


def _inner(layer: Any) -> Any:
    if isinstance(layer, partial):
        return layer.func
    if isinstance(layer, nn.DataParallel | nn.parallel.DistributedDataParallel):
        return layer.module
    for name in ("denoiser", "_orig_mod", "__wrapped__"):
        if callable(inner := getattr(layer, name, None)):
            return inner
    owner = getattr(layer, "__self__", None)
    return owner if isinstance(owner, nn.Module) else None


def check_rows(denoiser: DenoiserFn, count: int) -> None:
    """Ask a denoiser that holds a condition for each sample if they are so many.

    Its method ``check_rows(count)`` raises if they are not: who takes some of the rows
    would not notice that there are too many.
    """
    for layer in unwrap(denoiser):
        check = getattr(layer, "check_rows", None)
        if callable(check):
            check(count)


def network_dtypes(denoiser: Callable[..., Tensor]) -> list[torch.dtype]:
    """The dtypes that a network may compute in, the likeliest first.

    Returns:
        Empty where no parameter can be seen; see `artlib.flow.denoisers.network_dtype`.
    """
    for layer in unwrap(denoiser):
        if isinstance(layer, nn.Module) and (found := _of_module(layer)):
            return found
    return []


_UNIFORM: WeakKeyDictionary[nn.Module, list[nn.Parameter]] = WeakKeyDictionary()
"""Parameters of modules that have one dtype. To collect those of a small U-Net takes
6 % of its evaluation; to look at their dtypes again, next to nothing."""


def _of_module(module: nn.Module) -> list[torch.dtype]:
    known = _UNIFORM.get(module)
    if known and next(module.parameters(), None) is known[0]:
        kind = known[0].dtype
        if all(p.dtype is kind for p in known) and kind in _COMPUTING:
            return [kind]
    parameters = list(module.parameters())
    kinds = {p.dtype for p in parameters}
    if len(kinds) == 1 and kinds <= {*_COMPUTING}:
        _UNIFORM[module] = parameters
        return [*kinds]
    _UNIFORM.pop(module, None)
    if not parameters:
        return []
    sizes: dict[torch.dtype, int] = {}
    for tensors in (parameters, module.buffers()):
        for x in tensors:
            if x.dtype in _COMPUTING:
                size = 1 if is_lazy(x) else x.numel()
                sizes[x.dtype] = sizes.get(x.dtype, 0) + size
        if sizes:
            break
    found = sorted(sizes, key=lambda kind: -sizes[kind]) or [torch.float32]
    declared = getattr(module, "dtype", None)
    if declared in _COMPUTING:
        found = [declared, *(kind for kind in found if kind != declared)]
    return found


def exact_time(t: TimeLike, x: Tensor) -> Tensor:
    """A time in float64: on the device of ``x``, or on the CPU if that is as good.

    On the CPU are numbers, 0-d tensors that are there already (a scalar on the CPU goes
    with every device), and all times where the device has no float64.
    """
    if not isinstance(t, Tensor) or t.is_complex() or t.dtype == torch.bool:
        return as_time(t, torch.device("cpu"))  # or it is refused
    here = t.ndim == 0 and t.device.type == "cpu"
    device = t.device if here else x.device
    if not holds_double(device):
        device = torch.device("cpu")
    return t.to(device).to(torch.float64)


class Explained(Exception):
    """What goes wrong in the call of a network, said in the user's terms."""


class _WrongDtype(Explained, TypeError): ...


class _WrongTime(Explained, ValueError): ...


class Ask:
    """Calls a network, and remembers what it would take.

    The network gets copies: many scale their input in place, and some their time.
    """

    def __init__(self) -> None:
        self._took: tuple[torch.dtype, torch.dtype] | None = None

    def __call__(
        self,
        network: DenoiserFn,
        x: Tensor,
        t: Tensor,
        dtypes: Sequence[torch.dtype],
        *,
        trial: DenoiserFn | None = None,
    ) -> Any:
        """``network(x, t)``.

        Args:
            network: The network.
            x: States [N, *shape].
            t: Times, 0-d or broadcastable against ``x``.
            dtypes: What it may compute in, the likeliest first.
            trial: The same network without a counter, to try out what it would take.

        Returns:
            Its answer as it is.

        Raises:
            TypeError: If it computes in another dtype.
            ValueError: If it takes one time per sample only.
        """
        kinds = dtypes[0], at_least_single(dtypes[0])
        if self._took is not None and self._took[0] in dtypes:
            kinds = self._took
        try:
            return _call(network, x, t, *kinds)
        except Explained:  # by a denoiser, of the network in it
            raise
        except Exception as error:
            return self._again(trial or network, x, t, [*dtypes], kinds, error)

    def _again(
        self,
        network: DenoiserFn,
        x: Tensor,
        t: Tensor,
        dtypes: list[torch.dtype],
        failed: tuple[torch.dtype, torch.dtype],
        error: Exception,
    ) -> Any:
        """Find out what the network would have taken; what it may be given, it gets."""
        about_dtype = bool(_ABOUT_DTYPE.search(str(error)))
        known = [(d, time) for d in dtypes for time in {at_least_single(d): 0, d: 0}]
        trials = [k for k in known if k != failed] if about_dtype else []
        for kinds in trials:
            answer = _try(network, x, t, kinds)
            if answer is None:
                continue
            self._took = kinds
            if kinds[1] not in (torch.float32, torch.float64):
                warnings.warn(
                    f"denoiser: it takes its time t in {kinds[1]} only, which rounds "
                    "it by up to 0.4 %; embed t in float32 and convert the embedding",
                    UserWarning,
                    stacklevel=5,
                )
            return answer
        first = (str(error).splitlines() or [type(error).__name__])[0]
        if t.ndim == 0:
            each = t.reshape(1).repeat(len(x))
            if any(_try(network, x, each, k) is not None for k in (failed, *trials)):
                raise _WrongTime(
                    "denoiser: t is a 0-d tensor, one time for all samples, and this "
                    "network wants one per sample; expand it: "
                    f"t.reshape(-1).expand(len(x)) ({first})"
                ) from error
        if not about_dtype:
            raise error
        others = [(d, at_least_single(d)) for d in _COMPUTING if d not in dtypes]
        fits = next((k for k in others if _try(network, x, t, k) is not None), None)
        which = "the dtype it computes in" if fits is None else str(fits[0])
        raise _WrongDtype(
            f"denoiser: it does not compute in {failed[0]}; pass dtype= to "
            f"ProbabilityFlow: dtype={which} ({first})"
        ) from error


def _call(
    network: DenoiserFn, x: Tensor, t: Tensor, dtype: torch.dtype, time: torch.dtype
) -> Any:
    told = t.to(time, copy=True).to(x.device)
    if told.ndim == 0 and any(isinstance(f, nn.DataParallel) for f in unwrap(network)):
        # It deals its arguments out along their first axis.
        told = told.reshape([1] * x.ndim).repeat(len(x), *[1] * (x.ndim - 1))
    return network(x.to(dtype, copy=True), told)


def _try(
    network: DenoiserFn, x: Tensor, t: Tensor, kinds: tuple[torch.dtype, torch.dtype]
) -> Any:
    """The network's answer, or None where it raises."""
    try:
        return _call(network, x, t, *kinds)
    except Exception:  # only the first error is reported
        return None
