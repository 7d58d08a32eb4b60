"""Long work in slices of time: what is made of parts is what one run makes."""

import pytest
import torch

import artlib
import artlib.comparison


def problem():
    process = artlib.VE(sigma_max=20.0)
    law = artlib.Gaussian(torch.zeros(3), torch.diag(torch.tensor([1.0, 0.3, 0.01])))
    flow = artlib.ProbabilityFlow(process, law.denoiser(process))
    return flow, law.sample_prior(process, 8, seed=0)


def in_slices(call):
    """Call again and again until it is done; how often it stopped."""
    for stops in range(100):
        try:
            return call(), stops
        except artlib.comparison.PausedError:
            continue
    raise AssertionError("a slice does nothing")


def test_references_in_slices_are_those_of_one_run(tmp_path):
    flow, noise = problem()
    noises, file = [noise[:5], noise[5:8]], tmp_path / "ends.safetensors"
    expected = artlib.references(flow, noises, batch=2)
    found, stops = in_slices(
        lambda: artlib.references(flow, noises, batch=2, file=file, seconds=1e-9)
    )
    assert stops == 4  # of five batches
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)
    # All of it is in the file, and the file is of this call only.
    counter = artlib.CountNFE(flow.denoiser)
    counted = flow.with_denoiser(counter)
    again = artlib.references(counted, noises, batch=2, file=file)
    assert torch.equal(again[1], expected[1])
    assert counter.nfe == 3  # by which the flow is known again
    for changed, word in (
        ({"noises": [noise[:5], noise[4:7]]}, "noises"),
        ({"batch": 3}, "batch"),
        ({"rtol": 1e-4}, "rtol"),
        ({"flow": flow.with_denoiser(lambda x, t: 0.9 * x)}, "denoiser"),
    ):
        call = {"flow": flow, "noises": noises, "batch": 2, **changed}
        with pytest.raises(ValueError, match=f"file: .*{word} differs"):
            artlib.references(file=file, **call)


def test_a_comparison_in_slices_is_that_of_one_run(tmp_path):
    flow, noise = problem()
    schedules = {"EDM": artlib.edm(flow.process), "DPM": artlib.log_snr(flow.process)}
    ends = artlib.references(flow, [noise])
    arguments = (flow, schedules, [noise], {"euler": [3, 4], "heun": [3]})
    expected = artlib.compare(*arguments, ends=ends)
    found, stops = in_slices(
        lambda: artlib.compare(
            *arguments, ends=ends, file=tmp_path / "t.json", seconds=1e-9
        )
    )
    assert stops == 5  # of six cells
    assert found.cells == expected.cells
    for function, more in ((artlib.references, {}), (artlib.compare, {"ends": ends})):
        given = arguments if more else (flow, [noise])
        with pytest.raises(ValueError, match=r"seconds: .* pass file="):
            function(*given, seconds=5, **more)
        with pytest.raises(ValueError, match="seconds: expected"):
            function(*given, seconds=-1, file=tmp_path / "u", **more)
