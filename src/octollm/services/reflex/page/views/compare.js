/* Two runs side by side: what each made of its steps, took and cost, and where their results differ. */
import { html, useMemo } from "../vendor/htm-preact.js";
import { FINAL } from "../lib/api.js";
import { Needs, Waiting, useData } from "../lib/data.js";
import { duration, money } from "../lib/format.js";
import { plain } from "../lib/text.js";
import { Chip } from "../lib/ui.js";

const MAX_LINES = 600;

/* The lines of two texts by their longest common subsequence: "same", "left" or "right" each. */
export function differ(left, right) {
  const a = left.split("\n").slice(0, MAX_LINES), b = right.split("\n").slice(0, MAX_LINES);
  const long = Array.from({ length: a.length + 1 }, () => new Uint16Array(b.length + 1));
  for (let x = a.length - 1; x >= 0; x--) for (let y = b.length - 1; y >= 0; y--) long[x][y] = a[x] === b[y] ? long[x + 1][y + 1] + 1 : Math.max(long[x + 1][y], long[x][y + 1]);
  const out = [];
  let x = 0, y = 0;
  while (x < a.length || y < b.length) {
    if (x < a.length && y < b.length && a[x] === b[y]) { out.push(["same", a[x]]); x++; y++; } else if (y >= b.length || (x < a.length && long[x + 1][y] >= long[x][y + 1])) out.push(["left", a[x++]]);
    else out.push(["right", b[y++]]);
  }
  return out;
}

export function Compare({ left, right, scope }) {
  return html`<${Needs} scope=${scope} wanted="tasks:read"><${Both} left=${left} right=${right}/><//>`;
}

const tokens = (usage) => usage.prompt_tokens + usage.completion_tokens;
const seconds = (task) => (new Date(task.finished_at || Date.now()) - new Date(task.created_at)) / 1000;
const Delta = ({ by, show }) => (by ? html` <span class=${"small " + (by > 0 ? "bad-text" : "good-text")}>${by > 0 ? "+" : "−"}${show(Math.abs(by))}</span>` : null);

function Both({ left, right }) {
  const one = useData(`/tasks/${left}`, 3000), two = useData(`/tasks/${right}`, 3000);
  const lines = useMemo(() => (one.data && two.data ? differ(one.data.output || "", two.data.output || "") : []), [one.data?.output, two.data?.output]);
  const heading = html`<h1 class="view-title" id="compare-title">Two runs</h1>`;
  if (!one.data || !two.data) return html`<section class="card stack">${heading}<${Waiting} of=${one.data ? two : one}/></section>`;
  const [a, b] = [one.data, two.data];
  const names = [...new Set([...a.steps, ...b.steps].map((step) => step.title))];
  const cell = (task, title) => { const step = task.steps.find((each) => each.title === title); return step ? html`<${Chip} status=${step.status}/> <span class="small soft">${step.arm}, attempt ${step.attempt}, ${tokens(step.usage).toLocaleString()} tokens</span>` : html`<span class="faint">–</span>`; };
  const row = (name, value, delta) => html`<tr><th scope="row">${name}</th><td>${value(a)}</td><td>${value(b)}${delta}</td></tr>`;
  return html`<section class="card stack" aria-labelledby="compare-title">${heading}
    <div class="scroll" tabindex="0" role="region" aria-label="The two runs"><table class="grid wide"><thead><tr><td></td>${[a, b].map((task) => html`<th scope="col"><a href=${"#/tasks/" + task.task_id}>${plain(task.goal).slice(0, 120)}</a></th>`)}</tr></thead><tbody>
      ${row("Status", (task) => html`<${Chip} status=${task.status}/>`)}
      ${row("Time", (task) => duration(seconds(task)), FINAL.has(a.status) && FINAL.has(b.status) && html`<${Delta} by=${seconds(b) - seconds(a)} show=${duration}/>`)}
      ${row("Tokens", (task) => tokens(task.usage).toLocaleString(), html`<${Delta} by=${tokens(b.usage) - tokens(a.usage)} show=${(n) => n.toLocaleString()}/>`)}
      ${row("Cost", (task) => money(task.usage.cost_usd), html`<${Delta} by=${b.usage.cost_usd - a.usage.cost_usd} show=${money}/>`)}
      ${row("Model", (task) => task.model || "–")}
      ${names.map((title) => html`<tr><th scope="row">${plain(title).slice(0, 80)}</th><td>${cell(a, title)}</td><td>${cell(b, title)}</td></tr>`)}</tbody></table></div>
    <h2>Results</h2>${lines.every(([kind]) => kind === "same") ? html`<p class="small soft">${a.output || b.output ? "Both results are the same." : "Neither has a result."}</p>` : html`<p class="small soft"><span class="mark left">Only in the first</span> <span class="mark right">only in the second</span></p>`}
    ${(a.output || b.output) && html`<pre class="diff" tabindex="0" aria-label="Differences of the results">${lines.map(([kind, line]) => html`<span class=${kind}>${kind === "left" ? "− " : kind === "right" ? "+ " : "  "}${plain(line)}${"\n"}</span>`)}</pre>`}</section>`;
}
