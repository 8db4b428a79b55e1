"""``/docs``: an OpenAPI description as one page of HTML, with nothing to fetch and no script."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterable, Iterator
from html import escape
from typing import Any

_STYLE = """
:root { color-scheme: light dark; --bg: #f5f5f8; --card: #fff; --line: #e2e2ea; --text: #1b1b25; --soft: #5d5d70;
  --accent: #5b3fd6; --code: #f3f3f8; --get: #11734a; --post: #5b3fd6; --put: #8a5300; --delete: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --bg: #111118; --card: #1a1a24; --line: #2e2e3d; --text: #ececf4;
  --soft: #a9a9bd; --accent: #a793ff; --code: #15151e; --get: #6fd6a4; --post: #a793ff; --put: #f2bd6a;
  --delete: #ff9d93; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--bg); color: var(--text); font: 15px/1.55 system-ui, sans-serif; }
main, header { max-width: 980px; margin: 0 auto; padding: 0 20px; }
header { padding-top: 34px; } main { padding-bottom: 64px; }
h1 { margin: 0; font-size: 1.6rem; letter-spacing: -.02em; } h2 { margin: 30px 0 8px; font-size: 1.05rem; }
h3 { margin: 18px 0 6px; font-size: .9rem; } p { margin: 4px 0; }
.soft { color: var(--soft); } a { color: var(--accent); }
nav { display: flex; flex-wrap: wrap; gap: 4px 14px; margin: 14px 0; }
details.op { margin: 6px 0; background: var(--card); border: 1px solid var(--line); border-radius: 10px; }
details.op > summary { display: flex; flex-wrap: wrap; gap: 2px 12px; align-items: baseline; padding: 9px 14px;
  cursor: pointer; list-style: none; } details.op > summary::-webkit-details-marker { display: none; }
details.op[open] > summary { border-bottom: 1px solid var(--line); } details.op > div { padding: 4px 16px 16px; }
.method { flex: none; width: 4.2em; font: 700 .78rem ui-monospace, monospace; } .get { color: var(--get); }
.post { color: var(--post); } .put, .patch { color: var(--put); } .delete { color: var(--delete); }
code, pre { font: .86em ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
pre { margin: 6px 0; padding: 10px 12px; overflow-x: auto; background: var(--code); border-radius: 8px; }
table { width: 100%; border-collapse: collapse; font-size: .9rem; } td { padding: 5px 12px 5px 0; vertical-align: top;
  border-top: 1px solid var(--line); } td:first-child { white-space: nowrap; width: 1%; }
:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; border-radius: 6px; }
"""
_MAX_OUTLINE_DEPTH = 6


def render_docs_page(api: dict[str, Any]) -> tuple[str, str]:
    """Return the page of a description, and the Content-Security-Policy that it goes with."""
    digest = base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'sha256-{digest}'; img-src data:; base-uri 'none'; form-action 'none'"
    return "".join(_page_html(api)), f"{policy}; frame-ancestors 'none'"


def _page_html(api: dict[str, Any]) -> Iterator[str]:
    info = api["info"]
    title = escape(info["title"])
    by_tag: dict[str, list[str]] = {}
    for path, methods in api["paths"].items():
        for method, op in methods.items():
            by_tag.setdefault(op["tags"][0], []).append("".join(_operation_html(path, method, op, api)))
    yield f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
    yield '<meta name="viewport" content="width=device-width, initial-scale=1">'
    yield f'<link rel="icon" href="data:,"><style>{_STYLE}</style></head><body><header><h1>{title}</h1>'
    yield f'<p class="soft">Version {escape(info["version"])}. {_text_html(info["description"])}</p>'
    yield '<p>The same for programs: <a href="openapi.json">openapi.json</a> (OpenAPI 3.1).</p><nav>'
    for tag in by_tag:
        yield f'<a href="#{escape(tag)}">{escape(tag)}</a>'
    yield "</nav></header><main>"
    for tag, operations in by_tag.items():
        yield f'<h2 id="{escape(tag)}">{escape(tag)}</h2>'
        yield from operations
    yield "</main></body></html>"


def _operation_html(path: str, method: str, op: dict[str, Any], api: dict[str, Any]) -> Iterator[str]:
    yield f'<details class="op" id="{escape(op["operationId"])}"><summary>'
    yield f'<span class="method {method}">{method.upper()}</span><code>{escape(path)}</code>'
    yield f'<span class="soft">{escape(op["summary"])}</span></summary><div>'
    opened = "anybody" if op["security"] == [{}] else "a bearer token"
    scope = f", with the scope <code>{escape(op['x-scope'])}</code>" if "x-scope" in op else ""
    yield f"<p>Opened by {opened}{scope}.</p><h3>Call</h3><pre>{escape(_curl(path, method, op))}</pre>"
    yield from _table_html("Parameters", (_parameter_html(one) for one in op["parameters"]))
    for kind, content in op.get("requestBody", {}).get("content", {}).items():
        yield f"<h3>Body <code>{escape(kind)}</code></h3>{_schema_html(content.get('schema', {}), api)}"
    for status, response in op["responses"].items():
        for kind, content in response.get("content", {}).items():
            schema = content.get("schema")
            if status.startswith("2") and "problem" not in kind and schema:
                told = (
                    f"<p>{_text_html(schema['description'])}</p>"
                    if "description" in schema
                    else _schema_html(schema, api)
                )
                yield f"<h3>{status} <code>{escape(kind)}</code></h3>{told}"
    yield from _table_html(
        "Statuses", ((status, _text_html(one["description"])) for status, one in op["responses"].items())
    )
    yield "</div></details>"


def _table_html(title: str, rows: Iterable[tuple[str, str]]) -> Iterator[str]:
    yield f"<h3>{title}</h3><table>"
    for name, text in rows:
        yield f"<tr><td><code>{escape(name)}</code></td><td>{text}</td></tr>"
    yield "</table>"


def _parameter_html(parameter: dict[str, Any]) -> tuple[str, str]:
    needed = "needed" if parameter["required"] else "optional"
    text = (
        f'<span class="soft">{escape(parameter["in"])}, {needed}</span> {_text_html(parameter.get("description", ""))}'
    )
    bounds = {name: value for name, value in parameter["schema"].items() if name not in ("type", "title")}
    return parameter["name"], text + (f" <code>{escape(json.dumps(bounds))}</code>" if bounds else "")


def _curl(path: str, method: str, op: dict[str, Any]) -> str:
    lines = [f"curl --request {method.upper()} $URL{path}"]
    if op["security"] != [{}]:
        lines.append('--header "Authorization: Bearer $TOKEN"')
    for kind, content in op.get("requestBody", {}).get("content", {}).items():
        lines.append(f'--header "Content-Type: {kind}"')
        if "example" in content:
            body = json.dumps(content["example"], indent=2).replace("'", "'\\''")
            lines.append(f"--data '{body}'")
        else:
            lines.append("--data-binary @FILE")
    return " \\\n  ".join(lines)


def _schema_html(schema: dict[str, Any], api: dict[str, Any]) -> str:
    return f"<pre>{escape(json.dumps(_outline(schema, api, 0), indent=2, ensure_ascii=False))}</pre>"


def _outline(schema: dict[str, Any], api: dict[str, Any], depth: int) -> object:
    """Return a schema as a picture of its value: members by name, each with the word for what it is."""
    if "$ref" in schema:
        name: str = schema["$ref"].rpartition("/")[2]
        found = api["components"]["schemas"].get(name, {})
        return name if depth >= _MAX_OUTLINE_DEPTH else _outline(found, api, depth + 1)
    if "properties" in schema:
        needed = schema.get("required", ())
        return {
            name + ("" if name in needed else "?"): _outline(member, api, depth + 1)
            for name, member in schema["properties"].items()
        }
    if "anyOf" in schema:
        kinds = [_outline(kind, api, depth + 1) for kind in schema["anyOf"]]
        words = [kind for kind in kinds if isinstance(kind, str)]
        return " | ".join(words) if len(words) == len(kinds) else next(k for k in kinds if not isinstance(k, str))
    if schema.get("type") == "array" and isinstance(schema.get("items"), dict):
        return [_outline(schema["items"], api, depth + 1)]
    if "enum" in schema:
        return " | ".join(map(str, schema["enum"]))
    if "const" in schema:
        return str(schema["const"])
    return str(schema.get("type", "any"))


def _text_html(text: str) -> str:
    """Return a text with what stands between backquotes as code."""
    parts = escape(text).split("`")
    return "".join(f"<code>{part}</code>" if index % 2 else part for index, part in enumerate(parts))
