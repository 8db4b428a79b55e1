/* The page: its header, its routes, and who is signed in. */
import { html, render, useCallback, useEffect, useRef, useState } from "./vendor/htm-preact.js";
import { call, getJson } from "./lib/api.js";
import { useReachable } from "./lib/data.js";
import { Octopus } from "./lib/ui.js";
import { Compose, SAMPLES } from "./views/compose.js";
import { Health } from "./views/health.js";
import { KeyForm, backFromLogin } from "./views/login.js";
import { Task } from "./views/task.js";
import { TaskList, Tasks } from "./views/tasks.js";

const ID = /^[A-Za-z0-9._-]{1,128}$/;
const NAV = [["tasks", "Tasks"], ["services", "Services"], ["events", "Events"], ["cost", "Cost"], ["audit", "Audit"], ["authority", "Authority"], ["keys", "Keys"]];
const TITLES = { "": "New task", compare: "Two runs", trace: "Trace", ...Object.fromEntries(NAV) };
/* Views that few need at once are read when they are first opened. */
const LAZY = {
  services: async () => (await import("./views/services.js")).Services,
  events: async () => (await import("./views/events.js")).Events,
  cost: async () => (await import("./views/cost.js")).Cost,
  audit: async () => (await import("./views/audit.js")).Audit,
  authority: async () => (await import("./views/audit.js")).Authority,
  keys: async () => (await import("./views/keys.js")).Keys,
  compare: async () => (await import("./views/compare.js")).Compare,
  trace: async () => (await import("./views/trace.js")).Waterfall,
};

/* `#/tasks/<id>`, `#/tasks/<id>/trace`, `#/compare/<id>/<id>`, `#/events/<tab>`, `#/<view>`; anything else is the start. */
function route() {
  const [view = "", first = "", second = ""] = location.hash.replace(/^#\/?/, "").split("?")[0].split("/");
  if (view === "tasks" && ID.test(first)) return second === "trace" ? { view: "trace", props: { taskId: first } } : { view: "task", task: first };
  if (view === "compare" && ID.test(first) && ID.test(second)) return { view, props: { left: first, right: second } };
  if (view === "events") return { view, props: first ? { tab: first } : {} };
  return NAV.some(([name]) => name === view) ? { view, props: {} } : { view: "" };
}

function Lazy({ name, props, scope }) {
  const [View, setView] = useState(null);
  const [trouble, say] = useState("");
  useEffect(() => {
    let gone = false;
    LAZY[name]().then((found) => { if (!gone) setView(() => found); }, () => { if (!gone) say("This part of the page could not be read. Load the page again: it may have a new version."); });
    return () => { gone = true; };
  }, [name]);
  if (trouble) return html`<section class="card"><p class="notice" role="alert">${trouble}</p></section>`;
  return View ? html`<${View} scope=${scope} ...${props}/>` : html`<section class="card"><p class="soft small loading" role="status">Reading…</p></section>`;
}

const SHORTCUTS = [["n", "New task"], ["t", "Tasks"], ["s", "Services"], ["e", "Events"], ["c", "Cost"], ["a", "Audit"], ["k", "Keys"], ["/", "Search"], ["?", "These shortcuts"]];
const GO = { n: "#/", t: "#/tasks", s: "#/services", e: "#/events", c: "#/cost", a: "#/audit", k: "#/keys" };

function useShortcuts(box) {
  useEffect(() => {
    const press = (event) => {
      const within = event.target.closest?.("input, textarea, select, [contenteditable], dialog[open]");
      if (event.ctrlKey || event.metaKey || event.altKey || (within && event.key !== "Escape")) return;
      if (event.key === "?") box.current?.showModal();
      else if (event.key === "/") {
        const found = document.querySelector("main input[type=search]");
        if (found) { event.preventDefault(); found.focus(); } else location.hash = "#/tasks";
      } else if (Object.hasOwn(GO, event.key)) {
        event.preventDefault();
        location.hash = GO[event.key];
        if (event.key === "n") setTimeout(() => document.getElementById("goal-input")?.focus());
      }
    };
    document.addEventListener("keydown", press);
    return () => document.removeEventListener("keydown", press);
  }, []);
}

function Offline({ onBack }) {
  const reachable = useReachable(), was = useRef(true);
  useEffect(() => {
    if (reachable) { if (!was.current) onBack(); was.current = true; return undefined; }
    was.current = false;
    const timer = setInterval(() => { call("/health").catch(() => {}); }, 2000);
    return () => clearInterval(timer);
  }, [reachable]);
  return reachable ? null : html`<div class="offline" role="alert">The server cannot be reached. You see what was read last; the page goes on by itself.</div>`;
}

function App() {
  const [at, setAt] = useState(route);
  const [tasks, setTasks] = useState([]);
  const [cursor, setCursor] = useState(null);
  const [goal, setGoal] = useState("");
  const [wantsKey, setWantsKey] = useState(false);
  const [epoch, setEpoch] = useState(0);
  const [trouble, setTrouble] = useState("");
  const [who, setWho] = useState(null);
  const shortcuts = useRef(null);
  const onKey = useCallback(() => setWantsKey(true), []);
  const arrived = useRef(!new URLSearchParams(location.search).has("state"));
  const current = at.task || "";
  useShortcuts(shortcuts);
  const load = useCallback(async () => {
    try {
      const page = await getJson("/tasks?limit=30");
      setTasks(page.tasks); setCursor(page.cursor || null); setTrouble("");
    } catch (error) {
      if (error.status === 401) setWantsKey(true); else if (error.status) setTrouble(error.message);
    }
  }, []);
  useEffect(() => {
    const change = () => {
      setAt((before) => { const now = route(); return JSON.stringify(now) === JSON.stringify(before) ? before : now; });
      scrollTo(0, 0);
    };
    addEventListener("hashchange", change);
    return () => removeEventListener("hashchange", change);
  }, []);
  useEffect(() => { document.title = at.view === "task" ? "Task · OctoLLM" : `${TITLES[at.view]} · OctoLLM`; }, [at.view]);
  useEffect(() => {
    // A browser that comes back from an issuer has no session yet: everything else waits for it.
    if (!arrived.current) return undefined;
    load();
    const timer = setInterval(() => { if (!document.hidden) load(); }, 10000);
    return () => clearInterval(timer);
  }, [epoch]);
  useEffect(() => {
    if (arrived.current) return;
    backFromLogin().catch((error) => setTrouble(error.message)).finally(() => { arrived.current = true; setEpoch((now) => now + 1); });
  }, []);
  useEffect(() => {
    let gone = false;
    const take = (value) => { if (!gone) setWho(value); };
    getJson("/session").then(take, () => take(null));
    return () => { gone = true; };
  }, [epoch]);
  const leave = async () => {
    try { await call("/session", { method: "DELETE" }); } catch { /* it was over */ }
    setTasks([]); location.hash = "#/"; setEpoch(epoch + 1);
  };
  const again = () => setEpoch((now) => now + 1);
  const start = (text) => { setGoal(text); document.getElementById("goal-input")?.focus(); };
  const scope = who ? who.scope : null, beside = at.view === "" || at.view === "task";
  const section = at.view === "task" || at.view === "trace" || at.view === "compare" ? "tasks" : at.view;
  const compose = html`<${Compose} goal=${goal} setGoal=${setGoal} onDone=${(id) => { location.hash = "#/tasks/" + id; load(); }} onKey=${onKey}/>`;
  return html`<a class="skip" href="#main" onClick=${(event) => { event.preventDefault(); document.getElementById("main").focus(); }}>Skip to content</a>
    <header class="top"><a class="brand" href="#/"><${Octopus}/><span>OctoLLM</span></a>
      <nav class="nav" aria-label="Views">${NAV.map(([name, title]) => html`<a href=${"#/" + name} aria-current=${name === section ? "page" : null}>${title}</a>`)}</nav>
      <${Health}/>${who?.session && html`<button onClick=${leave}>Log out</button>`}</header>
    <${Offline} onBack=${again}/>
    <div class=${"layout" + (current ? " has-task" : "") + (beside ? "" : " whole")}>
      ${beside ? html`<div class="side">${wantsKey && html`<${KeyForm} onDone=${() => { setWantsKey(false); again(); }}/>`}
        ${compose}
        ${trouble && html`<p class="notice" role="alert">${trouble}</p>`}
        <${TaskList} tasks=${tasks} current=${current} cursor=${cursor}/></div>`
        : wantsKey && html`<div class="narrow"><${KeyForm} onDone=${() => { setWantsKey(false); again(); }}/></div>`}
      <main class="stack" id="main" tabindex="-1">${at.view === "task"
        ? html`<${Task} key=${current + epoch} taskId=${current} onChange=${load} onKey=${onKey} scope=${scope}/>`
        : at.view === "tasks" ? html`<${Tasks} key=${epoch} scope=${scope}/>`
          : at.view ? html`<${Lazy} key=${at.view + epoch} name=${at.view} props=${at.props} scope=${scope}/>`
            : html`<div class="empty"><${Octopus}/><h1>Give a goal, watch it being done</h1><p>A plan is made, arms carry out its steps, a judge checks them. You see every stage live.</p>
          <div class="samples">${SAMPLES.map(([sample, needs]) => html`<button onClick=${() => start(sample)}>${sample} ${needs && html`<span class="small faint">${needs}</span>`}</button>`)}</div>
          <p class="small faint">Press <kbd>?</kbd> for shortcuts.</p></div>`}</main>
    </div>
    <dialog class="card" ref=${shortcuts} aria-labelledby="shortcuts-title"><form method="dialog" class="stack close"><h2 id="shortcuts-title">Keyboard</h2>
      <dl class="keys">${SHORTCUTS.map(([key, does]) => html`<dt><kbd>${key}</kbd></dt><dd>${does}</dd>`)}</dl><button>Close</button></form></dialog>`;
}

render(html`<${App}/>`, document.getElementById("app"));
