/* Reading the server: what a view shows, whether it is fresh, and whether the server can be reached at all. */
import { html, useCallback, useEffect, useRef, useState } from "../vendor/htm-preact.js";
import { watchDashboard } from "../client.js";
import { onReach, getJson, query } from "./api.js";

/* Reads `path` now and every `every` milliseconds while the page is visible. What was read stays when a later read fails. */
export function useData(path, every = 0) {
  const [state, setState] = useState({ data: null, error: null, at: 0, path });
  const [turn, setTurn] = useState(0);
  useEffect(() => {
    if (!path) return undefined;
    const aborter = new AbortController();
    let timer = 0;
    const again = () => { if (every && !aborter.signal.aborted) timer = setTimeout(look, every); };
    const look = async () => {
      clearTimeout(timer);
      if (document.hidden && every) return again();
      try {
        const data = await getJson(path, { signal: aborter.signal });
        setState({ data, error: null, at: Date.now(), path });
      } catch (error) {
        if (aborter.signal.aborted) return undefined;
        setState((before) => ({ ...(before.path === path ? before : { data: null, at: 0, path }), error }));
      }
      return again();
    };
    const shown = () => { if (!document.hidden && every) look(); };
    look();
    document.addEventListener("visibilitychange", shown);
    return () => { aborter.abort(); clearTimeout(timer); document.removeEventListener("visibilitychange", shown); };
  }, [path, every, turn]);
  const reload = useCallback(() => setTurn((now) => now + 1), []);
  const fresh = state.path === path ? state : { data: null, error: null, at: 0 };
  return { ...fresh, reload };
}

const NO_TASKS = { rows: [], cursor: null, busy: true, error: null };
const newestFirst = (left, right) => (left.created_at < right.created_at ? 1 : left.created_at > right.created_at ? -1 : 0);

/* The tasks that match `filter`, as they change: a first page of `limit`, and with `more` the pages after it. */
export function useTasks(filter, limit) {
  const key = JSON.stringify(filter);
  const [state, setState] = useState(NO_TASKS);
  const [turn, setTurn] = useState(0);
  const current = useRef(null);
  useEffect(() => {
    const mine = current.current = {};
    const watch = watchDashboard({ include: "tasks", limit, ...Object.fromEntries(Object.entries(filter).filter(([, value]) => value)) });
    const set = (change) => { if (current.current === mine) setState(change); };
    setState(NO_TASKS);
    (async () => {
      try {
        for await (const { type, data } of watch) {
          if (type === "snapshot") set({ rows: data.tasks, cursor: data.cursor, busy: false, error: null });
          if (type === "change") set((now) => ({ ...now, rows: merge(now, data) }));
        }
      } catch (error) {
        set((now) => ({ ...now, busy: false, error }));
      }
    })();
    return () => { current.current = null; watch.close(); };
  }, [key, limit, turn]);
  const more = async () => {
    const mine = current.current;
    const set = (change) => { if (current.current === mine) setState(change); };
    setState((now) => ({ ...now, busy: true, error: null }));
    try {
      const page = await getJson("/tasks" + query({ limit, cursor: state.cursor, ...filter }));
      set((now) => {
        const had = new Set(now.rows.map((task) => task.task_id));
        return { rows: [...now.rows, ...page.tasks.filter((task) => !had.has(task.task_id))], cursor: page.cursor, busy: false, error: null };
      });
    } catch (error) {
      set((now) => ({ ...now, busy: false, error }));
    }
  };
  return { ...state, more, reload: () => setTurn((now) => now + 1) };
}

/* Puts what has changed in the place of what is shown. A task that belongs below what is shown stays to be asked for. */
function merge({ rows, cursor }, { tasks, removed }) {
  const changed = new Map(tasks.map((task) => [task.task_id, task])), gone = new Set(removed);
  const kept = rows.filter((task) => !gone.has(task.task_id)).map((task) => {
    const now = changed.get(task.task_id);
    changed.delete(task.task_id);
    return now || task;
  });
  const oldest = cursor && rows.length ? rows[rows.length - 1].created_at : "";
  const added = [...changed.values()].filter((task) => task.created_at >= oldest);
  return added.length ? [...added, ...kept].sort(newestFirst) : kept;
}

/* Whether the server answers: the last request of the whole page decides. */
export function useReachable() {
  const [reachable, setReachable] = useState(true);
  useEffect(() => onReach(setReachable), []);
  return reachable;
}

/* What a view shows in place of data that it does not have. */
export function Waiting({ of, label = "Reading…" }) {
  if (of.error?.status === 403) return html`<${Refused} error=${of.error}/>`;
  if (of.error && !of.data) {
    return html`<div class="notice row" role="alert"><span class="grow">${of.error.message}</span>${of.reload && html`<button onClick=${of.reload}>Try again</button>`}</div>`;
  }
  return of.data ? null : html`<p class="soft small loading" role="status">${label}</p>`;
}

const Refused = ({ error }) => html`<p class="notice mild" role="status">You may not see this. ${error.message}</p>`;

/* Scopes as `service:name`, either of them `*`; a selector after them narrows to single objects. What a preset has, the server knows.
   While the scopes are not known yet, nothing is hidden: the server decides. */
export function allows(scope, wanted) {
  if (scope === null || scope === undefined) return true;
  const [service, name] = wanted.split(":");
  return scope.split(/\s+/).some((granted) => {
    const [of, what] = granted.split(":");
    return what === undefined || ((of === "*" || of === service) && (what === "*" || what === name));
  });
}

export function Needs({ scope, wanted, children }) {
  if (allows(scope, wanted)) return children;
  return html`<p class="notice mild" role="status">Your scopes do not include <code>${wanted}</code>, so this is hidden.</p>`;
}
