"""Parts of the samples: conditions go with them, and batches change no result."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import artlib
from artlib.flow.denoisers import CountNFE, from_epsilon, from_x0
from artlib.flow.flow import ProbabilityFlow
from artlib.flow.rows import in_batches
from artlib.rivals import euler_jumps, girsanov

F64 = torch.float64
N = 11
PROCESS = artlib.VE(sigma_max=10.0)
# Every sample has its own mean and width, so that a row taken for another shows.
MEANS = torch.linspace(-2, 2, N, dtype=F64)[:, None] * torch.tensor([1.0, -0.7])
WIDTHS = torch.linspace(0.1, 1.0, N, dtype=F64)[:, None]


class Labelled:
    """The exact denoiser of N(m_i, c_i^2), sample by sample."""

    def __init__(self, means: Tensor = MEANS, widths: Tensor = WIDTHS) -> None:
        self.means, self.widths = means.double(), widths
        self.largest: list[int] = []

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        assert len(x) == len(self.means)
        self.largest.append(len(x))
        return self.means + (x - self.means) * self.widths**2 / (self.widths**2 + t**2)

    def rows(self, index: Any) -> Labelled:
        part = Labelled(self.means[index], self.widths[index])
        part.largest = self.largest
        return part


def noise() -> Tensor:
    rng = torch.Generator().manual_seed(3)
    z = torch.randn(N, 2, generator=rng, dtype=F64)
    return MEANS + torch.sqrt(WIDTHS**2 + PROCESS.t_max**2) * z


def flow(**options: Any) -> ProbabilityFlow:
    return ProbabilityFlow(PROCESS, Labelled(), **options)


def closure(**options: Any) -> ProbabilityFlow:
    whole = Labelled()

    def denoiser(x: Tensor, t: Tensor) -> Tensor:  # no assertion: what torch says
        m, v = whole.means, whole.widths**2
        return m + (x - m) * v / (v + t**2)

    return ProbabilityFlow(PROCESS, denoiser, **options)


def midpoint(flow: ProbabilityFlow, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
    half = (t + s) / 2
    return x + (s - t) * flow.velocity(x + (half - t) * flow.velocity(x, t), half)


def table(flow: ProbabilityFlow, batch: int | None, **more: Any) -> Tensor:
    return artlib.stiffness_table(flow, noise(), points=9, batch=batch, **more).values


def errors(flow: ProbabilityFlow, batch: int | None, **more: Any) -> Tensor:
    return artlib.error_table(flow, noise(), points=9, batch=batch, **more).values


def refined(flow: ProbabilityFlow, batch: int | None, **more: Any) -> Tensor:
    start = artlib.edm(PROCESS, pinned=False)
    return artlib.refine(
        start, flow, noise(), 4, iterations=5, batch=batch, **more
    ).grid(4)


def compared(flow: ProbabilityFlow, batch: int | None) -> Tensor:
    x, size = noise(), batch or N
    ends = artlib.references(flow, [x], rtol=1e-9, batch=size)
    found = artlib.compare(
        flow, artlib.baselines(PROCESS), [x], {"heun": [3]}, ends=ends, batch=size
    )
    assert found.nfe == {"heun 3": 5}
    labels = found.labels("heun")
    return torch.tensor([found.mean("heun", 3, k, "error") for k in labels])


def sampled(flow: ProbabilityFlow, batch: int | None, **more: Any) -> Tensor:
    return artlib.sample(
        flow, noise(), artlib.edm(PROCESS).grid(5), batch=batch, **more
    )


def clocked(flow: ProbabilityFlow, batch: int | None) -> Tensor:
    clock = artlib.ExactClock(4, points=9)
    return artlib.sample(flow, noise(), clock=clock, solver="heun", batch=batch)


def actor(flow: ProbabilityFlow, paths: int | None, **more: Any) -> Tensor:
    trainer = artlib.ActorCritic(
        flow, noise(), steps=4, points=9, warm_up=1, path_batch=paths, **more
    )
    for _ in trainer.train(3):
        pass
    return trainer.clocks()


def costs(flow: ProbabilityFlow, batch: int | None) -> Tensor:
    options: dict[str, Any] = {"points": 9, "batch": batch}
    return torch.tensor(
        [
            artlib.cost(flow, artlib.edm(PROCESS), noise(), **options),
            artlib.lower_bound(flow, noise(), **options),
            artlib.lower_bound(flow, noise(), clock="feedback", **options),
        ]
    )


def density(flow: ProbabilityFlow, batch: int | None) -> Tensor:
    clean = MEANS + WIDTHS * torch.randn(N, 2, generator=torch.manual_seed(0))
    return girsanov(flow, clean, points=9, batch=batch).grid(5)


USES: dict[str, Callable[[ProbabilityFlow, int | None], Tensor]] = {
    "stiffness_table": table,
    "stiffness_table, dopri5": lambda f, b: table(f, b, method="dopri5", rtol=1e-10),
    "art": lambda f, b: artlib.art(f, noise(), points=9, batch=b).grid(6),
    "art, paper": lambda f, b: artlib.art(
        f, noise(), points=9, average="paper", batch=b
    ).grid(6),
    "art, judged": lambda f, b: artlib.art(
        f, noise(), solver="dpmpp_2m", points=9, steps=4, batch=b
    ).grid(6),
    "error_table": lambda f, b: errors(f, b, solver="heun"),
    "error_table, step": lambda f, b: errors(f, b, solver=midpoint),
    "error_table, multistep": lambda f, b: errors(f, b, solver="dpmpp_2m"),
    "error_table, terminal": lambda f, b: errors(f, b, weight="terminal", probes=1),
    "error_table, dual": lambda f, b: errors(f, b, weight="dual", solver=midpoint),
    "cost": costs,
    "refine": refined,
    "refine, step": lambda f, b: refined(f, b, solver=midpoint),
    "compare": compared,
    "sample": sampled,
    "sample, step": lambda f, b: sampled(f, b, solver=midpoint),
    "sample, clock": clocked,
    "euler_jumps": lambda f, b: euler_jumps(f, noise(), points=9, batch=b).costs,
    "girsanov": density,
    "ActorCritic": actor,
}


@pytest.mark.parametrize("use", USES)
def test_batches_change_no_result_and_keep_conditions(use: str) -> None:
    """Batches of 4, 4 and 3 against all at once; no call sees more than four."""
    split, whole = flow(), USES[use](flow(), None)
    torch.testing.assert_close(USES[use](split, 4), whole, rtol=1e-6, atol=1e-9)
    assert isinstance(split.denoiser, Labelled)
    assert max(split.denoiser.largest) <= 4


def test_the_model_in_the_loop_plays_each_row_under_its_condition() -> None:
    options: dict[str, Any] = {"environment": "model", "batch": 5}
    assert bool(torch.isfinite(actor(flow(), None, **options)).all())
    torch.testing.assert_close(
        actor(flow(), 4, **options), actor(flow(), None, **options), rtol=1e-5, atol=0
    )


@pytest.mark.parametrize("use", sorted({*USES} - {"sample, clock"}))
def test_labels_in_a_closure_are_refused(use: str) -> None:
    with pytest.raises(ValueError, match=r"denoiser: it takes .* condition for each"):
        USES[use](closure(), 4)


@pytest.mark.parametrize(
    "work",
    [
        table,
        errors,
        lambda f, b: errors(f, b, weight="terminal"),
        lambda f, b: errors(f, b, weight="dual"),
        refined,
        USES["euler_jumps"],
    ],
)
def test_one_batch_of_paths_is_held_at_a_time(
    work: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[weakref.ref[Any]] = []
    usual = ProbabilityFlow.trajectory

    def trajectory(*args: Any, **options: Any) -> Any:
        assert sum(path() is not None for path in seen) <= 1  # the one that goes
        path = usual(*args, **options)
        assert path.states.shape[1] <= 2
        seen.append(weakref.ref(path))
        return path

    monkeypatch.setattr(ProbabilityFlow, "trajectory", trajectory)
    work(flow(), 2)
    assert len(seen) >= 6


def test_evaluations_are_those_of_one_batch() -> None:
    options: dict[str, Any] = {"points": 9}
    for work in (artlib.stiffness_table, artlib.error_table, euler_jumps):
        whole = work(flow(acceleration="difference"), noise(), **options)
        split = work(flow(acceleration="difference"), noise(), batch=3, **options)
        assert split.nfe == whole.nfe


def test_the_dearest_batch_counts_wherever_it_is() -> None:
    """An adaptive solver takes other numbers of steps in each."""
    counter = CountNFE(Labelled())
    counter.nfe = 7  # spent before
    counted, calls = flow().with_denoiser(counter), iter((3, 5, 1))
    for part, (x,) in in_batches(counted, [noise()], 4, counter=counter):
        for _ in range(next(calls)):
            part.denoise(x, 1.0)
    assert counter.nfe == 7 + 5


def test_a_batch_that_rejects_forward_mode_decides_for_all() -> None:
    """The table is of one method, not of two."""

    class Picky(Labelled):
        def __call__(self, x: Tensor, t: Tensor) -> Tensor:
            dual = torch.autograd.forward_ad.unpack_dual(x).tangent is not None
            if dual and bool((self.means[-1] == MEANS[-1]).all()):
                raise RuntimeError("no forward derivative here")
            return super().__call__(x, t)

        def rows(self, index: Any) -> Picky:
            return Picky(self.means[index], self.widths[index])

    widths = WIDTHS.clone()
    widths[:8] = 0  # points: a first batch that says nothing of forward mode
    usual = ProbabilityFlow(PROCESS, Labelled(MEANS, widths), acceleration="difference")
    picky = ProbabilityFlow(PROCESS, Picky(MEANS, widths))
    with pytest.warns(artlib.ForwardModeWarning):
        found = artlib.stiffness_table(picky, noise(), points=9, batch=8)
    assert found.acceleration == "difference"
    torch.testing.assert_close(found.values, table(usual, None), rtol=1e-12, atol=1e-12)


def test_an_error_of_the_denoiser_itself_stays_as_it_is() -> None:
    def broken(x: Tensor, t: Tensor) -> Tensor:
        raise LookupError("no such weight")

    with pytest.raises(LookupError, match="no such weight"):
        table(ProbabilityFlow(PROCESS, broken), 4)


def test_a_device_out_of_memory_is_no_matter_of_conditions() -> None:
    def full(x: Tensor, t: Tensor) -> Tensor:
        if len(x) < N:
            raise torch.OutOfMemoryError("out of memory")
        return x

    with pytest.raises(torch.OutOfMemoryError):
        table(ProbabilityFlow(PROCESS, full), 4)


def test_labels_that_are_taken_once_are_refused_as_those_of_all() -> None:
    """A part of a part is compared with the whole: ``rows`` gave a closure."""

    class Once(Labelled):
        def rows(self, index: Any) -> Any:
            part = Labelled(self.means[index], self.widths[index])
            return lambda x, t: part(x, t)

    part = ProbabilityFlow(PROCESS, Once()).rows(slice(0, 6), N)
    with pytest.raises(ValueError, match=r"^denoiser: it takes 11 samples") as told:
        part.rows(slice(0, 3), 6).denoise(noise()[:3], 1.0)
    assert str(told.value).count("give it a method rows") == 1


def test_a_part_answered_with_all_rows_is_refused() -> None:
    """One sample against eleven labels broadcasts, and is no answer for one."""
    with pytest.raises(ValueError, match=r"condition for each.*\(11, 2\)"):
        closure().rows(slice(0, 1), N).denoise(noise()[:1], 1.0)


def test_a_callback_and_a_batch_are_refused() -> None:
    with pytest.raises(ValueError, match=r"callback: .*either a callback or a batch"):
        sampled(flow(), 4, callback=lambda k, t, x: None)


@pytest.mark.parametrize("batch", [0, -1])
def test_no_batch_of_nothing_is_refused(batch: int) -> None:
    for use in ("stiffness_table", "error_table", "refine", "sample", "girsanov"):
        with pytest.raises(ValueError, match="batch: expected at least 1"):
            USES[use](flow(), batch)


class Shifted(nn.Module):
    """A network under class labels: x shrunk towards a number of its own class."""

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        return_dict: bool = False,
        class_labels: Tensor | None = None,
        added_cond_kwargs: dict[str, Tensor] | None = None,
    ) -> tuple[Tensor]:
        assert class_labels is not None
        shift = class_labels[:, None]
        if added_cond_kwargs is not None:
            shift = shift + added_cond_kwargs["size"]
        return (0.5 * sample + 0.1 * shift,)


class Level(nn.Module):
    """The same as NVlabs calls it."""

    def forward(self, x: Tensor, sigma: Tensor, labels: Tensor) -> Tensor:
        return 0.5 * x + labels.argmax(1)[:, None]


def wrapped() -> dict[str, tuple[Any, Any]]:
    """Denoisers with a condition for each sample, and the process of each."""
    scale = WIDTHS[:, :1]

    class Net:
        def __init__(self, scale: Tensor) -> None:
            self.scale = scale

        def __call__(self, x: Tensor, t: Tensor) -> Tensor:
            return x * self.scale

        def rows(self, index: Any) -> Net:
            return Net(self.scale[index])

    eye = torch.eye(3)[torch.arange(N) % 3]
    found: dict[str, tuple[Any, Any]] = {
        "from_epsilon": (PROCESS, from_epsilon(PROCESS, Net(scale))),
        "from_x0": (PROCESS, from_x0(PROCESS, Net(scale))),
        "counted": (PROCESS, CountNFE(CountNFE(Labelled()))),
        "to_ve": (PROCESS, flow().to_ve().denoiser),
        "nvlabs": (PROCESS, artlib.adapters.nvlabs.denoiser(Level(), class_labels=eye)),
    }
    return found


@pytest.mark.parametrize("name", wrapped())
@pytest.mark.parametrize("index", [slice(3, 7), torch.tensor([9, 0, 4])])
def test_wrappers_pass_rows_on(name: str, index: Any) -> None:
    process, denoiser = wrapped()[name]
    whole = ProbabilityFlow(process, denoiser)
    x, t = noise(), torch.tensor(1.3, dtype=F64)
    expected = whole.denoise(x, t)
    part = whole.rows(index, N)
    torch.testing.assert_close(part.denoise(x[index], t), expected[index])
    again = part.rows(slice(1, 3), len(x[index]))  # and a part of the part
    torch.testing.assert_close(again.denoise(x[index][1:3], t), expected[index][1:3])
    # The whole is what it was.
    torch.testing.assert_close(whole.denoise(x, t), expected, rtol=0, atol=0)


def test_parts_count_into_the_whole() -> None:
    counter = CountNFE(Labelled())
    counted = ProbabilityFlow(PROCESS, counter)
    for part, (x,) in in_batches(counted, [noise()], 4):
        part.denoise(x, 1.0)
    assert counter.nfe == 3


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_conditions_of_a_diffusers_network_go_with_their_samples(
    guidance: float,
) -> None:
    diffusers = pytest.importorskip("diffusers")
    labels = torch.arange(N) % 4
    size = torch.linspace(0, 1, N)[:, None]
    net = artlib.adapters.diffusers.denoiser(
        Shifted(),
        diffusers.DDPMScheduler(),
        condition={"class_labels": labels, "added_cond_kwargs": {"size": size}},
        unconditional={
            "class_labels": torch.full((1,), 9),  # one row for all
            "added_cond_kwargs": {"size": 0.3 * size},
        },
        guidance=guidance,
    )
    model = ProbabilityFlow(net.process, net, acceleration="difference")
    x = net.process.t_max * noise() / 10
    whole = artlib.stiffness_table(model, x, points=9).values
    split = artlib.stiffness_table(model, x, points=9, batch=4).values
    torch.testing.assert_close(split, whole, rtol=1e-5, atol=1e-12)
    expected, index = model.denoise(x, 2.0), torch.tensor([7, 2])
    found = model.rows(index, N).denoise(x[index], 2.0)
    torch.testing.assert_close(found, expected[index])


def test_labels_for_another_number_of_samples_are_refused() -> None:
    """Eight labels and batches of eight would fit, for the wrong samples."""
    eye = torch.eye(3)[torch.arange(8) % 3]
    net = artlib.adapters.nvlabs.denoiser(Level(), class_labels=eye)
    model = ProbabilityFlow(PROCESS, net, acceleration="difference")
    x = torch.cat([noise(), noise()])[:16]
    with pytest.raises(ValueError, match="class_labels: 8 rows for 16 samples"):
        artlib.stiffness_table(model, x, points=9, batch=8)
