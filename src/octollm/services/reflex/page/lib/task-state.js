/* One task, as its frames tell it: a state that takes frames, and the socket that they come from. */
import { watchTask } from "../client.js";
import { FINAL } from "./api.js";

export const fresh = (taskId) => ({
  taskId, view: null, status: "", progress: 0, seq: 0, steps: [], plan: "", texts: {}, attempts: {}, log: [],
  note: null, line: "connecting", refused: null, decisions: 0,
});

const SAYS = {
  "task.accepted": () => "The task was accepted.",
  "task.planning": () => "The plan is being made.",
  "task.planned": (d) => `Planned ${d.steps.length} step${d.steps.length === 1 ? "" : "s"}.`,
  "task.replanned": () => "The rest was planned anew.",
  "task.started": () => "The first step begins.",
  "task.progress": null,
  "task.waiting": (d) => `Needs approval: ${d.reason}`,
  "task.approved": (d) => `Approved by ${d.decided_by}${d.comment ? `: ${d.comment}` : "."}`,
  "task.paused": (d) => `Paused by ${d.by}.`,
  "task.resumed": (d) => `Resumed by ${d.by}.`,
  "task.instructed": (d) => `${d.by} added: ${d.text}`,
  "task.extended": (d) => `${d.by} raised the limits.`,
  "task.completed": () => "The task is completed.",
  "task.failed": (d) => `The task failed: ${d.reason}`,
  "task.cancelled": () => "The task was cancelled.",
  "step.started": (d) => `“${d.title || d.step}” begins${d.attempt > 1 ? ` (attempt ${d.attempt})` : ""}.`,
  "step.completed": (d) => `“${d.title || d.step}” is accepted.`,
  "step.skipped": (d) => `“${d.title || d.step}” was skipped by ${d.by}.`,
  "step.failed": (d) => `Attempt ${d.attempt} of “${d.title || d.step}” was not accepted.`,
};

function changeStep(steps, id, change) {
  return steps.some((step) => step.step === id)
    ? steps.map((step) => (step.step === id ? { ...step, ...change(step) } : step))
    : [...steps, { step: id, title: id, arm: "", status: "pending", attempt: 0, depends_on: [], ...change({}) }];
}

function takeToken(state, frame) {
  const before = state.texts[frame.step];
  const anew = frame.reset || !before || before.attempt !== frame.attempt || before.run !== frame.run;
  const text = anew ? frame.data.text : before.text + frame.data.text;
  const entry = { attempt: frame.attempt, run: frame.run, text };
  return { ...state, texts: { ...state.texts, [frame.step]: entry } };
}

function takeEvent(state, frame) {
  const data = frame.data, kind = data.event_type;
  let { steps, status, attempts } = state;
  if (kind === "task.planned" || kind === "task.replanned") {
    const had = Object.fromEntries(steps.map((step) => [step.step, step]));
    steps = data.steps.map((step) => ({
      status: (data.reused || []).includes(step.step) ? "completed" : "pending", attempt: 0, depends_on: [], ...had[step.step], ...step,
    }));
  } else if (kind === "step.started") {
    steps = changeStep(steps, data.step, (step) => ({
      title: data.title || step.title, arm: data.arm || step.arm, status: "running", attempt: data.attempt,
    }));
  } else if (kind === "step.completed") {
    steps = changeStep(steps, data.step, () => ({
      status: "completed", attempt: data.attempt, output: data.output || "", artifacts: data.artifacts || [],
      score: data.score, accepted: data.reasons || [],
    }));
  } else if (kind === "step.failed") {
    attempts = { ...attempts, [data.step]: [...(attempts[data.step] || []), data] };
    steps = changeStep(steps, data.step, () => ({ status: data.final ? "failed" : "running" }));
  }
  if (kind === "step.skipped") steps = changeStep(steps, data.step, () => ({ status: "skipped" }));
  if (data.status && (frame.type !== "step" || kind === "step.skipped")) status = data.status;
  if (kind === "task.started") status = "running";
  if (kind === "task.paused") steps = steps.map((step) => (step.status === "running" ? { ...step, status: "pending" } : step));
  if (FINAL.has(status)) {
    steps = steps.map((step) => (step.status === "running" || step.status === "pending"
      ? { ...step, status: status === "completed" ? step.status : "cancelled" } : step));
  }
  const steered = ["task.waiting", "task.approved", "task.instructed", "task.extended", "step.skipped"];
  const decisions = state.decisions + (steered.includes(kind) ? 1 : 0);
  const titled = { ...data, title: data.title || (steps.find((step) => step.step === data.step) || {}).title };
  const says = SAYS[kind];
  const log = says ? [...state.log, { at: frame.timestamp, text: says(titled) }] : state.log;
  return { ...state, steps, status, attempts, log, decisions };
}

export function reduce(state, action) {
  if (action.type === "reset") return fresh(action.taskId);
  if (action.taskId && action.taskId !== state.taskId) return state;
  if (action.type === "line") return { ...state, line: action.line };
  if (action.type === "refused") return { ...state, refused: action.error, line: "closed" };
  if (action.type === "note") return { ...state, note: action.note };
  if (action.type === "view") {
    const { view } = action;
    const known = Object.fromEntries(view.steps.map((step) => [step.step, step]));
    const steps = state.steps.map((step) => {
      const truth = known[step.step];
      return truth ? { ...step, evidence: truth.evidence, usage: truth.usage, output: truth.output || step.output } : step;
    });
    return { ...state, view, steps, status: FINAL.has(view.status) ? view.status : state.status || view.status, progress: Math.max(state.progress, view.progress * (FINAL.has(view.status) ? 1 : 0)) };
  }
  const { frame } = action;
  let next = { ...state, progress: Math.max(state.progress, frame.progress) };
  if (frame.type === "token") return takeToken(next, frame);
  if (frame.data.note) return { ...next, note: frame.data.note };
  if (frame.type === "ping" || frame.seq <= state.seq) return next;
  next = takeEvent(next, frame);
  next.seq = frame.seq;
  /* A task that is over stays over: it must not look as if it ran again while its history is read. */
  if (FINAL.has(state.view?.status)) next.status = state.view.status;
  return next;
}

const REFUSALS = {
  4401: ["token_missing", "An API key is needed to watch this task."],
  4403: ["scope_missing", "You may not watch this task."],
  4404: ["task_not_found", "There is no such task."],
};

/* Watches a task from its beginning to its final frame. */
export function follow(taskId, dispatch) {
  const watch = watchTask(taskId, { after: 0 });
  let stopped = false;
  const tell = (action) => { if (!stopped) dispatch({ taskId, ...action }); };
  watch.onstate = (line) => tell({ type: "line", line });
  (async () => {
    try {
      for await (const frame of watch) tell({ type: "frame", frame });
    } catch (error) {
      const [code, detail] = REFUSALS[error.code] || ["refused", error.message];
      tell({ type: "refused", error: { code, detail } });
    }
  })();
  return () => { stopped = true; watch.close(); };
}
