"""The difference along a path, where it may not look above t_max."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from artlib._path_derivative import PathDerivative


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_the_difference_is_of_second_order_at_t_max_too(share: float) -> None:
    """On D(x, t) = x sin t + t^3, whose rate is known, within the square of h."""
    t_max = 2.0
    t = torch.tensor(share * t_max, dtype=torch.float64)
    x = torch.tensor([[0.7], [-1.3]], dtype=torch.float64)
    velocity = torch.tensor([[0.4], [2.0]], dtype=torch.float64)
    highest = []

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        highest.append(float(t))
        return x * torch.sin(t) + t**3

    found = PathDerivative("difference", t_max, torch.float64).rate(
        denoise, x, t, velocity
    )
    expected = velocity * torch.sin(t) + x * torch.cos(t) + 3 * t**2
    # h is 1.2e-5 here: an error of first order would be 6e-5.
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=0)
    assert max(highest) <= t_max
