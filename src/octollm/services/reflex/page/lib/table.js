/* Tables that can be sorted, with a chart where their numbers invite one. */
import { html, useMemo, useState } from "../vendor/htm-preact.js";

const NUMBER = /^[-+]?[$€£]?\s?(\d{1,3}(,\d{3})+|\d+)(\.\d+)?\s?%?$/;
export const toNumber = (text) => (NUMBER.test(String(text).trim()) ? Number(String(text).replace(/[$€£,%\s]/g, "")) : NaN);
const MAX_ROWS = 500, MAX_BARS = 40;

function compare(a, b) {
  const x = toNumber(a), y = toNumber(b);
  if (!isNaN(x) && !isNaN(y)) return x - y;
  return String(a).localeCompare(String(b), undefined, { numeric: true });
}

/* `columns`: { title, value(row) to sort by, cell(row) to show, number }. Rows keep their order until a heading is pressed. */
export function Table({ columns, rows, label, rowKey, rowClass }) {
  const [order, setOrder] = useState({ at: -1, down: false });
  const sorted = useMemo(() => {
    if (order.at < 0 || !columns[order.at]) return rows;
    const value = columns[order.at].value;
    const found = [...rows].sort((a, b) => compare(value(a), value(b)));
    return order.down ? found.reverse() : found;
  }, [rows, order, columns.length]);
  const press = (at) => setOrder((now) => (now.at === at ? { at, down: !now.down } : { at, down: Boolean(columns[at].number) }));
  return html`<div class="scroll" tabindex="0" role="region" aria-label=${label}><table class="grid"><thead><tr>${columns.map((column, at) => html`<th scope="col" class=${column.number ? "number" : ""}
      aria-sort=${order.at === at ? (order.down ? "descending" : "ascending") : null}>${column.value
      ? html`<button class="sort" onClick=${() => press(at)}>${column.title}<span aria-hidden="true">${order.at === at ? (order.down ? " ↓" : " ↑") : ""}</span></button>` : column.title}</th>`)}</tr></thead>
    <tbody>${sorted.slice(0, MAX_ROWS).map((row, index) => html`<tr key=${rowKey ? rowKey(row) : index} class=${rowClass ? rowClass(row) : ""}>${columns.map((column) => html`<td class=${column.number ? "number" : ""}>${column.cell ? column.cell(row) : column.value(row)}</td>`)}</tr>`)}</tbody></table>
    ${rows.length > MAX_ROWS && html`<p class="small soft">The first ${MAX_ROWS} of ${rows.length.toLocaleString()} rows are shown.</p>`}</div>`;
}

/* A table of texts, such as the answer's: `show` turns a cell into elements. */
export function TextTable({ head, rows, show = (text) => text, label = "Table" }) {
  const [chart, setChart] = useState(false);
  const numbers = useMemo(() => head.map((_, at) => rows.length > 0 && rows.every((row) => !isNaN(toNumber(row[at] ?? "")))), [head, rows]);
  const names = numbers.findIndex((is) => !is), values = numbers.findIndex((is, at) => is && at !== names);
  const invites = rows.length >= 3 && rows.length <= MAX_BARS && names >= 0 && values >= 0;
  const columns = head.map((title, at) => ({ title: show(title), number: numbers[at], value: (row) => row[at] ?? "", cell: (row) => show(row[at] ?? "") }));
  return html`<div class="stack close">${invites && html`<div class="row"><button class="plain" aria-pressed=${chart} onClick=${() => setChart(!chart)}>${chart ? "Hide chart" : "Show chart"}</button></div>`}
    ${invites && chart && html`<${Bars} label=${`${head[values]} by ${head[names]}`} bars=${rows.map((row) => ({ name: row[names], value: toNumber(row[values]), text: row[values] }))}/>`}
    <${Table} columns=${columns} rows=${rows} label=${label}/></div>`;
}

/* Bars beside their names and numbers: they are text for a screen reader, too. */
export function Bars({ bars, label }) {
  const low = Math.min(0, ...bars.map((bar) => bar.value)), high = Math.max(0, ...bars.map((bar) => bar.value)), span = high - low || 1;
  return html`<ul class="bars" aria-label=${label}>${bars.map((bar) => html`<li><span class="name" title=${bar.name}>${bar.name}</span>
    <span class="track" aria-hidden="true"><i class=${bar.value < 0 ? "minus" : ""} style=${{ left: `${((Math.min(0, bar.value) - low) / span) * 100}%`, width: `${(Math.abs(bar.value) / span) * 100}%` }}></i></span>
    <span class="value">${bar.text ?? bar.value}</span></li>`)}</ul>`;
}

/* RFC 4180: quotes, doubled quotes, line breaks in quotes. At most `most` rows are read. */
export function parseCsv(text, separator = ",", most = 2001) {
  const rows = [];
  let row = [], cell = "", quoted = false;
  for (let at = 0; at < text.length && rows.length < most; at++) {
    const char = text[at];
    if (quoted) {
      if (char !== '"') cell += char;
      else if (text[at + 1] === '"') { cell += '"'; at++; } else quoted = false;
    } else if (char === '"' && !cell) quoted = true;
    else if (char === separator) { row.push(cell); cell = ""; }
    else if (char === "\n") { row.push(cell.replace(/\r$/, "")); rows.push(row); row = []; cell = ""; } else cell += char;
  }
  if ((cell || row.length) && rows.length < most) { row.push(cell.replace(/\r$/, "")); rows.push(row); }
  return rows;
}
