/* One task, live. */
import { html, useEffect, useReducer, useState } from "../vendor/htm-preact.js";
import { FINAL, call, getJson, randomKey } from "../lib/api.js";
import { allows } from "../lib/data.js";
import { count, clockTime, duration } from "../lib/format.js";
import { Prose } from "../lib/markdown.js";
import { follow, fresh, reduce } from "../lib/task-state.js";
import { Live, plain } from "../lib/text.js";
import { Chip, Reasons, useNow } from "../lib/ui.js";
import { Artifacts } from "./files.js";
import { Graph } from "./plan.js";
import { Approvals, Meters, Steering } from "./steering.js";
import { Evidence, Step, withoutEvidence } from "./step.js";
import { Trace } from "./trace.js";

export function Task({ taskId, onChange, onKey, scope }) {
  const [state, dispatch] = useReducer(reduce, taskId, fresh);
  const [trouble, say] = useState("");
  const [cancelling, setCancelling] = useState(false);
  useEffect(() => follow(taskId, dispatch), [taskId]);
  const settled = state.steps.filter((step) => step.status === "completed").length;
  useEffect(() => {
    let gone = false;
    getJson(`/tasks/${taskId}`).then((view) => { if (!gone) dispatch({ type: "view", taskId, view }); }).catch(() => {});
    onChange();
    return () => { gone = true; };
  }, [taskId, settled, state.status, state.decisions]);
  useEffect(() => { if (state.refused?.code === "token_missing" || state.refused?.code === "api_key_invalid") onKey(); }, [state.refused]);
  const over = FINAL.has(state.status);
  const now = useNow(!over);
  const { view } = state;
  const cancel = async () => {
    if (!confirm("Cancel this task?")) return;
    setCancelling(true);
    say("");
    try { await call(`/tasks/${taskId}/cancel`, { method: "POST" }); } catch (error) { say(error.message); }
    setCancelling(false);
  };
  const runAgain = async (how, body) => {
    say("");
    try {
      const answer = await call(`/tasks/${taskId}/${how}`, {
        method: "POST", body, headers: { "Content-Type": "application/json", "Idempotency-Key": randomKey() },
      });
      location.hash = "#/tasks/" + (await answer.json()).task_id;
    } catch (error) { say(error.message); }
  };
  if (state.refused) return html`<div class="card"><p class="notice" role="alert">${state.refused.detail}</p></div>`;
  const started = view && new Date(view.created_at);
  const ended = view?.finished_at ? new Date(view.finished_at) : new Date(now);
  const usage = view?.usage;
  const tokens = usage ? usage.prompt_tokens + usage.completion_tokens : 0;
  const plan = state.texts.plan;
  const output = over && (view?.output || "");
  const artifacts = (over && view?.artifacts) || [];
  const alone = state.steps.length === 1;
  const may = (wanted) => allows(scope, wanted);
  const pending = (view?.approvals || []).filter((approval) => approval.status === "pending");
  return html`
    <section class="card stack" aria-labelledby="goal">
      <div class="row"><${Chip} status=${state.status}/>
        ${!over && state.line !== "live" && state.line !== "closed" && html`<span class="small faint">${state.line}…</span>`}
        <span class="grow"></span>
        <a class="small" href=${`#/tasks/${taskId}/trace`}>Trace</a>
        ${view?.forked_from && html`<a class="small" href=${`#/compare/${view.forked_from}/${taskId}`}>Compare with the run before</a>`}
        ${over && may("tasks:create") && html`<button onClick=${() => runAgain("retry")}>Run again</button>`}
        ${!over && may("tasks:cancel") && html`<button class="danger" onClick=${cancel} disabled=${cancelling}>Cancel task</button>`}</div>
      <h1 class="goal-text" id="goal">${view ? plain(view.goal) : "…"}</h1>
      <div class=${"bar " + state.status} role="progressbar" aria-label="Progress" aria-valuemin="0" aria-valuemax="100" aria-valuenow=${Math.round(state.progress)}><i style=${{ width: `${state.progress}%` }}></i></div>
      <div class="facts"><span><b>${Math.round(state.progress)} %</b></span>
        ${started && html`<span>Time <b>${duration((ended - started) / 1000)}</b></span>`}
        ${tokens > 0 && html`<span>Tokens <b>${tokens.toLocaleString()}</b></span>`}
        ${usage && usage.cost_usd > 0 && html`<span>Cost <b>$${usage.cost_usd.toFixed(4)}</b></span>`}
        ${view?.model && html`<span>Model <b>${view.model}</b></span>`}
        ${view?.parent_task_id && html`<span>Part of <a href=${"#/tasks/" + view.parent_task_id}>another task</a></span>`}
        ${view?.forked_from && html`<span>From <a href=${"#/tasks/" + view.forked_from}>another task</a></span>`}
        ${view?.files?.length > 0 && html`<span>Files <b>${view.files.map((file) => plain(file.name)).join(", ")}</b></span>`}</div>
      ${view && html`<${Meters} view=${view} started=${started} ended=${ended}/>`}
      ${trouble && html`<p class="notice" role="alert">${trouble}</p>`}
      ${state.note && html`<p class="notice mild" role="status">${state.note.detail}</p>`}
    </section>
    ${!over && pending.length > 0 && !may("tasks:approve") && html`<p class="notice mild" role="status">The task waits for an approval, which needs the scope tasks:approve.</p>`}
    ${!over && pending.length > 0 && may("tasks:approve") && html`<${Approvals} taskId=${taskId} pending=${pending} say=${say}/>`}
    ${!over && state.status && may("tasks:steer") && html`<${Steering} taskId=${taskId} status=${state.status} steps=${state.steps} view=${view} instructions=${view?.instructions || []} say=${say}/>`}
    ${state.status === "failed" && view?.error && html`<section class="card stack close" aria-labelledby="why"><h2 id="why">Why it failed</h2>
      <${Reasons} title=${view.error.detail} reasons=${(view.error.reasons || []).filter((reason) => !view.error.detail.includes(reason))} tone="bad"/><p class="small faint mono">${view.error.code}</p></section>`}
    ${(output || artifacts.length > 0) && html`<section class="card stack" aria-labelledby="result"><h2 id="result">Result</h2>
      ${view?.found === false && html`<p class="notice mild" role="status"><strong>Not found.</strong> The files do not have what the goal asks for.</p>`}
      ${output && html`<${Prose} text=${alone && state.steps[0].evidence ? withoutEvidence(output, state.steps[0].evidence) : output}/>`}
      ${artifacts.length > 0 && html`<${Artifacts} taskId=${taskId} artifacts=${artifacts} say=${say}/>`}
      ${alone && output && state.steps[0].evidence && html`<${Evidence} evidence=${state.steps[0].evidence} files=${view.files}/>`}</section>`}
    ${state.steps.length === 0 && plan && !over && html`<section class="card stack close"><h2>Planning</h2><${Live} text=${plan.text} running=${true} label="The plan as it is written"/></section>`}
    ${state.steps.length === 0 && !plan && !over && state.status && html`<section class="card"><p class="soft">${state.status === "accepted" ? "Waiting for a worker…" : "Planning…"}</p></section>`}
    ${state.steps.length > 0 && html`<section class="card stack" aria-labelledby="plan"><div class="row"><h2 id="plan">Plan</h2><span class="small soft">${settled} of ${count(state.steps.length, "step")} done</span></div>
      ${!alone && html`<${Graph} steps=${state.steps}/>`}
      ${state.steps.map((step) => html`<${Step} key=${step.step} step=${step} text=${state.texts[step.step]} failures=${state.attempts[step.step] || []} taskId=${taskId} say=${say} bare=${alone && Boolean(output)} files=${view?.files}
        fork=${over && may("tasks:create") && state.steps.length > 1 && (() => runAgain("fork", JSON.stringify({ from: step.step })))}/>`)}</section>`}
    ${view?.children?.length > 0 && html`<section class="card stack close" aria-labelledby="children"><h2 id="children">Sub-tasks</h2>
      <ul class="tasks">${view.children.map((child) => html`<li key=${child.task_id}><a href=${"#/tasks/" + child.task_id}><span class="goal">${plain(child.goal)}</span>
        <span class="row"><${Chip} status=${child.status}/></span></a></li>`)}</ul></section>`}
    ${state.log.length > 0 && html`<section class="card"><details><summary>What happened (${state.log.length})</summary><ol class="log">${state.log.map((entry) => html`<li><time class="faint mono" datetime=${entry.at}>${clockTime(entry.at)}</time><span>${plain(entry.text)}</span></li>`)}</ol></details></section>`}
    ${state.status && html`<${Trace} key=${taskId} taskId=${taskId} over=${over}/>`}
    <div class="hidden" role="status" aria-live="polite">${state.log.length ? plain(state.log[state.log.length - 1].text) : ""}</div>`;
}
