"use strict";
/* Values under the pointer, and the viewer of rollouts. Texts of a run enter the document as text nodes only. */

function make(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name in node && typeof value === "boolean") node[name] = value;
    else node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => child !== null));
  return node;
}

/* ---- charts: the values at the step under the pointer stand in the legend ---- */
const [LEFT, RIGHT, TOP, BOTTOM, WIDTH, HEIGHT] = [52, 10, 10, 30, 440, 230];

function show_number(value) {
  return Math.abs(value) >= 1e4 || (value !== 0 && Math.abs(value) < 1e-3) ? value.toExponential(2) : String(+value.toPrecision(4));
}

function watch_chart(svg) {
  const series = JSON.parse(svg.dataset.values);
  const [first, last] = svg.dataset.x.split(" ").map(Number);
  const shown = [...svg.parentElement.querySelectorAll(".legend .value")];
  if (!series.length || shown.length !== series.length) return;
  const [usual, cursor] = [shown.map((node) => node.textContent), svg.querySelector(".cursor")];
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const across = (((event.clientX - box.left) / box.width) * WIDTH - LEFT) / (WIDTH - LEFT - RIGHT);
    const x = first + Math.min(Math.max(across, 0), 1) * (last - first);
    let step = x;
    series.forEach((one, number) => {
      const nearest = one.points.reduce((best, point) => (Math.abs(point[0] - x) < Math.abs(best[0] - x) ? point : best));
      shown[number].textContent = `${show_number(nearest[1])} at ${show_number(nearest[0])}`;
      step = nearest[0];
    });
    const place = LEFT + ((step - first) / (last - first || 1)) * (WIDTH - LEFT - RIGHT);
    cursor.setAttribute("d", `M${place} ${TOP}V${HEIGHT - BOTTOM}`);
  });
  svg.addEventListener("pointerleave", () => {
    cursor.setAttribute("d", "");
    shown.forEach((node, number) => (node.textContent = usual[number]));
  });
}
document.querySelectorAll("figure > svg").forEach(watch_chart);
