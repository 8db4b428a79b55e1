"""Signatures of deliveries and templates of goals: pure rules, and every way to bend them."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from standardwebhooks import Webhook

from octollm.contracts.hooks import HmacSignature, HookTemplate, SignatureScheme
from octollm.errors import OctoError
from octollm.services.orchestrator.hook_template import (
    CLOSE_MARK,
    MAX_VALUE,
    NOTICE,
    OPEN_MARK,
    check_template,
    matches,
    read_pointer,
    render_task,
)
from octollm.services.orchestrator.webhook_signatures import (
    SignatureError,
    check_secret,
    generate_secret,
    sign_standard,
    verify_delivery,
)

NOW = 1_800_000_000
PLAIN = HmacSignature()
BODY = b'{"id": "evt_1", "type": "issue.opened"}'
STANDARD, OTHER = generate_secret("standard"), generate_secret("standard")
SECRET = "a secret of GitHub".replace(" ", "-")


def mac(secret: str, signed: bytes, algorithm: str = "sha256") -> str:
    return hmac.new(secret.encode(), signed, algorithm).hexdigest()


def standard(secret: str = STANDARD, body: bytes = BODY, at: int = NOW, message: str = "msg_1") -> dict[str, str]:
    signature = Webhook(secret).sign(message, datetime.fromtimestamp(at, UTC), body.decode())
    return {"webhook-id": message, "webhook-timestamp": str(at), "webhook-signature": signature}


def stripe(secret: str = SECRET, body: bytes = BODY, at: int | str = NOW, **more: str) -> dict[str, str]:
    parts = [f"t={at}", f"v1={mac(secret, str(at).encode() + b'.' + body)}", *(f"{k}={v}" for k, v in more.items())]
    return {"stripe-signature": ",".join(parts)}


def github(secret: str = SECRET, body: bytes = BODY, delivery: str = "7f2b") -> dict[str, str]:
    return {"x-hub-signature-256": f"sha256={mac(secret, body)}", "x-github-delivery": delivery}


def verify(
    scheme: SignatureScheme,
    headers: dict[str, str],
    body: bytes = BODY,
    *,
    secrets: tuple[str, ...] = (),
    options: HmacSignature = PLAIN,
    now: float = NOW,
) -> tuple[str, ...]:
    own = secrets or ((STANDARD,) if scheme == "standard" else (SECRET,))
    return verify_delivery(scheme, options, own, headers, body, now=now, tolerance=300).keys


@pytest.mark.parametrize(("scheme", "headers"), [("standard", standard()), ("github", github()), ("stripe", stripe())])
def test_a_good_delivery_is_verified(scheme: SignatureScheme, headers: dict[str, str]):
    assert verify(scheme, headers)


BENT: dict[str, tuple[SignatureScheme, dict[str, str], bytes]] = {
    "another body": ("standard", standard(), BODY + b" "),
    "another secret": ("standard", standard(OTHER), BODY),
    "another id": ("standard", {**standard(), "webhook-id": "msg_2"}, BODY),
    "another time": ("standard", {**standard(), "webhook-timestamp": str(NOW + 1)}, BODY),
    "an old time": ("standard", standard(at=NOW - 301), BODY),
    "a time to come": ("standard", standard(at=NOW + 301), BODY),
    "no time": ("standard", {**standard(), "webhook-timestamp": ""}, BODY),
    "a time that is no number": ("standard", {**standard(), "webhook-timestamp": "nan"}, BODY),
    "a fraction of a second": ("standard", {**standard(), "webhook-timestamp": f"{NOW}.5"}, BODY),
    "a time of another script": ("standard", {**standard(), "webhook-timestamp": "１８００００００００"}, BODY),
    "no id": ("standard", {**standard(), "webhook-id": ""}, BODY),
    "a signature without a version": ("standard", {**standard(), "webhook-signature": "abc"}, BODY),
    "a version to come": (
        "standard",
        {**standard(), "webhook-signature": standard()["webhook-signature"].replace("v1,", "v2,")},
        BODY,
    ),
    "an empty signature": ("standard", {**standard(), "webhook-signature": "v1,"}, BODY),
    "commas": ("standard", {**standard(), "webhook-signature": ",,,, ,v1,,"}, BODY),
    "letters outside ASCII": ("standard", {**standard(), "webhook-signature": "v1,é"}, BODY),
    "a body that is not UTF-8": ("standard", standard(), b"\xff"),
    "the seventeenth signature": (
        "standard",
        {**standard(), "webhook-signature": "v1,x " * 16 + standard()["webhook-signature"]},
        BODY,
    ),
    "GitHub with SHA-1": (
        "github",
        {"x-hub-signature": "sha1=" + mac(SECRET, BODY, "sha1"), "x-github-delivery": "1"},
        BODY,
    ),
    "GitHub without an id": ("github", {**github(), "x-github-delivery": ""}, BODY),
    "GitHub with capitals": (
        "github",
        {**github(), "x-hub-signature-256": github()["x-hub-signature-256"].upper()},
        BODY,
    ),
    "GitHub with another body": ("github", github(), BODY + b"\n"),
    "Stripe in the past": ("stripe", stripe(at=NOW - 3600), BODY),
    "Stripe without a time": ("stripe", {"stripe-signature": stripe()["stripe-signature"].split(",")[1]}, BODY),
    "Stripe in test mode": ("stripe", {"stripe-signature": stripe()["stripe-signature"].replace("v1", "v0")}, BODY),
    "Stripe with two times": (
        "stripe",
        {"stripe-signature": f"t={NOW}," + stripe(at=NOW - 3600)["stripe-signature"]},
        BODY,
    ),
    "Stripe malformed": ("stripe", {"stripe-signature": "t=1;v1=2"}, BODY),
    "Stripe without an id": ("stripe", stripe(body=b"{}"), b"{}"),
    "Stripe without JSON": ("stripe", stripe(body=b"id"), b"id"),
    "nothing at all": ("hmac", {}, BODY),
}


@pytest.mark.parametrize("bent", BENT)
def test_anything_else_is_refused(bent: str):
    scheme, headers, body = BENT[bent]
    with pytest.raises(SignatureError):
        verify(scheme, headers, body)


def test_during_a_rotation_both_secrets_are_good_and_afterwards_one():
    assert verify("standard", standard(OTHER), secrets=(STANDARD, OTHER))
    assert verify("standard", standard(STANDARD), secrets=(STANDARD, OTHER))
    both = {
        **standard(),
        "webhook-signature": f"{standard(OTHER)['webhook-signature']} {standard()['webhook-signature']}",
    }
    assert verify("standard", both)
    with pytest.raises(SignatureError):
        verify("standard", standard(OTHER), secrets=(STANDARD,))
    with pytest.raises(SignatureError):
        verify_delivery("standard", HmacSignature(), (), standard(), BODY, now=NOW, tolerance=300)


def test_an_id_that_is_not_signed_does_not_hide_a_repeat():
    first, again = verify("github", github(delivery="1")), verify("github", github(delivery="2"))
    assert set(first) & set(again)
    assert not set(first) & set(verify("github", github(body=b"{}", delivery="3"), b"{}"))
    assert verify("standard", standard(message="a")) != verify("standard", standard(message="b"))


@pytest.mark.parametrize(
    ("options", "headers"),
    [
        (HmacSignature(), {"x-signature": mac(SECRET, BODY)}),
        (
            HmacSignature(header="X-Sig", prefix="sha512=", algorithm="sha512"),
            {"x-sig": "sha512=" + mac(SECRET, BODY, "sha512")},
        ),
        (
            HmacSignature(encoding="base64"),
            {"x-signature": base64.b64encode(hmac.new(SECRET.encode(), BODY, hashlib.sha256).digest()).decode()},
        ),
        (
            HmacSignature(timestamp_header="X-Time", id_header="X-Id"),
            {"x-time": str(NOW), "x-signature": mac(SECRET, f"{NOW}.".encode() + BODY), "x-id": "7"},
        ),
        (HmacSignature(id_pointer="/id"), {"x-signature": mac(SECRET, BODY)}),
    ],
)
def test_a_generic_signature_is_where_the_hook_says(options: HmacSignature, headers: dict[str, str]):
    assert verify("hmac", headers, options=options)
    for name in headers:
        if name != "x-id":
            with pytest.raises(SignatureError):
                verify("hmac", {**headers, name: headers[name][:-1] + "~"}, options=options)


@pytest.mark.parametrize(
    "secret", ["whsec_", "whsec_c2hvcnQ=", "MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw", "whsec_????????????????????????"]
)
def test_a_standard_secret_has_the_form_of_the_standard(secret: str):
    with pytest.raises(OctoError, match="whsec_"):
        check_secret("standard", secret)
    check_secret("standard", generate_secret("standard"))


@given(st.text(max_size=200), st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=64))
def test_what_we_sign_is_verified_by_the_library_and_by_us(body: str, message: str):
    now = datetime.now(UTC).timestamp()
    try:
        raw = body.encode()
    except UnicodeEncodeError:
        return
    headers = sign_standard([OTHER, STANDARD], message, now, body)
    for secret in (STANDARD, OTHER):
        Webhook(secret).verify(raw, headers, json_parse=False)
        assert verify("standard", headers, raw, secrets=(secret,), now=now)


# Templates

PAYLOAD: dict[str, Any] = {
    "action": "opened",
    "issue": {"number": 7, "title": "It crashes", "labels": ["bug", "p1"], "a/b": {"m~n": None}},
    "draft": False,
}


@pytest.mark.parametrize(
    ("pointer", "value"),
    [
        ("", PAYLOAD),
        ("/issue/title", "It crashes"),
        ("/issue/labels/1", "p1"),
        ("/issue/a~1b/m~0n", None),
        ("/draft", False),
    ],
)
def test_a_pointer_finds_its_value(pointer: str, value: object):
    assert read_pointer(PAYLOAD, pointer) == (True, value)


@pytest.mark.parametrize(
    "pointer", ["/none", "/issue/labels/2", "/issue/labels/01", "/issue/labels/-", "/action/0", "/draft/x"]
)
def test_a_pointer_to_nothing_finds_nothing(pointer: str):
    assert read_pointer(PAYLOAD, pointer) == (False, None)


def test_values_are_marked_as_data_and_the_goal_says_so():
    template = HookTemplate("Look into {title} ({labels}).", {"title": "/issue/title", "labels": "/issue/labels"})
    check_template(template)
    task = render_task(template, PAYLOAD)
    assert (
        task.goal == f'Look into {OPEN_MARK}It crashes{CLOSE_MARK} ({OPEN_MARK}["bug","p1"]{CLOSE_MARK}).\n\n{NOTICE}'
    )
    assert task.context.files == ()


@given(st.text(max_size=3000))
def test_no_value_leaves_its_marks_or_becomes_a_placeholder(text: str):
    template = HookTemplate("{a}{b}", {"a": "/a", "b": "/b"})
    goal = render_task(template, {"a": text, "b": "{a}"}).goal.removesuffix("\n\n" + NOTICE)
    inside = goal[1:-1].split(CLOSE_MARK + OPEN_MARK)
    assert len(inside) == 2
    assert inside[1] == "{a}"
    assert OPEN_MARK not in inside[0] and CLOSE_MARK not in inside[0] and len(inside[0]) <= MAX_VALUE
    assert not any(char < " " and char not in "\n\t" for char in inside[0])


def test_the_payload_can_come_as_a_file():
    task = render_task(HookTemplate("Summarise payload.json", attach_payload=True), PAYLOAD)
    [file] = task.context.files
    assert json.loads(file.text or "") == PAYLOAD
    assert NOTICE in task.goal


def test_a_value_that_is_missing_is_named():
    with pytest.raises(OctoError, match="/issue/body") as caught:
        render_task(HookTemplate("{a}", {"a": "/issue/body"}), PAYLOAD)
    assert (caught.value.code, caught.value.field_errors[0].pointer) == ("invalid_body", "/issue/body")


@pytest.mark.parametrize(
    ("when", "expected"),
    [
        ({}, True),
        ({"/action": ("opened", "reopened")}, True),
        ({"/action": ("closed",)}, False),
        ({"/action": ("opened",), "/draft": (True,)}, False),
        ({"/draft": (0,)}, False),
        ({"/none": (None,)}, False),
        ({"/issue/a~1b/m~0n": (None,)}, True),
    ],
)
def test_a_template_is_for_the_payloads_that_it_names(when: dict[str, Any], expected: bool):
    assert matches(HookTemplate("Do it", when=when), PAYLOAD) is expected


@pytest.mark.parametrize(
    "template",
    [
        HookTemplate("{title}"),
        HookTemplate("{Title}", {"title": "/t"}),
        HookTemplate("Do it", {"title": "/t"}),
        HookTemplate("{t}" * 21, {"t": "/t"}),
    ],
)
def test_a_template_that_cannot_work_is_refused_when_it_is_made(template: HookTemplate):
    with pytest.raises(OctoError) as caught:
        check_template(template)
    assert caught.value.field_errors[0].pointer.startswith("/template")
