/* Files that a task made: to save, and to look at where they are text, a table or a picture. */
import { html, useEffect, useState } from "../vendor/htm-preact.js";
import { call, download } from "../lib/api.js";
import { size } from "../lib/format.js";
import { Prose } from "../lib/markdown.js";
import { TextTable, parseCsv } from "../lib/table.js";
import { Code, plain } from "../lib/text.js";

const MAX_PREVIEW = 1024 * 1024;
const KINDS = [[/\.(csv|tsv)$/i, "table"], [/\.(md|markdown)$/i, "prose"], [/\.(png|jpe?g|gif|webp)$/i, "picture"],
  [/\.(txt|py|js|ts|json|ya?ml|toml|sql|sh|html?|css|xml|svg|java|go|rs|c|h|cpp|rb|log|ini|cfg)$/i, "code"]];
const PICTURES = { png: "image/png", jpg: "image/jpeg", jpeg: "image/jpeg", gif: "image/gif", webp: "image/webp" };
const kindOf = (artifact) => (artifact.size > MAX_PREVIEW ? "" : (KINDS.find(([pattern]) => pattern.test(artifact.name)) || [])[1] || "");

export function Artifacts({ taskId, artifacts, say }) {
  const [open, setOpen] = useState("");
  const get = (artifact) => async (event) => {
    event.preventDefault();
    try { await download(taskId, artifact); } catch (error) { say(error.message); }
  };
  const shown = artifacts.find((artifact) => artifact.digest + artifact.name === open);
  return html`<ul class="arts" aria-label="Files">${artifacts.map((artifact) => html`<li><a class="art" href=${`/tasks/${taskId}/artifacts/${artifact.digest}`} onClick=${get(artifact)}>
    <span aria-hidden="true">⬇</span><bdi>${plain(artifact.name)}</bdi><span class="small faint">${size(artifact.size)}</span></a>
    ${kindOf(artifact) && html`<button class="plain" aria-expanded=${open === artifact.digest + artifact.name} aria-label=${`Look at ${plain(artifact.name)}`} onClick=${() => setOpen(open === artifact.digest + artifact.name ? "" : artifact.digest + artifact.name)}>${open === artifact.digest + artifact.name ? "Hide" : "Look"}</button>`}</li>`)}</ul>
    ${shown && html`<${Preview} key=${open} taskId=${taskId} artifact=${shown}/>`}`;
}

function Preview({ taskId, artifact }) {
  const [state, setState] = useState({});
  const kind = kindOf(artifact);
  useEffect(() => {
    let gone = false;
    const read = async () => {
      const answer = await call(`/tasks/${taskId}/artifacts/${artifact.digest}`);
      if (kind !== "picture") return { text: await answer.text() };
      // As a data URL of a type that is only ever a picture: the policy lets no other content in.
      const type = PICTURES[artifact.name.split(".").pop().toLowerCase()], bytes = new Uint8Array(await answer.arrayBuffer());
      let binary = "";
      for (let at = 0; at < bytes.length; at += 8192) binary += String.fromCharCode(...bytes.subarray(at, at + 8192));
      return { url: `data:${type};base64,${btoa(binary)}` };
    };
    read().then((found) => { if (!gone) setState(found); }, (error) => { if (!gone) setState({ trouble: error.message }); });
    return () => { gone = true; };
  }, [taskId, artifact.digest]);
  if (state.trouble) return html`<p class="notice" role="alert">${state.trouble}</p>`;
  if (state.url) return html`<img class="picture" src=${state.url} alt=${plain(artifact.name)}/>`;
  if (state.text === undefined) return html`<p class="small soft loading" role="status">Reading…</p>`;
  if (kind === "prose") return html`<${Prose} text=${state.text}/>`;
  const rows = kind === "table" ? parseCsv(state.text, /\.tsv$/i.test(artifact.name) ? "\t" : ",") : [];
  if (rows.length > 1) return html`<${TextTable} head=${rows[0].map(plain)} rows=${rows.slice(1)} show=${plain} label=${plain(artifact.name)}/>`;
  return html`<${Code} text=${state.text} label=${plain(artifact.name)}/>`;
}
