"""Answers in many languages: right ones are given, and one about another fact is never presented as certain."""

from collections.abc import Sequence

import msgspec
import pytest
from document_kit import DocumentKit

from octollm.contracts.operations import Passage
from octollm.contracts.task import ExecuteResult
from octollm.services.arms.retriever.answer import QUESTION_CHECK, answer_question
from octollm.services.arms.retriever.service import search_texts
from octollm.text.passages import split_passages
from octollm.text.question_terms import content_terms, recognize_language

TEXTS = {
    "de": "# Mietvertrag\n\nDer Vertrag wird mit einer Kündigungsfrist von drei Monaten beendet.\n"
    "Die Miete beträgt 543 Euro im Monat.\nVermieterin ist Rosa Lind.\n",
    "ar": "عقد الإيجار\n\nالإيجار الشهري هو 543 درهم.\nمدة الإشعار هي 37 يوما.\nالتأمين هو 900 درهم.\n",
    "zh": "租赁合同\n\n每月租金为543元。\n合同的通知期限为37天。\n房东的姓名是王伟。\n",
    "ja": "賃貸契約書\n\n毎月の家賃は543円です。\n解約の通知期間は37日です。\n大家の名前は佐藤です。\n",
    "th": "สัญญาเช่า\n\nค่าเช่ารายเดือนคือ 543 บาท\nระยะเวลาแจ้งล่วงหน้าคือ 37 วัน\nเจ้าของบ้านชื่อสมชาย\n",
    "nl": "# Reglement van de sporthal\n\nEen abonnement kost 543 euro per jaar.\nDe hal sluit om 11 uur.\n"
    "De beheerder is Rosa Lind.\n",
    "pl": "# Umowa najmu\n\nCzynsz miesięczny wynosi 773 złotych.\nOkres wypowiedzenia wynosi 37 dni.\n"
    "Wynajmującym jest Rosa Lind.\n",
    "ru": "# Договор аренды\n\nЕжемесячная арендная плата составляет 543 рубля. Срок уведомления составляет 37 дней.\n",
}


async def answer(text: str, question: str, said: str, *matched: str) -> ExecuteResult:
    """Answer a question over a text with a model that says ``said``, however often it is asked."""

    async def ask(messages, **more: object) -> str:
        return said

    async def search(question: str, limit: int) -> Sequence[Passage]:
        cut = [Passage("a.txt", "d", p.line_start, p.line_end, p.text, 1.0) for p in split_passages(text)]
        return [msgspec.structs.replace(each, matched=matched) for each in cut][:limit]

    return await answer_question(question, ask, search)


def is_certain(result: ExecuteResult) -> bool:
    assert result.evidence is not None
    return result.evidence.found and not result.evidence.notes


@pytest.mark.parametrize(
    ("language", "question", "said"),
    [
        ("de", "Wie lang ist die Kündigungsfrist?", "Die Kündigungsfrist beträgt drei Monate."),
        ("de", "Wie lang ist die Frist für die Kündigung des Vertrags?", "Drei Monate."),
        ("ar", "كم الإيجار الشهري؟", "الإيجار الشهري هو 543 درهم."),
        ("ar", "ما هي مدة الإشعار؟", "37 يوما"),
        ("zh", "每月租金是多少?", "每月租金为543元。"),
        ("zh", "通知期限是多少天?", "37天"),
        ("ja", "毎月の家賃はいくらですか?", "543円です。"),
        ("ja", "大家の名前は何ですか?", "佐藤です。"),
        ("th", "ค่าเช่ารายเดือนเท่าไร", "543 บาท"),
        ("th", "ระยะเวลาแจ้งล่วงหน้ากี่วัน", "37 วัน"),
        ("nl", "Hoeveel kost een abonnement per jaar?", "543 euro"),
        ("pl", "Ile wynosi okres wypowiedzenia?", "37 dni"),
        ("ru", "Какой срок уведомления?", "37 дней"),
    ],
)
async def test_a_right_answer_is_given_and_accepted(language: str, question: str, said: str) -> None:
    result = await answer(TEXTS[language], question, said)
    assert is_certain(result), result
    verdict = await DocumentKit().judge(question, {"a.txt": TEXTS[language]}, result)
    assert verdict.accepted, verdict.reasons


@pytest.mark.parametrize(
    ("language", "question", "said"),
    [
        ("nl", "Hoeveel kleedkamers heeft de hal?", "11 kleedkamers"),
        ("nl", "Hoeveel kleedkamers heeft de hal?", "11"),
        ("pl", "Ile wynosi okres wypowiedzenia?", "773 złotych"),
        ("de", "Wie hoch ist die Kaution für die Wohnung?", "543 Euro"),
        ("de", "Wie lang ist die Kündigungsfrist?", "543 Euro im Monat"),
        ("ar", "كم عدد الغرف في الشقة؟", "37"),
        ("ar", "ما هي مدة الإشعار؟", "543 درهم"),
        ("zh", "房间的窗户朝哪个方向?", "37"),
        ("zh", "通知期限是多少天?", "543元"),
        ("ja", "部屋の壁は何色ですか?", "佐藤です。"),
        ("ja", "解約の通知期間は何日ですか?", "543円"),
        ("th", "ระยะเวลาแจ้งล่วงหน้ากี่วัน", "543 บาท"),
        ("ru", "Какой срок уведомления?", "543 рубля"),
        ("ru", "Сколько этажей в здании?", "37"),
    ],
)
async def test_an_answer_about_another_fact_is_never_certain(language: str, question: str, said: str) -> None:
    for matched in ((), ("words", "vectors")):
        result = await answer(TEXTS[language], question, said, *matched)
        assert not is_certain(result), result
        assert result.evidence is not None
        if result.evidence.found:
            assert "not certain" in result.output
            assert [check.passed for check in result.evidence.checks if check.name == QUESTION_CHECK] == [False]
            # An honest note is no fault of the result.
            assert (await DocumentKit().judge(question, {"a.txt": TEXTS[language]}, result)).accepted


async def test_an_answer_in_other_words_says_that_it_is_uncertain() -> None:
    text = "Mitarbeiter haben Anspruch auf 30 Urlaubstage im Jahr.\n"
    question = "How many days of vacation do employees get?"
    found = await answer(text, question, "30", "vectors")
    assert found.output.startswith("30\n\n[a.txt:1]\n\nNote: not certain, check it: ")
    # Nothing but the model's word connects them.
    withheld = await answer(text, question, "30")
    assert withheld.evidence is not None
    assert not withheld.evidence.found


async def test_a_sentence_that_goes_on_from_the_one_before_shares_its_subject() -> None:
    text = "The motor of pump P3 is made by Norvik. It is covered by a warranty of eight years.\n"
    assert is_certain(await answer(text, "How long is the warranty of the motor of pump P3?", "Eight years."))


def test_texts_in_place_are_searched_in_their_language() -> None:
    found = search_texts({"a.txt": TEXTS["de"]}, "Kündigungsfristen der Verträge", 5)
    assert [each.matched for each in found] == [("words",)]


@pytest.mark.parametrize(
    ("question", "expected"),
    [
        ("Hoeveel kleedkamers heeft de hal?", ["kleedkamers", "hal"]),
        ("Ile wynosi okres wypowiedzenia?", ["okres", "wypowiedzenia"]),
        ("通知期限是多少天?", ["通知", "知期", "期限", "天"]),
        ("大家の名前は何ですか?", ["大家", "名前"]),
        ("월세는 얼마입니까?", ["월세"]),
        ("Who is it?", ["who", "is", "it"]),
        ("", []),
    ],
)
def test_content_terms_leave_out_what_any_question_has(question: str, expected: list[str]) -> None:
    assert [each.text for each in content_terms(question, [recognize_language(question)])] == expected
