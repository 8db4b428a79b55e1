/* The services: state, replicas, breakers, and their rate, errors and latencies over time. */
import { html, useEffect, useRef, useState } from "../vendor/htm-preact.js";
import { Lines } from "../lib/chart.js";
import { Waiting, useData } from "../lib/data.js";
import { ago, millis, moment } from "../lib/format.js";
import { plain } from "../lib/text.js";

const EVERY = 5000, KEPT = 720; // points of each service: an hour
const TONE = { up: "ready", degraded: "degraded", down: "unready", unknown: "" };
const rate = (value) => (value === null || value === undefined ? "–" : value < 10 ? value.toFixed(1) + "\u00a0/s" : Math.round(value) + "\u00a0/s");
const percent = (value) => (value === null || value === undefined ? "–" : (value * 100).toFixed(value > 0 && value < 0.1 ? 2 : 0) + " %");
const MEASURED = ["requests_per_second", "error_ratio", "p50_ms", "p95_ms", "p99_ms"];

/* Lives as long as the page, so that leaving the view and coming back keeps the lines. */
const kept = new Map();
function keep(services, at) {
  for (const service of services) {
    let series = kept.get(service.service);
    if (!series) {
      // What the monitor has seen before this page was opened: the probes, which have the latency only.
      series = { times: [], probe: [], ...Object.fromEntries(MEASURED.map((name) => [name, []])) };
      for (const sample of service.history || []) {
        series.times.push(new Date(sample.at) / 1000);
        series.probe.push(sample.state === "down" ? null : sample.latency_ms);
        for (const name of MEASURED) series[name].push(null);
      }
      kept.set(service.service, series);
    }
    if (at / 1000 <= (series.times[series.times.length - 1] || 0)) continue;
    series.times.push(at / 1000);
    series.probe.push(service.state === "down" ? null : service.latency_ms);
    for (const name of MEASURED) series[name].push(service[name] ?? null);
    for (const values of Object.values(series)) if (values.length > KEPT) values.splice(0, values.length - KEPT);
  }
}

/* Whether the caller may read the monitor, the monitor says: the scopes of the session are those for the orchestrator. */
export function Services() {
  const read = useData("/services", EVERY);
  const [open, setOpen] = useState("");
  const seen = useRef(0);
  if (read.data && seen.current !== read.at) { seen.current = read.at; keep(read.data.services, read.at); }
  useEffect(() => { if (!open && read.data?.services.length) setOpen(read.data.services[0].service); }, [Boolean(read.data)]);
  if (!read.data) return html`<section class="card stack"><h1 class="view-title">Services</h1>
    ${read.error?.status === 404 ? html`<p class="notice mild" role="status">This gateway does not offer the monitor's data.</p>` : html`<${Waiting} of=${read}/>`}</section>`;
  const services = read.data.services, chosen = services.find((service) => service.service === open);
  const bad = services.filter((service) => service.state === "down" || service.state === "degraded");
  return html`<div class="stack"><section class="card stack" aria-labelledby="services-title"><div class="row"><h1 class="view-title grow" id="services-title">Services</h1>
      ${read.error && html`<span class="chip degraded" role="status"><i></i>as of ${new Date(read.at).toLocaleTimeString()}</span>`}
      <span class="small soft">${bad.length ? `${bad.length} of ${services.length} not well` : `All ${services.length} are up`}</span></div>
    <ul class="tiles" aria-label="Services">${services.map((service) => html`<li key=${service.service}><button class=${"tile " + service.state} aria-pressed=${service.service === open} onClick=${() => setOpen(service.service)}>
      <span class="row"><b class="grow">${service.service}</b><span class=${"chip " + TONE[service.state]}><i></i>${service.state}</span></span>
      <${Spark} service=${service.service}/>
      <span class="small soft">${service.instances} ${service.instances === 1 ? "replica" : "replicas"} · ${"p95_ms" in service && service.p95_ms !== null ? `p95 ${millis(service.p95_ms)} · ${rate(service.requests_per_second)}` : `probe ${millis(service.latency_ms)}`}${service.breakers?.length ? html` · <b class="bad-text">${service.breakers.length} open</b>` : ""}</span></button></li>`)}</ul></section>
    ${chosen && html`<${Service} key=${chosen.service} service=${chosen}/>`}</div>`;
}

/* The last probes as a row of marks, each as high as it was slow. */
function Spark({ service }) {
  const values = (kept.get(service)?.probe || []).slice(-40), most = Math.max(1, ...values.map((value) => value || 0));
  return html`<svg class="spark" viewBox="0 0 160 22" preserveAspectRatio="none" aria-hidden="true">${values.map((value, at) => html`<rect class=${value === null ? "down" : ""} x=${at * 4} width="3"
    y=${value === null ? 0 : 20 - (value / most) * 18} height=${value === null ? 22 : 2 + (value / most) * 18}/>`)}</svg>`;
}

function Service({ service }) {
  const series = kept.get(service.service) || { times: [], probe: [], ...Object.fromEntries(MEASURED.map((name) => [name, []])) };
  const has = (name) => series[name].some((value) => value !== null);
  const measured = has("p50_ms") || has("requests_per_second");
  return html`<section class="card stack" aria-labelledby="service-title"><div class="row"><h2 class="grow" id="service-title">${service.service}</h2>
      <span class="small soft">${service.since ? html`${service.state} since <time datetime=${service.since} title=${moment(service.since)}>${ago(service.since)}</time>` : "not probed yet"}</span></div>
    ${service.detail && html`<p class="notice" role="status">${plain(service.detail)}</p>`}
    ${service.breakers?.length > 0 && html`<div class="verdict bad"><strong>Open circuit breakers</strong><ul>${service.breakers.map((breaker) => html`<li>${breaker.caller} does not call <span class="mono">${breaker.instance}</span>, since ${ago(breaker.since)}</li>`)}</ul></div>`}
    <div class="facts"><span>Replicas <b>${service.instances}</b></span><span>Probe <b>${millis(service.latency_ms)}</b></span>
      ${"requests_per_second" in service && html`<span>Requests <b>${rate(service.requests_per_second)}</b></span><span>Errors <b>${percent(service.error_ratio)}</b></span><span>p50 <b>${millis(service.p50_ms)}</b></span><span>p95 <b>${millis(service.p95_ms)}</b></span><span>p99 <b>${millis(service.p99_ms)}</b></span>`}
      ${service.last_event && html`<span>Last event <b>${service.last_event}</b> ${ago(service.last_event_at)}</span>`}</div>
    <div class="plots">
      ${measured && html`<${Lines} times=${series.times} label="Latency" format=${millis} series=${[
        { label: "p50", colour: "--chart-1", values: series.p50_ms }, { label: "p95", colour: "--chart-2", values: series.p95_ms }, { label: "p99", colour: "--chart-3", values: series.p99_ms }]}/>
      <${Lines} times=${series.times} label="Requests" format=${rate} series=${[{ label: "rate", colour: "--chart-1", values: series.requests_per_second }]}/>
      <${Lines} times=${series.times} label="Errors" format=${percent} series=${[{ label: "5xx", colour: "--chart-3", values: series.error_ratio }]}/>`}
      <${Lines} times=${series.times} label="Health probe" format=${millis} series=${[{ label: "latency", colour: "--chart-1", values: series.probe }]}/></div>
    ${!measured && html`<p class="small soft">No requests in the last minute: the rate and the percentiles appear with the next ones.</p>`}</section>`;
}
