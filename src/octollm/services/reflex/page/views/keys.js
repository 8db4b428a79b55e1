/* API keys and enrolment tokens: for administrators. A secret is shown once and kept nowhere. */
import { html, useState } from "../vendor/htm-preact.js";
import { send } from "../lib/api.js";
import { Needs, Waiting, allows, useData } from "../lib/data.js";
import { ago, moment } from "../lib/format.js";
import { Table } from "../lib/table.js";
import { Copy, plain } from "../lib/text.js";

export function Keys({ scope }) {
  const may = allows(scope, "keys:write");
  return html`<section class="card stack" aria-labelledby="keys-title"><h1 class="view-title" id="keys-title">Keys and arms</h1>
    <${Needs} scope=${scope} wanted="keys:read">${!may && html`<p class="small soft">Your scopes do not include <code>keys:write</code>: you can read keys, not create or revoke them.</p>`}
      <${ApiKeys} may=${may}/><${Enrolments} may=${may}/><//></section>
    <section class="card stack" aria-labelledby="arms-title"><h2 id="arms-title">Arms</h2><${Needs} scope=${scope} wanted="arms:read"><${Arms}/><//></section>`;
}

const Secret = ({ secret, what }) => html`<div class="notice good stack close" role="status"><strong>${what} Copy it now: it is not shown again.</strong>
  <div class="row"><code class="break grow">${secret}</code><${Copy} text=${secret} label="Copy the secret"/></div></div>`;

function useChanges(reload) {
  const [state, setState] = useState({ busy: false, trouble: "", made: null });
  const change = async (method, path, body) => {
    setState({ busy: true, trouble: "", made: null });
    try {
      const made = await send(method, path, body);
      setState({ busy: false, trouble: "", made });
      return true;
    } catch (error) {
      setState({ busy: false, trouble: [error.message, ...error.faults.map((fault) => `${fault.pointer}: ${fault.detail}`)].join(" "), made: null });
      return false;
    } finally { reload(); }
  };
  return [state, change];
}

function ApiKeys({ may }) {
  const read = useData("/keys", 15000);
  const [{ busy, trouble, made }, change] = useChanges(read.reload);
  const [name, setName] = useState("");
  const [scope, setScope] = useState("user");
  const create = async (event) => {
    event.preventDefault();
    if (await change("POST", "/keys", { name: name.trim(), scope: scope.trim() || "user" })) setName("");
  };
  return html`<div class="stack"><h2>API keys</h2>
    ${may && html`<form class="row filters" onSubmit=${create}><label class="hidden" for="key-name">Name</label><input class="grow" id="key-name" type="text" required maxlength="128" placeholder="Name of a person or program" value=${name} onInput=${(event) => setName(event.target.value)}/>
      <label class="hidden" for="key-scope">Scope</label><input id="key-scope" type="text" list="scope-presets" maxlength="2000" value=${scope} onInput=${(event) => setScope(event.target.value)}/><datalist id="scope-presets"><option value="user"/><option value="admin"/><option value="tasks:read"/></datalist>
      <button class="primary" disabled=${busy || !name.trim()}>Create key</button></form>`}
    ${trouble && html`<p class="notice" role="alert">${trouble}</p>`}
    ${made?.secret && html`<${Secret} secret=${made.secret} what=${`The key “${plain(made.key.name)}” was created.`}/>`}
    <${Waiting} of=${read}/>
    ${read.data && html`<${Table} label="API keys" rows=${read.data.keys} rowKey=${(row) => row.id} rowClass=${(row) => (row.revoked_at ? "gone" : "")} columns=${[
      { title: "Name", value: (row) => row.name, cell: (row) => html`<b>${plain(row.name)}</b>` }, { title: "Id", value: (row) => row.id, cell: (row) => html`<span class="mono">${row.id}</span>` },
      { title: "Scope", value: (row) => row.scope, cell: (row) => html`<span class="mono clip" title=${row.scope}>${plain(row.scope)}</span>` }, { title: "Created", value: (row) => row.created_at, cell: (row) => html`<span title=${moment(row.created_at)}>${ago(row.created_at)}</span>` },
      { title: "Last used", value: (row) => row.last_used_at || "", cell: (row) => (row.last_used_at ? ago(row.last_used_at) : "never") },
      { title: "State", value: (row) => (row.revoked_at ? "revoked" : "valid"), cell: (row) => html`<span class=${"chip " + (row.revoked_at ? "unready" : "ready")}><i></i>${row.revoked_at ? "revoked" : "valid"}</span>` },
      ...(may ? [{ title: html`<span class="hidden">Actions</span>`, cell: (row) => !row.revoked_at && html`<button class="danger" disabled=${busy} aria-label=${`Revoke ${row.name}`}
        onClick=${() => confirm(`Revoke “${row.name}”? Its open tasks are cancelled.`) && change("DELETE", `/keys/${row.id}`)}>Revoke</button>` }] : [])]}/>`}</div>`;
}

function Enrolments({ may }) {
  const read = useData("/joins", 15000);
  const [{ busy, trouble, made }, change] = useChanges(read.reload);
  const [name, setName] = useState("");
  const create = async (event) => {
    event.preventDefault();
    if (await change("POST", "/joins", { name: name.trim() })) setName("");
  };
  return html`<div class="stack"><h2>Enrolment tokens for arms of your own</h2>
    ${may && html`<form class="row filters" onSubmit=${create}><label class="hidden" for="arm-name">Name of the arm</label><input class="grow" id="arm-name" type="text" required maxlength="64" pattern="[a-z][a-z0-9_\\-]*" placeholder="Name of the arm" value=${name} onInput=${(event) => setName(event.target.value)}/>
      <button disabled=${busy || !name.trim()}>Create token</button></form>`}
    ${trouble && html`<p class="notice" role="alert">${trouble}</p>`}
    ${made?.secret && html`<${Secret} secret=${made.secret} what=${`The enrolment token of ${made.join.name} was created.`}/>`}
    <${Waiting} of=${read}/>
    ${read.data && !read.data.joins.length && html`<p class="small soft">None yet. With one, an arm of your own is let in under one name.</p>`}
    ${read.data?.joins.length > 0 && html`<${Table} label="Enrolment tokens" rows=${read.data.joins} rowKey=${(row) => row.id} columns=${[
      { title: "Arm", value: (row) => row.name, cell: (row) => html`<b>${plain(row.name)}</b>` }, { title: "May call", cell: (row) => html`<span class="mono">${row.calls.join(", ") || "nothing"}</span>` },
      { title: "Expires", value: (row) => row.expires_at, cell: (row) => moment(row.expires_at) }, { title: "State", value: (row) => row.state, cell: (row) => html`<span class=${"chip " + (row.state === "good" ? "ready" : "unready")}><i></i>${row.state}${row.used_at ? ", used" : ""}</span>` },
      ...(may ? [{ title: html`<span class="hidden">Actions</span>`, cell: (row) => row.state === "good" && html`<button class="danger" disabled=${busy} aria-label=${`Revoke the token of ${row.name}`} onClick=${() => confirm(`Revoke the enrolment token of “${row.name}”?`) && change("DELETE", `/joins/${row.id}`)}>Revoke</button>` }] : [])]}/>`}</div>`;
}

function Arms() {
  const read = useData("/arms", 15000);
  if (!read.data) return html`<${Waiting} of=${read}/>`;
  return html`<${Table} label="Arms that may be called" rows=${read.data.arms} rowKey=${(row) => row.name} columns=${[
    { title: "Arm", value: (row) => row.name, cell: (row) => html`<b>${plain(row.name)}</b>` }, { title: "What it does", cell: (row) => html`<span class="wrap">${plain(row.description)}</span>` },
    { title: "Operations", cell: (row) => html`<span class="mono wrap">${row.operations.join(", ")}</span>` }, { title: "May call", cell: (row) => html`<span class="mono wrap">${row.calls.join(", ") || "nothing"}</span>` },
    { title: "State", value: (row) => row.state, cell: (row) => html`<span class=${"chip " + (row.state === "healthy" ? "ready" : "unready")}><i></i>${row.state}</span>` }]}/>`;
}
