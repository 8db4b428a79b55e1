/* Text of models, files and people, as text that cannot change what stands beside it. */
import { html, useEffect, useRef, useState } from "../vendor/htm-preact.js";

/* Control characters, and those that turn the direction of what follows, are shown by their code point. */
const HIDDEN = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff]|[\ud800-\udbff](?![\udc00-\udfff])|(?<![\ud800-\udbff])[\udc00-\udfff]/g;
const MAX_SHOWN = 400000;
export function plain(text) {
  const whole = String(text ?? "").replace(/\r\n/g, "\n");
  const shown = whole.length > MAX_SHOWN ? whole.slice(0, MAX_SHOWN) + `\n… ${(whole.length - MAX_SHOWN).toLocaleString()} more characters; the file or the API has all of them.` : whole;
  return shown.replace(HIDDEN, (char) => `⟨U+${char.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}⟩`);
}

export function Copy({ text, label = "Copy" }) {
  const [done, setDone] = useState("");
  const copy = async () => {
    try { await navigator.clipboard.writeText(text); setDone("Copied"); } catch { setDone("Not allowed here"); }
    setTimeout(() => setDone(""), 2000);
  };
  return html`<button type="button" class="plain copy" onClick=${copy} aria-label=${label}>${done || "Copy"}</button>`;
}

export const Code = ({ text, label = "Code" }) => html`<div class="code"><${Copy} text=${text} label=${`Copy: ${label}`}/><pre tabindex="0" aria-label=${label}><code>${plain(text)}</code></pre></div>`;

/* Text that grows stays in view, unless its reader has scrolled up. */
export function Live({ text, running, label }) {
  const box = useRef(null), stick = useRef(true);
  useEffect(() => { if (box.current && stick.current) box.current.scrollTop = box.current.scrollHeight; }, [text]);
  const onScroll = () => { const el = box.current; stick.current = el.scrollHeight - el.scrollTop - el.clientHeight < 24; };
  return html`<pre class="live" ref=${box} onScroll=${onScroll} tabindex="0" aria-label=${label}>${plain(text.length > 200000 ? "…" + text.slice(-200000) : text)}${running && html`<span class="caret"></span>`}</pre>`;
}
