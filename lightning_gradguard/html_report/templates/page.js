// Draws all figures, and draws a figure again when its width changes.

function drawRunLegend(item) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  for (const [name, value] of Object.entries({ width: 26, height: 8, viewBox: "0 0 26 8", "aria-hidden": "true" })) svg.setAttribute(name, value);
  add(svg, "line", { class: "curve", x1: 0, x2: 26, y1: 4, y2: 4, ...lineOf(Number(item.dataset.line)) });
  item.prepend(svg);
}

function fillPicker(picker) {
  const titles = [...new Set(DATA.runs.flatMap((run) => Object.keys(run.histograms)))].sort();
  picker.append(...titles.map((title) => new Option(title, title)));
  // Starts with a tensor that can be compared: the first that most runs have.
  const runsWith = (title) => DATA.runs.filter((run) => title in run.histograms).length;
  picker.value = titles.reduce((best, title) => (runsWith(title) > runsWith(best) ? title : best));
}

function start() {
  const picker = document.getElementById("layer");
  document.querySelectorAll("[data-line]").forEach(drawRunLegend);
  if (picker) fillPicker(picker);
  const drawings = new Map();
  for (const figure of document.querySelectorAll("figure")) {
    const { heat, chart, histogram } = figure.dataset;
    if (heat) drawings.set(figure, () => drawHeat(figure, DATA.runs[heat]));
    if (chart) drawings.set(figure, () => drawChart(figure, DATA.charts[chart]));
    if (histogram) drawings.set(figure, () => drawHistogram(figure, DATA.runs[histogram], picker.value));
  }
  const widths = new Map();
  const redraw = (figure) => {
    // Drawing changes the height, and a changed height must not start another drawing.
    if (widths.get(figure) === figure.clientWidth) return;
    widths.set(figure, figure.clientWidth);
    drawings.get(figure)();
  };
  for (const figure of drawings.keys()) redraw(figure);
  const observer = new ResizeObserver((entries) => {
    requestAnimationFrame(() => entries.forEach((entry) => redraw(entry.target)));
  });
  for (const figure of drawings.keys()) observer.observe(figure);
  const name = document.getElementById("layer-name");
  const showName = () => {
    // A list cuts off what is too long for it.
    name.textContent = picker.value;
    name.hidden = picker.value.length < 40;
  };
  if (picker) showName();
  picker?.addEventListener("change", () => {
    showName();
    for (const [figure, draw] of drawings) if (figure.dataset.histogram) draw();
  });
}

start();
