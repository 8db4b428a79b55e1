/* What a person does to a running task: decide on approvals, pause, resume, add an instruction, skip a step, raise its
   limits. */
import { html, useState } from "../vendor/htm-preact.js";
import { call, randomKey } from "../lib/api.js";
import { duration, money } from "../lib/format.js";
import { plain } from "../lib/text.js";

export function Approvals({ taskId, pending, say }) {
  const [comment, setComment] = useState("");
  const [busy, setBusy] = useState(false);
  const decide = async (decision, approval) => {
    setBusy(true);
    say("");
    try {
      await call(`/tasks/${taskId}/approval`, {
        method: "POST", body: JSON.stringify({ decision, approval_id: approval.approval_id, comment: comment.trim() }),
        headers: { "Content-Type": "application/json", "Idempotency-Key": randomKey() },
      });
      setComment("");
    } catch (error) { say(error.message); }
    setBusy(false);
  };
  return html`<section class="card stack" aria-labelledby="approval"><h2 id="approval">Needs your approval</h2>
    <div><label for="approval-comment">Comment, recorded with the decision</label>
      <input type="text" id="approval-comment" maxlength="2000" value=${comment} onInput=${(event) => setComment(event.target.value)}/></div>
    ${pending.map((approval) => html`<div class="stack close" key=${approval.approval_id}>
      <p><b class="mono">${approval.approval_id}</b> ${plain(approval.reason)}</p>
      <p class="small faint">Until ${new Date(approval.expires_at).toLocaleString()}; after that the task fails.</p>
      <div class="row"><button class="primary" disabled=${busy} onClick=${() => decide("approve", approval)}>Approve</button>
        <button class="danger" disabled=${busy} onClick=${() => decide("reject", approval)}>Reject</button></div></div>`)}
    </section>`;
}

export function Steering({ taskId, status, instructions, say, steps, view }) {
  const [text, setText] = useState("");
  const [busy, setBusy] = useState(false);
  const steer = async (how, body) => {
    setBusy(true);
    say("");
    try {
      await call(`/tasks/${taskId}/${how}`, {
        method: "POST", body: body && JSON.stringify(body),
        headers: { "Content-Type": "application/json", "Idempotency-Key": randomKey() },
      });
      if (how === "instructions") setText("");
    } catch (error) { say(error.message); }
    setBusy(false);
  };
  const add = (event) => { event.preventDefault(); if (text.trim()) steer("instructions", { text: text.trim() }); };
  const paused = status === "paused";
  return html`<section class="card stack close" aria-label="Steer this task">
    <form class="row" onSubmit=${add}><label class="hidden" for="instruction">Instruction</label>
      <input class="grow" type="text" id="instruction" maxlength="4000" placeholder="Something else to keep to, from the next attempt or step on" value=${text} onInput=${(event) => setText(event.target.value)}/>
      <button disabled=${busy || !text.trim()}>Add</button>
      <button type="button" disabled=${busy} onClick=${() => steer(paused ? "resume" : "pause")}>${paused ? "Resume" : "Pause"}</button></form>
    <${Skip} steps=${steps} busy=${busy} steer=${steer}/>
    <${Extend} view=${view} busy=${busy} steer=${steer}/>
    ${instructions.map((each) => html`<p class="small soft">${plain(each.text)} <span class="faint">(${each.given_by})</span></p>`)}
    </section>`;
}

/* A task may go on without a step: those that need its result are told that it is missing. */
function Skip({ steps, busy, steer }) {
  const [chosen, setChosen] = useState("");
  const open = steps.filter((step) => !["completed", "failed", "skipped"].includes(step.status));
  if (!open.length) return null;
  const step = (open.find((each) => each.step === chosen) || open[0]).step;
  return html`<details><summary>Go on without a step</summary><form class="row" onSubmit=${(event) => { event.preventDefault(); steer("skip", { step }); }}>
    <label class="hidden" for="skip-step">Step</label>
    <select id="skip-step" class="grow" value=${step} onChange=${(event) => setChosen(event.target.value)}>${open.map((each) => html`<option value=${each.step}>${plain(each.title)}</option>`)}</select>
    <button class="danger" disabled=${busy}>Skip</button></form></details>`;
}

/* Limits are only ever raised: each field begins at what the task has. */
function Extend({ view, busy, steer }) {
  const [tokens, setTokens] = useState("");
  const [usd, setUsd] = useState("");
  const raise = (event) => {
    event.preventDefault();
    steer("extend", { ...(tokens ? { max_tokens: Number(tokens) } : {}), ...(usd ? { max_cost_usd: Number(usd) } : {}) });
    setTokens(""); setUsd("");
  };
  const { max_tokens: most, max_cost_usd: cost } = view?.budget || {};
  return html`<details><summary>Raise its limits</summary><form class="two" onSubmit=${raise}>
    <div><label for="extend-tokens">Most tokens</label><input id="extend-tokens" type="number" min=${most || 1} step="1" placeholder=${most ? most.toLocaleString() : "no limit of its own"} value=${tokens} onInput=${(event) => setTokens(event.target.value)}/></div>
    <div><label for="extend-cost">Most US dollars</label><input id="extend-cost" type="number" min=${cost || 0} step="any" placeholder=${cost ? String(cost) : "no limit of its own"} value=${usd} onInput=${(event) => setUsd(event.target.value)}/></div>
    <div><button disabled=${busy || !(tokens || usd)}>Raise</button></div></form></details>`;
}

/* How much of each limit is used; a task without a limit has no bar for it. */
export function Meters({ view, started, ended }) {
  const used = view.usage.prompt_tokens + view.usage.completion_tokens, { max_tokens: tokens, max_cost_usd: cost, max_time_seconds: time } = view.budget;
  const seconds = Math.max(0, (ended - started) / 1000);
  const meters = [tokens && ["Tokens", used, tokens, (n) => Math.round(n).toLocaleString()], cost && ["Cost", view.usage.cost_usd, cost, money], time && ["Time", Math.min(seconds, time), time, duration]].filter(Boolean);
  if (!meters.length) return null;
  return html`<div class="meters">${meters.map(([name, value, most, show]) => html`<div class=${"meter" + (value >= most ? " over" : value >= 0.8 * most ? " near" : "")}><span>${name} <b>${show(value)}</b> of ${show(most)}</span>
    <div class="bar" role="meter" aria-label=${`${name} used`} aria-valuemin="0" aria-valuemax=${most} aria-valuenow=${value}><i style=${{ width: `${Math.min(100, (value / most) * 100)}%` }}></i></div></div>`)}</div>`;
}
