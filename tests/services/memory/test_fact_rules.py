"""Facts against a model of them: any sequence of statements, at any times, by any sources."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

import pytest
from databases import Backend
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from octollm.clock import format_rfc3339
from octollm.contracts.memory_operations import FactIn, FactQuery
from octollm.errors import OctoError
from octollm.services.memory.facts import (
    FactKey,
    FactStore,
    Provenance,
    digest_value,
    find_valid,
    normalize_value,
    parse_moment,
)
from octollm.storage import Database, open_database
from octollm.storage.migrations import migrate
from octollm.testing import ManualClock

START = 1_700_000_000.0
TIMES = st.integers(-5, 15).map(lambda step: START + step)
VALUES = st.sampled_from(["a", "b", {"n": 1}, {"n": 1.0}, [True], [1]])


@dataclass
class Statement:
    """A version as the model has it."""

    value: object
    begin: float
    end: float | None
    sources: dict[str, float] = field(default_factory=dict[str, float])


class Model:
    """What is known of one fact. The line of time is filled from the earliest begin to the latest."""

    def __init__(self) -> None:
        self.statements: list[Statement] = []

    def at(self, moment: float) -> Statement | None:
        found: Statement | None = None
        # Sorting is stable: of two that begin together the later statement comes last.
        for each in sorted(self.statements, key=lambda each: each.begin):
            if each.begin <= moment:
                found = each
        return found if found is not None and (found.end is None or found.end > moment) else None

    def state(self, value: object, begin: float, end: float | None, source: str, confidence: float) -> None:
        same = self.at(begin)
        if same is None or _digest(same.value) != _digest(value) or same.end != end:
            same = Statement(value, begin, end)
            self.statements.append(same)
        same.sources[source] = confidence


def _digest(value: object) -> str:
    return digest_value(normalize_value(value))


class FactMachine(RuleBasedStateMachine):
    """The store and the model get the same statements, and must always agree."""

    runner: asyncio.Runner
    db: Database
    clock: ManualClock
    examples = 0

    def __init__(self) -> None:
        super().__init__()
        FactMachine.examples += 1
        self.tenant = f"tenant-{FactMachine.examples}"
        self.store = FactStore(self.db)
        self.models = {name: Model() for name in ("one", "two")}
        self.clock.time = START

    @rule(
        name=st.sampled_from(["one", "two"]),
        value=VALUES,
        begin=TIMES,
        length=st.none() | st.integers(1, 6),
        source=st.sampled_from(["x", "y", "z"]),
        confidence=st.sampled_from([0.2, 0.7, 1.0]),
    )
    def state(self, name: str, value: object, begin: float, length: int | None, source: str, confidence: float) -> None:
        end = None if length is None else begin + length
        model = self.models[name]
        # The rule of a confirmation: the begin is that of the version, or the statement is another one.
        same = model.at(begin)
        if same is not None and _digest(same.value) == _digest(value) and same.end == end and same.begin != begin:
            return
        fact = FactIn(
            value,
            confidence=confidence,
            valid_from=format_rfc3339(begin),
            valid_until=None if end is None else format_rfc3339(end),
        )
        key = FactKey(self.tenant, "s", name)
        stated, _created = self.runner.run(self.store.put(key, fact, Provenance(source)))
        model.state(value, begin, end, source, confidence)
        expected = model.at(begin)
        assert expected is not None
        assert (stated.evidence, stated.confidence) == (len(expected.sources), max(expected.sources.values()))

    @invariant()
    def check_every_time(self) -> None:
        for step in (-6, -3, 0, 4, 9, 16, 30):
            moment = START + step
            expected = {name: found for name, model in self.models.items() if (found := model.at(moment)) is not None}
            query = FactQuery(at=format_rfc3339(moment))
            listed = {each.name: each for each in self.runner.run(self.store.list(self.tenant, query)).facts}
            assert listed.keys() == expected.keys()
            for name, found in expected.items():
                assert _digest(listed[name].value) == _digest(found.value)
                assert listed[name].evidence == len(found.sources)

    @invariant()
    def check_change_time(self) -> None:
        for name, model in self.models.items():
            found = model.at(START)
            try:
                fact, until = self.runner.run(self.store.get(FactKey(self.tenant, "s", name), START))
            except OctoError as error:
                assert (error.code, found) == ("not_found", None)
                continue
            assert found is not None
            assert _digest(fact.value) == _digest(found.value)
            # Nothing changes by itself before the time that the cache is told.
            assert all(model.at(START + step) is found for step in range(31) if START + step < until)


def test_the_store_agrees_with_the_model(backend: Backend) -> None:
    with asyncio.Runner() as runner:
        clock = ManualClock(START)
        opening = open_database(backend.url("octollm_memory"), clock=clock)
        db = runner.run(opening.__aenter__())
        try:
            runner.run(migrate(db, "memory"))
            FactMachine.runner, FactMachine.db, FactMachine.clock = runner, db, clock
            run_state_machine_as_test(
                FactMachine,
                settings=settings(max_examples=8, stateful_step_count=10, deadline=None),
            )
        finally:
            runner.run(opening.__aexit__(None, None, None))


async def test_a_clock_that_is_set_back_hides_nothing() -> None:
    clock = ManualClock(START)
    async with open_database("memory://", clock=clock) as db:
        await migrate(db, "memory")
        store, key = FactStore(db), FactKey("t", "", "n")
        await store.put(key, FactIn(1), Provenance("u"))
        clock.time = START - 3600
        await store.put(key, FactIn(2), Provenance("u"))
        clock.time = START
        assert (await store.get(key))[0].value == 2


@given(
    st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(), lambda x: st.lists(x, max_size=3))
)
def test_a_normalized_value_stays_as_it_is(value: object) -> None:
    try:
        normal = normalize_value(value)
    except ValueError:
        return
    assert digest_value(normalize_value(normal)) == digest_value(normal)


@given(st.floats(0, 4e9))
def test_a_time_that_was_written_is_read_as_the_same(moment: float) -> None:
    read = parse_moment(format_rfc3339(moment), "")
    assert parse_moment(format_rfc3339(read), "") == read
    assert read <= moment + 1e-6


@pytest.mark.parametrize("text", ["", "2030-01-01", "2030-01-01T00:00:00", "x", "0001-01-01T00:00:00Z", "1e9"])
def test_other_texts_are_no_times(text: str) -> None:
    with pytest.raises(OctoError, match="RFC 3339"):
        parse_moment(text, "")


def test_without_versions_nothing_is_valid() -> None:
    assert find_valid([], 0.0) is None
