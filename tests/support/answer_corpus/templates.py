"""Texts in several languages with slots, and the questions that they answer and do not answer."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Template:
    """A text: its ``lines`` have slots such as ``{days}``; ``asked`` are questions with the slots of their answers."""

    name: str
    language: str
    title: str
    lines: tuple[str, ...]
    asked: tuple[tuple[str, str], ...]
    absent: tuple[str, ...]


FILLERS = {
    "en": (
        "This page was reviewed by the office in the autumn and is valid until it is replaced.",
        "Questions are answered by the front desk during the usual hours of business.",
        "Nothing in this text limits rights that cannot be limited by law.",
        "The parties keep each other informed of changes to their addresses.",
        "Earlier versions of this text are kept in the archive for reference.",
        "Headings are for orientation only and have no meaning of their own.",
    ),
    "de": (
        "Diese Seite wurde im Herbst geprüft und gilt, bis sie ersetzt wird.",
        "Fragen beantwortet der Empfang zu den üblichen Geschäftszeiten.",
        "Frühere Fassungen werden im Archiv aufbewahrt.",
        "Die Überschriften dienen nur der Übersicht.",
    ),
    "fr": (
        "Cette page a été relue par le bureau à l'automne.",
        "L'accueil répond aux questions pendant les heures d'ouverture.",
        "Les versions antérieures sont conservées dans les archives.",
    ),
    "es": (
        "Esta página fue revisada por la oficina en otoño.",
        "La recepción responde a las preguntas en el horario habitual.",
        "Las versiones anteriores se guardan en el archivo.",
    ),
    "it": ("Questa pagina è stata rivista in autunno.", "Le versioni precedenti sono conservate in archivio."),
    "nl": ("Deze pagina is in de herfst nagekeken.", "Eerdere versies worden in het archief bewaard."),
    "pl": ("Ta strona została sprawdzona jesienią.", "Wcześniejsze wersje są przechowywane w archiwum."),
    "pt": ("Esta página foi revista no outono.", "As versões anteriores ficam guardadas no arquivo."),
    "ru": ("Эта страница была проверена осенью.", "Прежние версии хранятся в архиве."),
    "zh": ("本页由办公室在秋季审核。", "旧版本保存在档案中。", "如有疑问请在营业时间联系前台。"),
    "ja": (
        "このページは秋に事務局が確認しました。",
        "以前の版は書庫に保管されています。",
        "ご質問は受付までお願いします。",
    ),
    "ko": ("이 페이지는 가을에 사무실에서 검토했습니다.", "이전 판은 보관소에 보관됩니다."),
    "ar": ("راجع المكتب هذه الصفحة في الخريف.", "تحفظ النسخ السابقة في الأرشيف."),
}

TEMPLATES = (
    Template(
        "lease",
        "en",
        "Lease agreement",
        (
            "The monthly rent is {money} euros and is due on the third working day of each month.",
            "Either party may end the lease with a notice period of {days} days.",
            "The tenant pays a deposit of {deposit} euros before moving in.",
            "The landlord is {person}, the tenant is {other}.",
            "Pets are allowed only with written permission of the landlord.",
        ),
        (
            ("How much is the monthly rent?", "money"),
            ("What is the notice period of the lease?", "days"),
            ("Who is the landlord?", "person"),
            ("How much is the deposit?", "deposit"),
        ),
        ("What is the name of the tenant's employer?", "How many parking spaces belong to the flat?"),
    ),
    Template(
        "manual",
        "en",
        "Pump manual",
        (
            "The pump delivers at most {flow} litres per minute.",
            "Change the filter every {days} hours of operation.",
            "The operating temperature must not exceed {degrees} degrees.",
            "Error code E{code} means that the inlet is blocked.",
            "Spare parts are ordered from {company}.",
        ),
        (
            ("How many litres per minute does the pump deliver?", "flow"),
            ("After how many hours is the filter changed?", "days"),
            ("Which company supplies spare parts?", "company"),
            ("Which error code means that the inlet is blocked?", "code"),
        ),
        ("What colour is the pump's housing?", "How much does the pump weigh?"),
    ),
    Template(
        "minutes",
        "en",
        "Minutes of the board",
        (
            "The meeting took place in {city} and was chaired by {person}.",
            "The board approved a budget of {money} euros for the new warehouse.",
            "{other} will present the report on staffing in the next meeting.",
            "The proposal to move the head office was rejected with {votes} votes against.",
            "The next meeting begins at {hour}:30.",
        ),
        (
            ("Who chaired the meeting?", "person"),
            ("What budget was approved for the new warehouse?", "money"),
            ("Who will present the report on staffing?", "other"),
            ("In which city did the meeting take place?", "city"),
        ),
        ("What was served for lunch at the meeting?", "Which bank finances the warehouse?"),
    ),
    Template(
        "policy",
        "en",
        "Travel policy",
        (
            "Hotels are refunded up to {money} euros a night.",
            "Expenses are claimed within {days} days after the journey.",
            "Flights in business class need the approval of {person}.",
            "For a private car, {cents} cents a kilometre are paid.",
            "Receipts below {deposit} euros are not needed.",
        ),
        (
            ("Up to which amount is a hotel night refunded?", "money"),
            ("Within how many days are expenses claimed?", "days"),
            ("Whose approval do flights in business class need?", "person"),
            ("How many cents are paid per kilometre?", "cents"),
        ),
        ("Which rental car company must be used?", "What is the daily allowance in Japan?"),
    ),
    Template(
        "incident",
        "en",
        "Incident report",
        (
            "The outage of the payment service began at {hour}:12 and lasted {minutes} minutes.",
            "The cause was an expired certificate on the server {server}.",
            "{votes} customers were affected.",
            "{person} renewed the certificate and restarted the service.",
            "As a measure, certificates are now checked every {days} days.",
        ),
        (
            ("How long did the outage last?", "minutes"),
            ("What was the cause of the outage?", "cause"),
            ("How many customers were affected?", "votes"),
            ("Who renewed the certificate?", "person"),
        ),
        ("How much money was lost in the outage?", "Which database version was in use?"),
    ),
    Template(
        "vertrag",
        "de",
        "Dienstvertrag",
        (
            "Die Kündigungsfrist beträgt {days} Tage zum Monatsende.",
            "Die Vergütung beträgt {money} Euro je Stunde.",
            "Ansprechpartner des Auftraggebers ist {person}.",
            "Der Erfüllungsort ist {city}.",
        ),
        (
            ("Wie lang ist die Kündigungsfrist?", "days"),
            ("Wie hoch ist die Vergütung je Stunde?", "money"),
            ("Wer ist Ansprechpartner des Auftraggebers?", "person"),
        ),
        ("Welche Versicherung hat der Auftragnehmer?",),
    ),
    Template(
        "anleitung",
        "de",
        "Anleitung der Heizung",
        (
            "Der Kessel wird alle {days} Monate gewartet.",
            "Der Betriebsdruck liegt bei {flow} bar.",
            "Bei Störungen hilft der Kundendienst unter der Nummer {phone}.",
            "Die Garantie gilt {years} Jahre.",
        ),
        (
            ("Wie viele Jahre gilt die Garantie?", "years"),
            ("Unter welcher Nummer hilft der Kundendienst?", "phone"),
            ("Wie hoch ist der Betriebsdruck?", "flow"),
        ),
        ("Wie viel kostet ein neuer Kessel?",),
    ),
    Template(
        "contrat",
        "fr",
        "Contrat de location",
        (
            "Le loyer mensuel est de {money} euros.",
            "Le préavis est de {days} jours.",
            "Le propriétaire est {person}.",
            "Le dépôt de garantie s'élève à {deposit} euros.",
        ),
        (
            ("Quel est le loyer mensuel ?", "money"),
            ("Quelle est la durée du préavis ?", "days"),
            ("Qui est le propriétaire ?", "person"),
        ),
        ("Quelle est la surface du balcon ?",),
    ),
    Template(
        "informe",
        "es",
        "Informe del proyecto",
        (
            "El presupuesto del proyecto es de {money} euros.",
            "La directora del proyecto es {person}.",
            "La entrega está prevista dentro de {days} semanas.",
            "Las pruebas se hicieron en {city}.",
        ),
        (
            ("¿Cuál es el presupuesto del proyecto?", "money"),
            ("¿Quién es la directora del proyecto?", "person"),
            ("¿En qué ciudad se hicieron las pruebas?", "city"),
        ),
        ("¿Qué banco financia el proyecto?",),
    ),
    Template(
        "regolamento",
        "it",
        "Regolamento della biblioteca",
        (
            "Il prestito dura {days} giorni.",
            "La multa per il ritardo è di {cents} centesimi al giorno.",
            "La direttrice è {person}.",
        ),
        (("Quanti giorni dura il prestito?", "days"), ("Chi è la direttrice?", "person")),
        ("Quanti libri possiede la biblioteca?",),
    ),
    Template(
        "reglement",
        "nl",
        "Reglement van de sporthal",
        (
            "Een abonnement kost {money} euro per jaar.",
            "De hal sluit om {hour} uur.",
            "De beheerder is {person}.",
        ),
        (("Hoeveel kost een abonnement per jaar?", "money"), ("Wie is de beheerder?", "person")),
        ("Hoeveel kleedkamers heeft de hal?",),
    ),
    Template(
        "umowa",
        "pl",
        "Umowa najmu",
        (
            "Czynsz miesięczny wynosi {money} złotych.",
            "Okres wypowiedzenia wynosi {days} dni.",
            "Wynajmującym jest {person}.",
        ),
        (("Ile wynosi czynsz miesięczny?", "money"), ("Ile wynosi okres wypowiedzenia?", "days")),
        ("Ile miejsc parkingowych ma budynek?",),
    ),
    Template(
        "contrato",
        "pt",
        "Contrato de serviço",
        (
            "O preço do serviço é de {money} euros por mês.",
            "O prazo de rescisão é de {days} dias.",
            "A responsável é {person}.",
        ),
        (("Qual é o preço do serviço por mês?", "money"), ("Quem é a responsável?", "person")),
        ("Qual é o número de funcionários?",),
    ),
    Template(
        "dogovor",
        "ru",
        "Договор аренды",
        (
            "Ежемесячная арендная плата составляет {money} рублей.",
            "Срок уведомления составляет {days} дней.",
            "Арендодателем является {person}.",
        ),
        (("Сколько составляет арендная плата?", "money"), ("Какой срок уведомления?", "days")),
        ("Сколько этажей в здании?",),
    ),
    Template(
        "hetong",
        "zh",
        "租赁合同",
        (
            "每月租金为{money}元。",
            "合同的通知期限为{days}天。",
            "房东的姓名是{person_zh}。",
            "押金为{deposit}元,在入住前支付。",
        ),
        (("每月租金是多少?", "money"), ("通知期限是多少天?", "days"), ("房东的姓名是什么?", "person_zh")),
        ("房间的窗户朝哪个方向?",),
    ),
    Template(
        "keiyaku",
        "ja",
        "賃貸契約書",
        (
            "毎月の家賃は{money}円です。",
            "解約の通知期間は{days}日です。",
            "大家の名前は{person_ja}です。",
            "敷金は{deposit}円で、入居前に支払います。",
        ),
        (
            ("毎月の家賃はいくらですか?", "money"),
            ("解約の通知期間は何日ですか?", "days"),
            ("大家の名前は何ですか?", "person_ja"),
        ),
        ("部屋の壁は何色ですか?",),
    ),
    Template(
        "gyeyak",
        "ko",
        "임대 계약서",
        (
            "월세는 {money}원입니다.",
            "해지 통지 기간은 {days}일입니다.",
            "보증금은 {deposit}원입니다.",
        ),
        (("월세는 얼마입니까?", "money"), ("해지 통지 기간은 며칠입니까?", "days")),
        ("건물은 몇 층입니까?",),
    ),
    Template(
        "aqd",
        "ar",
        "عقد الإيجار",
        (
            "الإيجار الشهري هو {money} درهم.",
            "مدة الإشعار هي {days} يوما.",
            "التأمين هو {deposit} درهم.",
        ),
        (("كم الإيجار الشهري؟", "money"), ("ما هي مدة الإشعار؟", "days")),
        ("كم عدد الغرف في الشقة؟",),
    ),
)
