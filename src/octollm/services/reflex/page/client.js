/*
 * Live updates of OctoLLM in a browser: `watchTask` and `watchDashboard`, each an async iterator of frames.
 * A watch reconnects by itself and resumes at its last position, so each frame comes once and in order.
 * The types are in client.d.ts; the frames are described in docs/concepts/live-updates.md and docs/dashboard.md.
 */

const MAX_QUEUED = 10000;
const MAX_OFFSETS = 64;
const SILENCE_MS = 45000; // the gateway sends a ping after 15 s: without one the connection is dead
const FIRST_PAUSE_MS = 250;
const LONGEST_PAUSE_MS = 10000;
const UNRESUMABLE = new Set(["position_expired", "position_unknown"]);

/** Why the gateway refuses a watch for good: its close code and its reason. */
export class LiveError extends Error {
  constructor(code, reason) {
    super(`The gateway closed the connection with ${code}${reason ? `: ${reason}` : ""}.`);
    this.name = "LiveError";
    this.code = code;
    this.reason = reason;
  }
}

/** A frame does not follow the one before: what is between them was lost, and is asked for again. */
class Gap extends Error {}

/* Text is counted in code points, as the gateway counts it: a character outside the BMP is one, not two. */
const codePoints = (text) => Array.from(text);

/** The position of a task's watch: `after`, and for each running step the attempt, run and length of its text. */
class TaskPosition {
  constructor({ after, offsets = {} }) {
    this.after = after;
    this.beganWithState = after === undefined;
    this.texts = new Map(Object.entries(offsets).map(([step, at]) => [step, at.split(".").map(Number)]));
  }

  get offsets() {
    return Object.fromEntries(Array.from(this.texts, ([step, at]) => [step, at.join(".")]));
  }

  query() {
    const parts = this.after === undefined ? [] : [["after", this.after]];
    for (const [step, at] of Array.from(this.texts).slice(-MAX_OFFSETS)) parts.push(["offset", `${step}.${at.join(".")}`]);
    return parts;
  }

  /** Applies a frame; returns what is new of it, or null. */
  advance(frame) {
    if (frame.type === "ping") return null;
    if (frame.type === "token") return this.advanceText(frame);
    if (frame.data.note) return frame;
    if (this.after !== undefined) {
      // After the present state of a finished task comes its final frame, with the same seq.
      const isLast = this.beganWithState && frame.seq === this.after && this.isFinal(frame);
      if (frame.seq <= this.after && !isLast) return null;
      if (frame.seq > this.after + 1) throw new Gap();
    }
    if (frame.type === "step" && "text_length" in frame.data) this.texts.delete(frame.data.step);
    this.after = frame.seq;
    return frame;
  }

  advanceText(frame) {
    const [attempt, run, length] = this.texts.get(frame.step) || [-1, -1, 0];
    const order = frame.attempt - attempt || frame.run - run;
    if (order < 0) return null; // a late piece of an attempt, or of a worker, that another one has replaced
    const seen = order > 0 ? 0 : length;
    const points = codePoints(frame.data.text);
    const end = frame.offset + points.length;
    if (!frame.reset) {
      if (frame.offset > seen) throw new Gap();
      if (end <= seen) return null;
      if (frame.offset < seen) {
        const text = points.slice(seen - frame.offset).join("");
        frame = { ...frame, offset: seen, data: { ...frame.data, text } };
      }
    }
    this.texts.delete(frame.step); // so that the latest steps are last
    this.texts.set(frame.step, [frame.attempt, frame.run, end]);
    return frame;
  }

  /** A task's position is the client's own to choose: what cannot be resumed is an error. */
  forget() { return false; }

  isFinal(frame) {
    return frame.type === "result" || frame.type === "error"
      || (frame.type === "status" && frame.data.event_type === "task.cancelled");
  }
}

/** The position of a dashboard's watch. */
class DashboardPosition {
  constructor({ after, status = [], text, tenant, include = [], limit }) {
    this.after = after;
    this.filters = [
      ...[status].flat().map((value) => ["status", value]),
      ...[include].flat().map((value) => ["include", value]),
      ...Object.entries({ text, tenant, limit }).filter(([, value]) => value !== undefined),
    ];
    this.offsets = {};
  }

  query() {
    return this.after === undefined ? this.filters : [["after", this.after], ...this.filters];
  }

  advance(frame) {
    this.after = frame.seq;
    return frame.type === "ping" ? null : frame;
  }

  forget() {
    const hadPosition = this.after !== undefined;
    this.after = undefined;
    return hadPosition;
  }

  isFinal() { return false; }
}

class Watch {
  constructor(path, position, { url, signal } = {}) {
    this.state = "connecting";
    this.onstate = null;
    this._path = path;
    this._position = position;
    this._base = new URL(url || globalThis.location.href);
    this._base.protocol = this._base.protocol.replace(/^http/, "ws");
    this._queue = [];
    this._waiting = null;
    this._failure = null;
    this._ended = false;
    this._attempts = 0;
    this._isPaused = false;
    this._socket = null;
    this._reconnect = 0;
    this._silence = 0;
    if (signal) {
      if (signal.aborted) this.close();
      else signal.addEventListener("abort", () => this.close(), { once: true });
    }
    if (!this._ended) this._open();
  }

  get position() { return { after: this._position.after, offsets: this._position.offsets }; }

  send(message) {
    if (!this._socket || this._socket.readyState !== WebSocket.OPEN) return false;
    this._socket.send(JSON.stringify(message));
    return true;
  }

  close() { this._end(null); }

  [Symbol.asyncIterator]() { return this; }

  async next() {
    if (!this._queue.length && !this._ended) await new Promise((resolve) => { this._waiting = resolve; });
    if (this._queue.length) {
      const value = this._queue.shift();
      if (this._isPaused && !this._queue.length) this._open();
      return { value, done: false };
    }
    if (this._failure) {
      const failure = this._failure;
      this._failure = null;
      throw failure;
    }
    return { value: undefined, done: true };
  }

  async return() {
    this._queue = [];
    this.close();
    return { value: undefined, done: true };
  }

  _open() {
    this._isPaused = false;
    const url = new URL(this._path, this._base);
    for (const [name, value] of this._position.query()) url.searchParams.append(name, value);
    const socket = this._socket = new WebSocket(url);
    socket.onopen = () => { if (socket === this._socket) this._watchSilence(); };
    socket.onmessage = (event) => { if (socket === this._socket) this._take(event.data); };
    socket.onclose = (event) => { if (socket === this._socket) this._closed(event.code, event.reason); };
    this._watchSilence();
  }

  _watchSilence() {
    clearTimeout(this._silence);
    this._silence = setTimeout(() => this._drop(), SILENCE_MS);
  }

  /** Gives the connection up, and connects again. */
  _drop() {
    const socket = this._socket;
    this._socket = null;
    if (socket) socket.close();
    this._schedule();
  }

  _take(data) {
    this._watchSilence();
    let frame;
    try {
      frame = this._position.advance(JSON.parse(data));
    } catch (error) {
      if (!(error instanceof Gap)) return this._end(error);
      return this._drop();
    }
    this._attempts = 0;
    this._setState("live");
    if (frame === null) return undefined;
    this._queue.push(frame);
    this._wake();
    if (this._position.isFinal(frame)) return this._end(null);
    if (this._queue.length >= MAX_QUEUED) {
      // The rest stays at the gateway until these were taken.
      const socket = this._socket;
      this._socket = null;
      this._isPaused = true;
      clearTimeout(this._silence);
      socket.close();
    }
    return undefined;
  }

  _closed(code, reason) {
    this._socket = null;
    if (code === 1000) return this._end(null);
    if (code === 1008 && UNRESUMABLE.has(reason) && this._position.forget()) return this._open();
    if ([1008, 4401, 4403, 4404].includes(code)) return this._end(new LiveError(code, reason));
    return this._schedule();
  }

  _schedule() {
    clearTimeout(this._silence);
    if (this._ended) return;
    this._setState("reconnecting");
    const longest = Math.min(LONGEST_PAUSE_MS, FIRST_PAUSE_MS * 2 ** this._attempts++);
    this._reconnect = setTimeout(() => this._open(), longest * (0.5 + Math.random() / 2));
  }

  _end(failure) {
    if (this._ended) return;
    this._ended = true;
    this._failure = failure;
    clearTimeout(this._silence);
    clearTimeout(this._reconnect);
    const socket = this._socket;
    this._socket = null;
    if (socket) socket.close();
    this._setState("closed");
    this._wake();
  }

  _setState(state) {
    if (state === this.state) return;
    this.state = state;
    if (this.onstate) this.onstate(state);
  }

  _wake() {
    const resolve = this._waiting;
    this._waiting = null;
    if (resolve) resolve();
  }
}

/** Watches a task: without `after` from its present state, with `after: 0` from its beginning. */
export function watchTask(taskId, options = {}) {
  return new Watch(`/ws/tasks/${encodeURIComponent(taskId)}`, new TaskPosition(options), options);
}

/** Watches all that the caller may see. */
export function watchDashboard(options = {}) {
  return new Watch("/ws/dashboard", new DashboardPosition(options), options);
}
