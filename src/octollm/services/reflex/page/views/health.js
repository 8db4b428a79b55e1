/* Whether the services are ready, in the header. */
import { html, useEffect, useRef, useState } from "../vendor/htm-preact.js";

export function Health() {
  const [state, setState] = useState(null);
  useEffect(() => {
    let gone = false;
    const look = async () => {
      if (document.hidden) return;
      try {
        const answer = await fetch("/ready", { cache: "no-store" });
        const found = await answer.json();
        if (!gone) setState(found);
      } catch { if (!gone) setState({ status: "not reached", dependencies: {} }); }
    };
    look();
    const timer = setInterval(look, 15000);
    document.addEventListener("visibilitychange", look);
    return () => { gone = true; clearInterval(timer); document.removeEventListener("visibilitychange", look); };
  }, []);
  const box = useRef(null);
  useEffect(() => {
    const close = (event) => { if (box.current?.open && (event.key === "Escape" || (event.type === "click" && !box.current.contains(event.target)))) box.current.open = false; };
    document.addEventListener("click", close);
    document.addEventListener("keydown", close);
    return () => { document.removeEventListener("click", close); document.removeEventListener("keydown", close); };
  }, []);
  if (!state) return html`<span class="chip"><i></i>Services</span>`;
  const services = Object.entries(state.dependencies || {});
  const bad = services.filter(([, service]) => !service.ok);
  const tone = state.status === "ready" ? "ready" : state.status === "degraded" ? "degraded" : "unready";
  const words = tone === "ready" ? "All services ready" : bad.length ? `${bad.length} of ${services.length} not ready` : state.status;
  return html`<details class="pop" ref=${box}><summary class=${"chip " + tone} aria-label=${`Services: ${words}`}><i></i>${words}</summary>
    <div class="card"><h2>Services</h2><ul class="svc">${services.map(([name, service]) => html`<li><span>${name}</span>
      <span class=${"chip " + (service.ok ? "ready" : service.required === false ? "degraded" : "unready")}><i></i>${service.ok ? "ready" : "not ready"}</span>${service.detail && html`<small>${service.detail}</small>`}</li>`)}</ul></div></details>`;
}
