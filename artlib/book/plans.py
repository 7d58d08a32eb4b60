"""Tables of plans, a row per way to sample and a column per number of evaluations."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from torch import Tensor

from ..comparison.bootstrap import statistic
from ..comparison.file import Origin
from ..comparison.references import references
from ..comparison.table import Comparison
from ..flow.flow import ProbabilityFlow
from ..schedules.plan import Plan
from ..solvers.sample import sample
from .results import load_results, save_results, scratch
from .slices import is_made, seconds_left
from .surroundings import full
from .tables import describe, origin_json, reference_again

Plans: TypeAlias = Mapping[str, Mapping[int, Plan]]
"""Label -> evaluations -> plan."""

Samples: TypeAlias = Mapping[str, Mapping[str, list[list[float]]]]
"""``"nfe N"`` -> label -> for each seed the errors of its samples."""

_AGREE = 0.05  # relative, of a sample's error now and in the full run
_AGAIN = "make it again (ARTLIB_FULL=1) or find out what changed"


def plan_table(
    name: str,
    flow: ProbabilityFlow,
    make: Callable[[], Plans],
    noise: Callable[[int, int], Tensor],
    *,
    count: int,
    seed: int,
    again: Sequence[tuple[str, int]],
    few: int = 3,
    rtol: float = 1e-6,
    shared: str | None = None,
) -> tuple[dict[str, dict[int, Plan]], Comparison]:
    """Plans and their errors from matched noise: made in a full run, read otherwise.

    Where they are read, the errors of some cells from the first few noises are computed
    anew, the numbers of each cell must be those of its samples, and flow, noise and
    plans must be those of the full run.

    Args:
        name: Of the results.
        flow: The flow.
        make: Makes the plans, in a full run only.
        noise: ``noise(n, seed)`` -> states at t_max [n, *shape]; not those that the
            plans were learned from.
        count: Noises of the full run.
        seed: Of the noise.
        again: Cells, label and evaluations, to compute again.
        few: Noises to compute them from.
        rtol: Tolerance of the reference solution.
        shared: A name for the references of a full run, see `comparison`.

    Returns:
        The plans, and a `Comparison` with a key ``"nfe N"`` for each number of
        evaluations; its measures are ``"error"`` (rms) and ``"median"``.

    Raises:
        AssertionError: If the code of today gives other numbers than the stored ones.
        FileNotFoundError: If there are no results yet.
    """
    fresh_run = full() and not is_made(name)
    if fresh_run:
        seconds_left()
        plans = {label: dict(row) for label, row in make().items()}
        x = noise(count, seed)
        kept = scratch(f"{shared}.references.safetensors") if shared else None
        samples = plan_errors(flow, plans, x, rtol=rtol, file=kept)
        results: dict[str, Any] = {
            "plans": {
                label: {str(n): json.loads(p.to_json()) for n, p in row.items()}
                for label, row in plans.items()
            },
            "samples": samples,
            "origin": origin_json(flow, [x]),
        }
        results["sha256"] = _digest(results)
        save_results(name, results, seed=seed)
    stored = load_results(name)
    results = stored["results"]
    plans = {
        label: {int(n): Plan.from_json(json.dumps(p)) for n, p in row.items()}
        for label, row in results["plans"].items()
    }
    table = error_table(results["samples"])
    if not fresh_run:
        print(describe(stored["made"], table.count, 1))
        assert results["sha256"] == _digest(results), (
            f"{name}: a stored number was changed by hand; {_AGAIN}"
        )
        x = noise(table.count, seed)
        now, then = Origin(**origin_json(flow, [x])), Origin(**results["origin"])
        other = now.difference(then)
        assert other is None, f"{name}: {other} differed in the full run; {_AGAIN}"
        for label, nfe in again:
            ends = reference_again(flow, x[:few], rtol)
            fresh = _errors(flow, x[:few], ends, plans[label][nfe])
            old = np.array(table.samples[f"nfe {nfe}"][label][0][:few])
            least = float(np.median(old)) / 4
            worst = float(np.max(np.abs(fresh - old) / np.maximum(old, least)))
            assert worst < _AGREE, (
                f"{name}: an error of {label} at {nfe} evaluations differs by "
                f"{worst:.1%} from the full run; {_AGAIN}"
            )
    return plans, table


def plan_errors(
    flow: ProbabilityFlow,
    plans: Plans,
    x_T: Tensor,
    *,
    rtol: float,
    file: str | os.PathLike[str] | None = None,
) -> Samples:
    """Errors of plans from matched noise: "nfe N" -> label -> [error of each noise].

    An error is the root mean square per coordinate, to four digits.

    Args:
        flow: The flow.
        plans: Label -> evaluations -> plan.
        x_T: States at t_max [N, *shape].
        rtol: Tolerance of the reference solution.
        file: Keeps the reference, see `artlib.references`.
    """
    ends = references(flow, [x_T], rtol=rtol, file=file)[0]
    samples: dict[str, dict[str, list[list[float]]]] = {}
    for label, row in plans.items():
        for nfe, plan in row.items():
            errors = _errors(flow, x_T, ends, plan)
            cell = [float(f"{e:.4g}") for e in errors]
            samples.setdefault(f"nfe {nfe}", {})[label] = [cell]
    return samples


def error_table(samples: Samples) -> Comparison:
    """Errors of plans as a `Comparison`, with the measures ``"error"``, ``"median"``.

    Args:
        samples: ``"nfe N"`` -> label -> for each seed the errors of its samples.
    """
    cells = {
        key: {
            label: {
                measure: statistic(np.array(errors), measure).tolist()
                for measure in ("error", "median")
            }
            for label, errors in row.items()
        }
        for key, row in samples.items()
    }
    first = next(iter(next(iter(samples.values())).values()))
    return Comparison(
        cells=cells,
        nfe={key: int(key.split()[1]) for key in samples},
        count=len(first[0]),
        samples={key: dict(row) for key, row in samples.items()},
    )


def _errors(flow: ProbabilityFlow, x: Tensor, ends: Tensor, plan: Plan) -> np.ndarray:
    """Root mean squared error per coordinate of each sample."""
    # On a CPU few, whose activations stay in its cache.
    most = 64 if x.device.type == "cpu" else 256
    y = sample(flow, x, plan, batch=min(len(x), most))
    squares = (y.double() - ends.double()).flatten(1).square().mean(1)
    return np.asarray(squares.sqrt().cpu().numpy())


def _digest(results: Mapping[str, Any]) -> str:
    parts = [results[key] for key in ("plans", "samples", "origin")]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
