"use strict";
// Helpers of all figures: elements, axes, formatted numbers, and a cursor that mouse, finger and keyboard move.

const DATA = JSON.parse(document.getElementById("data").textContent);

function add(parent, tag, attributes = {}, text = "") {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  if (text) element.textContent = text;
  parent.append(element);
  return element;
}

function bytes(text) {
  return Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
}

function whole(number) {
  return Math.round(number).toLocaleString("en");
}

// Decades (powers of ten) with a true minus sign, and the number that they stand for.
function decades(x, digits = 2) {
  return x.toFixed(digits).replace("-", "−");
}

function power(x) {
  return `10^${decades(x)} = ${(10 ** x).toExponential(1).replace("-", "−")}`;
}

function ticks(low, high, most) {
  const rough = (high - low) / Math.max(1, most);
  const unit = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((k) => k * unit).find((s) => s >= rough);
  const found = [];
  for (let k = Math.ceil(low / step - 1e-9); k * step <= high + 1e-9 * step; k++) found.push(k * step + 0); // + 0 turns a negative zero into zero
  return found;
}

function shortNumber(x) {
  if (x !== 0 && (Math.abs(x) >= 1e5 || Math.abs(x) < 1e-3)) return x.toExponential(1).replace("-", "−");
  return String(Number(x.toPrecision(4))).replace("-", "−");
}

// An empty drawing. `box` is the part inside the axes; `x` and `y` turn values into positions.
function plot(place, height, margin, xs, ys, label) {
  const width = Math.max(200, place.clientWidth);
  place.replaceChildren();
  const svg = add(place, "svg", {
    viewBox: `0 0 ${width} ${height}`, height, tabindex: 0, role: "application", "aria-label": label,
  });
  const box = { left: margin.left, right: width - margin.right, top: margin.top, bottom: height - margin.bottom };
  const x = (value) => box.left + ((value - xs[0]) / (xs[1] - xs[0] || 1)) * (box.right - box.left);
  const y = (value) => box.bottom - ((value - ys[0]) / (ys[1] - ys[0] || 1)) * (box.bottom - box.top);
  return { svg, box, x, y, xs, ys };
}

function stepAxis(p) {
  add(p.svg, "line", { class: "axis", x1: p.box.left, x2: p.box.right, y1: p.box.bottom + 0.5, y2: p.box.bottom + 0.5 });
  const room = p.box.right - p.box.left;
  for (const step of ticks(p.xs[0], p.xs[1], Math.max(2, room / 90)).filter(Number.isInteger)) {
    const anchor = p.x(step) > p.box.right - 16 ? "end" : "middle";
    add(p.svg, "text", { x: p.x(step), y: p.box.bottom + 15, "text-anchor": anchor }, whole(step));
  }
  add(p.svg, "text", { x: p.box.left - 8, y: p.box.bottom + 15, "text-anchor": "end" }, "step");
}

function valueAxis(p, most = 4) {
  for (const value of ticks(p.ys[0], p.ys[1], most)) {
    add(p.svg, "line", { class: "axis", x1: p.box.left, x2: p.box.right, y1: p.y(value), y2: p.y(value) });
    add(p.svg, "text", { x: p.box.left - 6, y: p.y(value) + 4, "text-anchor": "end" }, shortNumber(value));
  }
}

// Mouse and finger give positions; arrow keys give moves of one cell, or of ten with Shift.
function follow(svg, point, move, leave) {
  const at = (event) => {
    const frame = svg.getBoundingClientRect();
    const scale = svg.viewBox.baseVal.width / frame.width;
    point((event.clientX - frame.left) * scale, (event.clientY - frame.top) * scale);
  };
  svg.addEventListener("pointermove", at);
  svg.addEventListener("pointerdown", at);
  svg.addEventListener("pointerleave", leave);
  svg.addEventListener("blur", leave);
  svg.addEventListener("keydown", (event) => {
    const moves = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
    if (event.key === "Escape") leave();
    if (!moves) return;
    event.preventDefault();
    move(moves[0] * (event.shiftKey ? 10 : 1), moves[1] * (event.shiftKey ? 10 : 1));
  });
}

// Sets text in parts, of which every second one is emphasized. Nothing is parsed as markup.
function setText(readout, ...parts) {
  readout.replaceChildren(
    ...parts.map((part, i) => {
      const element = document.createElement(i % 2 ? "b" : "span");
      element.textContent = part;
      return element;
    }),
  );
}

function clamp(x, low, high) {
  return Math.min(high, Math.max(low, x));
}
