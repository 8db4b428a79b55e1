/* Reading the server: what a view shows, whether it is fresh, and whether the server can be reached at all. */
import { html, useCallback, useEffect, useRef, useState } from "../vendor/htm-preact.js";
import { onReach, getJson } from "./api.js";

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

/* Pages of a list by cursor: `load(cursor)` returns { rows, cursor }. */
export function usePages(load, key) {
  const [state, setState] = useState({ rows: [], cursor: null, busy: true, error: null });
  const latest = useRef(0);
  const read = useCallback(async (cursor, before) => {
    const mine = ++latest.current;
    setState((now) => ({ ...now, busy: true, error: null }));
    try {
      const page = await load(cursor);
      if (mine === latest.current) setState({ rows: [...before, ...page.rows], cursor: page.cursor, busy: false, error: null });
    } catch (error) {
      if (mine === latest.current) setState((now) => ({ ...now, busy: false, error }));
    }
  }, [key]);
  useEffect(() => { setState({ rows: [], cursor: null, busy: true, error: null }); read(null, []); return () => { latest.current++; }; }, [read]);
  return { ...state, more: () => read(state.cursor, state.rows), reload: () => read(null, []) };
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
