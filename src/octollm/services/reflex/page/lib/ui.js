/* Small parts that every view uses. */
import { html, useEffect, useState } from "../vendor/htm-preact.js";
import { WORDS } from "./format.js";
import { plain } from "./text.js";

export const Chip = ({ status }) => html`<span class=${"chip " + status}><i></i>${WORDS[status] || status || "…"}</span>`;
export const Octopus = () => html`<svg viewBox="0 0 32 32" fill="none" stroke="currentColor" stroke-width="2.2" stroke-linecap="round" stroke-linejoin="round" aria-hidden="true">
  <path d="M8 17v-3a8 8 0 0 1 16 0v3c0 2 .6 3.2 2 4.500M24 17c0 4 0 6 3 8.500M8 17c0 2-.6 3.2-2 4.500M8 17c0 4 0 6-3 8.500M12.5 20c0 4-.5 6-2.5 8M19.5 20c0 4 .5 6 2.5 8M16 20.500V28"/>
  <circle cx="13" cy="14" r="1.1" fill="currentColor"/><circle cx="19" cy="14" r="1.1" fill="currentColor"/></svg>`;

export const Reasons = ({ title, reasons, tone }) => html`<div class=${"verdict " + tone}><strong>${plain(title)}</strong>
  ${reasons.length > 0 && html`<ul>${reasons.map((reason) => html`<li>${plain(reason)}</li>`)}</ul>`}</div>`;

export function useNow(active) {
  const [now, setNow] = useState(Date.now());
  useEffect(() => {
    if (!active) return undefined;
    const timer = setInterval(() => setNow(Date.now()), 500);
    return () => clearInterval(timer);
  }, [active]);
  return now;
}
