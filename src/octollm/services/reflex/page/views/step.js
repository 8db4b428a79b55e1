/* One step of a task: its text, verdicts, result, evidence and files. */
import { html, useState } from "../vendor/htm-preact.js";
import { call } from "../lib/api.js";
import { count, cut } from "../lib/format.js";
import { Prose } from "../lib/markdown.js";
import { Code, Live, plain } from "../lib/text.js";
import { Chip, Reasons } from "../lib/ui.js";
import { Artifacts } from "./files.js";

const UNCERTAIN = "not certain, check it: ", UNDECIDED = "Not decided by the file, so the answer may be wrong";

/* The text of an answer for a terminal has its evidence, too: what is shown below it is left out here, word for word. */
export function withoutEvidence(output, { query, assumptions = [], notes = [] }) {
  const lines = new Set([...assumptions.map((each) => `- ${each.text}`), ...notes.map((text) => `Note: ${text}`), UNDECIDED + ":", "Assumptions:"]);
  const plain = query ? output.replace("Query:\n```sql\n" + query + "\n```", () => "") : output;
  return plain.split("\n").filter((line) => !lines.has(line)).join("\n").trim();
}

/* A citation opens the passage around it, whatever the file's format: memory has the text of every document. */
const MAX_QUERY = 300;
function Source({ cite, digest }) {
  const [state, setState] = useState({});
  const place = cite.location ? cite.location : cite.line_start === cite.line_end ? `line ${cite.line_start}` : `lines ${cite.line_start}–${cite.line_end}`;
  const open = async (event) => {
    if (!event.target.open || state.passage) return;
    setState({ busy: true });
    try {
      const body = { query: cite.text.slice(0, MAX_QUERY), limit: 20, filters: { digests: [digest] } };
      const answer = await call("/memory/search", { method: "POST", body: JSON.stringify(body), headers: { "Content-Type": "application/json" } });
      const passage = (await answer.json()).passages.find((each) => each.line_start <= cite.line_start && each.line_end >= cite.line_end);
      setState(passage ? { passage } : { trouble: "The passage around it is not in memory any more." });
    } catch (error) { setState({ trouble: error.message }); }
  };
  const isCited = (number) => number >= cite.line_start && number <= cite.line_end;
  return html`<li class="stack close"><blockquote>${plain(cite.text)}</blockquote>
    ${digest ? html`<details onToggle=${open}><summary>${plain(cite.file)}, ${place}</summary>
      ${state.busy && html`<p class="small soft">Reading…</p>`}
      ${state.trouble && html`<p class="notice" role="alert">${state.trouble}</p>`}
      ${state.passage && html`<ol class="passage" tabindex="0" aria-label=${`${cite.file}, ${place}`}>${state.passage.text.split("\n").map((line, at) => {
        const number = state.passage.line_start + at;
        return html`<li class=${isCited(number) ? "cited" : ""}><span class="faint">${number}</span><span style="text-align: left">${plain(line)}</span></li>`;
      })}</ol>`}</details>` : html`<span class="small soft">${plain(cite.file)}, ${place}</span>`}</li>`;
}

export function Evidence({ evidence, files = [] }) {
  const { checks = [], query, citations = [], rows, assumptions = [], notes = [] } = evidence;
  const doubts = notes.filter((text) => text.startsWith(UNCERTAIN)), read = notes.filter((text) => !text.startsWith(UNCERTAIN));
  const digestOf = (name) => files.find((file) => file.name === name)?.digest;
  const [decided, open] = [true, false].map((value) => assumptions.filter((each) => (each.decided !== false) === value).map((each) => each.text));
  return html`
    ${checks.length > 0 && html`<ul class="checks" aria-label="Checks">${checks.map((check) => html`<li class=${"chip " + (check.checked_by === "nobody" ? "" : check.passed ? "completed" : "failed")} title=${check.detail || ""}>${check.checked_by === "nobody" ? `not checked: ${cut(check.detail || check.name, 36)}` : `${check.passed ? "✓" : "✗"} ${check.name}`}</li>`)}</ul>`}
    ${query && html`<div class="stack close"><strong class="small">SQL query${typeof rows === "number" ? ` · ${count(rows, "row")}` : ""}</strong><${Code} text=${query} label="SQL query"/></div>`}
    ${open.length > 0 && html`<${Reasons} title=${UNDECIDED} reasons=${open} tone=""/>`}
    ${decided.length > 0 && html`<div class="stack close"><strong class="small">Assumptions</strong><ul class="small">${decided.map((text) => html`<li>${plain(text)}</li>`)}</ul></div>`}
    ${doubts.length > 0 && html`<${Reasons} title="Not certain" reasons=${doubts.map((text) => text.slice(UNCERTAIN.length))} tone=""/>`}
    ${read.length > 0 && html`<div class="stack close"><strong class="small">How files were read</strong><ul class="small">${read.map((text) => html`<li>${plain(text)}</li>`)}</ul></div>`}
    ${citations.length > 0 && html`<div class="stack close"><strong class="small">Sources</strong><ol class="cites">${citations.map((cite) => html`<${Source} cite=${cite} digest=${digestOf(cite.file)}/>`)}</ol></div>`}`;
}

export function Step({ step, text, failures, taskId, say, bare, files, fork }) {
  const running = step.status === "running";
  const shown = text && text.attempt === step.attempt ? text.text : "";
  return html`<article class=${"step " + step.status} id=${"step-" + step.step} tabindex="-1" aria-label=${`Step: ${step.title}`}>
    <header><h3>${plain(step.title)}</h3><span class="small soft nowrap">${step.arm}${step.attempt > 1 ? ` · attempt ${step.attempt}` : ""}</span><${Chip} status=${step.status}/></header>
    ${failures.map((failure) => html`<${Reasons} title=${`Attempt ${failure.attempt} was not accepted${failure.code && failure.code !== "not_accepted" ? ` (${failure.code})` : ""}`} reasons=${failure.reasons || []} tone=${failure.final ? "bad" : ""}/>`)}
    ${shown && (running ? html`<${Live} text=${shown} running=${true} label=${`Text of ${step.title}`}/>`
      : html`<details><summary>What was written</summary><${Live} text=${shown} label=${`Text of ${step.title}`}/></details>`)}
    ${running && !shown && html`<p class="small soft">Working…</p>`}
    ${step.status === "completed" && html`<${Reasons} title=${`Accepted${typeof step.score === "number" ? ` · score ${step.score.toFixed(2)}` : ""}`} reasons=${step.accepted || []} tone="good"/>`}
    ${step.status === "completed" && step.output && !bare && html`<details><summary>Result of this step</summary><${Prose} text=${step.output}/></details>`}
    ${step.evidence && !bare && html`<${Evidence} evidence=${step.evidence} files=${files}/>`}
    ${(step.artifacts || []).length > 0 && !bare && html`<${Artifacts} taskId=${taskId} artifacts=${step.artifacts} say=${say}/>`}
    ${fork && html`<div class="row"><button class="plain" onClick=${fork}>Run again from here</button></div>`}
  </article>`;
}
