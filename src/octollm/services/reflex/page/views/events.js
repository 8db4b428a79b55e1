/* Events: the log as it grows, how far each consumer is, dead letters, and webhooks with their deliveries. */
import { html, useEffect, useRef, useState } from "../vendor/htm-preact.js";
import { watchDashboard } from "../client.js";
import { getJson, query, send } from "../lib/api.js";
import { Needs, Waiting, allows, useData } from "../lib/data.js";
import { ago, clockTime, moment } from "../lib/format.js";
import { Table } from "../lib/table.js";
import { Code, plain } from "../lib/text.js";

const TABS = [["feed", "Feed"], ["consumers", "Consumers"], ["dead-letters", "Dead letters"], ["webhooks", "Webhooks"]];

export function Events({ scope, tab = "feed" }) {
  const may = allows(scope, "events:subscribe");
  return html`<section class="card stack" aria-labelledby="events-title"><div class="row"><h1 class="view-title grow" id="events-title">Events</h1></div>
    <nav class="tabs" aria-label="Events">${TABS.map(([name, title]) => html`<a href=${"#/events/" + name} aria-current=${name === tab ? "page" : null}>${title}</a>`)}</nav>
    ${tab === "webhooks" ? html`<${Needs} scope=${scope} wanted="webhooks:read"><${Webhooks} may=${allows(scope, "webhooks:write")}/><//>`
      : html`<${Needs} scope=${scope} wanted="events:read">${tab === "consumers" ? html`<${Consumers}/>` : tab === "dead-letters" ? html`<${DeadLetters} may=${may}/>` : html`<${Feed}/>`}<//>`}</section>`;
}

const KEPT = 5000, WINDOW = 500, MAX_WINDOWS = 20;

/* Reads what comes before the position `end` in the log. Positions of other tenants are between: an empty window says nothing. */
async function readBefore(end, signal) {
  for (let turn = 0; end > 0 && turn < MAX_WINDOWS; turn++) {
    const start = Math.max(0, end - WINDOW);
    const page = await getJson("/events" + query({ after: String(start), limit: WINDOW }), { signal });
    const events = page.events.filter((event) => event.seq <= end).reverse();
    end = start;
    if (events.length) return { events, end };
  }
  return { events: [], end };
}

/* The newest events, live, and with `earlier` those before them. What arrives while the view is held waits. */
function useFeed(paused) {
  const [state, setState] = useState({ events: [], end: 0 });
  const [line, setLine] = useState("reading");
  const [busy, setBusy] = useState(false);
  const held = useRef([]), stopped = useRef(paused), aborter = useRef(null);
  stopped.current = paused;
  const add = (events) => setState((now) => {
    const all = [...events.reverse(), ...now.events], kept = all.slice(0, KEPT);
    return { events: kept, end: kept.length < all.length ? kept[KEPT - 1].seq - 1 : now.end };
  });
  const read = async (end) => {
    const { signal } = aborter.current;
    setBusy(true);
    try {
      const found = await readBefore(end, signal);
      if (!signal.aborted) setState((now) => ({ events: [...now.events, ...found.events], end: found.end }));
    } catch (error) {
      if (signal.aborted) return;
      // What is older was deleted.
      if (error.code === "position_expired") setState((now) => ({ ...now, end: 0 })); else setLine(error.message);
    } finally {
      if (!signal.aborted) setBusy(false);
    }
  };
  useEffect(() => {
    const { signal } = aborter.current = new AbortController();
    const watch = watchDashboard({ include: "events", limit: 1, signal });
    watch.onstate = (now) => { if (!signal.aborted && now !== "closed") setLine(now); };
    (async () => {
      try {
        for await (const { type, seq, data } of watch) {
          if (signal.aborted) return;
          if (type === "snapshot") { held.current = []; setState({ events: [], end: seq }); await read(seq); }
          else if (type === "change" && data.events.length) { if (stopped.current) held.current.push(...data.events); else add(data.events); }
        }
      } catch (error) {
        if (!signal.aborted) setLine(error.message);
      }
    })();
    return () => aborter.current.abort();
  }, []);
  useEffect(() => { if (!paused && held.current.length) add(held.current.splice(0)); }, [paused]);
  return { events: state.events, line, busy, earlier: state.end > 0 ? () => read(state.end) : null };
}

function Feed() {
  const [paused, setPaused] = useState(false);
  const [text, setText] = useState("");
  const { events, line, busy, earlier } = useFeed(paused);
  const wanted = text.trim().toLowerCase();
  const shown = wanted ? events.filter((event) => `${event.event_type} ${event.subject} ${event.source}`.toLowerCase().includes(wanted)) : events;
  return html`<div class="stack"><div class="row filters"><label class="hidden" for="event-text">Filter</label><input class="grow" id="event-text" type="search" placeholder="Filter by type, subject or source" value=${text} onInput=${(event) => setText(event.target.value)}/>
      <span class=${"chip " + (line === "live" ? "ready" : "degraded")} role="status"><i></i>${paused ? "held" : line}</span><button aria-pressed=${paused} onClick=${() => setPaused(!paused)}>${paused ? "Go on" : "Hold"}</button></div>
    ${!shown.length && !busy && html`<p class="nothing soft">${events.length ? "No event matches." : "No event yet: they appear here as they happen."}</p>`}
    <ol class="feed" aria-label="Events, newest first">${shown.map((event) => html`<li key=${event.seq}><details><summary><time class="faint mono" datetime=${event.timestamp}>${clockTime(event.timestamp)}</time><b>${event.event_type}</b>
      <span class="soft">${plain(event.subject || event.source)}</span></summary><${Code} text=${JSON.stringify(event, null, 2)} label=${event.event_type}/></details></li>`)}</ol>
    ${earlier && html`<div class="row"><span class="grow"></span><button onClick=${earlier} disabled=${busy}>${busy ? "Reading…" : "Show earlier"}</button></div>`}</div>`;
}

function Consumers() {
  const read = useData("/subscriptions", 3000);
  if (!read.data) return html`<${Waiting} of=${read}/>`;
  const rows = [...(read.data.sink ? [{ name: read.data.sink.name, lag: read.data.sink.lag, consumers: [], sink: true }] : []), ...read.data.subscriptions];
  if (!rows.length) return html`<div class="nothing"><p>No durable subscription yet.</p><p class="small soft">Create one with <code>octollm events subscribe</code>.</p></div>`;
  return html`<${Table} label="Durable subscriptions" rows=${rows} rowKey=${(row) => row.name} columns=${[
    { title: "Name", value: (row) => row.name, cell: (row) => html`<b>${plain(row.name)}</b>${row.sink && html` <span class="chip">sink</span>`}` },
    { title: "Selects", cell: (row) => html`<span class="mono">${(row.spec?.patterns || ["every event"]).join(", ")}</span>` },
    { title: "Behind", number: true, value: (row) => row.lag.positions }, { title: "Oldest", number: true, value: (row) => row.lag.seconds, cell: (row) => `${Math.round(row.lag.seconds)} s` },
    { title: "Delayed", number: true, value: (row) => row.lag.delayed }, { title: "Held", number: true, value: (row) => row.lag.held },
    { title: "Dead", number: true, value: (row) => row.lag.dead, cell: (row) => (row.lag.dead ? html`<a href="#/events/dead-letters">${row.lag.dead}</a>` : 0) },
    { title: "Consumers", number: true, value: (row) => row.consumers.length, cell: (row) => html`<span title=${row.consumers.map((each) => `${each.consumer}: ${each.partitions} partitions`).join("\n")}>${row.consumers.length}</span>` }]}/>`;
}

function DeadLetters({ may }) {
  const read = useData("/dead-letters?limit=200", 5000);
  const [trouble, say] = useState("");
  const act = async (method, path) => { say(""); try { await send(method, path); } catch (error) { say(error.message); } read.reload(); };
  if (!read.data) return html`<${Waiting} of=${read}/>`;
  if (!read.data.dead_letters.length) return html`<p class="nothing soft">No dead letter: every event was delivered, or is being tried.</p>`;
  return html`<div class="stack">${trouble && html`<p class="notice" role="alert">${trouble}</p>`}${!may && html`<p class="small soft">Your scopes do not include <code>events:subscribe</code>: you can read dead letters, not retry or drop them.</p>`}
    <ul class="letters" aria-label="Dead letters">${read.data.dead_letters.map((letter) => html`<li key=${letter.id} class="stack close"><div class="row"><b>${letter.event.event_type}</b><span class="soft">${plain(letter.event.subject)}</span><span class="chip failed"><i></i>${letter.state}</span>
      <span class="grow small soft">${letter.subscription} · ${letter.attempts} attempts · ${ago(letter.created_at)}</span>
      ${may && html`<button onClick=${() => act("POST", `/dead-letters/${letter.id}/retry`)} disabled=${letter.state === "retrying"}>Deliver again</button>
        <button class="danger" onClick=${() => confirm("Drop this event for this subscription?") && act("DELETE", `/dead-letters/${letter.id}`)}>Drop</button>`}</div>
      <p class="small">${plain(letter.reason)}</p><details><summary>Event</summary><${Code} text=${JSON.stringify(letter.event, null, 2)} label="Event"/></details></li>`)}</ul></div>`;
}

function Webhooks({ may }) {
  const read = useData("/webhooks", 5000);
  const [open, setOpen] = useState("");
  const [says, say] = useState(null);
  if (!read.data) return html`<${Waiting} of=${read}/>`;
  const act = async (what, id, body) => {
    say(null);
    try {
      const found = await send("POST", `/webhooks/${id}/${what}`, body);
      say(what === "test" ? { bad: !found.delivered, text: found.delivered ? `Delivered: ${found.status} in ${found.duration_ms} ms.` : `Not delivered: ${found.error || found.status}` } : { text: `${found.queued} queued.` });
    } catch (error) { say({ bad: true, text: error.message }); }
    read.reload();
  };
  const webhooks = read.data.webhooks;
  if (!webhooks.length) return html`<div class="nothing"><p>No webhook yet.</p><p class="small soft">Create one with <code>octollm webhooks create URL</code>.</p></div>`;
  return html`<div class="stack">${says && html`<p class=${"notice" + (says.bad ? "" : " good")} role="status">${plain(says.text)}</p>`}
    <ul class="letters" aria-label="Webhooks">${webhooks.map((hook) => html`<li key=${hook.id} class="stack close"><div class="row"><b class="mono grow break">${plain(hook.url)}</b>
      <span class=${"chip " + (hook.state === "active" ? (hook.failing_since ? "degraded" : "ready") : "unready")}><i></i>${hook.failing_since && hook.state === "active" ? "failing" : hook.state}</span></div>
      <div class="facts"><span>Selects <b>${hook.patterns.join(", ")}</b></span><span>Pending <b>${hook.pending}</b></span><span>Dead <b>${hook.dead}</b></span>${hook.last_delivered_at && html`<span>Last delivery <b>${ago(hook.last_delivered_at)}</b></span>`}</div>
      ${hook.reason && html`<p class="small bad-text">${plain(hook.reason)}</p>`}
      <div class="row"><button aria-expanded=${open === hook.id} onClick=${() => setOpen(open === hook.id ? "" : hook.id)}>Deliveries</button>
        ${may && html`<button onClick=${() => act("test", hook.id)}>Send a test</button>${hook.dead > 0 && html`<button onClick=${() => act("replay", hook.id, {})}>Deliver the dead again</button>`}`}</div>
      ${open === hook.id && html`<${Deliveries} id=${hook.id}/>`}</li>`)}</ul></div>`;
}

function Deliveries({ id }) {
  const read = useData(`/webhooks/${id}/deliveries?limit=100`, 3000);
  if (!read.data) return html`<${Waiting} of=${read}/>`;
  if (!read.data.deliveries.length) return html`<p class="small soft">Nothing was delivered yet.</p>`;
  return html`<${Table} label="Deliveries" rows=${read.data.deliveries} rowKey=${(row) => row.event_id} columns=${[
    { title: "When", value: (row) => row.created_at, cell: (row) => moment(row.created_at) }, { title: "Event", value: (row) => row.event_type }, { title: "Subject", value: (row) => plain(row.subject) },
    { title: "State", value: (row) => row.state, cell: (row) => html`<span class=${"chip " + { delivered: "ready", dead: "unready", pending: "degraded" }[row.state]}><i></i>${row.state}</span>` },
    { title: "Attempts", number: true, value: (row) => row.attempts }, { title: "Answer", value: (row) => row.last_status || plain(row.last_error).slice(0, 120) }]}/>`;
}
