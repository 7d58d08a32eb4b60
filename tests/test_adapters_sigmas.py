"""Lists of sigmas (k-diffusion, ComfyUI) and networks of the EDM family."""

import importlib.util
import json
import math
import sys
import types
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import artlib
from artlib.adapters import comfyui, k_diffusion, nvlabs

VE = artlib.VE()


def mixture() -> artlib.GaussianMixture:
    return artlib.GaussianMixture([[-1.0, 0.5], [0.8, -0.2]], [0.1, 0.3], [0.4, 0.6])


# k-diffusion.


def test_convention_of_k_diffusion() -> None:
    schedule = artlib.edm(VE, pinned=False)
    sigmas = schedule.to_k_diffusion(7)
    assert sigmas.dtype == torch.float32
    assert sigmas.device.type == "cpu"
    assert not sigmas.requires_grad
    torch.testing.assert_close(sigmas.double(), schedule.grid(7), rtol=1e-7, atol=0)
    assert float(sigmas[-1]) == 0.0


def test_the_published_list_of_k_diffusion_is_ours() -> None:
    # k_diffusion.sampling.get_sigmas_karras(5, 0.1, 10.0), by its formula.
    ramp = torch.linspace(0, 1, 5)
    karras = (10 ** (1 / 7) + ramp * (0.1 ** (1 / 7) - 10 ** (1 / 7))) ** 7
    sigmas = artlib.edm(artlib.VE(0.1, 10.0)).to_k_diffusion(5)
    torch.testing.assert_close(sigmas[:-1], karras, rtol=1e-5, atol=0)


@pytest.mark.parametrize("K", [1, 4, 10])
@pytest.mark.parametrize("denoise", [1.0, 0.75, 0.5, 0.1])
def test_denoise_keeps_the_tail_of_a_longer_grid(K: int, denoise: float) -> None:
    schedule = artlib.log_snr(VE)
    sigmas = schedule.to_k_diffusion(K, denoise=denoise)
    total = {1.0: K, 0.75: (4 * K) // 3, 0.5: 2 * K, 0.1: 10 * K}[denoise]
    expected = schedule.grid(total)[total - K :]
    torch.testing.assert_close(sigmas.double(), expected, rtol=1e-6, atol=0)


def test_round_off_takes_no_step_of_the_longer_grid() -> None:
    assert 7 / 0.07 < 100
    schedule = artlib.log_snr(VE)
    sigmas = schedule.to_k_diffusion(7, denoise=0.07).double()
    torch.testing.assert_close(sigmas, schedule.grid(100)[93:], rtol=1e-6, atol=0)


def test_coordinates() -> None:
    vp = artlib.VP()
    sigmas = artlib.beta(vp).to_k_diffusion(6)
    grid = artlib.beta(vp).grid(6)
    expected = vp.sigma(grid) / vp.alpha(grid)
    torch.testing.assert_close(sigmas.double(), expected, rtol=1e-6, atol=0)
    flow = artlib.RectifiedFlow()
    torch.testing.assert_close(
        artlib.uniform(flow).to_k_diffusion(4), torch.linspace(1, 0, 5)
    )
    found = k_diffusion.to_k_diffusion(artlib.edm(VE), 4, coordinate="flow").double()
    level = artlib.edm(VE).grid(4)
    torch.testing.assert_close(found, level / (1 + level), rtol=1e-6, atol=0)


def test_text_reads_back_as_the_same_float32() -> None:
    schedule = artlib.kl_optimal(VE)
    text = k_diffusion.to_text(schedule, 23)
    again = torch.tensor(json.loads(text), dtype=torch.float32)
    assert torch.equal(again, schedule.to_k_diffusion(23))


def test_bad_lists_are_refused() -> None:
    schedule = artlib.edm(VE)
    for bad in (0.0, -1.0, 1.5, math.nan):
        with pytest.raises(ValueError, match="denoise: expected"):
            schedule.to_k_diffusion(5, denoise=bad)
    with pytest.raises(ValueError, match="K: expected at least 1"):
        schedule.to_k_diffusion(0)
    with pytest.raises(ValueError, match="coordinate: expected"):
        k_diffusion.to_k_diffusion(schedule, 5, coordinate="log")  # type: ignore[arg-type]
    infinite = artlib.uniform(artlib.RectifiedFlow())
    with pytest.raises(artlib.ExportError, match="no signal is left"):
        k_diffusion.to_k_diffusion(infinite, 5, coordinate="level")
    twins = artlib.from_grid(VE, [80.0, 80.0 - 1e-7, 0.0])
    with pytest.raises(artlib.ExportError, match="one number in float32"):
        twins.to_k_diffusion(2)


@pytest.fixture(scope="module")
def sampling() -> Any:
    """k-diffusion's own samplers, without the rest of the package."""
    package = importlib.util.find_spec("k_diffusion")
    if package is None or not package.submodule_search_locations:
        pytest.skip("no k-diffusion")
    path = Path(package.submodule_search_locations[0]) / "sampling.py"
    # What sampling.py imports and these three do not use.
    utils: Any = types.ModuleType("kd_alone.utils")
    utils.append_dims = lambda x, n: x[(...,) + (None,) * (n - x.ndim)]
    parent: Any = types.ModuleType("kd_alone")
    parent.utils, parent.__path__ = utils, []
    stubs = {
        "kd_alone": parent,
        "kd_alone.utils": utils,
        "torchsde": types.ModuleType("torchsde"),
    }
    spec = importlib.util.spec_from_file_location("kd_alone.sampling", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        for name, stub in stubs.items():
            if name not in sys.modules:
                patch.setitem(sys.modules, name, stub)
        spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("solver", ["euler", "heun", "dpmpp_2m"])
@pytest.mark.parametrize("K", [1, 2, 6, 20])
def test_k_diffusions_samplers_equal_ours(sampling: Any, solver: str, K: int) -> None:
    target = mixture()
    flow = artlib.ProbabilityFlow(VE, target.denoiser(VE))
    # In float32 one step from 80 to 0 cancels 1e-5 away.
    x_T = target.sample_prior(VE, 64, seed=3).double()
    schedule = artlib.art(flow, x_T, points=24)

    def model(x: Tensor, sigma: Tensor) -> Tensor:
        return flow.denoise(x, sigma[:, None])

    sample = getattr(sampling, f"sample_{solver}")
    theirs = sample(model, x_T, schedule.to_k_diffusion(K), disable=True)
    mine = artlib.sample(flow, x_T, schedule.grid(K), solver=solver)
    torch.testing.assert_close(theirs, mine, rtol=1e-5, atol=1e-5)


# ComfyUI.


def test_node_as_comfyui_loads_it(tmp_path: Path) -> None:
    home = tmp_path / "custom_nodes" / "art"
    written = comfyui.install(artlib.edm(VE, pinned=False), home, "mine")
    comfyui.install(artlib.uniform(artlib.RectifiedFlow()), home, "flow.json")
    assert written == home / "mine.json"
    spec = importlib.util.spec_from_file_location("custom_art", home / "__init__.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    kind = module.NODE_CLASS_MAPPINGS["ARTSigmas"]
    assert module.NODE_DISPLAY_NAME_MAPPINGS.keys() == module.NODE_CLASS_MAPPINGS.keys()
    inputs = kind.INPUT_TYPES()["required"]
    assert inputs["schedule"][0] == ["flow.json", "mine.json"]
    assert kind.RETURN_TYPES == ("SIGMAS",)
    node = kind()
    call = getattr(node, kind.FUNCTION)
    expected = artlib.edm(VE, pinned=False)
    for steps in (1, 7, 33):
        (sigmas,) = call("mine.json", steps)
        assert torch.equal(sigmas, expected.to_k_diffusion(steps))
    (tail,) = call("mine.json", 5, 0.25)
    assert torch.equal(tail, expected.to_k_diffusion(20)[-6:])
    (nothing,) = call("mine.json", 5, 0.0)
    assert nothing.shape == (0,)
    (own,) = call("flow.json", 4, 1.0, "of the schedule")
    torch.testing.assert_close(own, torch.linspace(1, 0, 5))
    # Its arguments are the inputs it declares.
    names = call.__code__.co_varnames[1 : call.__code__.co_argcount]
    assert [*inputs, *kind.INPUT_TYPES()["optional"]] == list(names)
    for name in ("../mine.json", "..", "", "gone.json", str(home / "mine.json")):
        with pytest.raises(ValueError, match="schedule: expected the name"):
            call(name, 5)
    with pytest.raises(ValueError, match="coordinate: expected one of"):
        call("mine.json", 5, 1.0, "other")


def test_node_says_when_its_file_has_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    comfyui.install(artlib.edm(VE), tmp_path, "a")
    monkeypatch.setattr(comfyui.ARTSigmas, "FOLDER", tmp_path)
    inputs = {"steps": 5, "denoise": 1.0, "coordinate": "of the schedule"}
    first = comfyui.ARTSigmas.IS_CHANGED("a.json", **inputs)
    assert comfyui.ARTSigmas.IS_CHANGED("a.json", steps=None) == first
    comfyui.install(artlib.edm(VE), tmp_path, "a")
    assert comfyui.ARTSigmas.IS_CHANGED("a.json") == first  # written, not changed
    comfyui.install(artlib.log_snr(VE), tmp_path, "a")
    second = comfyui.ARTSigmas.IS_CHANGED("a.json")
    assert second != first
    (tmp_path / "a.json").unlink()
    assert comfyui.ARTSigmas.IS_CHANGED("a.json") not in (first, second)
    assert comfyui.ARTSigmas.IS_CHANGED("../a.json") not in (first, second)
    # It is asked for all of the inputs by name.
    names = [n for kind in comfyui.ARTSigmas.INPUT_TYPES().values() for n in kind]
    assert list(signature(comfyui.ARTSigmas.IS_CHANGED).parameters) == names


@pytest.mark.parametrize(
    ("steps", "denoise", "message"),
    [
        (0, 1.0, "steps: expected 1 to 10000, got 0"),
        (10_001, 1.0, "steps: expected 1 to 10000"),
        (2.5, 1.0, "steps: expected a whole number"),
        (True, 1.0, "steps: expected a whole number"),
        (5, -0.1, "denoise: expected a share"),
        (5, 1.5, "denoise: expected a share"),
        (5, math.nan, "denoise: expected a share"),
        (5, "x", "denoise: expected a share"),
        (5, 1e-9, "denoise: 1e-09 of the way in 5 steps would need"),
    ],
)
def test_numbers_out_of_range_refused_by_the_node(
    steps: Any,
    denoise: Any,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    comfyui.install(artlib.edm(VE), tmp_path, "a")
    monkeypatch.setattr(comfyui.ARTSigmas, "FOLDER", tmp_path)
    with pytest.raises((TypeError, ValueError), match=message):
        comfyui.ARTSigmas().get_sigmas("a.json", steps, denoise)


def test_the_node_takes_as_many_steps_as_it_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    comfyui.install(artlib.edm(VE), tmp_path, "a")
    monkeypatch.setattr(comfyui.ARTSigmas, "FOLDER", tmp_path)
    most = comfyui.ARTSigmas.INPUT_TYPES()["required"]["steps"][1]["max"]
    (sigmas,) = comfyui.ARTSigmas().get_sigmas("a.json", most)
    assert len(sigmas) == most + 1


def test_install_replaces_only_what_is_its_own(tmp_path: Path) -> None:
    target = comfyui.install(artlib.edm(VE), tmp_path, "a")
    assert comfyui.install(artlib.log_snr(VE), tmp_path, "a.JSON") == target
    assert artlib.Schedule.load(target) == artlib.log_snr(VE)
    node = tmp_path / "__init__.py"
    own = node.read_bytes()
    # What the copies of all versions begin with.
    assert own.startswith(b'"""A node for ComfyUI: choose a schedule and a number of ')
    node.write_bytes(own.splitlines(keepends=True)[0] + b"# of another version")
    comfyui.install(artlib.log_snr(VE), tmp_path, "a")
    assert node.read_bytes() == own
    (tmp_path / "b.json").write_text("{}")
    for path, text, name in ((tmp_path / "b.json", "{}", "b"), (node, "x = 1\n", "c")):
        path.write_text(text)
        before = sorted(tmp_path.iterdir())
        with pytest.raises(FileExistsError, match="force=True") as caught:
            comfyui.install(artlib.edm(VE), tmp_path, name)
        assert caught.value.filename == str(path)
        assert path.read_text() == text
        assert sorted(tmp_path.iterdir()) == before
        comfyui.install(artlib.edm(VE), tmp_path, name, force=True)
        assert path.read_text() != text


def test_install_refused(tmp_path: Path) -> None:
    for name in ("", "a/b", " ", ".json", "..", "a\x1b[2J"):
        with pytest.raises(ValueError, match="name: expected a plain"):
            comfyui.install(artlib.edm(VE), tmp_path / "new", name)
    assert not (tmp_path / "new").exists()
    (tmp_path / "folder.json").mkdir()  # in the way of the schedule
    with pytest.raises(IsADirectoryError):
        comfyui.install(artlib.edm(VE), tmp_path, "folder", force=True)
    assert [file.name for file in tmp_path.iterdir()] == ["folder.json"]


# Networks of the EDM family.


class EDMNetwork(torch.nn.Module):
    """Exact for N(mean, 1/4) with a mean per class, preconditioning and all."""

    sigma_min, sigma_max, label_dim = 0.002, 80.0, 3

    def __init__(self, shift: float = 0.0) -> None:
        super().__init__()
        self.means = torch.nn.Parameter(torch.tensor([-1.0, 0.0, 2.0]) + shift)
        self.sigmas: list[Tensor] = []

    def forward(self, x: Tensor, sigma: Tensor, class_labels: Tensor | None) -> Tensor:
        assert sigma.shape == (len(x),)
        assert sigma.dtype == torch.float32
        self.sigmas.append(sigma)
        s = sigma[:, None]
        mean = 0.0 if class_labels is None else (class_labels @ self.means)[:, None]
        return mean + 0.25 / (0.25 + s**2) * (x - mean)

    def round_sigma(self, sigma: Any) -> Tensor:
        return torch.as_tensor(sigma)


def one_hot(*classes: int) -> Tensor:
    return torch.nn.functional.one_hot(torch.tensor(classes), 3).float()


def test_edm_network_is_the_exact_denoiser() -> None:
    net = nvlabs.denoiser(EDMNetwork(), class_labels=one_hot(2))
    target = artlib.Gaussian([2.0], [[0.25]])
    exact = target.denoiser(net.process)
    x = torch.tensor([[0.3], [-4.0], [2.5]], dtype=torch.float64)
    for t in (0.01, 1.0, 60.0):
        time = torch.tensor(t, dtype=torch.float64)
        torch.testing.assert_close(net(x, time), exact(x, time), rtol=1e-5, atol=1e-6)
    times = torch.tensor([[0.1], [1.0], [9.0]], dtype=torch.float64)
    torch.testing.assert_close(net(x, times), exact(x, times), rtol=1e-5, atol=1e-6)
    flow = artlib.ProbabilityFlow(net.process, net)
    x_T = target.sample_prior(net.process, 16, seed=0)
    found, expected = (
        artlib.art(f, x_T, points=24).grid(8)
        for f in (flow, artlib.ProbabilityFlow(net.process, exact))
    )
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=0)


def test_labels_per_sample_and_guidance() -> None:
    network, lesser = EDMNetwork(), EDMNetwork(shift=0.5)
    x = torch.tensor([[0.3], [-4.0]], dtype=torch.float64)
    t = torch.tensor(2.0, dtype=torch.float64)
    each = nvlabs.denoiser(network, class_labels=one_hot(0, 2))(x, t)
    for row, k in enumerate((0, 2)):
        single = nvlabs.denoiser(network, class_labels=one_hot(k))(x, t)
        torch.testing.assert_close(each[row], single[row])
    labels = one_hot(1)
    strong = nvlabs.denoiser(network, class_labels=labels)(x, t)
    weak = nvlabs.denoiser(lesser, class_labels=labels)(x, t)
    guided = nvlabs.denoiser(network, class_labels=labels, guide=lesser, guidance=2.5)
    torch.testing.assert_close(guided(x, t), weak + 2.5 * (strong - weak))
    # An unconditional guide is not given the labels.
    lesser.label_dim = 0
    free = nvlabs.denoiser(lesser)(x, t)
    guided = nvlabs.denoiser(network, class_labels=labels, guide=lesser, guidance=2.5)
    torch.testing.assert_close(guided(x, t), free + 2.5 * (strong - free))


def test_noise_levels_are_rounded_and_the_range_narrowed() -> None:
    class Discrete(EDMNetwork):
        sigma_min, sigma_max = 0.02, 50.0

        def round_sigma(self, sigma: Any) -> Tensor:
            return (torch.as_tensor(sigma) * 4).round() / 4

    network = Discrete()
    net = nvlabs.denoiser(network)
    assert net.process == artlib.VE(0.02, 50.0)
    net(torch.zeros(2, 1), torch.tensor(1.1))
    assert network.sigmas[-1].tolist() == [1.0, 1.0]
    # `.to` reaches network, guide and labels alike.
    moved = nvlabs.denoiser(network, class_labels=one_hot(1), guide=EDMNetwork())
    moved.to(torch.float64)
    assert {p.dtype for p in moved.parameters()} == {torch.float64}
    assert moved.class_labels.dtype == torch.float64


def test_a_network_that_scales_its_input_in_place_changes_nothing() -> None:
    class InPlace(EDMNetwork):
        def forward(
            self, x: Tensor, sigma: Tensor, class_labels: Tensor | None
        ) -> Tensor:
            found = super().forward(x.clone(), sigma.clone(), class_labels)
            x.zero_()
            sigma.zero_()
            return found

    x = torch.tensor([[0.3], [-4.0]])  # in the dtype of the network
    t = torch.tensor([[0.5], [2.0]])
    networks = {"guide": InPlace(shift=0.5), "guidance": 2.0}
    found = nvlabs.denoiser(InPlace(), **networks)(x, t)
    assert x.tolist() == [[pytest.approx(0.3)], [-4.0]]
    assert t.tolist() == [[0.5], [2.0]]
    networks["guide"] = EDMNetwork(shift=0.5)
    assert torch.equal(found, nvlabs.denoiser(EDMNetwork(), **networks)(x, t))


def test_labels_go_where_the_states_are(accelerator: torch.device) -> None:
    x, t = torch.tensor([[0.3], [-4.0]]), torch.tensor(2.0)
    labels = one_hot(0, 2)
    expected = nvlabs.denoiser(EDMNetwork(), class_labels=labels)(x, t)
    there = nvlabs.denoiser(EDMNetwork().to(accelerator), class_labels=labels)
    found = there(x.to(accelerator), t)
    assert found.device.type == accelerator.type
    torch.testing.assert_close(found.cpu(), expected)


def test_bad_networks_are_refused() -> None:
    network = EDMNetwork()
    with pytest.raises(TypeError, match="network: expected a torch module"):
        nvlabs.denoiser("edm.pkl")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="guide: expected a torch module"):
        nvlabs.denoiser(network, guide=3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="needs a guide"):
        nvlabs.denoiser(network, guidance=2.0)
    with pytest.raises(TypeError, match="class_labels: expected a tensor"):
        nvlabs.denoiser(network, class_labels=[1])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="expected one-hot rows"):
        nvlabs.denoiser(network, class_labels=torch.zeros(1, 4))
    net = nvlabs.denoiser(network, class_labels=one_hot(0, 1))
    with pytest.raises(ValueError, match="2 rows for 3 samples"):
        net(torch.zeros(3, 1), torch.tensor(1.0))
