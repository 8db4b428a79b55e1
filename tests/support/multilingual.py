# ruff: noqa: E501 - a passage and its question are one line
"""A search corpus in nine languages, made from seeds: passages, and questions in other words than theirs.

The seeds are frozen: figures of search quality compare only while they stay. Passages of one topic differ by a name and a
number alone, so the words of the topic are not enough to find the right one of six.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

NAMES = {
    "de": ("Müller", "Bergmann", "Seeblick", "Hartwig", "Lindenhof", "Falkenried"),
    "en": ("Carter", "Oakfield", "Brighton", "Delaney", "Northgate", "Hawthorne"),
    "fr": ("Dubois", "Beaulieu", "Lavande", "Moreau", "Rivoli", "Châtelet"),
    "es": ("García", "Valverde", "Alhambra", "Montoya", "Ribera", "Castellón"),
    "zh": ("华信", "长青", "东湖", "明德", "金桥", "云山"),
    "ja": ("田中", "青葉", "富士見", "桜井", "北斗", "中村"),
    "th": ("สยาม", "รุ่งเรือง", "ดอกบัว", "ภูเขา", "ทองคำ", "สายฝน"),
    "ar": ("النخيل", "الأندلس", "الواحة", "الفجر", "البحر", "الياسمين"),
    "ko": ("한빛", "대성", "푸른솔", "서울숲", "미래", "금강"),
}
LANGUAGES = tuple(NAMES)

# Each line: a passage | a question that it answers. The lines of all languages have the same ten topics in order.
_SEEDS = {
    "de": """
Der Mietvertrag mit {name} kann mit einer Kündigungsfrist von {n} Monaten beendet werden. | Welche Frist gilt, um den Vertrag mit {name} zu kündigen?
Die Batterie des Geräts von {name} hat {n} Monate Garantie ab dem Kaufdatum. | Wie lange gilt die Gewährleistung für den Akku von {name}?
Die Bibliothek {name} öffnet werktags um {n} Uhr und schließt am Abend. | Ab wann kann man in die Bücherei {name} gehen?
Bei {name} stehen jedem Mitarbeiter {n} Urlaubstage im Jahr zu. | Wie viel Jahresurlaub bekommen Angestellte bei {name}?
Der Impfstoff von {name} muss bei {n} Grad Celsius gelagert werden. | Welche Lagertemperatur braucht das Vakzin von {name}?
Das Parkhaus {name} verlangt {n} Euro für jede angefangene Stunde. | Was kostet das Parken bei {name}?
Bei Feueralarm sammeln sich alle Besucher von {name} am Treffpunkt {n} hinter dem Gebäude. | Wo trifft man sich bei {name}, wenn es brennt?
Passwörter müssen bei {name} mindestens {n} Zeichen lang sein. | Welche Mindestlänge hat ein Kennwort bei {name}?
Der Zug nach {name} fährt jeden Morgen von Gleis {n} ab. | An welchem Bahnsteig startet die Bahn nach {name}?
Die Krankenversicherung {name} erstattet bis zu {n} Prozent der Zahnarztkosten. | Wie viel zahlt die Kasse {name} für die Zahnbehandlung?
""",
    "en": """
The lease with {name} can be terminated with a notice period of {n} months. | How far in advance must the contract with {name} be cancelled?
The battery of the {name} device is guaranteed for {n} months from the date of purchase. | How long is the warranty on the {name} accumulator?
The {name} library opens at {n} on weekdays and closes in the evening. | From what time can I borrow books at {name}?
Every employee of {name} is entitled to {n} days of annual leave. | How much holiday do staff get at {name}?
The vaccine made by {name} must be kept at {n} degrees Celsius. | At what temperature is the {name} jab stored?
The {name} car park charges {n} pounds for every hour begun. | What does it cost to leave a vehicle at {name}?
When the fire alarm rings, all visitors of {name} gather at assembly point {n} behind the building. | Where do people meet at {name} if there is a blaze?
Passwords at {name} need to have at least {n} characters. | What is the minimum length of a login secret at {name}?
The train to {name} leaves from platform {n} every morning. | Which track does the rail service to {name} depart from?
The {name} health insurance reimburses up to {n} percent of dental costs. | How much of a dentist's bill does {name} pay back?
""",
    "fr": """
Le bail avec {name} peut être résilié avec un préavis de {n} mois. | Combien de temps à l'avance faut-il mettre fin au contrat avec {name} ?
La batterie de l'appareil {name} est garantie {n} mois à partir de la date d'achat. | Quelle est la durée de garantie de l'accumulateur {name} ?
La bibliothèque {name} ouvre à {n} heures en semaine et ferme le soir. | À partir de quelle heure peut-on emprunter des livres à {name} ?
Chaque employé de {name} a droit à {n} jours de congés par an. | Combien de vacances ont les salariés chez {name} ?
Le vaccin de {name} doit être conservé à {n} degrés Celsius. | À quelle température faut-il stocker l'injection de {name} ?
Le parking {name} facture {n} euros pour chaque heure entamée. | Quel est le prix du stationnement à {name} ?
En cas d'alarme incendie, tous les visiteurs de {name} se rassemblent au point {n} derrière le bâtiment. | Où se retrouver à {name} s'il y a le feu ?
Les mots de passe chez {name} doivent comporter au moins {n} caractères. | Quelle est la longueur minimale du code d'accès chez {name} ?
Le train pour {name} part chaque matin de la voie {n}. | De quel quai part le chemin de fer vers {name} ?
L'assurance maladie {name} rembourse jusqu'à {n} pour cent des frais dentaires. | Quelle part de la facture du dentiste est prise en charge par {name} ?
""",
    "es": """
El contrato de alquiler con {name} puede rescindirse con un preaviso de {n} meses. | ¿Con cuánta antelación hay que cancelar el acuerdo con {name}?
La batería del aparato {name} tiene {n} meses de garantía desde la fecha de compra. | ¿Cuánto dura la cobertura del acumulador de {name}?
La biblioteca {name} abre a las {n} los días laborables y cierra por la noche. | ¿Desde qué hora se pueden tomar libros prestados en {name}?
Cada empleado de {name} tiene derecho a {n} días de vacaciones al año. | ¿Cuánto descanso anual tienen los trabajadores de {name}?
La vacuna de {name} debe conservarse a {n} grados Celsius. | ¿A qué temperatura se almacena la inyección de {name}?
El aparcamiento {name} cobra {n} euros por cada hora comenzada. | ¿Cuánto cuesta estacionar en {name}?
Si suena la alarma de incendios, todos los visitantes de {name} se reúnen en el punto {n} detrás del edificio. | ¿Dónde hay que encontrarse en {name} si hay fuego?
Las contraseñas en {name} deben tener al menos {n} caracteres. | ¿Qué longitud mínima tiene una clave de acceso en {name}?
El tren a {name} sale cada mañana de la vía {n}. | ¿De qué andén parte el ferrocarril hacia {name}?
El seguro médico {name} reembolsa hasta el {n} por ciento de los gastos dentales. | ¿Qué parte de la factura del dentista paga {name}?
""",
    "zh": """
与{name}签订的租赁合同可以提前{n}个月通知解除。 | 终止和{name}的租约需要提前多久?
{name}设备的电池自购买之日起保修{n}个月。 | {name}的蓄电池质保期有多长?
{name}图书馆工作日{n}点开门,晚上关门。 | 几点可以去{name}借书?
{name}的每位员工每年享有{n}天年假。 | 在{name}上班一年能休多少天?
{name}生产的疫苗必须在{n}摄氏度下保存。 | {name}的针剂要存放在什么温度?
{name}停车场每小时收费{n}元。 | 在{name}停车多少钱?
火警响起时,{name}的所有访客在大楼后面的{n}号集合点集合。 | {name}着火时人们应该去哪里?
{name}的密码至少要有{n}个字符。 | {name}的登录口令最短多长?
开往{name}的火车每天早上从{n}号站台出发。 | 去{name}的列车在哪个月台上车?
{name}医疗保险最多报销牙科费用的百分之{n}。 | 看牙医的账单{name}承担多少?
""",
    "ja": """
{name}との賃貸契約は{n}か月前の通知で解約できます。 | {name}の契約を終わらせるにはいつまでに知らせる必要がありますか?
{name}の機器のバッテリーは購入日から{n}か月間保証されます。 | {name}の電池の保証期間はどのくらいですか?
{name}図書館は平日{n}時に開館し、夜に閉館します。 | {name}で本を借りられるのは何時からですか?
{name}の社員には年間{n}日の有給休暇があります。 | {name}で働く人は一年に何日休めますか?
{name}のワクチンは摂氏{n}度で保管しなければなりません。 | {name}の予防接種薬は何度で保存しますか?
{name}駐車場は一時間ごとに{n}円の料金がかかります。 | {name}に車を停めるといくらですか?
火災警報が鳴ったら、{name}の来訪者は全員建物裏の第{n}集合場所に集まります。 | {name}で火事のときはどこに避難しますか?
{name}のパスワードは{n}文字以上でなければなりません。 | {name}の暗証の最低の長さは?
{name}行きの電車は毎朝{n}番線から発車します。 | {name}へ行く列車はどのホームから出ますか?
{name}健康保険は歯科費用の{n}パーセントまで払い戻します。 | 歯医者の代金のうち{name}が負担する割合は?
""",
    "th": """
สัญญาเช่ากับ{name}สามารถยกเลิกได้โดยแจ้งล่วงหน้า {n} เดือน | ถ้าจะเลิกสัญญากับ{name}ต้องบอกก่อนนานเท่าไร
แบตเตอรี่ของเครื่อง{name}รับประกัน {n} เดือนนับจากวันที่ซื้อ | ระยะเวลาประกันแบตของ{name}นานแค่ไหน
ห้องสมุด{name}เปิดเวลา {n} นาฬิกาในวันทำงานและปิดตอนเย็น | ยืมหนังสือที่{name}ได้ตั้งแต่กี่โมง
พนักงานทุกคนของ{name}มีสิทธิลาพักร้อนปีละ {n} วัน | คนทำงานที่{name}หยุดพักได้กี่วันต่อปี
วัคซีนของ{name}ต้องเก็บที่อุณหภูมิ {n} องศาเซลเซียส | ยาฉีดของ{name}เก็บรักษาที่กี่องศา
ที่จอดรถ{name}คิดค่าบริการชั่วโมงละ {n} บาท | จอดรถที่{name}ราคาเท่าไร
เมื่อสัญญาณไฟไหม้ดัง ผู้มาเยือน{name}ทุกคนรวมตัวที่จุดรวมพล {n} หลังอาคาร | ถ้าเกิดเพลิงไหม้ที่{name}ต้องไปที่ไหน
รหัสผ่านของ{name}ต้องมีอย่างน้อย {n} ตัวอักษร | รหัสเข้าระบบของ{name}สั้นที่สุดได้กี่ตัว
รถไฟไป{name}ออกจากชานชาลา {n} ทุกเช้า | ขึ้นขบวนรถไป{name}ที่ชานชาลาไหน
ประกันสุขภาพ{name}จ่ายคืนค่าทำฟันสูงสุด {n} เปอร์เซ็นต์ | {name}ออกค่าหมอฟันให้เท่าไร
""",
    "ar": """
يمكن إنهاء عقد الإيجار مع {name} بإشعار مسبق مدته {n} أشهر. | كم المدة اللازمة لإلغاء العقد مع {name}؟
بطارية جهاز {name} مضمونة لمدة {n} شهرا من تاريخ الشراء. | ما مدة ضمان البطارية من {name}؟
تفتح مكتبة {name} في الساعة {n} أيام العمل وتغلق مساء. | متى يمكن استعارة الكتب من {name}؟
يحق لكل موظف في {name} الحصول على {n} يوما من الإجازة السنوية. | كم عدد أيام العطلة للعاملين في {name}؟
يجب حفظ لقاح {name} عند درجة حرارة {n} مئوية. | في أي درجة يخزن التطعيم من {name}؟
يتقاضى موقف السيارات {name} مبلغ {n} ريالات عن كل ساعة. | كم تكلفة إيقاف السيارة في {name}؟
عند انطلاق إنذار الحريق يتجمع جميع زوار {name} في نقطة التجمع {n} خلف المبنى. | أين يلتقي الناس في {name} إذا اندلعت النار؟
يجب أن تتكون كلمات المرور في {name} من {n} أحرف على الأقل. | ما أقل طول لكلمة السر في {name}؟
يغادر القطار المتجه إلى {name} كل صباح من الرصيف {n}. | من أي رصيف تنطلق رحلة القطار إلى {name}؟
يعوض التأمين الصحي {name} ما يصل إلى {n} بالمئة من تكاليف الأسنان. | كم يدفع {name} من فاتورة طبيب الأسنان؟
""",
    "ko": """
{name}과의 임대 계약은 {n}개월 전에 통지하면 해지할 수 있습니다. | {name} 계약을 끝내려면 얼마나 미리 알려야 합니까?
{name} 기기의 배터리는 구입일로부터 {n}개월 동안 보증됩니다. | {name} 전지의 보증 기간은 얼마입니까?
{name} 도서관은 평일 {n}시에 문을 열고 저녁에 닫습니다. | {name}에서 책을 빌릴 수 있는 시간은 몇 시부터입니까?
{name}의 모든 직원은 연간 {n}일의 휴가를 받습니다. | {name}에서 일하면 일 년에 며칠 쉴 수 있습니까?
{name}의 백신은 섭씨 {n}도에서 보관해야 합니다. | {name} 예방 주사약의 저장 온도는 몇 도입니까?
{name} 주차장은 시간당 {n}원을 받습니다. | {name}에 차를 세우면 비용이 얼마입니까?
화재 경보가 울리면 {name}의 모든 방문객은 건물 뒤 {n}번 집결지에 모입니다. | {name}에 불이 나면 어디로 가야 합니까?
{name}의 비밀번호는 {n}자 이상이어야 합니다. | {name} 로그인 암호의 최소 길이는 얼마입니까?
{name}행 기차는 매일 아침 {n}번 승강장에서 출발합니다. | {name}으로 가는 열차는 어느 플랫폼에서 탑니까?
{name} 건강보험은 치과 비용의 {n}퍼센트까지 환급합니다. | 치과 진료비 중 {name}이 부담하는 비율은 얼마입니까?
""",
}


@dataclass(frozen=True)
class Fact:
    """A passage, and a question that no other passage answers."""

    language: str
    passage: str
    question: str


def facts(language: str, names: int = 6) -> Iterator[Fact]:
    """Yield the facts of a language about the first ``names`` names."""
    lines = [line for line in _SEEDS[language].splitlines() if line]
    for topic, line in enumerate(lines):
        passage, question = line.split(" | ")
        for number, name in enumerate(NAMES[language][:names]):
            fills = {"name": name, "n": 2 + (topic * 7 + number * 3) % 19}
            yield Fact(language, passage.format(**fills), question.format(**fills))
