// Layers by step, and lanes above them for faults and for skipped and clipped steps.

const LANE = 17;
// Least width of the cells, and width of a character of a name.
const CELLS = 220, CHARACTER = 6.4;

function elide(name, room) {
  const end = Math.ceil((room - 1) * 0.6);
  return name.length <= room ? name : `${name.slice(0, room - 1 - end)}…${name.slice(-end)}`;
}

function listNames(place, names) {
  const details = document.createElement("details"), summary = document.createElement("summary");
  summary.textContent = "Whole names of the layers";
  const list = document.createElement("ol");
  list.className = "names";
  for (const name of names) list.append(Object.assign(document.createElement("li"), { textContent: name }));
  details.append(summary, list);
  place.append(details);
}

function heightOf(layers) {
  const roomy = 24 * layers;
  return roomy <= 420 ? Math.max(72, roomy) : clamp(1.25 * layers, 420, 1200);
}

function drawHeat(figure, run) {
  const heat = run.heat, place = figure.querySelector(".plot");
  if (!heat || !place) return;
  const done = run.judged ? ["skipped", "clipped"] : [];
  const lanes = [...run.marks.map((mark) => mark.title), ...done];
  // Names are whole where they leave room for the cells; else they are shortened, and a list below has them whole.
  const room = clamp(Math.floor((place.clientWidth - CELLS) / CHARACTER), 12, 48);
  const labels = heat.names.map((name) => elide(name, room));
  const characters = Math.max(...[...lanes, ...labels].map((label) => label.length));
  const left = Math.max(56, CHARACTER * characters + 12);
  const top = lanes.length * LANE + 6;
  const last = heat.first + heat.columns * heat.stride;
  const margin = { left, right: 4, top, bottom: 22 };
  const label = `Heat map of ${heat.names.length} layers, steps ${whole(heat.first)} to ${whole(last - 1)}`;
  const p = plot(place, top + heightOf(heat.names.length) + 22, margin, [heat.first, last], [heat.names.length, 0], label);
  drawLanes(p, run, heat, lanes);
  const size = { x: p.box.left, y: top, width: p.box.right - p.box.left, height: p.box.bottom - top };
  add(p.svg, "image", { ...size, href: heat.image, preserveAspectRatio: "none" });
  drawLayerNames(p, heat, labels);
  if (labels.some((label, i) => label !== heat.names[i])) listNames(place, heat.names);
  stepAxis(p);
  explore(p, figure.querySelector(".readout"), heat);
}

function drawLanes(p, run, heat, lanes) {
  lanes.forEach((title, i) => {
    const y = i * LANE;
    add(p.svg, "rect", { class: "lane", x: p.box.left, y: y + 2, width: p.box.right - p.box.left, height: LANE - 4 });
    add(p.svg, "text", { x: p.box.left - 6, y: y + 12, "text-anchor": "end" }, title);
  });
  run.marks.forEach((mark, i) => {
    for (const step of mark.steps) {
      const x = clamp(p.x(step + 0.5), p.box.left + 4, p.box.right - 4), y = i * LANE + 4;
      const triangle = add(p.svg, "path", { class: `fault ${mark.severity}`, d: `M${x - 4.5} ${y}h9l-4.5 8z` });
      add(triangle, "title", {}, `${mark.title} (${mark.severity}), step ${whole(step)}`);
    }
  });
  lanes.slice(run.marks.length).forEach((kind, i) => {
    const y = (run.marks.length + i) * LANE + 2;
    for (const column of heat[kind]) {
      const x = p.x(heat.first + column * heat.stride);
      const width = Math.max(2, p.x(heat.first + (column + 1) * heat.stride) - x);
      const fill = kind === "skipped" ? "var(--nonfinite)" : "var(--clipped)";
      add(p.svg, "rect", { x, y, width, height: LANE - 4, fill });
    }
  });
}

function drawLayerNames(p, heat, labels) {
  const row = (p.box.bottom - p.box.top) / heat.names.length;
  const every = Math.ceil(14 / row);
  for (let i = 0; i < heat.names.length; i += every) {
    const text = add(p.svg, "text", { x: p.box.left - 6, y: p.y(i + 0.5) + 4, "text-anchor": "end" }, labels[i]);
    if (labels[i] !== heat.names[i]) add(text, "title", {}, heat.names[i]);
  }
}

function explore(p, readout, heat) {
  const cells = new Int16Array(bytes(heat.cells).buffer), rest = readout.textContent;
  const frame = add(p.svg, "rect", { class: "cursor", visibility: "hidden" });
  let column = heat.columns, layer = -1; // the first key starts at the newest step of the first layer
  const show = () => {
    const begin = heat.first + column * heat.stride, x = p.x(begin), y = p.y(layer);
    const size = { x, y, width: Math.max(3, p.x(begin + heat.stride) - x), height: Math.max(3, p.y(layer + 1) - y) };
    for (const [name, value] of Object.entries(size)) frame.setAttribute(name, value);
    frame.setAttribute("visibility", "visible");
    const cell = cells[layer * heat.columns + column];
    const value = cell === DATA.blankCell ? "no gradient" : cell === DATA.nonfiniteCell ? "NaN or infinity" : power(cell / 100);
    const steps = heat.stride === 1 ? `step ${whole(begin)}` : `steps ${whole(begin)} to ${whole(begin + heat.stride - 1)}`;
    setText(readout, "", heat.names[layer], ", ", steps, ", ", value);
  };
  follow(
    p.svg,
    (x, y) => {
      column = clamp(Math.floor(((x - p.box.left) / (p.box.right - p.box.left)) * heat.columns), 0, heat.columns - 1);
      layer = clamp(Math.floor(((y - p.box.top) / (p.box.bottom - p.box.top)) * heat.names.length), 0, heat.names.length - 1);
      show();
    },
    (right, down) => {
      const isFirst = layer < 0;
      column = clamp(isFirst ? heat.columns - 1 : column + right, 0, heat.columns - 1);
      layer = clamp(isFirst ? 0 : layer + down, 0, heat.names.length - 1);
      show();
    },
    () => {
      frame.setAttribute("visibility", "hidden");
      setText(readout, rest);
    },
  );
}
