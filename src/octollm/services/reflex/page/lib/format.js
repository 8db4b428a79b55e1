/* How numbers, times and states read. */

export const WORDS = { accepted: "Accepted", planning: "Planning", running: "Running", waiting: "Waiting", paused: "Paused", completed: "Completed", failed: "Failed", cancelled: "Cancelled", pending: "Pending" };

export const clockTime = (at) => { const date = new Date(at); return isNaN(date) ? "" : date.toLocaleTimeString([], { hour: "2-digit", minute: "2-digit", second: "2-digit", hourCycle: "h23" }); };
export const ago = (at) => {
  const seconds = Math.max(0, (Date.now() - new Date(at)) / 1000);
  if (isNaN(seconds)) return "";
  if (seconds < 60) return "just now";
  if (seconds < 3600) return Math.floor(seconds / 60) + " min ago";
  if (seconds < 86400) return Math.floor(seconds / 3600) + " h ago";
  return new Date(at).toLocaleDateString();
};
export const duration = (seconds) => {
  if (!(seconds >= 0)) return "";
  if (seconds < 60) return seconds.toFixed(1) + " s";
  return Math.floor(seconds / 60) + " min " + String(Math.floor(seconds % 60)).padStart(2, "0") + " s";
};
export const size = (bytes) => (bytes < 1024 ? bytes + " B" : bytes < 1048576 ? (bytes / 1024).toFixed(1) + " kB" : (bytes / 1048576).toFixed(1) + " MB");
export const count = (number, word) => `${number.toLocaleString()} ${word}${number === 1 ? "" : "s"}`;

export const cut = (text, most) => (text.length > most ? text.slice(0, most - 1) + "…" : text);

export const money = (usd) => (!(usd > 0) ? "$0" : usd < 0.01 ? `$${usd.toFixed(4)}` : `$${usd.toFixed(2)}`);
export const millis = (ms) => (ms === null || ms === undefined ? "–" : ms === 0 ? "0" : ms < 1 ? ms.toFixed(2) + " ms" : ms < 1000 ? Math.round(ms) + " ms" : (ms / 1000).toFixed(2) + " s");
export const moment = (at) => { const date = new Date(typeof at === "number" ? at * 1000 : at); return isNaN(date) ? "" : date.toLocaleString([], { dateStyle: "medium", timeStyle: "medium" }); };
