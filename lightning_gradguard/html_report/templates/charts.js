// Curves of all runs on one pair of axes, and histograms of one tensor over time.

const DASHES = ["", "7 3", "2 3"];

function lineOf(index) {
  if (DATA.runs.length === 1) return { stroke: "var(--accent)" };
  return { stroke: `var(--run-${index % 6})`, "stroke-dasharray": DASHES[Math.floor(index / 6) % 3] };
}

function rangeOf(chart, curves) {
  const known = curves.flatMap((c) => c.values).filter((v) => v !== null);
  if (["clip_scale", "clip_rate"].includes(chart.name)) return [0, 1];
  const low = Math.min(...known, ...chart.limits), high = Math.max(...known, ...chart.limits);
  if (!Number.isFinite(low)) return [0, 1];
  const air = (high - low || Math.abs(high) || 1) * 0.06;
  return [low - air, high + air];
}

function drawChart(figure, chart) {
  const lines = DATA.runs.map((run, index) => ({ run, index, ...run.curves[chart.name] })).filter((line) => line.steps);
  const first = Math.min(...lines.map((line) => line.steps[0])), last = Math.max(...lines.map((line) => line.steps.at(-1)));
  const place = figure.querySelector(".plot");
  const margin = { left: 46, right: 8, top: 8, bottom: 22 };
  const p = plot(place, 170, margin, [first, Math.max(last, first + 1)], rangeOf(chart, lines), `Chart: ${chart.title}`);
  valueAxis(p);
  stepAxis(p);
  for (const limit of chart.limits) {
    add(p.svg, "line", { class: "limit", x1: p.box.left, x2: p.box.right, y1: p.y(limit), y2: p.y(limit) });
  }
  for (const line of lines) drawCurve(p, line);
  readCurves(p, figure.querySelector(".readout"), lines);
}

function drawCurve(p, line) {
  let path = "", isDown = false;
  line.values.forEach((value, i) => {
    const x = p.x(line.steps[i]).toFixed(1);
    if (value === null) {
      add(p.svg, "path", { class: "gap", d: `M${x} ${p.box.bottom - 7}l4 7h-8z` });
    } else {
      // A point with gaps on both sides is a line of no length; round ends make it visible.
      path += `${isDown ? "L" : "M"}${x} ${p.y(value).toFixed(1)}${isDown ? "" : "h0"}`;
    }
    isDown = value !== null;
  });
  add(p.svg, "path", { class: "curve", d: path || "M0 0", "stroke-linecap": "round", ...lineOf(line.index) });
}

function nearest(steps, step) {
  let low = 0, high = steps.length - 1;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (steps[middle] < step) low = middle + 1;
    else high = middle;
  }
  return low > 0 && step - steps[low - 1] < steps[low] - step ? low - 1 : low;
}

function readCurves(p, readout, lines) {
  const steps = [...new Set(lines.flatMap((line) => line.steps))].sort((a, b) => a - b);
  const rule = add(p.svg, "line", { class: "cursor", y1: p.box.top, y2: p.box.bottom, visibility: "hidden" });
  let index = steps.length;
  const show = () => {
    for (const end of ["x1", "x2"]) rule.setAttribute(end, p.x(steps[index]));
    rule.setAttribute("visibility", "visible");
    const values = lines.flatMap((line) => {
      const i = nearest(line.steps, steps[index]);
      const isOver = steps[index] > line.steps.at(-1);
      const value = isOver ? "ended" : line.values[i] === null ? "NaN or infinity" : shortNumber(line.values[i]);
      return [lines.length > 1 ? `, ${line.run.title} ` : ", ", value];
    });
    setText(readout, `step ${whole(steps[index])}`, "", ...values);
  };
  follow(
    p.svg,
    (x) => {
      index = nearest(steps, p.xs[0] + ((x - p.box.left) / (p.box.right - p.box.left)) * (p.xs[1] - p.xs[0]));
      show();
    },
    (right) => {
      index = clamp(index + right, 0, steps.length - 1);
      show();
    },
    () => {
      rule.setAttribute("visibility", "hidden");
      setText(readout);
    },
  );
}

function drawHistogram(figure, run, title) {
  const place = figure.querySelector(".plot"), readout = figure.querySelector(".readout");
  const history = run.histograms[title], edges = DATA.edges, bins = edges.length - 1;
  setText(readout, history ? "Point at a cell, or focus the picture and use the arrow keys." : "This run has no histogram of this tensor.");
  place.replaceChildren();
  if (!history) return;
  const steps = history.steps, shares = bytes(history.shares);
  const width = steps.length > 1 ? steps[1] - steps[0] : 1;
  const ends = [...steps.slice(1), Math.max(history.last + 1, steps.at(-1) + width)];
  const margin = { left: 46, right: 8, top: 8, bottom: 22 };
  const p = plot(place, 260, margin, [steps[0], ends.at(-1)], [edges[0], edges.at(-1)], `Histograms of ${title}`);
  valueAxis(p, 6);
  stepAxis(p);
  const height = p.y(edges[0]) - p.y(edges[1]);
  const cell = (column, bin) => ({ x: p.x(steps[column]), y: p.y(edges[bin + 1]), width: p.x(ends[column]) - p.x(steps[column]) + 0.2, height });
  const isEmpty = (column) => !shares.subarray(column * bins, (column + 1) * bins).some(Boolean);
  steps.forEach((_, column) => {
    const { x, width } = cell(column, 0);
    if (isEmpty(column)) add(p.svg, "rect", { class: "gap", x, width, y: p.box.top, height: p.box.bottom - p.box.top });
  });
  shares.forEach((share, i) => {
    if (share) add(p.svg, "rect", { class: "bin", "fill-opacity": 0.08 + (0.92 * share) / 255, ...cell(Math.floor(i / bins), i % bins) });
  });
  readHistogram(p, readout, { steps, ends, shares, edges, bins, cell, isEmpty });
}

function readHistogram(p, readout, h) {
  const frame = add(p.svg, "rect", { class: "cursor", visibility: "hidden" }), rest = readout.textContent;
  let column = -1, bin = 0;
  const show = () => {
    for (const [name, value] of Object.entries(h.cell(column, bin))) frame.setAttribute(name, value);
    frame.setAttribute("visibility", "visible");
    const share = 100 * (h.shares[column * h.bins + bin] / 255) ** 2;
    const low = decades(h.edges[bin], 1), high = decades(h.edges[bin + 1], 1);
    const range = bin === 0 ? `zero or below 10^${high}` : bin === h.bins - 1 ? `10^${low} and above` : `10^${low} to 10^${high}`;
    const found = h.isEmpty(column) ? ["no finite element"] : [range, ": ", `${share.toFixed(share < 10 ? 1 : 0)} % of the elements`];
    setText(readout, "", `step ${whole(h.steps[column])}`, ", ", ...found);
  };
  follow(
    p.svg,
    (x, y) => {
      const step = p.xs[0] + ((x - p.box.left) / (p.box.right - p.box.left)) * (p.xs[1] - p.xs[0]);
      column = clamp(h.ends.findIndex((end) => end > step), 0, h.steps.length - 1);
      if (step >= h.ends.at(-1)) column = h.steps.length - 1;
      bin = clamp(Math.floor(((p.box.bottom - y) / (p.box.bottom - p.box.top)) * h.bins), 0, h.bins - 1);
      show();
    },
    (right, down) => {
      const isFirst = column < 0;
      column = clamp(isFirst ? h.steps.length - 1 : column + right, 0, h.steps.length - 1);
      bin = clamp(isFirst ? h.bins >> 1 : bin - down, 0, h.bins - 1);
      show();
    },
    () => {
      frame.setAttribute("visibility", "hidden");
      setText(readout, rest);
    },
  );
}
