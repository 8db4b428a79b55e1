/* Events: the log as it grows, how far each consumer is, dead letters, and webhooks with their deliveries. */
import { html, useEffect, useRef, useState } from "../vendor/htm-preact.js";
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

const KEPT = 500;
/* The log in order, page by page: after an outage it goes on where it was. */
function useFeed(paused) {
  const [events, setEvents] = useState([]);
  const [line, setLine] = useState("reading");
  const stopped = useRef(paused);
  stopped.current = paused;
  useEffect(() => {
    const aborter = new AbortController();
    let timer = 0, after = 0;
    const look = async () => {
      let pause = 1000;
      if (!stopped.current && !document.hidden) {
        try {
          const page = await getJson("/events" + query({ after: String(after), limit: 500 }), { signal: aborter.signal });
          after = page.after;
          if (page.events.length) setEvents((now) => [...page.events.reverse(), ...now].slice(0, KEPT));
          if (page.events.length === 500) pause = 0;
          setLine(pause ? "live" : "reading");
        } catch (error) {
          if (aborter.signal.aborted) return;
          if (error.code === "position_expired" || error.code === "position_unknown") after = 0;
          setLine(error.status ? error.message : "reconnecting");
          pause = 2000;
        }
      }
      if (!aborter.signal.aborted) timer = setTimeout(look, pause);
    };
    look();
    return () => { aborter.abort(); clearTimeout(timer); };
  }, []);
  return [events, line];
}

function Feed() {
  const [paused, setPaused] = useState(false);
  const [text, setText] = useState("");
  const [events, line] = useFeed(paused);
  const wanted = text.trim().toLowerCase();
  const shown = wanted ? events.filter((event) => `${event.event_type} ${event.subject} ${event.source}`.toLowerCase().includes(wanted)) : events;
  return html`<div class="stack"><div class="row filters"><label class="hidden" for="event-text">Filter</label><input class="grow" id="event-text" type="search" placeholder="Filter by type, subject or source" value=${text} onInput=${(event) => setText(event.target.value)}/>
      <span class=${"chip " + (line === "live" ? "ready" : "degraded")} role="status"><i></i>${paused ? "held" : line}</span><button aria-pressed=${paused} onClick=${() => setPaused(!paused)}>${paused ? "Go on" : "Hold"}</button></div>
    ${!shown.length && html`<p class="nothing soft">${events.length ? "No event matches." : "No event yet: they appear here as they happen."}</p>`}
    <ol class="feed" aria-label="Events, newest first">${shown.map((event) => html`<li key=${event.id}><details><summary><time class="faint mono" datetime=${event.timestamp}>${clockTime(event.timestamp)}</time><b>${event.event_type}</b>
      <span class="soft">${plain(event.subject || event.source)}</span></summary><${Code} text=${JSON.stringify(event, null, 2)} label=${event.event_type}/></details></li>`)}</ol></div>`;
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
