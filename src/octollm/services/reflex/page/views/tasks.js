/* The tasks: a short list beside the form, and a page of its own with search, status and two to compare. */
import { html, useEffect, useState } from "../vendor/htm-preact.js";
import { FINAL, query } from "../lib/api.js";
import { Needs, useTasks } from "../lib/data.js";
import { WORDS, ago, moment } from "../lib/format.js";
import { plain } from "../lib/text.js";
import { Chip } from "../lib/ui.js";

const STATUSES = ["accepted", "planning", "running", "waiting", "paused", "completed", "failed", "cancelled"];
const PAGE = 100;

export function TaskList({ tasks, current, cursor }) {
  if (!tasks.length) return null;
  return html`<nav class="card stack close" aria-label="Latest tasks"><div class="row"><h2 class="grow">Latest tasks</h2>${cursor && html`<a class="small" href="#/tasks">All tasks</a>`}</div>
    <ul class="tasks">${tasks.map((task) => html`<li key=${task.task_id}>
    <a href=${"#/tasks/" + task.task_id} aria-current=${task.task_id === current ? "page" : null}><span class="goal">${plain(task.goal)}</span>
      <span class="row"><${Chip} status=${task.status}/><span class="small faint">${ago(task.created_at)}</span>
        ${!FINAL.has(task.status) && html`<span class="small faint">${Math.round(task.progress)} %</span>`}</span></a></li>`)}</ul></nav>`;
}

/* The filter is in the address, so that it can be sent to somebody else. */
function readFilter() {
  const found = new URLSearchParams(location.hash.split("?")[1] || "");
  return { text: (found.get("text") || "").slice(0, 200), status: STATUSES.includes(found.get("status")) ? found.get("status") : "" };
}

export function Tasks({ scope }) {
  const [filter, setFilter] = useState(readFilter);
  const [text, setText] = useState(filter.text);
  const [chosen, setChosen] = useState([]);
  const key = JSON.stringify(filter);
  const { rows, cursor, busy, error, more, reload } = useTasks(filter, PAGE);
  useEffect(() => {
    const timer = setTimeout(() => setFilter((now) => (now.text === text.trim() ? now : { ...now, text: text.trim() })), 250);
    return () => clearTimeout(timer);
  }, [text]);
  useEffect(() => { history.replaceState(null, "", "#/tasks" + query(filter)); }, [key]);
  const choose = (id) => setChosen((now) => (now.includes(id) ? now.filter((each) => each !== id) : [...now, id].slice(-2)));
  const filtered = filter.text || filter.status;
  return html`<section class="card stack" aria-labelledby="tasks-title"><div class="row"><h1 class="view-title grow" id="tasks-title">Tasks</h1>
      <a class="button" href=${chosen.length === 2 ? `#/compare/${chosen[0]}/${chosen[1]}` : null} role="link" aria-disabled=${chosen.length !== 2}>Compare ${chosen.length} of 2</a>
      <a class="button primary" href="#/">New task</a></div>
    <${Needs} scope=${scope} wanted="tasks:read">
    <form class="row filters" role="search" onSubmit=${(event) => { event.preventDefault(); setFilter({ ...filter, text: text.trim() }); }}>
      <label class="hidden" for="task-text">Search in goals</label><input class="grow" id="task-text" type="search" maxlength="200" placeholder="Search in goals" value=${text} onInput=${(event) => setText(event.target.value)}/>
      <label class="hidden" for="task-status">Status</label><select id="task-status" value=${filter.status} onChange=${(event) => setFilter({ ...filter, status: event.target.value })}>
        <option value="">Any status</option>${STATUSES.map((status) => html`<option value=${status}>${WORDS[status]}</option>`)}</select></form>
    ${error && html`<div class="notice row" role="alert"><span class="grow">${error.message}</span><button onClick=${reload}>Try again</button></div>`}
    ${!rows.length && !busy && !error && html`<div class="nothing"><p>${filtered ? "No task matches." : "There is no task yet."}</p>${filtered
      ? html`<button onClick=${() => { setText(""); setFilter({ text: "", status: "" }); }}>Show all tasks</button>` : html`<a class="button primary" href="#/">Start the first</a>`}</div>`}
    ${rows.length > 0 && html`<ul class="task-rows" aria-label="Tasks">${rows.map((task) => html`<li key=${task.task_id}>
      <input type="checkbox" checked=${chosen.includes(task.task_id)} onChange=${() => choose(task.task_id)} aria-label=${`Choose for a comparison: ${plain(task.goal).slice(0, 80)}`}/>
      <a href=${"#/tasks/" + task.task_id}>${plain(task.goal).slice(0, 300)}</a><${Chip} status=${task.status}/>
      <span class="small soft nowrap progress-cell">${FINAL.has(task.status) ? "" : `${Math.round(task.progress)} %`}</span>
      <time class="small faint nowrap" datetime=${task.created_at} title=${moment(task.created_at)}>${ago(task.created_at)}</time></li>`)}</ul>`}
    ${busy && !rows.length && html`<p class="soft small loading" role="status">Reading…</p>`}
    ${rows.length > 0 && html`<div class="row"><span class="small soft grow" role="status">${rows.length.toLocaleString()} shown${cursor ? "" : ", all that match"}</span>
      ${cursor && html`<button onClick=${more} disabled=${busy}>${busy ? "Reading…" : "Show more"}</button>`}</div>`}
    <//></section>`;
}
