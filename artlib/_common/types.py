"""Shape-carrying aliases used in annotations.

They are checked at run time by the test suite only (jaxtyping's import hook with
beartype); for a user they cost nothing and read as documentation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from jaxtyping import Float64
from torch import Tensor

Times: TypeAlias = Float64[Tensor, " m"]
"""Process times, float64 whatever the dtype of the network."""

TimeLike: TypeAlias = float | Tensor
"""A process time: a number, a 0-d tensor, or a tensor that broadcasts."""

DenoiserFn: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""Any callable ``D(x, t) -> x0_hat``."""

SeedLike: TypeAlias = int | torch.Generator
"""A seed or a generator: the only two ways to hand randomness to this library."""
