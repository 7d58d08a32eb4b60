r"""What the chapters need from their surroundings, with and without Jupyter.

A chapter runs in three places: in a Jupyter kernel (the committed outputs), as
plain Python (``make full CHAPTER=10``, usually on a GPU) and on Colab. The
functions here behave alike in all three, so that a chapter never asks where it is.

* :func:`glue` names a number, so that prose can quote it instead of copying it.
* :func:`show` displays a figure exactly once, :func:`table` a table of results.
* :func:`full` and :func:`device` say how much to compute, and where.
* :func:`save_results` and :func:`load_results` keep the tables of full runs in
  ``notebooks/results/NAME.json`` of the clone (``ARTLIB_RESULTS`` names another
  folder), each with the circumstances it was made in; :func:`made` makes them in a
  full run only, which may be one of many slices of time (`artlib.book.slices`);
  :func:`comparison` does that for tables of schedules, and checks a part, and
  :func:`learned` for schedules, :func:`plan_table` for plans; :func:`plan_errors` and
  :func:`error_table` serve where a network or a solver is not kept.
* :func:`beside_best` is a row beside the best rivals, :func:`seed_ratio` a ratio over
  seeds; :func:`whole_evaluations` and :func:`is_saved` say what a share saved is worth;
  :func:`spelt` spells a row, :func:`in_words` a list.
* :func:`train_and_note` trains the actor-critic in a full run; :func:`learned_clock` is
  the clock of its notes, :func:`clock_prices` what a clock of K steps costs.
"""

from .display import SOLVER_NAMES, table
from .plans import error_table, plan_errors, plan_table
from .results import load_results, made, save_results, scratch
from .surroundings import FIGURE_DPI, GLUED, device, full, glue, show
from .tables import Listed, comparison, learned
from .trainings import clock_prices, even_times, learned_clock, train_and_note
from .verdicts import (
    beside_best,
    in_words,
    is_saved,
    seed_ratio,
    spelt,
    whole_evaluations,
)

__all__ = [
    "FIGURE_DPI",
    "GLUED",
    "SOLVER_NAMES",
    "Listed",
    "beside_best",
    "clock_prices",
    "comparison",
    "device",
    "error_table",
    "even_times",
    "full",
    "glue",
    "in_words",
    "is_saved",
    "learned",
    "learned_clock",
    "load_results",
    "made",
    "plan_errors",
    "plan_table",
    "save_results",
    "scratch",
    "seed_ratio",
    "show",
    "spelt",
    "table",
    "train_and_note",
    "whole_evaluations",
]
