/* Lines over time, drawn by uPlot, which is read when the first chart is shown. */
import { html, useEffect, useRef } from "../vendor/htm-preact.js";

let loading = null;
const load = () => (loading ||= import("../vendor/uplot.js").then((module) => {
  const link = Object.assign(document.createElement("link"), { rel: "stylesheet", href: new URL("../vendor/uplot.css", import.meta.url).href });
  return new Promise((done) => { link.onload = link.onerror = () => done(module.default); document.head.append(link); });
}));
const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

/* `series`: { label, colour: a custom property, values }, each as long as `times` (seconds); null where nothing is known. */
export function Lines({ times, series, label, format, height = 130 }) {
  const box = useRef(null), plot = useRef(null), shown = useRef(null);
  shown.current = [times, ...series.map((each) => each.values)];
  useEffect(() => {
    let gone = false, observer = null;
    const scheme = matchMedia("(prefers-color-scheme: dark)");
    const draw = (Plot) => {
      if (gone || !box.current) return;
      plot.current?.destroy();
      const axis = { stroke: colour("--soft"), grid: { stroke: colour("--line"), width: 1 }, ticks: { show: false }, font: "11px system-ui" };
      plot.current = new Plot({
        width: box.current.clientWidth || 300, height, cursor: { y: false }, legend: { show: false },
        scales: { y: { range: (_, low, high) => [Math.min(0, low ?? 0), (high || 0) > 0 ? high * 1.15 : 1] } },
        axes: [axis, { ...axis, size: 56, values: (_, ticks) => ticks.map((tick) => format(tick)) }],
        series: [{}, ...series.map((each) => ({ label: each.label, stroke: colour(each.colour), width: 2, points: { show: false }, spanGaps: false }))],
      }, shown.current, box.current);
    };
    const again = () => load().then(draw);
    again().then(() => {
      if (gone) return;
      observer = new ResizeObserver(() => { if (box.current?.clientWidth) plot.current?.setSize({ width: box.current.clientWidth, height }); });
      observer.observe(box.current);
    });
    scheme.addEventListener("change", again);
    return () => { gone = true; observer?.disconnect(); scheme.removeEventListener("change", again); plot.current?.destroy(); plot.current = null; };
  }, [series.map((each) => each.label).join()]);
  useEffect(() => { plot.current?.setData(shown.current); });
  const last = (values) => { for (let at = values.length - 1; at >= 0; at--) if (values[at] !== null && values[at] !== undefined) return format(values[at]); return "–"; };
  return html`<figure class="lines"><figcaption class="small"><b>${label}</b> ${series.map((each) => html`<span class="key"><i style=${{ background: `var(${each.colour})` }} aria-hidden="true"></i>${each.label} ${last(each.values)}</span>`)}</figcaption><div ref=${box} aria-hidden="true"></div></figure>`;
}
