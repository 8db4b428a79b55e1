/* Requests to the gateway, and what it refuses. */

export const MAX_FILE = 20 * 1024 * 1024;
export const FINAL = new Set(["completed", "failed", "cancelled"]);

export class Refusal extends Error {
  constructor(problem, status) {
    super(problem.detail || problem.title || "The server answered " + status + ".");
    this.code = problem.code || "";
    this.status = status;
    this.faults = problem.errors || [];
  }
}

const listeners = new Set();
let reachable = true;
function reached(now) {
  if (now === reachable) return;
  reachable = now;
  for (const tell of listeners) tell(now);
}
export function onReach(tell) {
  listeners.add(tell);
  return () => listeners.delete(tell);
}

export async function call(path, options = {}) {
  let answer;
  try {
    answer = await fetch(path, { ...options, cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    reached(false);
    throw new Refusal({ detail: "The server cannot be reached.", code: "unreachable" }, 0);
  }
  reached(true);
  if (!answer.ok) {
    let problem = {};
    try { problem = await answer.json(); } catch { /* not a problem document */ }
    throw new Refusal(problem, answer.status);
  }
  return answer;
}
export const getJson = async (path, options) => (await call(path, options)).json();

/* Sends `body` as JSON. Each call has an idempotency key of its own, so that a proxy that repeats it repeats nothing. */
export async function send(method, path, body) {
  const headers = { "Idempotency-Key": randomKey(), ...(body === undefined ? {} : { "Content-Type": "application/json" }) };
  return (await call(path, { method, headers, body: body === undefined ? undefined : JSON.stringify(body) })).json();
}

export const query = (members) => {
  const found = Object.entries(members).filter(([, value]) => value !== "" && value !== null && value !== undefined);
  return found.length ? "?" + new URLSearchParams(found) : "";
};

export function randomKey() {
  return Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) => byte.toString(16).padStart(2, "0")).join("");
}

export async function submit({ goal, files, criteria, tokens }) {
  const stored = [];
  for (const file of files) {
    const answer = await call("/files", {
      method: "POST", body: file,
      headers: { "Content-Type": "application/octet-stream", "X-File-Name": encodeURIComponent(file.name) },
    });
    stored.push({ name: file.name, digest: (await answer.json()).digest });
  }
  const body = { goal };
  if (stored.length) body.context = { files: stored };
  if (criteria.length) body.acceptance_criteria = criteria;
  if (tokens) body.budget = { max_tokens: tokens };
  const answer = await call("/tasks", {
    method: "POST", body: JSON.stringify(body),
    headers: { "Content-Type": "application/json", "Idempotency-Key": randomKey() },
  });
  return answer.json();
}

export async function download(taskId, artifact) {
  const answer = await call(`/tasks/${taskId}/artifacts/${artifact.digest}`);
  const url = URL.createObjectURL(await answer.blob());
  const link = Object.assign(document.createElement("a"), { href: url, download: artifact.name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(url), 10000);
}
