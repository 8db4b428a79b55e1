/* A small part of Markdown, made of elements, never of HTML text. */
import { html } from "../vendor/htm-preact.js";
import { TextTable } from "./table.js";
import { Code, plain } from "./text.js";

function inline(text) {
  return text.split(/(`[^`]+`|\*\*[^*]+\*\*)/).map((part) =>
    part.length > 2 && part.startsWith("`") ? html`<code>${part.slice(1, -1)}</code>`
      : part.length > 4 && part.startsWith("**") ? html`<strong>${part.slice(2, -2)}</strong>` : part);
}
const cells = (line) => line.trim().replace(/^\||\|$/g, "").split("|").map((cell) => cell.trim());
export function Prose({ text }) {
  const lines = plain(text).split("\n"), out = [];
  for (let at = 0; at < lines.length;) {
    const line = lines[at];
    const fence = line.match(/^\s*(```+|~~~+)/);
    if (fence) {
      const body = [];
      for (at++; at < lines.length && !lines[at].trim().startsWith(fence[1]); at++) body.push(lines[at]);
      at++;
      out.push(html`<${Code} text=${body.join("\n")}/>`);
    } else if (/^\s*\|.*\|\s*$/.test(line) && /^\s*\|?[\s:|-]+\|?\s*$/.test(lines[at + 1] || "") && (lines[at + 1] || "").includes("-")) {
      const head = cells(line), rows = [];
      for (at += 2; at < lines.length && /^\s*\|/.test(lines[at]); at++) rows.push(cells(lines[at]));
      out.push(html`<${TextTable} head=${head} rows=${rows} show=${inline} label="Table of the answer"/>`);
    } else if (/^#{1,6} /.test(line)) {
      out.push(html`<h3>${inline(line.replace(/^#+ /, ""))}</h3>`);
      at++;
    } else if (/^\s*([-*]|\d+[.)]) /.test(line)) {
      const ordered = /^\s*\d/.test(line), items = [];
      for (; at < lines.length && /^\s*([-*]|\d+[.)]) /.test(lines[at]); at++) items.push(lines[at].replace(/^\s*([-*]|\d+[.)]) /, ""));
      const list = items.map((item) => html`<li>${inline(item)}</li>`);
      out.push(ordered ? html`<ol>${list}</ol>` : html`<ul>${list}</ul>`);
    } else if (!line.trim()) {
      at++;
    } else {
      const body = [];
      for (; at < lines.length && lines[at].trim() && !/^\s*(```|~~~|#{1,6} |[-*] |\d+[.)] |\|)/.test(lines[at]); at++) body.push(lines[at]);
      if (!body.length) body.push(lines[at++]);
      out.push(html`<p>${inline(body.join("\n"))}</p>`);
    }
  }
  return html`<div class="prose">${out}</div>`;
}
