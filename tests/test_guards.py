"""What one function refuses, its siblings refuse: by the argument's name."""

import dataclasses
import inspect
import pickle
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
import torch
from torch import Tensor, nn

import artlib
from artlib import rivals
from artlib.adapters import nvlabs
from artlib.flow import ask as _ask

VE = artlib.VE()
TARGET = artlib.Gaussian([0.0, 0.0], [[1.0, 0.3], [0.3, 0.5]])
X = TARGET.sample_prior(VE, 6, seed=0)
GRID = artlib.edm(VE).grid(4)
FLOW = artlib.ProbabilityFlow(VE, TARGET.denoiser(VE))
TABLE = artlib.stiffness_table(FLOW, X, points=8)
WRONG = {
    "None": None,
    "text": "abc",
    "nan": float("nan"),
    "list": [1, "x"],
    "complex": torch.ones(3, 2, dtype=torch.complex64),
    "object": object(),
}

CALLS: dict[str, tuple[Any, dict[str, Any]]] = {
    "denoise": (FLOW.denoise, {"x": X}),
    "acceleration": (FLOW.acceleration, {"x": X}),
    "stiffness": (FLOW.stiffness, {"x": X}),
    "stiffness_table": (artlib.stiffness_table, {"flow": FLOW, "x_T": X}),
    "cost": (artlib.cost, {"flow": FLOW, "schedule": artlib.edm(VE), "x_T": X}),
    "StiffnessTable": (
        artlib.StiffnessTable,
        {"process": VE, "times": TABLE.times, "values": TABLE.values},
    ),
    "value_of_information": (artlib.value_of_information, {"table": TABLE}),
    "PredictedClock": (artlib.PredictedClock, {"table": TABLE, "steps": 3}),
    "references": (artlib.references, {"flow": FLOW, "noises": [X]}),
    "compare": (
        artlib.compare,
        {
            "flow": FLOW,
            "schedules": {"EDM": artlib.edm(VE)},
            "noises": [X],
            "budgets": {"euler": [2]},
        },
    ),
    "gaussian_stochastic_std": (
        artlib.gaussian_stochastic_std,
        {"process": VE, "variances": [1.0], "grid": GRID},
    ),
    "sample_stochastic": (
        artlib.sample_stochastic,
        {"flow": FLOW, "x_T": X, "grid": GRID},
    ),
    "euler_jumps": (rivals.euler_jumps, {"flow": FLOW, "x_T": X}),
    "girsanov": (rivals.girsanov, {"flow": FLOW, "x_0": X}),
    "girsanov_bound": (
        rivals.girsanov_bound,
        {"process": VE, "grid": GRID, "loss": lambda level: level},
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize(
    ("call", "argument"),
    [(name, argument) for name, (_, given) in CALLS.items() for argument in given],
)
def test_a_wrong_argument_is_refused_by_name(
    call: str, argument: str, wrong: str, as_a_user: None
) -> None:
    function, given = CALLS[call]
    more = {"ends": [X.double()]} if call == "compare" else {}
    more |= {"t": 1.0} if call in ("denoise", "acceleration", "stiffness") else {}
    with pytest.raises((TypeError, ValueError), match=rf"\b{argument}\b"):
        function(**{**given, **more, argument: WRONG[wrong]})


def test_the_entry_of_a_list_is_named_refused(as_a_user: None) -> None:
    bad = [X, X * float("nan")]
    schedules, budgets = {"EDM": artlib.edm(VE)}, {"euler": [2]}
    with pytest.raises(ValueError, match=r"^noises\[1\]: 12 of 12 values are NaN"):
        artlib.references(FLOW, bad)
    with pytest.raises(ValueError, match=r"^noises\[1\]: 12 of 12 values are NaN"):
        artlib.compare(FLOW, schedules, bad, budgets, ends=[X, X])
    with pytest.raises(ValueError, match=r"^ends\[1\]: 12 of 12 values are NaN"):
        artlib.compare(FLOW, schedules, [X, X], budgets, ends=bad)
    with pytest.raises(TypeError, match=r"^noises: expected a list .* brackets"):
        artlib.compare(FLOW, schedules, X, budgets, ends=X)


# Samples in parts.


class Seen:
    """An exact denoiser that notes the largest batch."""

    def __init__(self, process: artlib.Process) -> None:
        self.exact, self.largest = TARGET.denoiser(process), 0

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        self.largest = max(self.largest, len(x))
        return self.exact(x, t)


@pytest.mark.parametrize("process", [VE, artlib.VP()])
@pytest.mark.parametrize("method", ["churn", "ancestral"])
def test_stochastic_samples_in_parts_have_the_same_noise(
    process: artlib.Process, method: Any
) -> None:
    denoiser = Seen(process)
    flow = artlib.ProbabilityFlow(process, denoiser)
    x, grid = TARGET.sample_prior(process, 7, seed=0), artlib.edm(process).grid(5)
    options: dict[str, Any] = {"method": method, "seed": 3}
    whole = artlib.sample_stochastic(flow, x.double(), grid, **options)
    denoiser.largest = 0
    parts = artlib.sample_stochastic(flow, x.double(), grid, batch=3, **options)
    torch.testing.assert_close(parts, whole, rtol=1e-12, atol=1e-12)
    assert denoiser.largest == 3


def test_a_stochastic_sampler_says_where_it_became_nan() -> None:
    def breaks(x: Tensor, t: Tensor) -> Tensor:
        return x * (float("nan") if float(t) < float(GRID[1]) else 0.5)

    flow = artlib.ProbabilityFlow(VE, breaks)
    where = rf"at step 3 of 4, from t = {float(GRID[2]):.6g}"
    with pytest.raises(ValueError, match=where):
        artlib.sample_stochastic(flow, X, GRID, seed=0)


class Labelled(nn.Module):
    def forward(self, x: Tensor, sigma: Tensor, labels: Tensor) -> Tensor:
        return x / (1 + sigma.reshape(-1, 1) ** 2) + labels.to(x)


@pytest.mark.parametrize("rows", [12, 20])
def test_more_conditions_than_samples_are_refused_in_parts_too(rows: int) -> None:
    net = nvlabs.denoiser(Labelled(), class_labels=torch.zeros(rows, 2))
    ve = artlib.ProbabilityFlow(net.process, net).to_ve()
    x, message = TARGET.sample_prior(VE, 16), rf"class_labels: {rows} rows for 16 sampl"
    for denoiser in (net, artlib.CountNFE(net), ve.denoiser):
        flow = artlib.ProbabilityFlow(net.process, denoiser)
        for batch in (None, 4):
            with pytest.raises(ValueError, match=message):
                artlib.sample(flow, x, GRID, batch=batch)
            with pytest.raises(ValueError, match=message):
                artlib.art(flow, x, points=8, batch=batch)


# How a network's dtype is known.


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(2, 2), nn.Linear(2, 2)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.second(self.first(x).to(self.second.weight.dtype))


def test_a_dtype_that_is_remembered_is_looked_at_again() -> None:
    net = Two()
    assert _ask.network_dtypes(net) == [torch.float32]
    assert _ask.network_dtypes(net.double()) == [torch.float64]
    net.second.float()
    assert set(_ask.network_dtypes(net)) == {torch.float32, torch.float64}
    net.float()
    new = {name: value.double() for name, value in net.state_dict().items()}
    net.load_state_dict(new, assign=True)
    assert _ask.network_dtypes(net) == [torch.float64]
    assert _ask.network_dtypes(pickle.loads(pickle.dumps(net))) == [torch.float64]


# Figures.


def test_a_figure_is_written_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from artlib import plotting

    figure = plotting.plot_speed([artlib.edm(VE)])
    for name, start in (("a.png", b"\x89PNG"), ("b.pdf", b"%PDF"), ("c", b"\x89PNG")):
        figure.savefig(tmp_path / name)
        written = tmp_path / (name if "." in name else f"{name}.png")
        assert written.read_bytes().startswith(start)
    figure.savefig(tmp_path / "d.dat", format="png")
    assert (tmp_path / "d.dat").read_bytes().startswith(b"\x89PNG")
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(IsADirectoryError):
        figure.savefig(tmp_path / "folder.png")
    before = (tmp_path / "a.png").read_bytes()

    def fails(self: Any, target: Any, *arguments: Any, **more: Any) -> None:
        if hasattr(target, "write"):
            target.write(b"half of it")
        raise OSError("no space left")

    monkeypatch.setattr(mpl.figure.Figure, "savefig", fails)
    with pytest.raises(OSError, match="no space left"):
        figure.savefig(tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes() == before
    assert "format" in inspect.signature(figure.savefig).parameters


# Words among which one chooses: an array is none of them, and says so.

WORDS: dict[str, Any] = {
    "acceleration": lambda w: artlib.ProbabilityFlow(VE, FLOW.denoiser, acceleration=w),
    "average": lambda w: artlib.art(FLOW, X, average=w),
    "weight": lambda w: artlib.art(FLOW, X, weight=w),
    "clock": lambda w: artlib.lower_bound(FLOW, X, clock=w),
    "method": lambda w: artlib.stiffness_table(FLOW, X, method=w),
    "last_step": lambda w: dataclasses.replace(artlib.edm(VE), last_step=w),
    "interpolation": lambda w: artlib.from_grid(VE, GRID, interpolation=w),
}


@pytest.mark.parametrize("argument", WORDS)
@pytest.mark.parametrize("wrong", [np.ones(3), torch.ones(2), ["euler"], 3, None])
def test_a_word_that_is_none_is_refused(
    argument: str, wrong: Any, as_a_user: None
) -> None:
    with pytest.raises((TypeError, ValueError), match=rf"\b{argument}\b"):
        WORDS[argument](wrong)
