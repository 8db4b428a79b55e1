/* Where the time of a task went: a short list under the task, and a waterfall of every call, live while it runs. */
import { html, useEffect, useMemo, useState } from "../vendor/htm-preact.js";
import { FINAL, getJson } from "../lib/api.js";
import { Needs, Waiting, useData } from "../lib/data.js";
import { millis } from "../lib/format.js";
import { plain } from "../lib/text.js";
import { Chip } from "../lib/ui.js";

/* A call and its serving are one line; the services' own bookkeeping is left out, as in `octollm trace`. */
export function traceRows(spans) {
  const below = new Map(), ids = new Set(spans.map((span) => span.span_id));
  for (const span of spans) {
    const parent = ids.has(span.parent_id) && span.parent_id !== span.span_id ? span.parent_id : "";
    below.set(parent, [...(below.get(parent) || []), span]);
  }
  const rows = [], seen = new Set();
  const walk = (span, depth, above) => {
    if (seen.has(span)) return;
    seen.add(span);
    const inner = below.get(span.span_id) || [];
    const served = span.kind === "client" && inner.length === 1 && inner[0].kind === "server" ? inner[0] : span;
    if ("octollm.peer" in served.attributes && !served.code) return;
    const row = { id: span.span_id, above, depth, start: span.start, seconds: span.duration_ms / 1000, service: served.service, what: `${served.service} ${served.name}`, why: served.code || span.code,
      says: served.message || span.message, attributes: { ...span.attributes, ...served.attributes } };
    rows.push(row);
    seen.add(served);
    for (const next of below.get(served.span_id) || []) if (next !== served) walk(next, depth + 1, row.id);
  };
  for (const root of below.get("") || []) walk(root, 0, "");
  return rows;
}

export function Trace({ taskId, over }) {
  const [rows, setRows] = useState(null);
  const [trouble, say] = useState("");
  const [open, setOpen] = useState(false);
  useEffect(() => {
    if (!open) return undefined;
    let gone = false;
    const look = () => getJson(`/tasks/${taskId}/trace`)
      .then((trace) => { if (!gone) { setRows(traceRows(trace.spans)); say(""); } })
      .catch((error) => { if (!gone) say(error.message); });
    look();
    const timer = setTimeout(look, 1500);
    return () => { gone = true; clearTimeout(timer); };
  }, [taskId, open, over]);
  const zero = rows?.length ? Math.min(...rows.map((row) => row.start)) : 0;
  const whole = rows?.length ? Math.max(...rows.map((row) => row.start + row.seconds)) - zero || 1 : 1;
  return html`<section class="card"><details onToggle=${(event) => setOpen(event.target.open)}><summary>Where the time went</summary>
    ${trouble && html`<p class="notice" role="alert">${trouble}</p>`}
    ${rows && !rows.length && !trouble && html`<p class="small soft">No spans of this task are kept.</p>`}
    ${rows?.length > 0 && html`<p class="small"><a href=${`#/tasks/${taskId}/trace`}>Open as a waterfall</a></p><ol class="trace">${rows.map((row) => html`<li class=${row.why ? "failed" : ""}>
      <span class="what" style=${{ paddingLeft: `${Math.min(row.depth, 12) * 12}px` }} title=${row.what}>${plain(row.what)}${row.why && ` · ${row.why}`}</span>
      <span class="when" aria-hidden="true"><i style=${{ left: `${Math.min(98, (row.start - zero) / whole * 100)}%`, width: `${row.seconds / whole * 100}%` }}></i></span>
      <span class="took">${row.seconds < 1 ? `${Math.round(row.seconds * 1000)} ms` : `${row.seconds.toFixed(2)} s`}</span></li>`)}</ol>`}
  </details></section>`;
}

const COLOURS = 6;
const MAX_SPANS = 2000;

export function Waterfall({ taskId, scope }) {
  return html`<${Needs} scope=${scope} wanted="tasks:read"><${Watched} taskId=${taskId}/><//>`;
}

function Watched({ taskId }) {
  const [over, setOver] = useState(false);
  const task = useData(`/tasks/${taskId}`, over ? 0 : 1500);
  const read = useData(`/tasks/${taskId}/trace`, over ? 0 : 1500);
  const [closed, setClosed] = useState(new Set());
  const [open, setOpen] = useState("");
  const [text, setText] = useState("");
  const ended = Boolean(task.data && FINAL.has(task.data.status));
  // The last spans arrive within a second of their end.
  useEffect(() => { if (!ended) return undefined; const timer = setTimeout(() => setOver(true), 2500); return () => clearTimeout(timer); }, [ended]);
  const rows = useMemo(() => (read.data ? traceRows(read.data.spans) : []), [read.data]);
  const services = [...new Set(rows.map((row) => row.service))];
  const zero = rows.length ? rows.reduce((low, row) => Math.min(low, row.start), Infinity) : 0;
  const whole = rows.length ? rows.reduce((high, row) => Math.max(high, row.start + row.seconds), 0) - zero || 0.001 : 1;
  const parents = new Set(rows.map((row) => row.above)), byId = new Map(rows.map((row) => [row.id, row]));
  const folded = (row) => { for (let above = byId.get(row.above); above; above = byId.get(above.above)) if (closed.has(above.id)) return true; return false; };
  const wanted = text.trim().toLowerCase();
  const shown = rows.filter((row) => (wanted ? `${row.what} ${row.why}`.toLowerCase().includes(wanted) : !folded(row)));
  const fold = (id) => setClosed((now) => { const next = new Set(now); if (!next.delete(id)) next.add(id); return next; });
  const ticks = [0, 0.25, 0.5, 0.75, 1];
  return html`<section class="card stack" aria-labelledby="trace-title"><div class="row"><a class="small" href=${"#/tasks/" + taskId}>← Task</a><h1 class="view-title grow" id="trace-title">Trace</h1>${task.data && html`<${Chip} status=${task.data.status}/>`}
      ${rows.length > 0 && html`<span class="small soft">${rows.length} calls · ${millis(whole * 1000)}</span>`}</div>
    ${task.data && html`<p class="soft small clamp">${plain(task.data.goal).slice(0, 300)}</p>`}
    ${!read.data && html`<${Waiting} of=${read}/>`}
    ${read.data && !rows.length && html`<p class="nothing soft">${ended ? "No spans of this task are kept." : "No span has arrived yet."}</p>`}
    ${read.data?.complete === false && html`<p class="notice mild">The task has more spans than are kept: some are missing.</p>`}
    ${rows.length > 0 && html`<div class="row filters"><label class="hidden" for="span-text">Filter</label><input class="grow" id="span-text" type="search" placeholder="Filter by service, operation or error code" value=${text} onInput=${(event) => setText(event.target.value)}/></div>
    <ul class="legend" aria-label="Services">${services.map((service, at) => html`<li><i class=${`series-${at % COLOURS}`} aria-hidden="true"></i>${service}</li>`)}</ul>
    <div class="waterfall"><div class="axis" aria-hidden="true"><span></span><span class="ticks">${ticks.map((tick) => html`<i style=${{ left: `${tick * 100}%` }}>${millis(tick * whole * 1000)}</i>`)}</span></div>
    <ol aria-label="Calls">${shown.slice(0, MAX_SPANS).map((row) => html`<li key=${row.id} class=${row.why ? "failed" : ""}>
      <div class="line"><span class="call" style=${{ paddingLeft: `${wanted ? 0 : Math.min(row.depth, 14) * 14}px` }}>${parents.has(row.id) && !wanted
        ? html`<button class="fold" aria-expanded=${!closed.has(row.id)} aria-label=${`Calls below ${row.what}`} onClick=${() => fold(row.id)}>${closed.has(row.id) ? "▸" : "▾"}</button>` : html`<span class="fold"></span>`}
        <button class="name" aria-expanded=${open === row.id} onClick=${() => setOpen(open === row.id ? "" : row.id)} title=${row.what}>${plain(row.what)}${row.why && html` <b>${row.why}</b>`}</button></span>
        <span class="lane"><i class=${`series-${services.indexOf(row.service) % COLOURS}`} style=${{ left: `${Math.min(99.5, (row.start - zero) / whole * 100)}%`, width: `${row.seconds / whole * 100}%` }}></i>
        <em style=${(row.start - zero + row.seconds) / whole < 0.85 ? { left: `${(row.start - zero + row.seconds) / whole * 100}%` } : { right: `${Math.max(0, 100 - (row.start - zero) / whole * 100)}%` }}>${millis(row.seconds * 1000)}</em></span></div>
      ${open === row.id && html`<dl class="details">${row.says && html`<dt>message</dt><dd>${plain(row.says)}</dd>`}<dt>start</dt><dd>+${millis((row.start - zero) * 1000)}</dd>${Object.entries(row.attributes).map(([name, value]) => html`<dt>${plain(name)}</dt><dd>${plain(Array.isArray(value) ? value.join(", ") : value)}</dd>`)}</dl>`}</li>`)}</ol></div>`}</section>`;
}
