/* Who did what: the audit log, and what each principal let others do or was refused. */
import { html, useEffect, useMemo, useState } from "../vendor/htm-preact.js";
import { getJson, query } from "../lib/api.js";
import { Needs, Waiting } from "../lib/data.js";
import { ago, moment } from "../lib/format.js";
import { Code, plain } from "../lib/text.js";

const PAGE = 500, KEPT = 5000;

/* All rows, oldest first on the wire, newest first here; at most the last `KEPT`. */
function useAudit(of) {
  const [state, setState] = useState({ rows: [], head: null, cut: null, error: null, busy: true });
  const [turn, setTurn] = useState(0);
  useEffect(() => {
    const aborter = new AbortController();
    let timer = 0, after = -1;
    const read = async () => {
      try {
        if (after < 0) {
          const first = await getJson("/audit" + query({ after: "0", limit: 1, of }), { signal: aborter.signal });
          after = Math.max(first.cut?.seq || 0, first.head.seq - KEPT);
        }
        for (;;) {
          const page = await getJson("/audit" + query({ after: String(after), limit: PAGE, of }), { signal: aborter.signal });
          if (page.rows.length) after = page.rows[page.rows.length - 1].seq;
          setState((now) => ({ rows: [...page.rows.reverse(), ...now.rows].slice(0, KEPT), head: page.head, cut: page.cut, error: null, busy: false }));
          if (page.rows.length < PAGE) break;
        }
      } catch (error) { if (!aborter.signal.aborted) setState((now) => ({ ...now, error, busy: false })); }
      if (!aborter.signal.aborted) timer = setTimeout(read, 5000);
    };
    setState({ rows: [], head: null, cut: null, error: null, busy: true });
    read();
    return () => { aborter.abort(); clearTimeout(timer); };
  }, [of, turn]);
  return { ...state, data: state.rows.length || state.head ? state : null, reload: () => setTurn((now) => now + 1) };
}

export function Audit({ scope }) {
  const [of, setOf] = useState("tenant");
  const [text, setText] = useState("");
  const read = useAudit(of);
  const wanted = text.trim().toLowerCase();
  const shown = useMemo(() => read.rows.filter((row) => !wanted || `${row.action} ${row.sub} ${row.service} ${row.target} ${JSON.stringify(row.detail)}`.toLowerCase().includes(wanted)), [read.rows, wanted]);
  return html`<section class="card stack" aria-labelledby="audit-title"><div class="row"><h1 class="view-title grow" id="audit-title">Audit</h1>
      ${read.head && html`<span class="small soft" title=${read.head.hash}>${read.head.seq.toLocaleString()} rows, hash ${read.head.hash.slice(0, 12) || "–"}…</span>`}</div>
    <${Needs} scope=${scope} wanted="audit:read">
    <div class="row filters"><label class="hidden" for="audit-text">Search</label><input class="grow" id="audit-text" type="search" placeholder="Search action, principal, target or detail" value=${text} onInput=${(event) => setText(event.target.value)}/>
      <label class="hidden" for="audit-of">Whose rows</label><select id="audit-of" value=${of} onChange=${(event) => setOf(event.target.value)}><option value="tenant">This tenant</option><option value="system">The system</option></select></div>
    <${Waiting} of=${read}/>
    ${read.data && read.error && html`<p class="notice" role="alert">${read.error.message}</p>`}
    ${read.data && !shown.length && html`<p class="nothing soft">${read.rows.length ? "No row matches." : "No row yet."}</p>`}
    ${read.cut?.seq > 0 && html`<p class="small soft">The rows up to ${read.cut.seq.toLocaleString()} are in the archive.</p>`}
    <${Rows} rows=${shown}/><p class="small soft">The rows are chained by hash. <code>octollm audit verify</code> checks that none was changed, dropped or inserted.</p><//></section>`;
}

const Rows = ({ rows }) => html`<ol class="feed" aria-label="Audit rows, newest first">${rows.slice(0, 500).map((row) => html`<li key=${row.seq}><details><summary><time class="faint mono" title=${moment(row.at)}>${ago(row.at * 1000)}</time>
  <b class=${isRefusal(row) ? "bad-text" : ""}>${row.action}</b><span class="soft">${plain(row.sub || row.service)} → ${plain(row.target)}</span></summary><${Code} text=${JSON.stringify(row, null, 2)} label=${row.action}/></details></li>`)}</ol>`;

const isRefusal = (row) => /refus|denied|fail|revok|forbid/.test(row.action) || /refus|denied/.test(String(row.detail?.outcome || ""));

/* Who let whom do what: from the log, a chain for each principal that acted. */
export function Authority({ scope }) {
  const read = useAudit("tenant");
  const people = useMemo(() => {
    const found = new Map();
    for (const row of read.rows) {
      const who = row.sub || row.service || "system";
      const entry = found.get(who) || { who, creds: new Set(), services: new Set(), granted: [], refused: [], last: row.at, rows: 0 };
      entry.rows++;
      if (row.cred) entry.creds.add(row.cred);
      if (row.service) entry.services.add(row.service);
      if (isRefusal(row)) entry.refused.push(row);
      else if (scopesOf(row)) entry.granted.push(row);
      found.set(who, entry);
    }
    return [...found.values()];
  }, [read.rows]);
  return html`<section class="card stack" aria-labelledby="authority-title"><div class="row"><h1 class="view-title grow" id="authority-title">Authority</h1></div>
    <p class="soft small">Authority only shrinks: each hop of a call gets a part of what the one before it had. These are the delegations and refusals of the audit log.</p>
    <${Needs} scope=${scope} wanted="audit:read"><${Waiting} of=${read}/>
    ${read.data && !people.length && html`<p class="nothing soft">Nobody has acted yet.</p>`}
    <ul class="letters" aria-label="Principals">${people.map((person) => html`<li key=${person.who} class="stack close"><div class="row"><b class="grow break">${plain(person.who)}</b><span class="small soft">${person.rows} rows · last ${ago(person.last * 1000)}</span></div>
      ${person.creds.size > 0 && html`<p class="small soft">By the ${person.creds.size === 1 ? "credential" : "credentials"} <span class="mono">${[...person.creds].map(plain).join(", ")}</span>${person.services.size > 0 && html` through ${[...person.services].join(", ")}`}</p>`}
      ${person.granted.length > 0 && html`<details open><summary>Let others do (${person.granted.length})</summary><ul class="hops">${person.granted.slice(0, 50).map((row) => html`<li><span class="mono">${row.action}</span> <b>${plain(row.target)}</b> <${Scopes} row=${row}/> <span class="faint small">${ago(row.at * 1000)}</span></li>`)}</ul></details>`}
      ${person.refused.length > 0 && html`<details open><summary class="bad-text">Refused or revoked (${person.refused.length})</summary><ul class="hops">${person.refused.slice(0, 50).map((row) => html`<li><span class="mono bad-text">${row.action}</span> <b>${plain(row.target)}</b> <span class="small">${plain(Object.entries(row.detail || {}).map(([name, value]) => `${name}: ${typeof value === "object" ? JSON.stringify(value) : value}`).join(", "))}</span></li>`)}</ul></details>`}</li>`)}</ul><//></section>`;
}

const scopesOf = (row) => row.detail?.scope || row.detail?.scopes || row.detail?.calls || null;
const Scopes = ({ row }) => { const found = scopesOf(row); const list = Array.isArray(found) ? found : String(found).split(/\s+/); return list.slice(0, 24).map((each) => html`<code class="scope">${plain(each)}</code>`); };
