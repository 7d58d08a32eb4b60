"""Networks of one's own on a table: exact answers, dtypes, steps, conditions."""

import contextlib
import copy
import io
import os
import pickle
import textwrap
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import artlib
from artlib.adapters import ddpm

F64 = torch.float64
TABLE = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=F64), 0)
LEVELS = ((1 - TABLE) / TABLE).sqrt()


def noise(*shape: int, seed: int = 5) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_the_example_of_the_documentation_runs_as_shown() -> None:
    text = str(ddpm.__doc__)
    begin = text.index("::\n") + 3
    code = textwrap.dedent(text[begin : text.index("With other noise")])
    scope: dict[str, Any] = {}
    printed = io.StringIO()
    torch.manual_seed(0)
    with contextlib.redirect_stdout(printed):
        exec(compile(code, "the example", "exec"), scope)
    assert printed.getvalue().startswith("torch.float32 (80, 2) [157.41, ")
    net, x_0 = scope["net"], scope["x_0"]
    assert bool(torch.isfinite(x_0).all())
    assert scope["schedule"].provenance["trajectories"] == 80
    # The 80 labels count, each for its own sample, and so does the guidance.
    x = scope["x_T"]
    network = scope["network"]
    labels = scope["labels"]
    step = torch.full((80,), float(torch.searchsorted(LEVELS, 3.0)))
    with torch.no_grad():
        scaled = x / (1 + LEVELS[int(step[0])] ** 2).sqrt().float()
        with_it = network(scaled, step, labels)
        without = network(scaled, step, torch.full((80,), 10))
        eps = without + 3 * (with_it - without)
        found = net(x, LEVELS[int(step[0])])
    expected = x - LEVELS[int(step[0])].float() * eps
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)


class Exact(nn.Module):
    """What a perfect network for N(0, 1/4) says at fractional steps."""

    def __init__(self, predicts: str, *, whole: bool = False) -> None:
        super().__init__()
        self.predicts, self.whole = predicts, whole
        self.weight = nn.Parameter(torch.zeros((), dtype=F64))
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor, step: Tensor) -> Tensor:
        assert step.shape == (len(x),)
        self.seen.append(step)
        if self.whole:
            assert step.dtype == torch.int64
        s = step.double().reshape(-1, *[1] * (x.ndim - 1))
        low = s.long().clamp(0, 998)
        logs = LEVELS.log()
        level = torch.lerp(logs[low], logs[low + 1], s - low).exp()
        alpha, sigma = 1 / (1 + level**2).sqrt(), level / (1 + level**2).sqrt()
        x0 = alpha / 4 / (alpha**2 / 4 + sigma**2) * x
        eps = (x - alpha * x0) / sigma
        v = alpha * eps - sigma * x0
        return {"epsilon": eps, "v_prediction": v, "sample": x0}[self.predicts]


@pytest.mark.parametrize("predicts", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("integers", [False, True])
@pytest.mark.parametrize("per_sample", [False, True])
def test_every_prediction_gives_the_exact_denoiser(
    predicts: Any, integers: bool, per_sample: bool
) -> None:
    network = Exact(predicts, whole=integers)
    net = ddpm.denoiser(network, TABLE, predicts=predicts, integers=integers)
    assert net.process == artlib.VE(float(LEVELS[0]), float(LEVELS[-1]))
    target = artlib.Gaussian([0.0] * 3, torch.eye(3) / 4)
    exact = target.denoiser(net.process)
    x = noise(4, 3).double()
    times = torch.tensor([0.02, 0.4, 7.0, 100.0], dtype=F64)[:, None]
    for t in [times] if per_sample else list(times[:, 0]):
        torch.testing.assert_close(net(x, t), exact(x, t), rtol=3e-4, atol=1e-5)
    # At whole steps nothing is interpolated; the ends of the table are reached.
    for step in (0, 17, 998, 999):
        t = LEVELS[step]
        y = x * (1 + t)
        torch.testing.assert_close(net(y, t), exact(y, t), rtol=1e-5, atol=1e-6)
    if integers:
        assert all(int(s.min()) >= 0 and int(s.max()) <= 999 for s in network.seen)
    flow = artlib.ProbabilityFlow(net.process, net)
    found = flow.stiffness(x, 2.0)
    assert flow.acceleration_method == "jvp"
    expected = artlib.ProbabilityFlow(net.process, exact).stiffness(x, 2.0)
    # Between whole steps the slope is that of a chord.
    torch.testing.assert_close(found, expected, rtol=5e-2, atol=0)


def test_one_step_to_two_neighbours() -> None:
    """A table that is no line: the answer between two steps is on the chord."""
    values = noise(1000).double()

    class Embedded(nn.Module):
        def forward(self, x: Tensor, step: Tensor, label: Tensor) -> Tensor:
            return values[step][:, None] + label[:, None] * x

    label = torch.tensor([0.0, 1.0, 2.0], dtype=F64)
    net = ddpm.denoiser(
        Embedded(),
        TABLE,
        predicts="sample",
        integers=True,
        condition={"label": label},
        unconditional={"label": torch.zeros(1, dtype=F64)},
        guidance=2.0,
    )
    x = noise(3, 1).double()
    t = (LEVELS[400].log() * 0.75 + LEVELS[401].log() * 0.25).exp()
    y = x * (1 + t**2).sqrt()
    chord = 0.75 * values[400] + 0.25 * values[401]
    expected = chord + 2 * label[:, None] * x
    torch.testing.assert_close(net(y, t), expected, rtol=1e-4, atol=1e-4)
    counted = artlib.CountNFE(net)
    counted(y, t)
    assert counted.nfe == 1
    part = net.rows(slice(1, 3))(y[1:], t)
    torch.testing.assert_close(part, net(y, t)[1:])


def test_it_is_the_denoiser_of_diffusers_with_that_table() -> None:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    diffusers = pytest.importorskip("diffusers", reason="no diffusers")
    from artlib.adapters.diffusers import denoiser

    class Theirs(nn.Module):
        def forward(
            self, sample: Tensor, timestep: Tensor, return_dict: bool, label: Tensor
        ) -> tuple[Tensor]:
            return (torch.sin(sample + timestep[:, None] / 300 + label),)

    class Ours(nn.Module):
        def forward(self, x: Tensor, step: Tensor, label: Tensor) -> tuple[Tensor]:
            return Theirs()(x, step, False, label)

    for options in ({}, {"rescale_betas_zero_snr": True}):
        scheduler = diffusers.DDIMScheduler(prediction_type="v_prediction", **options)
        more: dict[str, Any] = {
            "condition": {"label": noise(3, 4)},
            "unconditional": {"label": torch.zeros(1, 4)},
            "guidance": 2.0,
            "guidance_rescale": 0.3,
        }
        theirs = denoiser(Theirs(), scheduler, **more)
        ours = ddpm.denoiser(
            Ours(), scheduler.alphas_cumprod, predicts="v_prediction", **more
        )
        assert ours.process.t_max == pytest.approx(theirs.process.t_max, rel=1e-6)
        x = noise(3, 4).double()
        for t in (0.05, 1.0, 30.0, 3000.0 if options else 100.0):
            time = torch.tensor(t, dtype=F64)
            torch.testing.assert_close(
                ours(x * t, time), theirs(x * t, time), rtol=1e-4, atol=1e-4
            )


class Small(nn.Module):
    """A convolution that is told the step and a class."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Conv2d(2, 4, 3, padding=1)
        self.label = nn.Embedding(3, 4)
        self.last = nn.Conv2d(4, 2, 1)
        self.dtypes: set[Any] = set()

    def forward(self, x: Tensor, step: Tensor, label: Tensor) -> Tensor:
        if not torch.compiler.is_compiling():
            self.dtypes |= {x.dtype, step.dtype, x.is_contiguous()}
        told = (step / 1000).to(x.dtype)[:, None] + self.label(label)
        return self.last(torch.tanh(self.layer(x) + told[..., None, None]))


@pytest.mark.parametrize(
    ("wrap", "near"),
    [
        (lambda net: net.half(), 5e-3),
        (lambda net: net.bfloat16(), 3e-2),
        (lambda net: torch.compile(net, backend="eager"), 1e-6),
        (lambda net: net.to(memory_format=torch.channels_last), 1e-6),
        (lambda net: lambda x, step, label: net(x.float(), step, label), 1e-6),
    ],
    ids=["float16", "bfloat16", "compiled", "channels-last", "a closure"],
)
def test_networks_as_people_have_them(wrap: Callable[[Any], Any], near: float) -> None:
    more: dict[str, Any] = {"condition": {"label": torch.tensor([0, 1, 2])}}
    exact = ddpm.denoiser(Small(), TABLE, **more)
    network = Small()
    net = ddpm.denoiser(wrap(network), TABLE, **more)
    x = noise(3, 2, 6, 6)
    with torch.no_grad():
        for dtype in (torch.float32, F64):
            for t in (0.1, 5.0):
                y, time = (x * t).to(dtype), torch.tensor(t, dtype=F64)
                found = net(y, time)
                assert found.dtype == dtype
                torch.testing.assert_close(
                    found.double(), exact(y, time).double(), rtol=near, atol=near * t
                )
    half = {"float16", "bfloat16"} & {str(p.dtype)[6:] for p in network.parameters()}
    if half:
        assert network.dtypes >= {getattr(torch, half.pop()), torch.float32}


def test_batches_and_copies_keep_their_conditions() -> None:
    net = ddpm.denoiser(
        Small().double(), TABLE, condition={"label": torch.tensor([0, 1, 2, 0, 1])}
    )
    flow = artlib.ProbabilityFlow(net.process, net)
    x_T = net.process.t_max * noise(5, 2, 3, 3).double()
    whole = artlib.art(flow, x_T, points=8)
    parts = artlib.art(flow, x_T, points=8, batch=2)
    torch.testing.assert_close(whole.grid(6), parts.grid(6), rtol=1e-8, atol=0)
    twin = pickle.loads(pickle.dumps(net))
    t = torch.tensor(2.0, dtype=F64)
    assert torch.equal(twin(x_T, t), net(x_T, t))
    other = copy.deepcopy(net)
    with torch.no_grad():
        other.network.last.weight.zero_()
    assert not torch.equal(other(x_T, t), net(x_T, t))


class Scribbling(nn.Module):
    """It writes over what it is given."""

    def forward(self, x: Tensor, step: Tensor, label: Tensor) -> Tensor:
        answer = torch.sin(x + step[:, None] + label[:, None])
        for value in (x, step, label):
            value.zero_()
        return answer


def test_a_network_that_writes_in_place_gets_copies() -> None:
    label = torch.tensor([1.0, 2.0])
    for integers in (False, True):
        net = ddpm.denoiser(
            Scribbling(), TABLE, condition={"label": label}, integers=integers
        )
        x, t = noise(2, 3), torch.tensor(0.5)
        kept = x.clone()
        assert torch.equal(net(x, t), net(x, t))
        assert torch.equal(x, kept)
    assert label.tolist() == [1.0, 2.0]


def test_a_predicted_variance_is_cut_off() -> None:
    def both(x: Tensor, step: Tensor) -> Tensor:
        return torch.cat([x, 100 + x], 1)

    for integers in (False, True):
        net = ddpm.denoiser(both, TABLE, predicts="sample", integers=integers)
        x = noise(2, 3).double()
        found = net(x, torch.tensor(2.0, dtype=F64))
        torch.testing.assert_close(found, x / 5**0.5)


def test_refused() -> None:
    def network(x: Tensor, step: Tensor) -> Tensor:
        return x

    with pytest.raises(TypeError, match="network: expected a callable"):
        ddpm.denoiser(TABLE, network)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="predicts: expected one of"):
        ddpm.denoiser(network, TABLE, predicts="v")  # type: ignore[arg-type]
    for table in (TABLE.flip(0), 1 - TABLE, TABLE.cumprod(0) * 0 + 0.5):
        with pytest.raises(ValueError, match=r"alphas_cumprod: .* torch.cumprod"):
            ddpm.denoiser(network, table)
    with pytest.raises(ValueError, match=r"alphas_cumprod: expected a list \[T\]"):
        ddpm.denoiser(network, TABLE[None])
    ended = TABLE.clone()
    ended[-1] = 0
    with pytest.raises(ValueError, match=r"no signal is left .*v_prediction"):
        ddpm.denoiser(network, ended)
    assert ddpm.denoiser(network, ended, predicts="v_prediction").process.t_max > 4095
    with pytest.raises(ValueError, match=r"guidance: 2\.0 needs both condition"):
        ddpm.denoiser(network, TABLE, guidance=2.0)
    net = ddpm.denoiser(lambda x, step: {"sample": x}, TABLE)
    with pytest.raises(TypeError, match="network: expected it to return a tensor"):
        net(torch.ones(2, 3), torch.tensor(1.0))


@pytest.mark.parametrize("integers", [False, True])
def test_on_an_accelerator(accelerator: torch.device, integers: bool) -> None:
    """Conditions and table come from the CPU."""
    more: dict[str, Any] = {
        "condition": {"label": torch.tensor([0, 1, 2])},
        "unconditional": {"label": torch.tensor([0])},
        "guidance": 2.0,
        "integers": integers,
    }
    x_T = 20 * noise(3, 2, 4, 4)
    grids = []
    for device in (torch.device("cpu"), accelerator):
        net = ddpm.denoiser(Small().to(device), TABLE, **more)
        assert net(x_T.to(device), torch.tensor(2.0)).device.type == device.type
        flow = artlib.ProbabilityFlow(net.process, net)
        schedule = artlib.art(flow, x_T.to(device), points=8, method="heun", batch=2)
        grids.append(schedule.grid(6))
    torch.testing.assert_close(*grids, rtol=1e-3, atol=0)
