"""Figures: the data drawn is the right data, and the style is one and stays inside."""

import io

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from IPython.core.formatters import DisplayFormatter
from matplotlib.collections import LineCollection
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.text import Text

import artlib
from artlib import plotting
from artlib.control.closed_form import StiffnessTable
from artlib.plotting.style import SOFT

PROCESS = artlib.VE(sigma_min=0.002, sigma_max=80.0)
SCHEDULES = {
    "uniform": artlib.uniform(PROCESS),
    "edm": artlib.edm(PROCESS),
    "edm unpinned": artlib.edm(PROCESS, pinned=False),
    "log_snr": artlib.log_snr(PROCESS),
}
TIMES = torch.logspace(np.log10(80.0), np.log10(0.002), 40, dtype=torch.float64)
TIMES[0], TIMES[-1] = 80.0, 0.002
# 21 trajectories whose |Q| are (1 ... 21) t^-1: quantiles and means are known.
TABLE = StiffnessTable(
    PROCESS, TIMES, torch.arange(1, 22, dtype=torch.float64)[:, None] / TIMES
)
NOISE = torch.randn(5, 1, 4, 6, generator=torch.Generator().manual_seed(0)).tanh()
PATHS = torch.linspace(3, 0, 7).double(), torch.randn(7, 40, 1).double()

NEEDED = {
    "tuned": {"EDM, 35": (9.0, 8.5, 9.7), "EDM, 19": (6.0, 5.5, 6.4)},
    "ART, UniPC-3": {"EDM, 35": (14.0, 12.0, np.inf), "EDM, 19": (8.0, 7.0, 8.4)},
    "EDM, Euler": {
        "EDM, 35": (np.nan, np.inf, np.inf),
        "EDM, 19": (np.nan, 30, np.inf),
    },
}
GOALS = {"EDM, 35": 35, "EDM, 19": 19}

EXAMPLES = {
    "needed": lambda: plotting.plot_needed(NEEDED, goals=GOALS),
    "clock": lambda: plotting.plot_clock(SCHEDULES),
    "speed": lambda: plotting.plot_speed(SCHEDULES),
    "stiffness": lambda: plotting.plot_stiffness(TABLE),
    "steps": lambda: plotting.plot_steps(SCHEDULES, 6),
    "steps and table": lambda: plotting.plot_steps(SCHEDULES, 6, table=TABLE),
    "error": lambda: plotting.plot_error({"ART": ([3, 5, 9], [[0.3, 0.2, 0.1]] * 2)}),
    "paths": lambda: plotting.plot_paths(*PATHS, scale="log"),
    "samples": lambda: plotting.plot_samples({"EDM": NOISE, "reference": NOISE}),
}
every_figure = pytest.mark.parametrize("draw", EXAMPLES.values(), ids=EXAMPLES.keys())


def line(axes, label):
    (found,) = [entry for entry in axes.lines if entry.get_label() == label]
    return found


def png(figure):
    buffer = io.BytesIO()
    figure.savefig(buffer, metadata={"Software": None})
    return buffer.getvalue()


def luminance(color):
    """Relative luminance of WCAG 2.1, written down from its definition."""
    linear = [
        c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4
        for c in to_rgb(color)
    ]
    return float(np.dot([0.2126, 0.7152, 0.0722], linear))


def contrast(a, b):
    dark, light = sorted([luminance(a), luminance(b)])
    return (light + 0.05) / (dark + 0.05)


# --- the palette


def test_every_known_schedule_has_a_look_of_its_own():
    known = list(plotting.LOOKS.values())
    assert {look.label for look in known} == {
        *("Uniform", "DPM (log-SNR)", "DPM unpinned", "EDM", "EDM unpinned"),
        *("KL-optimal", "Beta", "ART", "ART paper average", "ART-RL"),
        *("oracle", "reference"),
    }
    # Stronger than distinct pairs: the marker alone tells them apart, without colour.
    assert len({look.marker for look in known}) == len(known)
    assert len({(look.color, look.marker) for look in known}) == len(known)


def test_colors_stand_out_from_the_panel_and_letters_more():
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert 0.6 < luminance(plotting.PANEL) < 0.9  # opaque, and no glaring white
    others = plotting.looks(f"mine {i}" for i in range(6))
    for look in [*plotting.LOOKS.values(), *others]:
        assert contrast(look.color, plotting.PANEL) >= 3, look
    assert contrast(plotting.INK, plotting.PANEL) >= 7
    assert contrast(SOFT, plotting.PANEL) >= 4.5  # used for letters too


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("edm", "EDM"),
        ("log_snr", "DPM (log-SNR)"),
        ("log-SNR (unpinned)", "DPM unpinned"),
        ("ART (paper average)", "ART paper average"),
        ("art_rl", "ART-RL"),
        ("kl_optimal", "KL-optimal"),
        ("EDM_UNPINNED", "EDM unpinned"),
    ],
)
def test_known_names_are_recognised_in_any_spelling(name, label):
    assert plotting.looks([name]) == [plotting.LOOKS[label]]


def test_every_constructor_has_a_known_look():
    made = [
        artlib.uniform(PROCESS),
        artlib.kl_optimal(PROCESS),
        artlib.beta(PROCESS),
        *(artlib.edm(PROCESS, pinned=p) for p in (True, False)),
        *(artlib.log_snr(PROCESS, pinned=p) for p in (True, False)),
        TABLE.art(),
        TABLE.art("paper"),
    ]
    labels = [look.label for look in plotting.looks(s.name for s in made)]
    assert set(labels) <= set(plotting.LOOKS)
    assert len(set(labels)) == len(made)


def test_looks_of_one_figure_differ_even_for_unknown_and_repeated_names():
    chosen = plotting.looks(["ART", "mine", "art", "yours"])
    assert [look.label for look in chosen] == ["ART", "mine", "art", "yours"]
    assert len({(look.color, look.marker) for look in chosen}) == 4


# --- style and pyplot


@every_figure
def test_figures_leave_no_trace_in_pyplot_and_in_the_settings(draw):
    before = dict(matplotlib.rcParams)
    figure = draw()
    png(figure)
    assert isinstance(figure, Figure)
    assert plt.get_fignums() == []
    assert dict(matplotlib.rcParams) == before


def test_many_figures_raise_no_memory_warning():
    for _ in range(25):  # pyplot warns above 20; warnings are errors here
        plotting.plot_speed(artlib.uniform(PROCESS))
    assert plt.get_fignums() == []


def test_style_is_left_when_a_figure_fails():
    before = dict(matplotlib.rcParams)
    with plotting.style():
        assert matplotlib.rcParams["figure.facecolor"] == plotting.PANEL
    with pytest.raises(KeyError), plotting.style():
        matplotlib.rcParams["no such setting"]
    assert dict(matplotlib.rcParams) == before


@every_figure
def test_figures_look_the_same_whatever_the_users_settings_are(draw):
    expected = png(draw())
    theirs = {"font.size": 20, "xtick.labelsize": 4, "xtick.direction": "in"}
    with plt.style.context(["dark_background", theirs]):
        assert png(draw()) == expected


@every_figure
def test_figures_keep_their_style_when_a_notebook_draws_them(draw):
    # What IPython's inline backend calls: the canvas, without Figure.savefig.
    expected, figure, drawn = png(draw()), draw(), io.BytesIO()
    # Fonts are looked up when a figure is drawn, not when it is made.
    theirs = {"mathtext.fontset": "cm", "font.sans-serif": ["Liberation Sans", "cmr10"]}
    with plt.style.context(["dark_background", theirs]):
        figure.canvas.print_figure(
            drawn, dpi=figure.dpi, facecolor=plotting.PANEL, metadata={"Software": None}
        )
    assert drawn.getvalue() == expected


@every_figure
def test_figures_are_legible_on_a_phone_and_show_themselves_once(draw):
    figure = draw()
    assert figure.get_figwidth() <= 6.4
    assert figure.dpi == 160
    assert to_rgb(figure.get_facecolor()) == pytest.approx(to_rgb(plotting.PANEL))
    png(figure)  # ticks exist after drawing
    sizes = [t.get_fontsize() for t in figure.findobj(Text) if t.get_text()]
    assert min(sizes) >= 10
    shown, _ = DisplayFormatter().format(figure)
    assert set(shown) == {"text/plain", "image/png"}
    assert shown["image/png"].startswith(b"\x89PNG")
    assert " at 0x" not in shown["text/plain"]


@every_figure
def test_no_letter_is_cut_off(draw):
    figure = draw()
    png(figure)
    ink = figure.get_tightbbox()  # inches; all that is drawn
    width, height = figure.get_size_inches()
    slack = 1 / figure.dpi
    assert ink.x0 > -slack
    assert ink.y0 > -slack
    assert ink.x1 < width + slack
    assert ink.y1 < height + slack


# --- the data drawn


def test_clock_draws_psi_and_time_of_each_schedule():
    upper, lower = plotting.plot_clock(SCHEDULES).axes
    for name, schedule in SCHEDULES.items():
        label = plotting.looks([name])[0].label
        share, psi = line(upper, label).get_data()
        _, t = line(lower, label).get_data()
        expected = schedule.time(torch.from_numpy(share * schedule.horizon)).numpy()
        np.testing.assert_allclose(t, expected, rtol=1e-12)
        np.testing.assert_allclose(psi, (80 - t) / schedule.horizon, atol=1e-12)
        assert share[0] == 0
        assert t[-1] == pytest.approx(0.002, rel=1e-9)
    # Uniform is the diagonal, which is what the panel is there to show.
    share, psi = line(upper, "Uniform").get_data()
    np.testing.assert_allclose(psi, share, atol=1e-12)


@pytest.mark.parametrize(("panel", "scale"), [("psi", "linear"), ("time", "log")])
def test_clock_offers_each_panel_alone(panel, scale):
    (axes,) = plotting.plot_clock(SCHEDULES["edm"], panels=panel).axes
    assert axes.get_yscale() == scale


def test_speed_is_minus_the_slope_of_the_time():
    (axes,) = plotting.plot_speed(list(SCHEDULES.values())).axes
    assert axes.get_yscale() == "log"
    for schedule in SCHEDULES.values():
        label = plotting.looks([schedule.name])[0].label
        share, theta = line(axes, label).get_data()
        # By finite differences of the time change, not by the library's own speed.
        clock = torch.from_numpy(share * schedule.horizon)[1:-1]
        h = 1e-5 * torch.minimum(clock, schedule.horizon - clock)
        slope = (schedule.time(clock - h) - schedule.time(clock + h)) / (2 * h)
        np.testing.assert_allclose(theta[1:-1], slope.numpy(), rtol=1e-3)


def test_stiffness_draws_mean_and_band():
    (axes,) = plotting.plot_stiffness(TABLE).axes
    x, y = line(axes, "mean over trajectories").get_data()
    np.testing.assert_allclose(x, TIMES.numpy())
    np.testing.assert_allclose(y, 11 / x)
    (band,) = axes.collections
    corners = band.get_paths()[0].vertices
    at_end = corners[np.isclose(corners[:, 0], 80.0)][:, 1]
    # The 10 and 90 % quantiles of 1 ... 21 are 3 and 19.
    assert at_end.min() == pytest.approx(3 / 80)
    assert at_end.max() == pytest.approx(19 / 80)
    assert axes.get_xscale() == axes.get_yscale() == "log"
    left, right = axes.get_xlim()
    assert left > 80 > 0.002 > right


def test_stiffness_survives_values_of_zero():
    values = TABLE.values.clone()
    values[:, TIMES < 0.1] = 0
    (axes,) = plotting.plot_stiffness(StiffnessTable(PROCESS, TIMES, values)).axes
    low, high = axes.get_ylim()
    assert 0 < low < 3 / 80  # the lowest that is drawn, at t_max
    assert high > 19 / 0.1
    with pytest.raises(ValueError, match="0 everywhere"):
        plotting.plot_stiffness(StiffnessTable(PROCESS, TIMES, 0 * values))


@pytest.mark.parametrize("K", [1, 2, 10])
def test_steps_are_the_grid_and_zero_has_a_mark_behind_the_break(K):
    (axes,) = plotting.plot_steps(SCHEDULES, K).axes
    for row, (name, schedule) in enumerate(SCHEDULES.items()):
        label = plotting.looks([name])[0].label
        x, y = line(axes, label).get_data()
        assert x.tolist() == schedule.grid(K)[:-1].tolist()
        assert set(y) == {-row}
        (zero,), _ = line(axes, f"{label}, 0").get_data()
        assert axes.get_xlim()[1] < zero < 0.002  # time falls to the right
        assert axes.xaxis.get_major_formatter()(zero, 0) == "0"


def test_steps_hatch_only_the_forced_step():
    (axes,) = plotting.plot_steps(SCHEDULES, 5).axes
    hatched = [c.get_label() for c in axes.collections if c.get_hatch()]
    assert hatched == ["EDM, pinned", "DPM (log-SNR), pinned"]
    notes = [t.get_text() for t in axes.texts]
    assert notes.count("5 steps, NFE 5") == 2
    assert notes.count("5 steps (last pinned), NFE 5") == 2


def test_steps_take_grids_and_count_the_solvers_evaluations():
    grid = [80.0, 4.0, 0.5, 0.0]
    (axes,) = plotting.plot_steps({"mine": grid}, solver="heun").axes
    assert line(axes, "mine").get_xdata().tolist() == grid[:-1]
    assert "3 steps, NFE 5" in [t.get_text() for t in axes.texts]


def test_steps_with_a_table_show_the_closed_forms_share_per_decade():
    upper, lower = plotting.plot_steps(SCHEDULES, 5, table=TABLE).axes
    (curve,) = upper.lines
    t, share = curve.get_data()
    # |Q| ~ 1 / t: the density is t^-1/2, its share of a decade ~ t^1/2.
    np.testing.assert_allclose(share / share[0], np.sqrt(t / t[0]), rtol=1e-6)
    assert -np.trapezoid(share, np.log10(t)) == pytest.approx(100, abs=0.1)
    assert line(lower, "EDM").get_xdata().tolist() == (
        SCHEDULES["edm"].grid(5)[:-1].tolist()
    )


def test_error_draws_mean_band_and_floor():
    counts = torch.tensor([3, 5, 9])
    errors = torch.tensor([[0.4, 0.2, 0.1], [0.6, 0.1, 0.05], [0.5, 0.3, 0.06]])
    results = {"ART": (counts, errors), "edm": (counts, errors[0])}
    (axes,) = plotting.plot_error(results, floors={"noise": 0.02}).axes
    x, y = line(axes, "ART").get_data()
    assert x.tolist() == [3, 5, 9]
    np.testing.assert_allclose(y, [0.5, 0.2, 0.07], rtol=1e-6)
    np.testing.assert_allclose(line(axes, "EDM").get_ydata(), errors[0])
    (band,) = axes.collections  # one seed has no spread
    corners = band.get_paths()[0].vertices
    first = corners[corners[:, 0] == 3][:, 1]
    assert (first.min(), first.max()) == pytest.approx((0.4, 0.6))
    assert axes.get_xscale() == axes.get_yscale() == "log"
    assert axes.get_xlabel() == "NFE"
    assert [list(entry.get_ydata()) for entry in axes.lines[2:]] == [[0.02, 0.02]]
    assert [t.get_text() for t in axes.texts] == ["noise 0.02"]
    assert axes.get_ylim()[0] < 0.02


def test_needed_draws_values_intervals_and_what_is_not_reached():
    figure = plotting.plot_needed(NEEDED, goals=GOALS)
    (axes,) = figure.axes
    edge = axes.get_xlim()[1]
    assert edge > 35
    assert [t.get_text() for t in axes.get_yticklabels()] == list(NEEDED)
    lines = axes.get_lines()
    for name in GOALS:
        (dots,) = [line for line in lines if line.get_label() == name]
        values = [found[name][0] for found in NEEDED.values()]
        np.testing.assert_array_equal(dots.get_xdata(), values)
        color = dots.get_color()
        spans = [
            tuple(line.get_xdata())
            for line in lines
            if line.get_color() == color and len(line.get_xdata()) == 2
        ]
        own = (float(GOALS[name]),) * 2
        assert own in [tuple(float(v) for v in s) for s in spans]
        drawn = [s for s in spans if s != (GOALS[name],) * 2]
        ends = [found[name][1:] for found in NEEDED.values()]
        expected = [tuple(edge if np.isinf(v) else v for v in pair) for pair in ends]
        np.testing.assert_allclose(drawn, expected)
        arrows = [
            line.get_ydata()[0]
            for line in lines
            if line.get_marker() == ">" and line.get_color() == color
        ]
        open_rows = [i for i, pair in enumerate(ends) if np.isinf(pair[1])]
        np.testing.assert_array_equal(np.round(arrows), open_rows)
    # The first row is at the top.
    low, high = axes.get_ylim()
    assert low > high


def test_paths_draw_states_and_normalised_laws():
    times, states = PATHS
    coarse = times[::3], states[::3, :2]
    left, middle, right = plotting.plot_paths(times, states, coarse=coarse).axes
    (drawn,) = [c for c in middle.collections if isinstance(c, LineCollection)]
    order = states[-1, :, 0].argsort()
    for segment, i in zip(drawn.get_segments(), order, strict=True):
        np.testing.assert_allclose(segment[:, 0], times)
        np.testing.assert_allclose(segment[:, 1], states[:, i, 0])
    for j, entry in enumerate(middle.lines):
        np.testing.assert_allclose(entry.get_ydata(), states[::3, j, 0])
    assert middle.get_xlim()[0] > 3 > 0 > middle.get_xlim()[1]
    for axes, ends in ((left, states[0]), (right, states[-1])):
        outline = axes.patches[0].get_path().vertices
        # The histogram is a density: the area of its outline is 1 (shoelace).
        x, y = outline.T
        area = 0.5 * abs(np.dot(x, np.roll(y, 1)) - np.dot(y, np.roll(x, 1)))
        assert area == pytest.approx(1)
        assert y.min() == pytest.approx(float(ends.min()))
        assert y.max() == pytest.approx(float(ends.max()))


def test_paths_show_the_exact_densities_and_at_most_so_many_paths():
    def start(x):
        return np.exp(-(x**2) / 18) / np.sqrt(18 * np.pi)

    figure = plotting.plot_paths(*PATHS, densities=(start, None), max_paths=9)
    left, middle, right = figure.axes
    density, x = left.lines[0].get_data()
    np.testing.assert_allclose(density, start(x))
    assert len(right.lines) == 0
    assert len(middle.collections[0].get_segments()) == 9


def test_paths_on_a_log_axis_put_zero_behind_the_break():
    _, middle, _ = plotting.plot_paths(*PATHS, scale="log").axes
    x = middle.collections[0].get_segments()[0][:, 0]
    np.testing.assert_allclose(x[:-1], PATHS[0][:-1])
    assert 0 < x[-1] < x[-2]
    assert middle.xaxis.get_major_formatter()(x[-1], 0) == "0"


def test_samples_draw_each_image_at_its_noise_and_row():
    rows = [NOISE, NOISE.flip(0), NOISE]
    (axes,) = plotting.plot_samples(
        rows,
        ["EDM", "EDM", "reference"],
        ["error 0.031, NFE 9", "error 0.012, NFE 9", "NFE 159"],
        groups=["Euler", "Heun", None],
        columns=4,
    ).axes
    assert len(axes.images) == 12
    for k, drawn in enumerate(axes.images):
        row, column = divmod(k, 4)
        shown = np.asarray(drawn.get_array())
        expected = (rows[row][column, 0].numpy() + 1) / 2
        np.testing.assert_allclose(shown, expected, atol=1e-7)
        left, right, bottom, top = drawn.get_extent()
        same_noise = axes.images[column].get_extent()
        assert [left, right] == same_noise[:2]
        assert bottom > top  # y points down, and the first row of pixels is on top
        assert (bottom - top) / (right - left) == pytest.approx(4 / 6)
    lefts = [drawn.get_extent()[0] for drawn in axes.images[:4]]
    assert lefts == sorted(lefts)
    tops = [axes.images[k].get_extent()[3] for k in (0, 4, 8)]
    assert tops == sorted(tops)
    words = [t.get_text() for t in axes.texts]
    assert words.count("EDM") == 2
    assert {"reference", "Euler", "Heun", "error 0.012, NFE 9"} <= set(words)


def test_samples_frame_the_marked_images_and_draw_colours():
    colour = torch.rand(5, 3, 4, 4) * 2 - 1
    marked = [torch.tensor([0, 1, 0, 0, 1]), None]
    (axes,) = plotting.plot_samples([colour, colour], marked=marked).axes
    lefts = [round(patch.get_x(), 6) for patch in axes.patches]
    assert lefts == [round(axes.images[i].get_extent()[0], 6) for i in (1, 4)]
    assert {patch.get_y() for patch in axes.patches} == {axes.images[0].get_extent()[3]}
    shown = np.asarray(axes.images[0].get_array())
    expected = (colour[0].permute(1, 2, 0).numpy() + 1) / 2
    np.testing.assert_allclose(shown, expected, atol=1e-6)


# --- what is refused


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: plotting.plot_clock([]), ValueError, "schedules: got none"),
        (lambda: plotting.plot_clock([[80.0, 0.0]]), TypeError, "got list"),
        (
            lambda: plotting.plot_speed({"a": [80.0, 0.0]}),
            TypeError,
            r"schedules\['a'\]: expected a Schedule",
        ),
        (
            lambda: plotting.plot_clock(SCHEDULES, panels="phi"),
            ValueError,
            "panels: .* got 'phi'",
        ),
        (
            lambda: plotting.plot_clock([artlib.edm(PROCESS), artlib.edm(artlib.VP())]),
            ValueError,
            "expected one process",
        ),
        (lambda: plotting.plot_steps(SCHEDULES), TypeError, "K: needed"),
        (
            lambda: plotting.plot_steps({"a": [80.0, 1.0]}),
            ValueError,
            "the last node is 1.0, expected 0",
        ),
        (
            lambda: plotting.plot_steps(artlib.edm(artlib.VP()), 5, table=TABLE),
            ValueError,
            "expected one process",
        ),
        (lambda: plotting.plot_stiffness({}), ValueError, "table: got an empty dict"),
        (
            lambda: plotting.plot_stiffness(TABLE, quantiles=(0.9, 0.1)),
            ValueError,
            "quantiles: expected",
        ),
        (lambda: plotting.plot_error({}), ValueError, "results: got an empty dict"),
        (lambda: plotting.plot_needed({}), ValueError, "needed: expected row -> goal"),
        (
            lambda: plotting.plot_needed({"a": {"g": (5.0, 4.0)}}),
            ValueError,
            r"needed\['a'\]\['g'\]: expected three positive numbers",
        ),
        (
            lambda: plotting.plot_needed(NEEDED, goals={"other": 3}),
            ValueError,
            "goals: expected some of .* got \\['other'\\]",
        ),
        (
            lambda: plotting.plot_error({"a": ([3, 5], [[0.1, 0.0]])}),
            ValueError,
            r"results\['a'\], errors: expected finite positive",
        ),
        (
            lambda: plotting.plot_error({"a": ([3, 5], [[0.1, 0.2, 0.3]])}),
            ValueError,
            r"expected nfe \[n\] and errors",
        ),
        (
            lambda: plotting.plot_paths([0.0, 1.0], [[1.0], [2.0]]),
            ValueError,
            "times: expected times descending",
        ),
        (
            lambda: plotting.plot_paths([1.0, 0.0], [[1.0], [float("nan")]]),
            ValueError,
            "states: holds NaN",
        ),
        (
            lambda: plotting.plot_paths([1.0, 0.0], [[1.0], [2.0]], scale="sqrt"),
            ValueError,
            "scale: .* got 'sqrt'",
        ),
        (
            lambda: plotting.plot_samples([NOISE], ["a", "b"]),
            ValueError,
            "labels: expected one per row, 1, got 2",
        ),
        (
            lambda: plotting.plot_samples([NOISE, NOISE[:3]]),
            ValueError,
            "expected images of one shape",
        ),
        (
            lambda: plotting.plot_samples([NOISE[:, 0, 0]]),
            ValueError,
            r"rows\[0\]: expected images",
        ),
        (
            lambda: plotting.plot_samples([NOISE], marked=[[1, 0]]),
            ValueError,
            r"marked\[0\]: expected one truth value per image, 5",
        ),
    ],
)
def test_wrong_arguments_are_refused_by_name(call, error, message):
    with pytest.raises(error, match=message):
        call()
