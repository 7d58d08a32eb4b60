"""Write the gallery: schedules/*.json, learned in the chapters, and book/gallery.md.

python tools/build_gallery.py            write files and page
python tools/build_gallery.py --check    fail if they are not what they should be

Schedules, plans and what they are worth are read from ``notebooks/results``, where full
runs of the chapters put them: nothing is learned or measured here.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import artlib
from artlib.book import SOLVER_NAMES, spelt
from artlib.comparison import Comparison

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "notebooks" / "results"
FOLDER = ROOT / "schedules"
PAGE = ROOT / "book" / "gallery.md"

FORMULAS = tuple(artlib.baselines(artlib.VE()))
UNTRAINED = (
    "EDM",
    "EDM unpinned",
    "log-SNR unpinned",
    "KL-optimal",
    "AYS",
    "AYS list",
)
"""With a solver behind each, what a tuned plan is compared with."""


@dataclass(frozen=True)
class Entry:
    """A schedule or plan of the gallery.

    Attributes:
        file: Its name in the gallery.
        network: Of the zoo.
        stored: Results that hold it, and the keys that lead to it.
        table: Results that hold the errors of its samples.
        label: Of its row there.
        judged: Cells, solver and K, to quote.
        chapter: Label of the chapter that made it.
    """

    file: str
    network: str
    stored: tuple[str | int, ...]
    table: str
    label: str
    judged: tuple[tuple[str, int], ...]
    chapter: str


def _cells(solver: str, *steps: int) -> tuple[tuple[str, int], ...]:
    return tuple((solver, K) for K in steps)


_BASE = (*_cells("euler", 5, 12, 30), *_cells("heun", 5, 10))
_HEUN = _cells("heun", 3, 5, 10)
_HERE = "ART learned here"
_MATCHED = "ART for this solver"


def _own(name: str) -> tuple[str, str]:
    return f"ch11-schedule-{name}", "schedule"


ENTRIES = [
    Entry(
        "fashion-base-art",
        "fashion-base",
        ("ch10-schedules", "art"),
        "ch10-tables",
        "ART",
        _BASE,
        "ch-images",
    ),
    Entry(
        "fashion-base-art-rl",
        "fashion-base",
        ("ch10-schedules", "rl", 0, "schedule"),
        "ch10-tables",
        "ART-RL",
        _BASE,
        "ch-images",
    ),
    Entry(
        "fashion-base-sigma-20-art",
        "fashion-base",
        ("ch10-schedule-short", "schedule"),
        "ch10-short",
        "ART",
        (*_cells("euler", 5, 12), *_cells("heun", 5, 10)),
        "ch-images",
    ),
    Entry(
        "fashion-base-art-heun",
        "fashion-base",
        _own("solver-heun"),
        "ch11-solver-heun",
        _MATCHED,
        _HEUN,
        "ch-transfer",
    ),
    Entry(
        "fashion-base-art-2m",
        "fashion-base",
        _own("solver-dpmpp_2m"),
        "ch11-solver-dpmpp_2m",
        _MATCHED,
        _cells("dpmpp_2m", 5, 10),
        "ch-transfer",
    ),
    Entry(
        "fashion-base-art-rk4",
        "fashion-base",
        _own("solver-rk4"),
        "ch11-solver-rk4",
        _MATCHED,
        _cells("rk4", 3, 5, 7),
        "ch-transfer",
    ),
    *(
        Entry(
            f"fashion-base-{short}-art",
            "fashion-base",
            _own(name),
            f"ch11-{name}",
            _HERE,
            _cells("euler", 5, 10, 18),
            "ch-transfer",
        )
        for short, name in (("vp", "VP"), ("flow", "rectified-flow"))
    ),
    Entry(
        "fashion-small-art",
        "fashion-small",
        _own("small"),
        "ch11-small",
        _HERE,
        _HEUN,
        "ch-transfer",
    ),
    Entry(
        "fashion-large-art",
        "fashion-large",
        ("ch12-schedule-fashion-large", "schedule"),
        "ch12-fashion-large",
        "ART",
        _cells("heun", 6, 10, 18),
        "ch-quarter",
    ),
    *(
        Entry(
            f"{network}-art",
            network,
            _own(name),
            f"ch11-{name}",
            _HERE,
            _HEUN,
            "ch-transfer",
        )
        for network, name in (
            ("mnist-base", "mnist"),
            ("emoji-base", "emoji"),
            ("fashion-latent-base", "latent"),
        )
    ),
    *(
        Entry(
            f"{network}-tuned-{K}",
            network,
            (f"ch16-{network}", "plans", "tuned", str(K)),
            f"ch16-{network}",
            "tuned",
            (("nfe", K),),
            "ch-few",
        )
        for network in (
            "fashion-base",
            "fashion-small",
            "fashion-large",
            "mnist-base",
            "emoji-base",
        )
        for K in (3, 5, 8, 10, 20)
    ),
    Entry(
        "cifar10-base-art",
        "cifar10-base",
        ("ch17-schedules", "art"),
        "ch17-heun",
        "ART",
        _cells("heun", 3, 5, 10, 18),
        "ch-cifar",
    ),
    *(
        Entry(
            f"cifar10-base-tuned-{K}",
            "cifar10-base",
            ("ch17-samplers", "plans", "tuned", str(K)),
            "ch17-samplers",
            "tuned",
            (("nfe", K),),
            "ch-cifar",
        )
        for K in (5, 8, 10, 20)
    ),
]


def results(name: str) -> dict[str, Any]:
    """Of a full run."""
    data = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    found: dict[str, Any] = data["results"]
    return found


def table_of(name: str) -> Comparison:
    """The errors of samples in some results."""
    found = results(name)
    if "table" in found:
        return Comparison.from_dict(found["table"])
    return Comparison(samples=found["samples"])


def worth(entry: Entry, table: Comparison) -> Iterator[dict[str, Any]]:
    """What an entry is worth in each of its cells.

    Yields:
        ``solver`` and ``nfe``; for ``"error"`` (root mean square) and ``"median"`` the
        ratio to the untrained rival that is best by that measure, with its 95 %
        interval, and that rival; and the ``verdict`` over both and all rivals.
    """
    for solver, K in entry.judged:
        row = table.samples[f"{solver} {K}"]
        rivals = [label for label in row if label.split(",")[0] in _rivals(solver)]
        cell: dict[str, Any] = {"solver": SOLVER_NAMES.get(solver, entry.label)}
        cell["nfe"] = K if solver == "nfe" else table.nfe[f"{solver} {K}"]
        for measure in ("error", "median"):
            rival = table.least(solver, K, rivals, measure)
            ratio = table.ratio(solver, K, entry.label, rival, measure=measure)
            cell[measure] = (ratio, spelt(rival))
        cell["verdict"] = table.verdict(solver, K, entry.label, rivals)
        yield cell


def _rivals(solver: str) -> tuple[str, ...]:
    return UNTRAINED if solver == "nfe" else FORMULAS


def _ratio(cell: dict[str, Any], measure: str) -> str:
    ratio, _ = cell[measure]
    return f"{ratio.value:.2f} ({ratio.low:.2f} to {ratio.high:.2f})"


def _in_words(cell: dict[str, Any]) -> str:
    """For the file, and so for `artlib show` and for the card."""
    by_error, by_median = cell["error"][1], cell["median"][1]
    return (
        f"rms error {_ratio(cell, 'error')} times that of {by_error}; median "
        f"{_ratio(cell, 'median')} times that of {by_median}; {cell['verdict']}"
    )


def made(entry: Entry, cells: list[dict[str, Any]]) -> artlib.Schedule | artlib.Plan:
    """The schedule or plan, with network and worth in its provenance."""
    name, *keys = entry.stored
    data: Any = results(str(name))
    for key in keys:
        data = data[key]
    provenance = {
        **data["provenance"],
        "network": entry.network,
        "worth": {f"{c['solver']}, NFE {c['nfe']}": _in_words(c) for c in cells},
    }
    text = json.dumps({**data, "provenance": provenance})
    plan = data["format"] == "artlib-plan"
    kind: Any = artlib.Plan if plan else artlib.Schedule
    found: artlib.Schedule | artlib.Plan = kind.from_json(text, source=entry.file)
    return found


def gallery() -> tuple[dict[str, str], str]:
    """The files by name, and the page."""
    files: dict[str, str] = {}
    tables: dict[str, Comparison] = {}
    listed, judged = [], []
    for entry in ENTRIES:
        if entry.table not in tables:
            tables[entry.table] = table_of(entry.table)
        cells = list(worth(entry, tables[entry.table]))
        if isinstance(bare := made(entry, []), artlib.Plan):
            cells = [
                {**cell, "solver": SOLVER_NAMES[str(bare.solver)]} for cell in cells
            ]
        found = made(entry, cells)
        files[f"{entry.file}.json"] = found.to_json()
        listed.append(_line(_row(entry, found)))
        judged += [_line(_judged(entry, cell)) for cell in cells]
    return files, _PAGE.format(
        listed="\n".join(listed), judged="\n".join(judged), count=len(files)
    )


def _row(entry: Entry, found: artlib.Schedule | artlib.Plan) -> list[str]:
    link = f"{{download}}`{entry.file} <../schedules/{entry.file}.json>`"
    known = found.provenance
    if isinstance(found, artlib.Plan):
        solver, budget = SOLVER_NAMES[str(found.solver)], f"NFE {found.nfe}"
        how = f"tuned on {sum(known['noises'])} noises"
    else:
        solver, budget = SOLVER_NAMES[known.get("solver", "euler")], "any"
        how = f"{known['method']}, {known['trajectories']} paths"
    how += f" ({{numref}}`{entry.chapter}`)"
    times = torch.tensor([found.process.t_min, found.process.t_max])
    low, high = found.process.noise_level(times.double()).tolist()
    process = f"{type(found.process).__name__}, {low:.2g} to {high:.3g}"
    cost = str(known["nfe"])
    return [link, entry.network, process, solver, budget, how, cost]


def _judged(entry: Entry, cell: dict[str, Any]) -> list[str]:
    return [
        entry.file,
        cell["solver"],
        str(cell["nfe"]),
        _ratio(cell, "error"),
        cell["error"][1],
        _ratio(cell, "median"),
        cell["median"][1],
        cell["verdict"],
    ]


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


_PAGE = """\
(gallery)=
# Gallery of schedules

These {count} files are in the folder `schedules` of the repository: what full runs of
the chapters learned on the networks of `artlib.zoo`. This page and the files are
written by `tools/build_gallery.py` from the stored results, and each file says the same
of itself: `artlib show schedules/fashion-base-art.json`.

```python
import artlib

net = artlib.zoo.load("fashion-base")
flow = artlib.ProbabilityFlow(net.process, net)
x_T = net.sample_prior(16, seed=0)
schedule = artlib.Schedule.load("schedules/fashion-base-art.json")
images = artlib.sample(flow, x_T, schedule.grid(10))
plan = artlib.Plan.load("schedules/fashion-base-tuned-8.json")
images = artlib.sample(flow, x_T, plan)
```

A schedule belongs to the network that it was learned on, and to its process; on another
network it is a guess ({{numref}}`ch-transfer`). These networks are small and ours: for
one that you use, learn one ({{numref}}`ch-pipeline`).

## The files

*Process* gives the noise per signal, $\\sigma/\\alpha$, that the steps run over; *made
for* names the solver whose error the schedule keeps small. A plan is the steps of one
solver, with what the network is told at each. The cost of learning is in evaluations of
the network on the batch of paths or noises.

| file | network | process | made for | budget | how | cost |
| --- | --- | --- | --- | --- | --- | ---: |
{listed}

## What they are worth

The error is the distance of a sample to the end of the network's own exact path from
the same noise, and no schedule was learned from that noise. It is given in units of the
untrained rival that is best by that measure, at the same number of evaluations: for a
schedule a formula with the same solver, for a plan a formula or a published list with
any of the solvers that were tried. In brackets stands the 95 % interval from paired
samples. *Ahead* means that by both measures the intervals of the ratios to all these
rivals lie below 1, *behind* that one lies above, *open* neither.

| file | solver | NFE | rms error | of | median error | of | verdict |
| --- | --- | ---: | --- | --- | --- | --- | --- |
{judged}
"""


def main() -> None:
    files, page = gallery()
    wanted = {FOLDER / name: text for name, text in files.items()} | {PAGE: page}
    if "--check" in sys.argv[1:]:
        stale = [p for p, text in wanted.items() if not p.is_file() or _read(p) != text]
        stale += [p for p in sorted(FOLDER.glob("*")) if p not in wanted]
        if stale:
            names = ", ".join(str(path.relative_to(ROOT)) for path in stale)
            sys.exit(f"{names}: out of date; run python tools/build_gallery.py")
        return
    FOLDER.mkdir(exist_ok=True)
    for path in sorted(FOLDER.glob("*.json")):
        path.unlink()
    for path, text in wanted.items():
        path.write_text(text, encoding="utf-8")


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


if __name__ == "__main__":
    main()
