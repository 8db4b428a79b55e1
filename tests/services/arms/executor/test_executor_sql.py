"""Which file becomes which table, and the queries themselves in the sandbox."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import duckdb
import pytest
from hypothesis import given
from hypothesis import strategies as st

from octollm.errors import OctoError
from octollm.services.arms.executor.bubblewrap import Bubblewrap
from octollm.services.arms.executor.runner import DESCRIBE, MAX_QUERY, build_sql_job, derive_tables, is_tabular
from octollm.services.arms.executor.runner_sql import RefusedError, check
from octollm.services.arms.executor.sandbox import MIB, Limits, SandboxResult

LIMITS = Limits(wall_seconds=30, cpu_seconds=60, memory_bytes=1024 * MIB)


class TestTables:
    @pytest.mark.parametrize(
        ("name", "table"),
        [
            ("Sales 2024.csv", "sales_2024"),
            ("2024.tsv", "t_2024"),
            ("---.json", "data"),
            ("Größe.ndjson", "größe"),
            ("a.b.parquet", "a_b"),
        ],
    )
    def test_names(self, name: str, table: str) -> None:
        assert [found.table for found in derive_tables([name])] == [table]

    def test_equal_stems(self) -> None:
        assert [t.table for t in derive_tables(["a.csv", "a.json", "A.tsv"])] == ["a", "a_2", "a_3"]

    def test_others_are_left_out(self) -> None:
        assert derive_tables(["notes.md", "x", "csv"]) == ()
        assert is_tabular("X.CSV")
        assert not is_tabular("x.txt")

    @given(st.lists(st.text(min_size=1, max_size=10).map(lambda stem: stem + ".csv"), max_size=8))
    def test_tables_are_distinct_identifiers(self, names: list[str]) -> None:
        tables = [found.table for found in derive_tables(names)]
        assert len(set(tables)) == len(tables)
        assert all(table.isidentifier() or table[0] in "_t" or table[0].isalnum() for table in tables)


@pytest.mark.parametrize("query", ["", "  ", "x" * (MAX_QUERY + 1)])
def test_queries_are_bounded(query: str) -> None:
    with pytest.raises(OctoError) as caught:
        build_sql_job(query, {}, LIMITS)
    assert caught.value.code == "invalid_body"


@pytest.mark.parametrize(
    "query",
    [
        "CREATE TABLE x AS SELECT 1",
        "DROP TABLE a",
        "INSERT INTO a VALUES (2)",
        "UPDATE a SET x = 2",
        "COPY a TO '/tmp/x.csv'",
        "ATTACH '/tmp/x.db'",
        "SET enable_external_access = true",
        "INSTALL httpfs",
        "LOAD httpfs",
        "PRAGMA database_list",
        "CALL pragma_version()",
        "EXPORT DATABASE '/tmp/x'",
    ],
)
def test_only_reading(query: str) -> None:
    with pytest.raises(RefusedError, match="only queries that read are allowed"):
        check(query)


@pytest.mark.parametrize("query", ["SELECT 1; SELECT 2", "-- nothing", "SELECT 1; DROP TABLE a"])
def test_only_one_statement(query: str) -> None:
    with pytest.raises(RefusedError, match="exactly one SQL statement"):
        check(query)


async def ask(sandbox: Bubblewrap, query: str, **files: str | bytes) -> SandboxResult:
    named = {name.replace("__", "."): data.encode() if isinstance(data, str) else data for name, data in files.items()}
    return await sandbox.run(build_sql_job(query, named, LIMITS))


async def answer(sandbox: Bubblewrap, query: str, **files: str | bytes) -> dict[str, Any]:
    outcome = await ask(sandbox, query, **files)
    assert outcome.stderr == ""
    assert outcome.exit_code == 0
    return json.loads(outcome.stdout)


@pytest.mark.sandbox
class TestQueries:
    async def test_one_table(self, bubblewrap: Bubblewrap) -> None:
        found = await answer(
            bubblewrap,
            "SELECT region, sum(amount) AS total FROM data GROUP BY region ORDER BY total DESC;",
            sales__csv="region,amount,day\nnorth,1.5,2024-01-01\nsouth,4,2024-01-02\nnorth,1,2024-02-01\n",
        )
        assert found == {
            "columns": ["region", "total"],
            "types": ["VARCHAR", "DOUBLE"],
            "rows": [["south", 4.0], ["north", 2.5]],
            "row_count": 2,
            "truncated": False,
            "assumptions": [],
        }

    async def test_joined_formats(self, bubblewrap: Bubblewrap) -> None:
        found = await answer(
            bubblewrap,
            "SELECT a.n, b.city, c.v, d.w FROM a JOIN b USING (id) JOIN c USING (id) JOIN d USING (id)",
            a__csv="id,n\n1,Ann\n",
            b__json='[{"id": 1, "city": "Rome"}]',
            c__jsonl='{"id": 1, "v": [1, 2]}\n',
            d__tsv="id\tw\n1\tx\n",
        )
        assert found["rows"] == [["Ann", "Rome", [1, 2], "x"]]

    async def test_parquet(self, bubblewrap: Bubblewrap, tmp_path: Path) -> None:
        path = tmp_path / "p.parquet"
        duckdb.connect().execute(f"COPY (SELECT 1 AS id, DATE '2024-01-01' AS day) TO '{path}'")
        found = await answer(bubblewrap, "FROM data", p__parquet=path.read_bytes())
        assert found["rows"] == [[1, "2024-01-01"]]

    async def test_values_of_many_types(self, bubblewrap: Bubblewrap) -> None:
        found = await answer(
            bubblewrap,
            "SELECT 1.50::DECIMAL(9,2), 2.00::DECIMAL(9,2), 'nan'::DOUBLE, 170141183460469231731687303715884105727,"
            " TIMESTAMP '2024-01-01 10:00:00', {'a': [1]}, '\\x01'::BLOB, NULL, true, INTERVAL 1 DAY",
        )
        assert found["rows"] == [
            [1.5, 2, None, 2**127 - 1, "2024-01-01T10:00:00", {"a": [1]}, "01", None, True, "1 day, 0:00:00"]
        ]

    async def test_long_answers_are_cut_and_counted(self, bubblewrap: Bubblewrap) -> None:
        found = await answer(bubblewrap, "SELECT range AS n FROM range(5000)")
        assert (len(found["rows"]), found["row_count"], found["truncated"]) == (1000, 5000, True)
        assert found["rows"][:2] == [[0], [1]]

    async def test_wide_answers_are_cut_too(self, bubblewrap: Bubblewrap) -> None:
        found = await answer(bubblewrap, "SELECT repeat('é', 2000) FROM range(900)")
        assert 0 < len(found["rows"]) < 900
        assert (found["row_count"], found["truncated"]) == (900, True)

    @pytest.mark.parametrize(
        "query", ["WITH a AS (SELECT 1 AS x) SELECT x FROM a -- end", "VALUES (1)", "SELECT 1;", "SELECT 1; -- end"]
    )
    async def test_forms_of_a_query(self, bubblewrap: Bubblewrap, query: str) -> None:
        assert (await answer(bubblewrap, query))["rows"] == [[1]]

    async def test_pivot(self, bubblewrap: Bubblewrap) -> None:
        found = await answer(bubblewrap, "PIVOT data ON k USING sum(v)", d__csv="k,v\na,1\nb,2\na,3\n")
        assert found["rows"] == [[4, 2]]


@pytest.mark.sandbox
class TestStrangeFiles:
    async def test_a_header_of_all_sorts(self, bubblewrap: Bubblewrap) -> None:
        text = 'id;"my ""q"" col";id; spaced name ;ünï;\n1;"two\nlines";2;"1,234";x;\n'
        found = await answer(bubblewrap, "FROM data", odd__csv=text)
        assert found["columns"][:5] == ["id", 'my "q" col', "id_2", "spaced name", "ünï"]
        assert found["rows"][0][:5] == [1, "two\nlines", 2, 1.234, "x"]
        (undecided,) = [each for each in found["assumptions"] if not each["decided"]]
        assert undecided["column"] == "spaced name"
        assert "'1,234' can be 1,234 or 1.234; read as 1.234" in undecided["text"]

    async def test_leading_zeros_stay_text(self, bubblewrap: Bubblewrap) -> None:
        found = await answer(bubblewrap, "SELECT zip FROM data ORDER BY 1", zips__csv="zip,n\n00123,1\n10000,2\n")
        assert found["rows"] == [["00123"], ["10000"]]

    async def test_types_come_from_the_whole_file(self, bubblewrap: Bubblewrap) -> None:
        rows = "".join(f"{number},{number}\n" for number in range(30_000))
        found = await answer(bubblewrap, "SELECT max(n), any_value(typeof(n)) FROM data", n__csv=f"n,m\n{rows}x,1\n")
        assert found["rows"] == [["x", "VARCHAR"]]

    async def test_a_header_alone(self, bubblewrap: Bubblewrap) -> None:
        found = await answer(bubblewrap, "FROM data", h__csv="name,city\n")
        assert (found["columns"], found["rows"]) == (["name", "city"], [])

    @pytest.mark.parametrize("data", ["", " \n\n", b"\xef\xbb\xbf"])
    async def test_an_empty_file(self, bubblewrap: Bubblewrap, data: str | bytes) -> None:
        outcome = await ask(bubblewrap, "FROM data", e__csv=data)
        assert outcome.exit_code == 1
        assert "e.csv could not be loaded: the file is empty" in outcome.stderr

    async def test_uneven_lines(self, bubblewrap: Bubblewrap) -> None:
        found = await answer(bubblewrap, "SELECT a, b FROM data", u__csv="a,b,c\n1,2\n3,4,5,6\n7,8,9\n")
        assert len(found["rows"]) >= 2

    @pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "cp1252"])
    async def test_encodings(self, bubblewrap: Bubblewrap, encoding: str) -> None:
        found = await answer(bubblewrap, "FROM data", x__csv="größe,n\nüber,1\n".encode(encoding))
        assert (found["columns"], found["rows"]) == (["größe", "n"], [["über", 1]])

    async def test_broken_json(self, bubblewrap: Bubblewrap) -> None:
        outcome = await ask(bubblewrap, "FROM data", b__json='{"a": ')
        assert outcome.exit_code == 1
        assert "b.json could not be loaded: Invalid Input Error: Malformed JSON" in outcome.stderr
        assert "CREATE TABLE" not in outcome.stderr
        assert "data/" not in outcome.stderr

    async def test_a_hostile_file_name(self, bubblewrap: Bubblewrap) -> None:
        name = "x'; DROP TABLE a; --\".csv"
        outcome = await bubblewrap.run(build_sql_job("FROM data", {name: b"a\n1\n"}, LIMITS))
        assert json.loads(outcome.stdout)["rows"] == [[1]]

    async def test_twenty_megabytes(self, bubblewrap: Bubblewrap) -> None:
        chance = random.Random(1)
        lines = [f"{n},{chance.choice('abc')},{chance.random():.4f},some words of text here" for n in range(530_000)]
        text = "id,kind,value,note\n" + "\n".join(lines)
        assert len(text) > 19 * MIB
        found = await answer(bubblewrap, "SELECT count(*), count(DISTINCT kind) FROM data", big__csv=text)
        assert found["rows"] == [[530_000, 3]]


@pytest.mark.sandbox
class TestRefusals:
    async def test_a_refused_query(self, bubblewrap: Bubblewrap) -> None:
        outcome = await ask(bubblewrap, "DROP TABLE a", a__csv="x\n1\n")
        assert (outcome.exit_code, outcome.stdout) == (1, "")
        assert "only queries that read are allowed" in outcome.stderr

    @pytest.mark.parametrize(
        "query",
        [
            "FROM read_csv('/usr/share/dict/words')",
            "FROM read_text('/work/runner_sql.py')",
            "FROM read_parquet('https://example.com/x.parquet')",
            "SELECT getenv('HOME')",
        ],
    )
    async def test_no_other_files(self, bubblewrap: Bubblewrap, query: str) -> None:
        outcome = await ask(bubblewrap, query, a__csv="x\n1\n")
        assert outcome.exit_code == 1
        assert outcome.stdout == ""

    async def test_a_wrong_column(self, bubblewrap: Bubblewrap) -> None:
        outcome = await ask(bubblewrap, "SELECT regio FROM data", a__csv="region\nnorth\n")
        assert (outcome.exit_code, outcome.stdout) == (1, "")
        assert "region" in outcome.stderr
        assert "Traceback" not in outcome.stderr

    async def test_memory(self, bubblewrap: Bubblewrap) -> None:
        limits = Limits(wall_seconds=30, cpu_seconds=60, memory_bytes=400 * MIB)
        job = build_sql_job("SELECT list(a.range || 'xxxxxxxx') FROM range(30000000) a", {}, limits)
        outcome = await bubblewrap.run(job)
        assert (outcome.exit_code, outcome.reason) == (1, "memory")

    async def test_time(self, bubblewrap: Bubblewrap) -> None:
        job = build_sql_job("SELECT count(*) FROM range(10000000) a, range(10000000) b", {}, Limits(wall_seconds=2))
        assert (await bubblewrap.run(job)).reason == "timeout"


@pytest.mark.sandbox
class TestDescribe:
    async def test_schema(self, bubblewrap: Bubblewrap) -> None:
        rows = "".join(f"{n},{'north' if n % 2 else 'south'},{n / 2},name{n},2024-01-{n:02}\n" for n in range(1, 21))
        found = await answer(
            bubblewrap,
            DESCRIBE,
            sales__csv="id,my region,amount,who,day\n" + rows,
            empty__csv="",
            more__json='[{"a": {"b": 1}}]',
        )
        sales, more = found["tables"]
        assert (sales["table"], sales["file"], sales["row_count"]) == ("sales", "sales.csv", 20)
        assert sales["columns"] == [
            {"name": "id", "type": "BIGINT", "min": 1, "max": 20},
            {"name": "my region", "type": "VARCHAR", "values": ["north", "south"]},
            {"name": "amount", "type": "DOUBLE", "min": 0.5, "max": 10.0},
            {"name": "who", "type": "VARCHAR"},
            {"name": "day", "type": "DATE", "min": "2024-01-01", "max": "2024-01-20"},
        ]
        assert sales["sample"][0] == [1, "north", 0.5, "name1", "2024-01-01"]
        assert len(sales["sample"]) == 3
        assert more["columns"][0]["name"] == "a"
        assert found["faults"] == ["empty.csv could not be loaded: the file is empty"]
        assert "\"my region\" VARCHAR: 'north', 'south'" in found["text"]

    async def test_nothing_to_describe(self, bubblewrap: Bubblewrap) -> None:
        assert await answer(bubblewrap, DESCRIBE) == {"tables": [], "faults": [], "text": "", "assumptions": []}
