"""The difference along a path, where it may not look above t_max."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from artlib.flow.path_derivative import PathDerivative


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


X = torch.tensor([[0.7, -1.3], [1.9, 0.2]], dtype=torch.float64)
STILL = torch.zeros_like(X)
"""A velocity: then D changes in time alone."""


def at(t: float) -> Tensor:
    return torch.tensor(t, dtype=torch.float64)


@pytest.mark.parametrize(("share", "noticed"), [(0.3, True), (0.02, False)])
def test_a_tenth_of_the_derivative_may_be_missing(share: float, noticed: bool) -> None:
    """A part of the network that lies outside of the graph."""

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        return x * ((1 - share) * torch.sin(t) + share * torch.sin(t.detach()))

    derivative = PathDerivative("jvp", 1.0, torch.float64)
    if noticed:
        with pytest.raises(RuntimeError, match="does not agree with a difference"):
            derivative.forward(denoise, X, at(0.5), STILL)
    else:
        rate = derivative.forward(denoise, X, at(0.5), STILL)
        assert rate is not None
        torch.testing.assert_close(rate, (1 - share) * X * torch.cos(at(0.5)))


@pytest.mark.parametrize(("share", "noticed"), [(0.3, True), (0.02, False)])
def test_a_tenth_of_it_may_be_a_staircase(share: float, noticed: bool) -> None:
    """A part that rounds its time: no short difference sees that."""

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        steps = (1000 * t).round() / 1000
        return x * ((1 - share) * torch.sin(t) + share * torch.sin(steps))

    derivative = PathDerivative("jvp", 1.0, torch.float64)
    points = [(X, at(t), STILL) for t in (0.8003, 0.5003, 0.3003)]
    for point in points:
        assert derivative.forward(denoise, *point) is not None
    if noticed:
        with pytest.raises(RuntimeError, match=r"at 3 levels .* does not add up"):
            derivative.contradicted(denoise, points)
    else:
        assert not derivative.contradicted(denoise, points)


def test_a_network_that_is_rough_in_its_time_is_no_staircase() -> None:
    """As trained ones are: several periods within what a difference would span."""

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        return x * (torch.sin(t) + 1e-3 * torch.sin(400 * t))

    derivative = PathDerivative("jvp", 1.0, torch.float64)
    points = [(X, at(t), STILL) for t in (0.8, 0.5, 0.3)]
    assert not derivative.contradicted(denoise, points)
