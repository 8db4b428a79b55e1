/* What model calls cost: by day, arm and model, as the ledger has settled them. */
import { html, useState } from "../vendor/htm-preact.js";
import { query } from "../lib/api.js";
import { Needs, Waiting, useData } from "../lib/data.js";
import { money } from "../lib/format.js";
import { Bars, Table } from "../lib/table.js";
import { plain } from "../lib/text.js";

const BY = [["day", "Day"], ["arm", "Arm"], ["model", "Model"]];
const DAYS = [1, 7, 30, 90];

export function Cost({ scope }) {
  const [by, setBy] = useState("day");
  const [days, setDays] = useState(30);
  return html`<section class="card stack" aria-labelledby="cost-title"><div class="row"><h1 class="view-title grow" id="cost-title">Cost</h1>
      <label class="hidden" for="cost-days">Period</label><select id="cost-days" value=${days} onChange=${(event) => setDays(Number(event.target.value))}>${DAYS.map((count) => html`<option value=${count}>${count === 1 ? "Last day" : `Last ${count} days`}</option>`)}</select></div>
    <div class="tabs" role="group" aria-label="Group by">${BY.map(([name, title]) => html`<button aria-pressed=${by === name} onClick=${() => setBy(name)}>${title}</button>`)}</div>
    <${Needs} scope=${scope} wanted="tasks:read"><${Spent} by=${by} days=${days}/><//></section>`;
}

function Spent({ by, days }) {
  const read = useData("/usage" + query({ by, days: String(days) }), 10000);
  if (!read.data) return html`<${Waiting} of=${read}/>`;
  const rows = read.data.rows, sum = (name) => rows.reduce((total, row) => total + row[name], 0);
  if (!rows.length) return html`<p class="nothing soft">No model was called in this period.</p>`;
  // Embedded models cost nothing: then the tokens say who used how much.
  const free = sum("cost_usd") === 0, title = BY.find(([name]) => name === by)[1], name = (row) => plain(row.name) || (by === "arm" ? "planning and judging" : "unknown");
  return html`<div class="stack"><div class="facts"><span>Cost <b>${money(sum("cost_usd"))}</b></span><span>Tokens <b>${sum("tokens").toLocaleString()}</b></span><span>Model calls <b>${sum("calls").toLocaleString()}</b></span></div>
    <${Bars} label=${`${free ? "Tokens" : "Cost"} by ${by}`} bars=${rows.slice(0, 90).map((row) => (free ? { name: name(row), value: row.tokens, text: row.tokens.toLocaleString() } : { name: name(row), value: row.cost_usd, text: money(row.cost_usd) }))}/>
    <${Table} label=${`Cost by ${by}`} rows=${rows} rowKey=${(row) => row.name} columns=${[{ title, value: name, cell: (row) => html`<b>${name(row)}</b>` }, { title: "Model calls", number: true, value: (row) => row.calls, cell: (row) => row.calls.toLocaleString() },
      { title: "Tokens", number: true, value: (row) => row.tokens, cell: (row) => row.tokens.toLocaleString() }, { title: "Cost", number: true, value: (row) => row.cost_usd, cell: (row) => money(row.cost_usd) }]}/>
    ${free && html`<p class="small soft">No price applies to these models: the bars count tokens.</p>`}</div>`;
}
