r"""Data sets that install from a package registry.

Images are scaled so that white paper is -1 and full ink is 1, the range in which
diffusion models are trained: :math:`x = v / 8 - 1` for digits with
:math:`v \in \{0, \ldots, 16\}`.
"""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor


@overload
def digits(*, return_labels: Literal[False] = False) -> Tensor: ...


@overload
def digits(*, return_labels: Literal[True]) -> tuple[Tensor, Tensor]: ...


def digits(*, return_labels: bool = False) -> Tensor | tuple[Tensor, Tensor]:
    """The 1,797 handwritten digits of scikit-learn, 8 x 8 pixels of 17 grey levels.

    Args:
        return_labels: Also return which digit each image shows.

    Returns:
        Images, float32 [1797, 1, 8, 8] in [-1, 1] with ink at 1, in scikit-learn's
        order; every value is exact in float32. With ``return_labels`` a pair of them
        and the labels, int64 [1797] in 0 ... 9.

    Raises:
        ImportError: If scikit-learn is not installed.

    References:
        Alpaydin and Kaynak, Optical Recognition of Handwritten Digits (1998),
        https://doi.org/10.24432/C50P49.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(
            "artlib.zoo.digits needs scikit-learn, which holds the images; "
            'install it with: pip install "art-diffusion[book]"'
        ) from error
    bunch = load_digits()
    images = torch.as_tensor(bunch.images, dtype=torch.float32)[:, None] / 8 - 1
    if not return_labels:
        return images
    return images, torch.as_tensor(bunch.target, dtype=torch.int64)
