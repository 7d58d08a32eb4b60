"""Rows beside the best rivals, and what a saved share is in whole steps."""

import math

import numpy as np
import pytest

from artlib import book
from artlib.comparison import Comparison


def comparison() -> Comparison:
    """Each of two rivals is the best by one measure."""
    rng = np.random.default_rng(0)
    noise = np.exp(0.1 * rng.standard_normal(200))
    tail = np.where(np.arange(200) < 4, 30.0, 1.0)  # four samples end far away
    samples = {
        "own": [(0.5 * noise).tolist()],
        "calm": [noise.tolist()],
        "wild": [(0.8 * noise * tail).tolist()],
    }
    return Comparison(cells={}, nfe={"nfe 5": 5}, count=200, samples={"nfe 5": samples})


def test_each_measure_has_its_own_best_rival() -> None:
    table = comparison()
    rms, first, median, second, verdict = book.beside_best(
        table, "nfe", 5, "own", ["calm", "wild"], called=str.upper
    )
    assert (first, second, verdict) == ("CALM", "WILD", "ahead")
    assert rms == table.ratio("nfe", 5, "own", "calm", measure="error")
    assert median == table.ratio("nfe", 5, "own", "wild", measure="median")
    behind = book.beside_best(table, "nfe", 5, "calm", ["own", "wild"])
    assert behind[-1] == "behind"


def test_a_list_is_said_in_words() -> None:
    assert book.in_words([2, 5, 9]) == "2, 5 and 9"
    assert book.in_words(["3", "5"]) == "3 and 5"
    assert book.in_words([8]) == "8"
    assert book.in_words([]) == "none"


def test_the_solver_behind_the_last_comma_is_spelt() -> None:
    assert book.spelt("AYS, SDXL, ipndm3") == "AYS, SDXL, iPNDM-3"
    assert book.spelt("EDM unpinned") == "EDM unpinned"


@pytest.mark.parametrize("each", [1, 2, 4])
def test_whole_evaluations_are_the_fewest_steps_that_are_enough(each: int) -> None:
    runs = [each * (K - 1) + 1 for K in range(1, 60)]
    for share in np.linspace(-20, 90, 111):
        needed = (1 - share / 100) * 35
        found = book.whole_evaluations(share, 35, each=each)
        assert found == next(n for n in runs if n > needed - 1e-6)
    assert book.whole_evaluations(math.nan, 35) is None
    assert book.whole_evaluations(-math.inf, 35) is None


def test_a_share_is_saved_by_the_worst_measure() -> None:
    assert book.is_saved([(26, 40), (30, 31)], 25) == "yes"
    assert book.is_saved([(26, 40), (20, 31)], 25) == "open"
    assert book.is_saved([(26, 40), (20, 24)], 25) == "no"


def test_ratio_over_seeds_is_the_t_interval_of_the_logarithms() -> None:
    a, b = [2.0, 4.0, 8.0], [1.0, 1.0, 1.0]
    found = book.seed_ratio(a, b)
    assert found.value == pytest.approx(4)  # the geometric mean
    # Logarithms to the base 2 are 1, 2, 3; Student's quantile for two degrees is 4.303.
    assert math.log2(found.high) == pytest.approx(2 + 4.3027 / math.sqrt(3), rel=1e-4)
    assert found.low * found.high == pytest.approx(16)
    back = book.seed_ratio(b, a)
    assert back == pytest.approx((1 / 4, 1 / found.high, 1 / found.low))
