"""The interpolation that the library uses: SciPy's, which is loaded when it is used."""

from __future__ import annotations

from typing import Any

import numpy as np


def pchip(x: np.ndarray, y: np.ndarray, axis: int = 0) -> Any:
    """A monotone cubic through points, which overshoots none of them.

    Args:
        x: Strictly increasing [n].
        y: Values, n of them along the axis.
        axis: Of ``y``.

    Returns:
        A function of numbers in the range of ``x``, with a ``derivative()``.

    References:
        Fritsch and Butland, SIAM J. Sci. Stat. Comput. 5 (1984) 300.
    """
    from scipy.interpolate import PchipInterpolator

    return PchipInterpolator(x, y, axis=axis)
