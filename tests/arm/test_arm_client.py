"""One suite over an arm in memory and the same arm served: what a test accepts, the real services accept."""

import asyncio
import functools
import hashlib

import arm_samples
import pytest

from octollm import OctoError
from octollm.contracts.task import ExecuteResult
from octollm.errors import RemoteError
from octollm.testing import ArmTestClient, FakeModel, RecordedCall, run_arm, wait_until

NOTHING = {"retriever:search": {"passages": []}}
PASSAGE = {"source": "a.md", "digest": "0", "line_start": 1, "line_end": 2, "text": "Hallo", "score": 0.5}


@pytest.fixture(params=[False, True], ids=["memory", "sockets"])
def open_client(request):
    return functools.partial(ArmTestClient, sockets=request.param)


async def refused(working) -> RemoteError:
    with pytest.raises(OctoError) as caught:
        await working
    return caught.value


async def test_the_example_of_the_design(open_client):
    async with open_client(arm_samples.translator, model=["Hallo Welt!"], answers=NOTHING) as client:
        result = await client.call("execute", {"goal": "Hello world!"})
        assert result == ExecuteResult("Hallo Welt!", usage=result.usage)
        assert result.usage.completion_tokens == 2
        assert client.calls == [RecordedCall("retriever:search", {"query": "Hello world!"})]
        assert client.text == "Hallo Welt!"
        assert len(client.emitted) > 1
        [prompt] = client.model.prompts
        assert prompt == "Translate with {'passages': []}: Hello world!"


async def test_bodies_and_answers_are_what_the_author_says(open_client):
    async with open_client(arm_samples.translator, model=['{"text": "Dear Ann"}', '{"tex']) as client:
        assert await client.call("count", {"text": "a b c"}) == arm_samples.Words(3, False)
        body = {"to": "Ann", "tones": [{"formal": True, "warmth": 3}]}
        assert await client.call("letter", body) == arm_samples.SentLetter(text="Dear Ann (1 tones)")
        assert client.progress == [(10.0, "begun")]
        assert client.model.requests[0].response_format.json_schema.schema["required"] == ["text"]
        assert await client.call("echo", "a b") == {"words": ["a", "b"]}
        error = await refused(client.call("letter", body))
        assert error.code == "model_output_invalid"


async def test_a_body_that_does_not_fit_is_refused_with_where(open_client):
    sour = [{"formal": "maybe", "warmth": 11}]
    faults = (
        ("execute", {"goal": 3}, {"/goal"}),
        ("execute", {}, {""}),
        ("execute", {"goal": "x", "context": {"files": [{"name": 1}]}}, {"/context/files/0/name"}),
        ("count", {"text": "a", "least": "1"}, {"/least"}),
        ("letter", {"to": "A", "tones": sour}, {"/to", "/tones/0/formal", "/tones/0/warmth"}),
        ("echo", {"not": "text"}, {""}),
    )
    async with open_client(arm_samples.translator) as client:
        for operation, body, pointers in faults:
            error = await refused(client.call(operation, body))
            assert (error.code, error.status) == ("invalid_body", 400), body
            assert {fault.pointer for fault in error.field_errors} == pointers, body


async def test_what_execute_returns_becomes_its_output(open_client):
    async with open_client(arm_samples.reporter) as client:
        result = await client.call("execute", {"goal": "one two"})
        assert result.output == '{"words":2,"task_known":true}'
        [artifact] = result.artifacts
        assert (artifact.name, artifact.media_type) == ("report.md", "text/markdown")
        assert client.files[artifact.digest] == b"# Report\n"
    async with open_client(arm_samples.teller) as client:
        assert (await client.call("execute", {"goal": "Done"})).output == "Done for task-000"


async def test_files_are_read_and_written(open_client):
    async with open_client(arm_samples.translator) as client:
        given = {"a.txt": "one", "b.bin": b"\x00\x01"}
        assert await client.call("copy", {"goal": "copy"}, files=given) == ["copy of a.txt", "copy of b.bin"]
        assert set(client.files.values()) == {b"one", b"\x00\x01"}
        inline = {"goal": "copy", "context": {"files": [{"name": "c", "text": "here"}, {"name": "d"}]}}
        assert (await refused(client.call("copy", inline))).code == "file_invalid"


async def test_a_file_that_is_not_the_tasks_is_out_of_reach(open_client):
    async with open_client(arm_samples.translator) as client:
        client.put_file("mine.txt", "mine")
        other = hashlib.sha256(b"another's").hexdigest()
        assert (await refused(client.call("steal", other))).code == "authority_missing"


async def test_a_call_that_is_not_declared_is_refused(open_client):
    async with open_client(arm_samples.translator, answers={"executor:run": {}, "nobody:knows": {}}) as client:
        for scope in ("executor:run", "memory:read", "tasks:create", "translator:echo", "nobody:knows"):
            error = await refused(client.call("overreach", scope))
            assert (error.code, error.status) == ("authority_missing", 403)
            assert f'calls=["{scope}"]' in error.detail
        assert client.calls == []


async def test_a_model_that_is_not_declared_is_refused(open_client):
    async with open_client(arm_samples.silent, model=["never"]) as client:
        error = await refused(client.call("ask", "Hello"))
        assert error.code == "authority_missing"
        assert 'calls=["models:chat"]' in error.detail
        assert client.model.requests == []


async def test_a_call_goes_on_without_an_optional_one(open_client):
    answers = {"judge:validate": {"is_valid": False, "reasons": ["a typo"]}}
    async with open_client(arm_samples.translator, answers=answers) as client:
        assert await client.call("check", "x = 1") == "a typo"
        assert await client.call("check", "x = 1", without=["judge:validate"]) == "unchecked"


async def test_it_does_not_begin_without_a_needed_one(open_client):
    async with open_client(arm_samples.translator, model=["never"], answers=NOTHING) as client:
        error = await refused(client.call("execute", {"goal": "x"}, without=["retriever:search"]))
        assert error.code == "authority_missing"
        assert "retriever:search" in error.detail
        assert client.calls == []


async def test_what_a_callee_says_is_what_the_arms_caller_hears(open_client):
    down = {"retriever:search": OctoError("The index is being built.", code="not_configured")}
    async with open_client(arm_samples.translator, answers=down) as client:
        error = await refused(client.call("execute", {"goal": "x"}))
        assert (error.code, error.detail) == ("not_configured", "The index is being built.")


async def test_an_answer_may_depend_on_the_question(open_client):
    async def found(body):
        return {"passages": [{**PASSAGE, "text": body["query"].upper()}]}

    async with open_client(arm_samples.translator, model=lambda _: "ok", answers={"retriever:search": found}) as client:
        await client.call("execute", {"goal": "hello"})
        assert "HELLO" in client.model.prompts[0]


async def test_a_test_that_no_service_would_answer_fails(open_client):
    async with open_client(arm_samples.translator, answers={"retriever:search": {"found": []}}) as client:
        with pytest.raises(AssertionError, match="none that the real retriever:search gives"):
            await client.call("execute", {"goal": "x"})


async def test_a_call_without_an_answer_fails_the_test(open_client):
    async with open_client(arm_samples.translator) as client:
        with pytest.raises(AssertionError, match="no answer for it"):
            await client.call("execute", {"goal": "x"})


async def test_the_budget_is_real(open_client):
    async with open_client(arm_samples.translator, model=["a b c"], answers=NOTHING, max_tokens=3) as client:
        assert (await refused(client.call("execute", {"goal": "x"}))).code == "budget_exhausted"
        assert client.model.requests == []


async def test_failures_keep_their_code_and_hide_what_they_should(open_client):
    async with open_client(arm_samples.translator, model=[OctoError("too much", code="context_too_long")]) as client:
        error = await refused(client.call("fail", "not_found"))
        assert (error.code, error.detail) == ("not_found", "There is no such language.")
        for mistake in ("crash", "wrong"):
            error = await refused(client.call("fail", mistake))
            assert error.code == "internal"
            assert "secret" not in error.detail
        assert (await refused(client.call("letter", {"to": "Ann"}))).code == "context_too_long"


async def test_a_stream_that_was_left_open_ends_with_its_call(open_client):
    async with open_client(arm_samples.translator, model=["word " * 500]) as client:
        assert await client.call("leave_open", "Go on") == "word wor"
        await wait_until(
            lambda: not [task for task in asyncio.all_tasks() if "ModelClient.stream" in repr(task.get_coro())],
            description="nothing of the stream is left",
        )


async def test_leaving_a_call_ends_it(open_client):
    async with open_client(arm_samples.translator) as client:
        calling = asyncio.create_task(client.call("wait", "x"))
        await wait_until(
            lambda: [task for task in asyncio.all_tasks() if "Endpoint._stream" in repr(task.get_coro())],
            description="the arm works",
        )
        calling.cancel()
        with pytest.raises(asyncio.CancelledError):
            await calling
        await wait_until(
            lambda: not [task for task in asyncio.all_tasks() if "Endpoint._stream" in repr(task.get_coro())],
            description="the arm has stopped",
        )


async def test_the_card_and_the_description_tell_the_types(open_client):
    async with open_client(arm_samples.translator) as client:
        card = await client.card()
        assert card["name"] == "translator"
        assert card["supportedInterfaces"][0]["protocolBinding"] == "urn:octollm:arm"
        skills = {skill["id"]: skill for skill in card["skills"]}
        assert skills["execute"]["description"] == "Translate the goal."
        assert "translator:count" in skills["count"]["tags"]
        described = await client.openapi()
        schemas = described["components"]["schemas"]
        body = described["paths"]["/letter"]["post"]["requestBody"]["content"]["application/json"]["schema"]
        assert body["properties"]["tones"]["items"] == {"$ref": "#/components/schemas/Tone"}
        assert schemas["Tone"]["properties"]["warmth"]["maximum"] == 10
        assert schemas["Count"]["required"] == ["text"]


async def test_a_model_without_an_answer_left_says_so(open_client):
    async with open_client(arm_samples.translator, model=FakeModel(), answers=NOTHING) as client:
        error = await refused(client.call("execute", {"goal": "x"}))
        assert "no answer left" in error.detail


def test_a_plain_test_needs_no_event_loop():
    result, client = run_arm(arm_samples.translator, "execute", {"goal": "Hi"}, model=["Hallo"], answers=NOTHING)
    assert result.output == client.text == "Hallo"
