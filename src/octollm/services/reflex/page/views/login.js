/* Logging in, with an API key or at an OpenID Connect issuer. */
import { html, useEffect, useState } from "../vendor/htm-preact.js";
import { Refusal, call, getJson } from "../lib/api.js";

/* Logging in at an OpenID Connect issuer: a code, and a secret that only this tab knows (RFC 7636). */
const LOGIN = "octollm.login";
const base64url = (bytes) => btoa(String.fromCharCode(...bytes)).replaceAll("+", "-").replaceAll("/", "_").replaceAll("=", "");
const secret = () => base64url(crypto.getRandomValues(new Uint8Array(32)));

async function leaveForLogin(issuer) {
  const login = { issuer: issuer.url, verifier: secret(), nonce: secret(), state: secret(), redirect_uri: location.origin + "/" };
  sessionStorage.setItem(LOGIN, JSON.stringify(login));
  const digest = await crypto.subtle.digest("SHA-256", new TextEncoder().encode(login.verifier));
  const asked = new URL(issuer.authorization_endpoint);
  const query = { response_type: "code", client_id: issuer.client_id, redirect_uri: login.redirect_uri, scope: "openid profile email",
    state: login.state, nonce: login.nonce, code_challenge: base64url(new Uint8Array(digest)), code_challenge_method: "S256" };
  for (const [name, value] of Object.entries(query)) asked.searchParams.set(name, value);
  location.assign(asked.href);
}

export async function backFromLogin() {
  const query = new URLSearchParams(location.search);
  if (!query.has("state")) return;
  const kept = JSON.parse(sessionStorage.getItem(LOGIN) || "null");
  sessionStorage.removeItem(LOGIN);
  history.replaceState(null, "", location.pathname + location.hash);
  if (!kept || kept.state !== query.get("state") || !query.get("code")) throw new Refusal({ detail: query.get("error_description") || "The login was not completed." }, 0);
  const { state, ...login } = kept;
  await call("/session", { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify({ login: { ...login, code: query.get("code") } }) });
}

export function KeyForm({ onDone }) {
  const [key, setKey] = useState("");
  const [trouble, setTrouble] = useState("");
  const [issuers, setIssuers] = useState([]);
  useEffect(() => { getJson("/session/issuers").then((found) => setIssuers(found.issuers), () => {}); }, []);
  const save = async (event) => {
    event.preventDefault();
    try {
      await call("/session", { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify({ api_key: key.trim() }) });
      onDone();
    } catch (error) { setTrouble(error.message); }
  };
  return html`<form class="card stack close" onSubmit=${save}><h2>An API key is needed</h2>
    <p class="small soft">It opens a session of twelve hours in this browser, and is not kept.</p>
    <label for="key">API key</label><input id="key" type="password" autocomplete="off" spellcheck="false" required value=${key} onInput=${(event) => setKey(event.target.value)}/>
    <div class="row"><button class="primary" disabled=${!key.trim()}>Log in</button></div>
    ${issuers.map((issuer) => html`<button type="button" onClick=${() => leaveForLogin(issuer).catch((error) => setTrouble(error.message))}>Log in with ${new URL(issuer.url).host}</button>`)}
    ${trouble && html`<p class="notice" role="alert">${trouble}</p>`}</form>`;
}
