from __future__ import annotations

from dataclasses import fields

import pytest

from octollm.config import (
    REMOVED,
    RENAMED,
    SETTING_SPECS,
    EventSinkUrl,
    Settings,
    read_client_settings,
    read_settings,
    unknown_settings,
)
from octollm.errors import SettingError

SERVICES = ("coder", "reflex")


def test_nothing_set_is_the_default() -> None:
    settings = read_settings({}, SERVICES)
    assert (settings.model, settings.host, settings.trust_loopback) == ("embedded", "127.0.0.1", True)
    assert settings.home.is_absolute()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("MODEL", "gpt"),
        ("MODEL", "openai:"),
        ("MODEL_URL", "ftp://x"),
        ("MODEL_CONTEXT", "12"),
        ("REDIS_URL", "http://x"),
        ("TRUST_LOOPBACK", "maybe"),
        ("PORT_OFFSET", "-1"),
        ("RATE_LIMIT", "many"),
        ("MAX_TOKENS", "0"),
        ("MAX_TIME_SECONDS", "soon"),
        ("SANDBOX", "none"),
        ("LOG_LEVEL", "loud"),
        ("CODER_URL", "coder:8102"),
    ],
)
def test_a_wrong_setting_is_refused_with_its_name(name: str, value: str) -> None:
    with pytest.raises(SettingError) as caught:
        read_settings({f"OCTOLLM_{name}": value}, SERVICES)
    assert caught.value.code == "setting_invalid"
    assert f"OCTOLLM_{name}" in caught.value.detail


def test_a_wrong_secret_is_not_shown() -> None:
    with pytest.raises(SettingError) as caught:
        read_settings({"OCTOLLM_REDIS_URL": "http://user:hunter2@host"}, SERVICES)
    assert "hunter2" not in str(caught.value)


def test_addresses_of_services_may_be_several() -> None:
    settings = read_settings({"OCTOLLM_CODER_URL": "http://a:1, http://b:2/"}, SERVICES)
    assert settings.service_urls == {"coder": ("http://a:1", "http://b:2")}


def test_every_setting_is_declared_once_with_its_own_variable() -> None:
    names = {each.name for each in fields(Settings)} - {"service_urls"}
    assert set(SETTING_SPECS) == names
    assert len({spec.variable for spec in SETTING_SPECS.values()}) == len(names)


def test_settings_without_an_environment_are_the_defaults() -> None:
    assert Settings() == read_settings({}, SERVICES)


def test_a_client_is_not_stopped_by_a_wrong_setting_of_a_server() -> None:
    settings = read_client_settings({"OCTOLLM_PORT": "many", "OCTOLLM_URL": "http://a:1/, https://b"})
    assert settings.urls == ("http://a:1", "https://b")


def test_otlp_headers_are_percent_decoded() -> None:
    settings = read_settings({"OTEL_EXPORTER_OTLP_HEADERS": "Authorization=Basic%20a%2Cb, x-team = core"}, SERVICES)
    assert settings.otlp_headers == (("Authorization", "Basic a,b"), ("x-team", "core"))


@pytest.mark.parametrize("value", ["no-equals", "bad name=x", "x=a%0Ab", "x="])
def test_wrong_otlp_headers_are_refused_and_not_shown(value: str) -> None:
    with pytest.raises(SettingError, match="NAME=VALUE") as caught:
        read_settings({"OTEL_EXPORTER_OTLP_HEADERS": value}, SERVICES)
    assert value not in caught.value.detail


def test_an_event_sink_is_a_url_with_options() -> None:
    text = "tls://ada:p%40ss@one:4222,[::1]?stream=copy&subject=a.b&format=cloudevents&start=latest&replicas=3"
    sink = read_settings({"OCTOLLM_EVENT_SINK": text}, SERVICES).event_sink
    assert sink == EventSinkUrl(("one:4222", "[::1]"), True, "ada", "p@ss", "copy", "a.b", "cloudevents", "latest", 3)
    assert "p@ss" not in repr(sink)
    token = read_settings({"OCTOLLM_EVENT_SINK": "nats://t0ken@one"}, SERVICES).event_sink
    assert token == EventSinkUrl(("one",), user="t0ken")
    assert read_settings({}, SERVICES).event_sink is None


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("kafka://s3cret:s3cret@one", "Kafka is not supported"),
        ("http://s3cret@one", "nats://"),
        ("nats://", "nats://"),
        ("nats://s3cret@", "nats://"),
        ("nats://s3cret@one,", "nats://"),
        ("nats://s3cret@[::1", "nats://"),
        ("nats://one/s3cret", "nats://"),
        ("nats://one?stream=s3cret.x", "stream=NAME"),
        ("nats://one?subject=s3cret.>", "subject=PREFIX"),
        ("nats://one?format=s3cret", "format is one of octollm, cloudevents"),
        ("nats://one?start=s3cret", "start is one of"),
        ("nats://one?replicas=9", "replicas is a whole number"),
        ("nats://one?steam=s3cret", "not 'steam'"),
    ],
)
def test_a_wrong_event_sink_is_refused_and_not_shown(value: str, reason: str) -> None:
    with pytest.raises(SettingError) as caught:
        read_settings({"OCTOLLM_EVENT_SINK": value}, SERVICES)
    assert reason in caught.value.detail
    assert "s3cret" not in caught.value.detail


def test_a_misspelt_setting_is_pointed_out() -> None:
    (sentence,) = unknown_settings({"OCTOLLM_MODLE": "x", "OCTOLLM_MODEL": "embedded", "OTHER": "y"}, SERVICES)
    assert "OCTOLLM_MODLE" in sentence
    assert "OCTOLLM_MODEL" in sentence


@pytest.mark.parametrize(("old", "new"), RENAMED.items())
def test_a_renamed_setting_is_refused_with_its_new_name(old: str, new: str) -> None:
    for read in (lambda env: read_settings(env, SERVICES), read_client_settings):
        with pytest.raises(SettingError) as caught:
            read({old: "1"})
        assert old in caught.value.detail
        assert f"Did you mean {new}?" in caught.value.detail
    # No warning says that it is ignored.
    assert unknown_settings({old: "1"}, SERVICES) == []
    assert new in {spec.variable for spec in SETTING_SPECS.values()}


@pytest.mark.parametrize(("old", "remedy"), REMOVED.items())
@pytest.mark.parametrize("value", ["1.1", "2", ""])
def test_a_removed_setting_is_refused_with_what_to_do(old: str, remedy: str, value: str) -> None:
    for read in (lambda env: read_settings(env, SERVICES), read_client_settings):
        with pytest.raises(SettingError) as caught:
            read({old: value})
        assert caught.value.detail == f"{old} is no longer a setting. {remedy}"
    assert old not in {spec.variable for spec in SETTING_SPECS.values()}


def test_every_setting_has_a_meaning_and_a_valid_default() -> None:
    for spec in SETTING_SPECS.values():
        assert spec.meaning.endswith(".")
        spec.parse(spec.default)
