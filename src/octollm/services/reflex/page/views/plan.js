/* The plan as a graph. */
import { html } from "../vendor/htm-preact.js";
import { WORDS, cut } from "../lib/format.js";
import { plain } from "../lib/text.js";

function layers(steps) {
  const depth = {}, known = Object.fromEntries(steps.map((step) => [step.step, step]));
  const find = (id, seen) => {
    if (depth[id] !== undefined || seen.has(id)) return depth[id] || 0;
    seen.add(id);
    const above = (known[id].depends_on || []).filter((need) => known[need]).map((need) => find(need, seen) + 1);
    return (depth[id] = Math.max(0, ...above));
  };
  const columns = [];
  for (const step of steps) (columns[find(step.step, new Set())] ||= []).push(step);
  return columns.filter(Boolean);
}

const WIDE = 208, TALL = 54, GAP_X = 46, GAP_Y = 16;
export function Graph({ steps }) {
  const columns = layers(steps);
  const rows = Math.max(...columns.map((column) => column.length));
  const place = {};
  columns.forEach((column, x) => column.forEach((step, y) => {
    place[step.step] = { x: x * (WIDE + GAP_X) + 2, y: (rows - column.length) * (TALL + GAP_Y) / 2 + y * (TALL + GAP_Y) + 2 };
  }));
  const width = columns.length * (WIDE + GAP_X) - GAP_X + 4, height = rows * (TALL + GAP_Y) - GAP_Y + 4;
  const edges = steps.flatMap((step) => (step.depends_on || []).filter((need) => place[need]).map((need) => [need, step]));
  const done = new Set(steps.filter((step) => step.status === "completed").map((step) => step.step));
  const go = (event, id) => { event.preventDefault(); const el = document.getElementById("step-" + id); el?.scrollIntoView({ behavior: "smooth" }); el?.focus({ preventScroll: true }); };
  return html`<div class="graph" role="group" aria-label="The plan as a graph; the steps are listed below">
    <svg width=${width} height=${height} viewBox="0 0 ${width} ${height}">
      ${edges.map(([from, step]) => {
        const a = place[from], b = place[step.step], x1 = a.x + WIDE, y1 = a.y + TALL / 2, x2 = b.x, y2 = b.y + TALL / 2, mid = (x1 + x2) / 2;
        return html`<path class=${done.has(from) ? "done" : ""} d="M${x1} ${y1}C${mid} ${y1} ${mid} ${y2} ${x2} ${y2}"/>`;
      })}
      ${steps.map((step) => {
        const { x, y } = place[step.step];
        return html`<a href=${"#step-" + step.step} class=${step.status} onClick=${(event) => go(event, step.step)} aria-label=${`${step.title}: ${WORDS[step.status]}`}>
          <rect x=${x} y=${y} width=${WIDE} height=${TALL} rx="11"/>
          <text x=${x + 13} y=${y + 23}>${cut(plain(step.title), 24)}</text>
          <text class="arm" x=${x + 13} y=${y + 41}>${step.arm} · ${(WORDS[step.status] || "").toLowerCase()}</text></a>`;
      })}
    </svg></div>`;
}
