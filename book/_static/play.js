// The page book/play.md: schedules, where their steps fall, and the exact error on
// Gaussian data, computed here. No request leaves the page. tests/test_play.py compares
// the numbers with artlib's.
"use strict";

const artPlay = (() => {
  // --- The mathematics. VE: x = x_0 + t * noise, x_0 ~ N(0, c^2). ---

  const SOLVERS = { euler: 1, heun: 2, rk4: 4, dpmpp_2m: 1 };

  const linspace = (from, to, n) =>
    Array.from({ length: n }, (_, i) => from + ((to - from) * i) / (n - 1));

  // K + 1 nodes of a formula on [low, high], the last one replaced by 0.
  const unpinned = (time, K) =>
    linspace(0, 1, K + 1).map((u, k) => (k === K ? 0 : k === 0 ? time(0) : time(u)));

  const edm = (low, high) => {
    const rho = 7;
    const [a, b] = [high ** (1 / rho), low ** (1 / rho)];
    return (u) => (a + u * (b - a)) ** rho;
  };

  // |Q| = c^2 |x_0| / (c^2 + t^2)^(3/2) along a path: the optimal density is its root,
  // (c^2 + t^2)^(-3/4). With t = c sinh(u) the integrand is cosh(u)^(-1/2).
  const art = (c, low, high) => {
    const cells = 4000;
    const us = linspace(Math.asinh(high / c), Math.asinh(low / c), cells + 1);
    const f = (u) => Math.cosh(u) ** -0.5;
    const cumulative = [0];
    for (let i = 0; i < cells; i++) {
      const h = us[i] - us[i + 1];
      const middle = f((us[i] + us[i + 1]) / 2);
      cumulative.push(cumulative[i] + (h / 6) * (f(us[i]) + 4 * middle + f(us[i + 1])));
    }
    const total = cumulative[cells];
    return (share) => {
      const wanted = share * total;
      let [first, last] = [0, cells];
      while (last - first > 1) {
        const middle = (first + last) >> 1;
        if (cumulative[middle] <= wanted) first = middle;
        else last = middle;
      }
      const step = cumulative[first + 1] - cumulative[first];
      const part = (wanted - cumulative[first]) / step;
      return c * Math.sinh(us[first] + part * (us[first + 1] - us[first]));
    };
  };

  // Colours and dashes are those of the figures (artlib.plotting.LOOKS).
  const SCHEDULES = [
    { key: "art", name: "ART", color: "#00735a", width: 3, grid: (p) => unpinned(art(p.c, p.low, p.high), p.K) },
    { key: "edm-unpinned", name: "EDM unpinned", color: "#cc5d12", dash: "6 3", grid: (p) => unpinned(edm(p.low, p.high), p.K) },
    { key: "edm", name: "EDM", color: "#b34700", grid: (p) => {
        if (p.K === 1) return [p.high, 0];
        return [...linspace(0, 1, p.K).map(edm(p.low, p.high)), 0];
      } },
    { key: "log-snr-unpinned", name: "DPM unpinned", color: "#2f81bd", dash: "9 3", grid: (p) =>
        unpinned((u) => p.high ** (1 - u) * p.low ** u, p.K) },
    { key: "kl-optimal", name: "KL-optimal", color: "#826300", dash: "8 3 2 3", grid: (p) =>
        unpinned((u) => Math.tan(u * Math.atan(p.low) + (1 - u) * Math.atan(p.high)), p.K) },
    { key: "uniform", name: "Uniform", color: "#6b675e", dash: "2 3", grid: (p) => linspace(p.high, 0, p.K + 1) },
    // Equal steps of arctan(t / c): the least error there is with Euler's method.
    { key: "oracle", name: "oracle (Euler)", color: "#2a2926", dash: "8 2", outside: true, grid: (p) =>
        linspace(Math.atan(p.high / p.c), 0, p.K + 1).map((u, k) =>
          k === 0 ? p.high : k === p.K ? 0 : p.c * Math.tan(u)) },
    // ART's nodes, and the network is told s with s^2 = t^2 - t h / 2 instead of t.
    { key: "told", name: "ART, told levels", color: "#a6397c", dash: "8 3 2 3", told: true, grid: (p) => unpinned(art(p.c, p.low, p.high), p.K) },
  ];

  // The levels that the network is told at the nodes of a grid; the step to 0 is honest.
  const levels = (grid) =>
    grid.slice(0, -1).map((t, k) => (grid[k + 1] === 0 ? t : Math.sqrt(t * t - (t * (t - grid[k + 1])) / 2)));

  // What a solver multiplies x by, from the first node to 0. The flow is linear:
  // dx/dt = a(t) x with a = t / (c^2 + t^2), and D = x c^2 / (c^2 + t^2).
  const factor = (grid, c, solver) => {
    const a = (t) => t / (c * c + t * t);
    const d = (t) => (c * c) / (c * c + t * t);
    let x = 1;
    let [previous, before] = [0, 0];
    for (let k = 0; k + 1 < grid.length; k++) {
      const [t, s] = [grid[k], grid[k + 1]];
      const h = s - t;
      if (solver === "dpmpp_2m") {
        const denoised = d(t) * x;
        let drive = denoised;
        if (k > 0 && s > 0) {
          const r = Math.log(s / t) / (2 * Math.log(t / before));
          drive += r * (denoised - previous);
        }
        x = (s / t) * x + (1 - s / t) * drive;
        [previous, before] = [denoised, t];
      } else if (solver === "euler" || s === 0) {
        x *= 1 + h * a(t);
      } else if (solver === "heun") {
        x *= 1 + (h / 2) * (a(t) + a(s) * (1 + h * a(t)));
      } else {
        // Kutta's 3/8 rule.
        const k1 = a(t);
        const k2 = a(t + h / 3) * (1 + (h / 3) * k1);
        const k3 = a(t + (2 * h) / 3) * (1 + h * (k2 - k1 / 3));
        const k4 = a(s) * (1 + h * (k1 - k2 + k3));
        x *= 1 + (h / 8) * (k1 + 3 * k2 + 3 * k3 + k4);
      }
    }
    return x;
  };

  // W2 between N(0, output^2) and N(0, c^2), from the exact prior N(0, c^2 + high^2).
  const error = (grid, c, solver) =>
    Math.abs(Math.abs(factor(grid, c, solver)) * Math.hypot(c, grid[0]) - c);

  // The same for Euler's method with told levels: x' = r x + (1 - r) D(x, s), r = t' / t.
  const toldError = (grid, c) => {
    let x = 1;
    levels(grid).forEach((s, k) => {
      const ratio = grid[k + 1] / grid[k];
      x *= ratio + ((1 - ratio) * (c * c)) / (c * c + s * s);
    });
    return Math.abs(Math.abs(x) * Math.hypot(c, grid[0]) - c);
  };

  // Of one row of the table; NaN where the solver has no told levels here.
  const rowError = (schedule, p) => {
    if (!schedule.told) return error(schedule.grid(p), p.c, p.solver);
    return p.solver === "euler" ? toldError(schedule.grid(p), p.c) : NaN;
  };

  const nfe = (K, solver) => K * SOLVERS[solver] - (SOLVERS[solver] - 1);

  // --- The page. ---

  const SVG = "http://www.w3.org/2000/svg";
  const make = (tag, attributes, text) => {
    const node = document.createElementNS(SVG, tag);
    for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
    if (text !== undefined) node.textContent = text;
    return node;
  };
  const digits = (value) => {
    if (value === 0) return "0";
    return value >= 1e-3 && value < 1e4 ? String(Number(value.toPrecision(3))) : value.toExponential(1);
  };

  // Decades from low to high on a log axis, as [value, place].
  const decades = (low, high, place) => {
    const found = [];
    for (let e = Math.ceil(Math.log10(low)); e <= Math.floor(Math.log10(high)); e++)
      found.push([10 ** e, place(10 ** e)]);
    return found;
  };

  const drawSteps = (svg, p) => {
    const width = Math.max(svg.clientWidth, 260);
    const narrow = width < 520;
    const rowHeight = narrow ? 46 : 34;
    const left = narrow ? 8 : 150;
    const right = width - 34;
    const height = SCHEDULES.length * rowHeight + 52;
    svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    svg.setAttribute("height", height);
    svg.replaceChildren();
    const low = p.low / 1.5;
    const place = (t) => left + ((Math.log(p.high / t)) / Math.log(p.high / low)) * (right - left);
    const bottom = SCHEDULES.length * rowHeight + 6;
    for (const [t, x] of decades(low, p.high, place)) {
      svg.append(make("line", { x1: x, x2: x, y1: 4, y2: bottom, class: "art-grid" }));
      svg.append(make("text", { x, y: bottom + 18, "text-anchor": "middle" }, String(Number(t.toPrecision(1)))));
    }
    svg.append(make("text", { x: right + 20, y: bottom + 18, "text-anchor": "middle" }, "0"));
    svg.append(make("text", { x: (left + right) / 2, y: bottom + 38, "text-anchor": "middle" }, "noise level t, in the data's unit"));
    SCHEDULES.forEach((schedule, row) => {
      const y = row * rowHeight + (narrow ? 32 : 20);
      svg.append(make("text", narrow
        ? { x: left, y: y - 14, "text-anchor": "start" }
        : { x: left - 12, y: y + 5, "text-anchor": "end" }, schedule.name));
      svg.append(make("line", { x1: left, x2: right + 8, y1: y, y2: y, class: "art-row" }));
      for (const t of schedule.grid(p)) {
        if (t === 0) svg.append(make("circle", { cx: right + 20, cy: y, r: 4.5, fill: "none", stroke: schedule.color, "stroke-width": 2 }));
        else if (t >= low) svg.append(make("line", { x1: place(t), x2: place(t), y1: y - 8, y2: y + 8, stroke: schedule.color, "stroke-width": 2.2 }));
      }
    });
  };

  const drawErrors = (svg, p) => {
    const width = Math.max(svg.clientWidth, 260);
    const height = 320;
    const [left, right, top, bottom] = [76, width - 12, 10, height - 46];
    svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    svg.setAttribute("height", height);
    svg.replaceChildren();
    const most = 40;
    const counts = Array.from({ length: most }, (_, i) => i + 1);
    const curves = SCHEDULES.map((s) => counts.map((K) => rowError(s, { ...p, K }) / p.c));
    const floor = 1e-7;
    const all = curves.flat().filter(Number.isFinite).map((e) => Math.max(e, floor));
    const low = 10 ** Math.floor(Math.log10(Math.min(...all)));
    const high = 10 ** Math.ceil(Math.log10(Math.max(...all)));
    const x = (K) => left + (Math.log(nfe(K, p.solver)) / Math.log(nfe(most, p.solver))) * (right - left);
    const y = (e) => top + (Math.log(high / Math.max(e, floor)) / Math.log(high / low)) * (bottom - top);
    for (const [value, at] of decades(low, high, y)) {
      svg.append(make("line", { x1: left, x2: right, y1: at, y2: at, class: "art-grid" }));
      svg.append(make("text", { x: left - 6, y: at + 5, "text-anchor": "end" }, digits(value)));
    }
    for (const K of [1, 2, 5, 10, 20, 40]) {
      svg.append(make("text", { x: x(K), y: bottom + 18, "text-anchor": K === 40 ? "end" : "middle" }, String(nfe(K, p.solver))));
    }
    svg.append(make("text", { x: (left + right) / 2, y: bottom + 38, "text-anchor": "middle" }, "NFE (network evaluations)"));
    const middle = (top + bottom) / 2;
    svg.append(make("text", { x: 14, y: middle, "text-anchor": "middle", transform: `rotate(-90 14 ${middle})` }, "error W2 / c"));
    svg.append(make("line", { x1: x(p.K), x2: x(p.K), y1: top, y2: bottom, class: "art-here" }));
    curves.forEach((curve, i) => {
      if (!curve.every(Number.isFinite)) return;
      const points = curve.map((e, k) => `${x(k + 1).toFixed(1)},${y(e).toFixed(1)}`).join(" ");
      const style = { points, fill: "none", stroke: SCHEDULES[i].color, "stroke-width": SCHEDULES[i].width ?? 1.8 };
      if (SCHEDULES[i].dash) style["stroke-dasharray"] = SCHEDULES[i].dash;
      svg.append(make("polyline", style));
    });
  };

  // Best of the schedules, and what shows the same digits; the oracle takes no part.
  const verdicts = (p) => {
    const rows = SCHEDULES.map((s) => ({ s, e: rowError(s, p) }));
    const rivals = rows.filter(({ s, e }) => !s.outside && Number.isFinite(e));
    const best = digits(Math.min(...rivals.map((r) => r.e)));
    const first = rivals.filter((r) => digits(r.e) === best);
    const word = first.length > 1 ? "tied" : "least";
    return rows.map((r) => ({ ...r, mark: first.includes(r) ? word : "" }));
  };

  const drawTable = (body, p) => {
    body.replaceChildren(...verdicts(p).map(({ s, e, mark }) => {
      const row = document.createElement("tr");
      row.dataset.schedule = s.key;
      if (mark) row.className = "art-best";
      const name = document.createElement("th");
      name.scope = "row";
      const sign = make("svg", { class: "art-mark", width: 40, height: 14, "aria-hidden": "true" });
      const line = { x1: 4, x2: 36, y1: 7, y2: 7, stroke: s.color, "stroke-width": s.width ?? 1.8 };
      if (s.dash) line["stroke-dasharray"] = s.dash;
      sign.append(make("line", line));
      name.append(sign, s.name + (mark ? ` (${mark})` : ""));
      const texts = Number.isFinite(e) ? [digits(e), `${digits((100 * e) / p.c)} %`] : ["\u2013", "\u2013"];
      const cells = texts.map((text) => {
        const cell = document.createElement("td");
        cell.textContent = text;
        return cell;
      });
      row.append(name, ...cells);
      return row;
    }));
  };

  const state = (root) => {
    const value = (name) => Number(root.querySelector(`[name=${name}]`).value);
    return {
      c: 10 ** value("spread"),
      low: 10 ** value("low"),
      high: 10 ** value("high"),
      K: value("steps"),
      solver: root.querySelector("[name=solver]").value,
    };
  };

  // c, least and largest noise level, steps, solver: what a link carries.
  const LOG = { c: "spread", low: "low", high: "high" };
  const BOOK = { c: 0.5, low: 0.002, high: 80, K: 8, solver: "euler" };

  const set = (root, wanted) => {
    const input = (name) => root.querySelector(`[name=${name}]`);
    for (const [key, name] of Object.entries(LOG)) {
      if (wanted[key] > 0) input(name).value = String(Math.log10(wanted[key]));
    }
    if (wanted.K >= 1) input("steps").value = String(Math.round(wanted.K));
    if (wanted.solver in SOLVERS) input("solver").value = wanted.solver;
  };

  const toHash = (p) =>
    `#c=${Number(p.c.toPrecision(6))}&low=${Number(p.low.toPrecision(6))}&high=${Number(p.high.toPrecision(6))}&K=${p.K}&solver=${p.solver}`;

  const fromHash = (hash) => {
    const found = new URLSearchParams(hash.replace(/^#/, ""));
    const wanted = { solver: found.get("solver") };
    for (const key of ["c", "low", "high", "K"]) wanted[key] = Number(found.get(key));
    return wanted;
  };

  const update = (root) => {
    const p = state(root);
    const shown = { spread: digits(p.c), low: digits(p.low), high: digits(p.high), steps: String(p.K) };
    for (const [name, text] of Object.entries(shown)) {
      root.querySelector(`[data-of=${name}]`).textContent = text;
      root.querySelector(`[name=${name}]`).setAttribute("aria-valuetext", text);
    }
    root.querySelector("[data-of=nfe]").textContent = String(nfe(p.K, p.solver));
    const [steps, errors] = [root.querySelector(".art-steps"), root.querySelector(".art-errors")];
    drawSteps(steps, p);
    drawErrors(errors, p);
    drawTable(root.querySelector("tbody"), p);
    const best = verdicts(p).filter((r) => r.mark).map((r) => `${r.s.name}, ${digits(r.e)}`);
    const said = `with ${p.K} steps the least error has ${best.join(" and ")}`;
    steps.setAttribute("aria-label", `Where ${p.K} steps fall, a row of ticks per schedule on a logarithmic axis of noise levels`);
    errors.setAttribute("aria-label", `Error of each schedule against network evaluations, on two logarithmic axes; ${said}`);
    const link = root.querySelector(".art-link");
    link.href = toHash(p);
  };

  const start = () => {
    const root = document.getElementById("art-play");
    if (!root) return;
    root.hidden = false;
    set(root, { ...BOOK });
    if (location.hash.includes("=")) set(root, fromHash(location.hash));
    root.addEventListener("input", () => update(root));
    addEventListener("hashchange", () => {
      if (!location.hash.includes("=")) return;
      set(root, fromHash(location.hash));
      update(root);
    });
    root.querySelector(".art-reset").addEventListener("click", () => {
      set(root, { ...BOOK });
      update(root);
    });
    new ResizeObserver(() => update(root)).observe(root);
    update(root);
  };
  if (document.readyState === "loading") document.addEventListener("DOMContentLoaded", start);
  else start();

  return { SCHEDULES, SOLVERS, error, levels, nfe, state, toldError, verdicts };
})();
