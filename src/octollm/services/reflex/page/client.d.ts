/** Types of client.js. Frames have further members; ignore those that you do not know. */

export type TaskStatus =
  | "accepted" | "planning" | "running" | "waiting" | "paused" | "completed" | "failed" | "cancelled";
export type WatchState = "connecting" | "live" | "reconnecting" | "closed";
export type DashboardPart = "tasks" | "events" | "services";

export interface Position {
  /** The `seq` of the last frame; undefined before the first. */
  after?: number;
  /** Of a task, by step: `<attempt>.<run>.<code points>`. */
  offsets: Record<string, string>;
}

export interface WatchOptions {
  after?: number;
  /** The address of the gateway, if the page comes from elsewhere. */
  url?: string;
  /** Closes the watch. */
  signal?: AbortSignal;
}
export interface TaskOptions extends WatchOptions { offsets?: Record<string, string>; }
export interface DashboardOptions extends WatchOptions {
  status?: TaskStatus | TaskStatus[];
  text?: string;
  tenant?: string;
  include?: DashboardPart | DashboardPart[];
  limit?: number;
}

interface TaskFrameMembers {
  task_id: string;
  seq: number;
  timestamp: string;
  /** 0 to 100, never falling. */
  progress: number;
}
export interface EventFrame extends TaskFrameMembers {
  type: "status" | "progress" | "step" | "result" | "error";
  data: Record<string, unknown>;
}
export interface TokenFrame extends TaskFrameMembers {
  type: "token";
  data: { text: string };
  step: string;
  attempt: number;
  run: number;
  /** Code points of this step, attempt and run before `text`. */
  offset: number;
  /** The earlier text of the step is void. */
  reset: boolean;
}
export type TaskFrame = EventFrame | TokenFrame;

export interface Usage { prompt_tokens: number; completion_tokens: number; cost_usd: number; }
export interface DashboardTask {
  task_id: string;
  status: TaskStatus;
  goal: string;
  progress: number;
  version: number;
  created_at: string;
  updated_at: string;
  finished_at: string | null;
  parent_task_id: string | null;
  /** The error code of a failed task, otherwise empty. */
  failure: string;
  usage: Usage;
}
export interface EventEntry {
  seq: number;
  event_type: string;
  timestamp: string;
  source: string;
  subject: string;
  /** null if it is too long. */
  data: Record<string, unknown> | null;
}
export interface OpenBreaker { caller: string; instance: string; since: string; }
export interface ServiceState {
  service: string;
  state: "up" | "degraded" | "down" | "unknown";
  since: string | null;
  checked_at: string | null;
  latency_ms: number;
  detail: string;
  instances: number;
  requests_per_second: number | null;
  error_ratio: number | null;
  p50_ms: number | null;
  p95_ms: number | null;
  p99_ms: number | null;
  breakers: OpenBreaker[];
}
export type DashboardFrame = { seq: number; timestamp: string } & (
  | { type: "snapshot"; data: { tenant: string; includes: DashboardPart[]; tasks: DashboardTask[]; cursor: string | null } }
  | { type: "change"; data: { tasks: DashboardTask[]; removed: string[]; events: EventEntry[] } }
  | { type: "services"; data: { available: boolean; detail: string; services: ServiceState[] } }
);

/** Why the gateway refuses a watch for good. */
export class LiveError extends Error {
  /** The close code of the WebSocket. */
  readonly code: number;
  readonly reason: string;
}

export interface Watch<Frame> extends AsyncIterableIterator<Frame> {
  readonly position: Position;
  readonly state: WatchState;
  onstate: ((state: WatchState) => void) | null;
  /** Returns false while there is no connection. */
  send(message: object): boolean;
  close(): void;
}

export function watchTask(taskId: string, options?: TaskOptions): Watch<TaskFrame>;
export function watchDashboard(options?: DashboardOptions): Watch<DashboardFrame>;
