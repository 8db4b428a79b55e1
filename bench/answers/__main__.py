"""Benchmark of true answers: files read without a model, and questions answered with one. Prints tables by kind.

``python -m answers`` reads the whole corpus and measures intake; ``--model`` asks its questions, ``--sample`` some of
them. Results are added to a file, so an interrupted run goes on where it ended.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections import Counter, defaultdict
from collections.abc import Sequence

from answer_corpus import corpus, paraphrases
from reports import RESULTS, save_results

from answers import asking, intake, reading


def show(titles: Sequence[str], counts: dict[str, Counter[str]], seconds: dict[str, list[float]]) -> Counter[str]:
    """Print a table by kind, and return the sums of its columns."""
    print(f"\n{'kind':<12}" + "".join(f"{title:>14}" for title in titles) + f"{'median s':>10}{'most s':>9}")
    whole: Counter[str] = Counter()
    for kind, row in counts.items():
        times = sorted(seconds[kind])
        cells = "".join(f"{row[title]:>14}" for title in titles)
        print(f"{kind:<12}{cells}{times[len(times) // 2]:>10.2f}{times[-1]:>9.2f}")
        whole += row
    print(f"{'all':<12}" + "".join(f"{whole[title]:>14}" for title in titles))
    return whole


def run_reading(pattern: str, *, verbose: bool) -> list[dict[str, object]]:
    """Read the corpus; return the rows of the results file."""
    counts: defaultdict[str, Counter[str]] = defaultdict(Counter)
    seconds: defaultdict[str, list[float]] = defaultdict(list)
    for case in corpus.build():
        if pattern not in case.id:
            continue
        outcome = reading.read_case(case)
        counts[case.kind][outcome.verdict] += 1
        seconds[case.kind].append(outcome.seconds)
        if verbose or outcome.verdict in ("wrong", "not read"):
            print(f"{outcome.verdict}: {case.id}: {outcome.detail[:400]}")
    whole = show(reading.VERDICTS, counts, seconds)
    good = whole["right"] + whole["told"] + whole["refused"]
    print(
        f"\nread as a person reads them, told or refused: {good / whole.total():.1%}; silently wrong: {whole['wrong']}"
    )
    command = "make bench-answers"
    return [
        {"name": f"files {verdict}", "value": whole[verdict], "unit": "files", "command": command}
        for verdict in reading.VERDICTS
    ]


def run_questions(
    model: str, sample: int, pattern: str, port_offset: int, *, fresh: bool, paraphrased: bool = False
) -> list[dict[str, object]]:
    """Ask the questions that the results file does not have yet; return the rows of the results file."""
    path = RESULTS / f"answers-{model}{'-paraphrased' * paraphrased}.jsonl"
    if fresh:
        path.unlink(missing_ok=True)
    known = {row["id"]: row for row in map(json.loads, path.read_text("utf-8").splitlines())} if path.exists() else {}
    cases = paraphrases.build() if paraphrased else corpus.build()
    asked = [each for each in asking.list_questions(cases) if pattern in each.id]
    chosen = asking.choose_sample(asked, sample) if sample else asked
    missing = [each for each in chosen if each.id not in known]
    if missing:
        with asking.installation(model, port_offset) as client, path.open("a", encoding="utf-8") as out:
            for number, each in enumerate(missing, 1):
                row = dataclasses.asdict(asking.ask(client, each))
                known[each.id] = row
                out.write(json.dumps(row, ensure_ascii=False) + "\n")
                out.flush()
                print(f"{number}/{len(missing)} {row['verdict']:<13}{row['seconds']:>7.1f} s  {each.id}", flush=True)
    rows = [known[each.id] for each in chosen]
    return summarise_answers(model, rows)


def summarise_answers(model: str, rows: Sequence[dict[str, object]]) -> list[dict[str, object]]:
    """Print the table of answers, and return the rows of the results file."""
    counts: defaultdict[str, Counter[str]] = defaultdict(Counter)
    seconds: defaultdict[str, list[float]] = defaultdict(list)
    for row in rows:
        counts[str(row["kind"])][str(row["verdict"])] += 1
        seconds[str(row["kind"])].append(float(str(row["seconds"])))
    print(f"\n{model}, {len(rows)} questions")
    whole = show(asking.VERDICTS, counts, seconds)
    tables = sum((counts[kind] for kind in ("csv", "tsv", "workbook", "json", "parquet", "join")), Counter[str]())
    documents = counts["document"] + counts["absent"]
    cited = [row["cited"] for row in rows if row["cited"] is not None]
    found: list[dict[str, object]] = []
    for name, part, verdict in (
        ("tables right", tables, "right"),
        ("documents right", documents, "right"),
        ("wrong, presented as right", whole, "wrong"),
    ):
        if part.total():
            share = part[verdict] / part.total()
            print(f"{name}: {share:.1%} of {part.total()}")
            found.append({"name": f"{model}: {name}", "value": round(share, 4), "unit": "share"})
    if cited:
        print(f"the place is cited that has the answer: {sum(map(bool, cited))} of {len(cited)}")
    return found


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(prog="answers", description=__doc__)
    parser.add_argument("--model", help="ask with this model of the catalogue, for example qwen2.5-coder-0.5b")
    parser.add_argument("--sample", type=int, default=0, help="so many questions, of each kind its share")
    parser.add_argument("--only", default="", help="cases whose id has this text")
    parser.add_argument("--port-offset", type=int, default=3100)
    parser.add_argument("--fresh", action="store_true", help="forget the results of earlier runs")
    parser.add_argument("--paraphrased", action="store_true", help="ask the questions that no rule answers")
    parser.add_argument("--verbose", action="store_true", help="print how every file is read")
    options = parser.parse_args()
    RESULTS.mkdir(exist_ok=True)
    summary = corpus.summarise()
    print(f"{summary['files']} files, {summary['questions']} questions, manifest {str(summary['sha256'])[:16]}…")
    if options.model:
        rows = run_questions(
            options.model,
            options.sample,
            options.only,
            options.port_offset,
            fresh=options.fresh,
            paraphrased=options.paraphrased,
        )
        name = f"answers-{options.model}{'-paraphrased' * options.paraphrased}"
    else:
        rows = run_reading(options.only, verbose=options.verbose)
        rows += intake.measure()
        name = "answers"
    save_results(name, rows)


if __name__ == "__main__":
    main()
