/* The form that starts a task. */
import { html, useState } from "../vendor/htm-preact.js";
import { MAX_FILE, submit } from "../lib/api.js";
import { size } from "../lib/format.js";
import { plain } from "../lib/text.js";

export function Compose({ goal, setGoal, onDone, onKey }) {
  const [files, setFiles] = useState([]);
  const [criteria, setCriteria] = useState("");
  const [tokens, setTokens] = useState("");
  const [busy, setBusy] = useState(false);
  const [over, setOver] = useState(false);
  const [trouble, setTrouble] = useState("");
  const add = (list) => {
    const chosen = Array.from(list);
    const large = chosen.filter((file) => file.size > MAX_FILE);
    setTrouble(large.length ? `${large.map((file) => file.name).join(", ")}: a file may have at most 20 MB.` : "");
    setFiles((before) => [...before, ...chosen.filter((file) => file.size <= MAX_FILE)].slice(0, 32));
  };
  const send = async (event) => {
    event.preventDefault();
    if (!goal.trim() || busy) return;
    setBusy(true);
    setTrouble("");
    try {
      const lines = criteria.split("\n").map((line) => line.trim()).filter(Boolean);
      const task = await submit({ goal: goal.trim(), files, criteria: lines, tokens: Number(tokens) || 0 });
      setGoal(""); setFiles([]); setCriteria(""); setTokens("");
      onDone(task.task_id);
    } catch (error) {
      setTrouble([error.message, ...(error.faults || []).map((fault) => `${fault.pointer}: ${fault.detail}`)].join(" "));
      if (error.status === 401) onKey();
    }
    setBusy(false);
  };
  const drop = (event) => { event.preventDefault(); setOver(false); add(event.dataTransfer.files); };
  return html`<form class="card stack close" onSubmit=${send} aria-label="New task">
    <label for="goal-input">What should be done?</label>
    <textarea id="goal-input" value=${goal} maxlength="32000" required placeholder="Write a Python function with tests" onInput=${(event) => setGoal(event.target.value)}
      onKeyDown=${(event) => { if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) send(event); }}></textarea>
    <label class=${"drop" + (over ? " over" : "")} onDragOver=${(event) => { event.preventDefault(); setOver(true); }} onDragLeave=${() => setOver(false)} onDrop=${drop}>
      <span>Add files, or drop them here</span><span class="small faint">Documents, tables, code · up to 20 MB each</span>
      <input class="hidden" type="file" multiple onChange=${(event) => { add(event.target.files); event.target.value = ""; }}/></label>
    ${files.length > 0 && html`<ul class="files" aria-label="Files to send">${files.map((file, index) => html`<li><span>${plain(file.name)}</span><span class="faint nowrap">${size(file.size)}</span>
      <button type="button" class="plain" aria-label=${`Remove ${file.name}`} onClick=${() => setFiles(files.filter((_, at) => at !== index))}>✕</button></li>`)}</ul>`}
    <details><summary>More</summary><div class="stack close">
      <div><label for="criteria">Acceptance criteria, one a line</label><textarea id="criteria" rows="3" value=${criteria} onInput=${(event) => setCriteria(event.target.value)}></textarea></div>
      <div><label for="tokens">Most tokens</label><input id="tokens" type="number" min="1" inputmode="numeric" placeholder="the installation's default" value=${tokens} onInput=${(event) => setTokens(event.target.value)}/></div></div></details>
    ${trouble && html`<p class="notice" role="alert">${trouble}</p>`}
    <div class="row"><button class="primary" disabled=${busy || !goal.trim()}>${busy ? "Sending…" : "Start task"}</button><span class="small faint">Ctrl + Enter</span></div>
  </form>`;
}

export const SAMPLES = [
  ["Write a Python function is_palindrome(text) with tests", ""],
  ["Which three products brought the most revenue?", "with a CSV file"],
  ["What does the contract say about notice periods?", "with a document"],
];
