"""Clinical date phrases, by grammar, to intervals of days.

    "last summer", note of 2015-08-02   ->  2014-06-01 … 2014-08-31, season
    "POD#2", surgery on 2015-07-30      ->  2015-08-01 … 2015-08-01, day

What a phrase leaves open is the width of its interval ("two weeks ago" is seven days wide), and what had to be assumed
to anchor it makes it `approximate`. Every repetition in a pattern is bounded, so a text is searched in time linear in
its length. A phrase that no rule spells out is not a date: there is no rule that takes whatever is left.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable
from datetime import date, timedelta
from typing import NamedTuple

from downstream.concepts.date_words import MONTHS, SEASONS, UNITS, WEEKDAYS, amount, expanded, number_of, shift

Interval = tuple[date, date]
Resolved = tuple[date, date, str]
DAY = timedelta(days=1)
APPROXIMATE = "approximate"

_WIDTHS = {"week": 3, "month": 15, "year": 182}  # half a unit: what "two weeks ago" leaves open on each side
_THIRDS = {"early": 0, "beginning": 0, "start": 0, "mid": 1, "middle": 1, "late": 2, "end": 2}
_EVENTS = {"adm": "admission", "hos": "admission", "pre": "admission", "sur": "surgery", "ope": "surgery"}
_LEAD = re.compile(
    r"(?:(?:in|on|at|by|since|from|until|till|during|around|about|near|for|over|the|only|more than)\s+){1,3}", re.I
)


class Anchors(NamedTuple):
    """Days of a patient that phrases count from; None: not known."""

    birth: date | None = None
    admission: date | None = None
    surgery: date | None = None


NO_ANCHORS = Anchors()


class DateMention(NamedTuple):
    """A date phrase in a text: its characters (end exclusive) and the days it may mean (both inclusive)."""

    start: int
    end: int
    first: date
    last: date
    granularity: str


class _Known(NamedTuple):
    note: date | None
    anchors: Anchors
    base: Interval | None = None  # the latest absolute date before the phrase

    def origin(self, event: str | None) -> tuple[Interval, bool] | None:
        """What a relative phrase counts from, and whether the phrase itself names it."""
        day = getattr(self.anchors, _EVENTS[event[:3].lower()]) if event and event[:3].lower() in _EVENTS else None
        if not day and self.base:
            return self.base, False
        any_day = day or self.anchors.admission or self.note
        return ((any_day, any_day), day is not None) if any_day else None


Groups = defaultdict[str, str]  # named groups of a match, lower case, "" for what is not there
Meaning = Callable[[Groups, _Known], Resolved | None]


def _moved(base: Interval, length: str, unit: str, sign: int) -> Interval:
    least, most = amount(length)[::sign]
    wide = timedelta(days=_WIDTHS.get(unit, 0) if least == most >= 1 else 0)
    return shift(base[0], sign * least, unit) - wide, shift(base[1], sign * most, unit) + wide


def _third(first: date, after: date, part: str) -> Interval:
    """All days from `first` to before `after`, or the early, middle or late third of them (of years: of months)."""
    days, place = (after - first).days, _THIRDS.get(part)
    if place is None:
        return first, after - DAY
    size, unit = (days // 365 * 4, "month") if days >= 365 else (days / 3, "day")
    start, end = (shift(first, int(size * count), unit) for count in (place, place + 1))
    return start, end - DAY


def _calendar(said: Groups, known: _Known) -> Resolved | None:
    """Of day, month and year whatever is said; a missing year is the latest that is not in the note's future."""
    year, month, day = said["year"], said["month"], said["day"]
    now = known.note.year if known.note else None
    if len(year) != 4 and now is None:
        return None
    if len(year) == 2 and now is not None:
        year = str(now - (now - int(year)) % 100)
    if not month:
        return *_third(date(int(year), 1, 1), date(int(year) + 1, 1, 1), said["part"]), "year"
    number, spans = int(month) if month.isdigit() else MONTHS[month[:3]], []
    for of in (int(year),) if year else range((now or 0) - 8, (now or 0) + 1):  # 29 February: up to eight years back
        try:
            first = date(of, number, int(day or 1))
        except ValueError:
            continue
        if year or (known.note and first <= known.note):
            spans.append((first, first + DAY if day else shift(first, 1, "month")))
    return (*_third(*spans[-1], said["part"]), "day" if day else "month") if spans else None


def _range(said: Groups, known: _Known) -> Resolved | None:
    last = resolve(said["last"], known.note, known.anchors)
    first = resolve(said["from"], last[1], known.anchors) if last else None
    return (first[0], last[1], last[2]) if first and last and first[0] <= last[0] else None


def _decade(said: Groups, known: _Known) -> Resolved | None:
    first = int(said["decade"])
    return *_third(date(first, 1, 1), date(first + 10, 1, 1), said["part"]), "decade"


def _season(said: Groups, known: _Known) -> Resolved | None:
    if not said["year"] and known.note is None:
        return None
    now = known.note.year if known.note else 0
    years = [int(said["year"])] if said["year"] else [now + step for step in range(-2, 2)]
    starts = [date(year, SEASONS[said["season"]], 1) for year in years]
    if known.note and not said["year"]:
        ended = 3 if said["which"] == "last" else 0  # "last summer" is over, "this summer" has begun
        before = [start for start in starts if shift(start, ended, "month") <= known.note]
        starts = [starts[len(before)]] if said["which"] == "next" else before
    return *_third(starts[-1], shift(starts[-1], 3, "month"), ""), "season"


def _near(said: Groups, known: _Known) -> Resolved | None:
    """Last, this or next week, month, year, decade or weekday, by the calendar."""
    if (note := known.note) is None:
        return None
    unit = said["unit"]
    step = {"next": 1, "last": -1, "previous": -1}.get(said["which"], 0)
    if unit in WEEKDAYS:
        behind = (note.weekday() - WEEKDAYS.index(unit)) % 7
        day = note + (7 - behind if step > 0 else -7 if step < 0 and not behind else -behind) * DAY
        return day, day, "day"
    years = note.year // 10 * 10 if unit == "decade" else note.year
    first = {"week": note - note.weekday() * DAY, "month": note.replace(day=1)}.get(unit, date(years, 1, 1))
    return shift(first, step, unit), shift(first, step + 1, unit) - DAY, unit


def _spoken(step: int) -> Meaning:
    return lambda said, known: (known.note + step * DAY, known.note + step * DAY, "day") if known.note else None


def _ago(said: Groups, known: _Known) -> Resolved | None:
    unit, length = UNITS[(said["unit"] or said["many"])[0]], said["length"] if said["unit"] else "2 to 11"
    if known.note is None:
        return None
    least, most = amount(length)
    return *_moved((known.note, known.note), length, unit, -1), unit if least == most else APPROXIMATE


def _past(said: Groups, known: _Known) -> Resolved | None:
    unit = said["many"] or UNITS[said["unit"][0]]
    return (shift(known.note, -amount(said["length"])[1], unit), known.note, APPROXIMATE) if known.note else None


def _relative(said: Groups, known: _Known) -> Resolved | None:
    """So long after or before something, or anywhere in that time for "within"."""
    if (origin := known.origin(said["event"])) is None:
        return None
    base, named = origin
    many, within, sign = said["many"], said["within"], -1 if said["before"] else 1
    unit = UNITS[(many or said["unit"])[0]]
    first, last = _moved(base, "2 to 11" if many and many.endswith("s") else said["length"], unit, sign)
    if within:
        bound = amount(said["length"])[1] * sign
        first, last = sorted((base[0] if sign > 0 else base[1], shift(base[1] if sign > 0 else base[0], bound, unit)))
    return first, last, unit if named and not within and base[0] == base[1] else APPROXIMATE


def _beside(said: Groups, known: _Known) -> Resolved | None:
    """The same day, the next morning, the following week: one step from what was said last."""
    if (origin := known.origin(said["event"])) is None:
        return None
    step = {"same": 0, "prior": -1, "previous": -1}.get(said["which"], 1)
    unit = UNITS.get(said["unit"][0], "day") if said["unit"] != "morning" else "day"
    return shift(origin[0][0], step, unit), shift(origin[0][1], step, unit), "day" if origin[1] else APPROXIMATE


def _counted(said: Groups, known: _Known) -> Resolved | None:
    """Day or week n of a stay or a treatment (its first is 1), or after an operation (its day is 0)."""
    kind, week, number = said["kind"], "w" in said["unit"], int(number_of(said["nth"]))
    event = {"p": "surgery", "h": "hospitalization"}.get(kind[:1], said["event"])
    if (origin := known.origin(event)) is None:
        return None
    steps = (number if kind.startswith("p") or said["after"] else number - 1) * (7 if week else 1)
    if not origin[1] and not known.base and not known.anchors.admission:
        return origin[0][0] - steps * DAY, origin[0][1], APPROXIMATE  # a note reports such days, it announces none
    unit = "week" if week else "day"
    return origin[0][0] + steps * DAY, origin[0][1] + (steps + 6 * week) * DAY, unit if origin[1] else APPROXIMATE


def _age(said: Groups, known: _Known) -> Resolved | None:
    if known.anchors.birth is None:
        return None
    least, most = amount(said["length"])
    unit = UNITS[(said["unit"] or "y")[0]]
    return shift(known.anchors.birth, least, unit), shift(known.anchors.birth, int(most) + 1, unit) - DAY, unit


def _event(said: Groups, known: _Known) -> Resolved | None:
    origin = known.origin(said["event"])
    return (*origin[0], "day" if origin[1] else APPROXIMATE) if origin else None


_ABSOLUTE = (_calendar, _range, _decade, _season)  # what "3 days later" may count from


class _Rule(NamedTuple):
    pattern: re.Pattern[str]
    meaning: Meaning
    running: bool  # also looked for in running text, where "3 months" alone is a duration and 2/6 no day


def _rule(pattern: str, meaning: Meaning, how: str = "") -> _Rule:
    compiled = re.compile(rf"(?<![\w/.,-]){expanded(pattern)}(?!\w)", re.I)
    return _Rule(compiled, meaning, how != "alone")


_RULES = (
    _rule(r"(?:@PART)?@MONTH,?\s(?:of\s)?@YEAR", _calendar),
    _rule(r"@MONTH\s{1,2}@DAY(?:(?:,\s{0,2}|\s)@YEAR)?", _calendar),
    _rule(r"@DAY[\s-](?:of\s)?@MONTH(?:,?[\s-]@SHORT)?", _calendar),
    _rule(r"@YEAR-(?P<month>\d\d?)-(?P<day>\d\d?)(?!-)(?:T[\d:]{5,8}Z?)?", _calendar),
    _rule(r"@MD[/-]@SHORT(?![/-])", _calendar),
    _rule(r"(?:on|since|until)\s@MD(?![/-]|\s?%)", _calendar),
    _rule(r"@MD", _calendar, "alone"),
    _rule(r"(?:@PART)?@YEAR@UNCOUNTED", _calendar),
    _rule(r"@SAID@MONTH", _calendar),
    _rule(r"@PART@MONTH", _calendar),
    _rule(r"@MONTH", _calendar, "alone"),
    _rule(r"(?:between|from)\s(?P<from>\w{3,9}(?:\s\d{4})?)\s(?:and|to)\s(?P<last>\w{3,9}(?:\s\d{4})?)", _range),
    _rule(r"(?:@PART)?(?:the\s)?(?P<decade>(?:19|20|21)\d0)['’]?s", _decade),
    _rule(r"(?P<which>)@SEASON\s(?:of\s)?@YEAR", _season),
    _rule(r"(?P<which>last|this|next)\s@SEASON(?P<year>)", _season),
    _rule(r"(?P<which>last|previous|this|next)\s(?P<unit>week|month|year|decade)", _near),
    _rule(r"(?P<which>last|this|next|on)\s@WEEKDAY", _near),
    _rule(r"today|now|currently|at\s(?:present|the\smoment)|this\s@TIME|tonight", _spoken(0)),
    _rule(r"(?:the\s)?time\s(?:of\swriting(?:\sthis\sreport)?|the\spresent\sreport\swas\swritten)", _spoken(0)),
    _rule(r"yesterday(?:\s@TIME)?|last\s(?:night|evening)", _spoken(-1)),
    _rule(r"(?:the\s)?day\sbefore\syesterday", _spoken(-2)),
    _rule(r"tomorrow", _spoken(1)),
    _rule(r"(?:@LENGTH|(?P<many>(?:year|month|week|day)s))\sago", _ago),
    _rule(r"(?:(?:(?:with)?in|over|during|for)\s)?(?:the\s)?(?:past|last)\s(?:@LENGTH|@MANY)", _past),
    _rule(r"@LENGTH(?:\s(?:@AFTER|@BEFORE)){1,2}@TAIL", _relative),
    _rule(r"@LENGTH[\s-]follow-?up", _relative),
    _rule(r"(?P<many>(?:month|week|day|year)s?)\s@BEFORE@TAIL", _relative),
    _rule(
        r"(?:after|(?P<within>within)|following|(?:at\s)?follow-?up(?:\sat)?)\s(?:(?:at\sleast|about|the|next|first"
        r"|following(?:\sfor)?)\s){0,2}@LENGTH(?:\s(?:later|after|of|@BEFORE)@TAIL)?",
        _relative,
    ),
    _rule(
        r"(?:the\s)?(?P<which>same|following|next|prior|previous)\s(?P<unit>day|week|month|year|morning)"
        r"(?:\s(?:of|as|after)(?:\s@EVENT)?)?",
        _beside,
    ),
    _rule(
        r"(?:(?P<kind>p\.?o\.?d\.?|post-?\s?op(?:erative)?\sday|hd|hospital\sday)|(?P<unit>day|week))\s{0,2}#?\s?"
        r"(?P<nth>\d{1,3}|@WORD)(?!\d|\stimes|[.,]\d)(?:\s(?:(?P<after>after|post|following)|of)@TAIL)?",
        _counted,
    ),
    _rule(
        r"@NTH\s(?P<kind>hospital\s|postoperative\s)?(?P<unit>day|week|morning)"
        r"(?:\s(?:(?P<after>after|following|post(?=-|\s))|of)@TAIL)?",
        _counted,
    ),
    _rule(r"(?:at\s)?(?:the\s)?age\s(?:of\s)?@AMOUNT(?:\s(?P<unit>years?|months?))?", _age),
    _rule(r"@AMOUNT[\s-](?P<unit>years?|months?)[\s-]of\sage", _age),
    _rule(r"@AMOUNT[\s-](?P<unit>years?|months?)[\s-]old", _age, "alone"),
    _rule(r"(?:on|at|upon)\s(?:the\stime\sof\s)?(?P<event>admission|presentation|discharge|surgery)", _event),
    _rule(r"(?:the\s)?(?:day\sof\s(?:the\s)?)?@EVENT", _event, "alone"),
    _rule(r"@LENGTH", _relative, "alone"),
)
_BRACKETS = re.compile(r"\[\*\*([^\]\n]{0,80})\*\*\]")
_BRACKETED = [re.compile(expanded(form)) for form in ("@YEAR-@MD", "@MD", "@YEAR", r"(?P<month>\d\d?)-?/@YEAR")]
_AGED = re.compile(r"(?<!\w)(\d{1,3})[\s-]?(?:years?|yrs?|yo?)(?:[\s-]?old|/o|(?<=yo))(?!\w)", re.I)


def resolve(phrase: str, note_date: date | None, anchors: Anchors = NO_ANCHORS) -> Resolved | None:
    """The first and the last day that a phrase may mean, and how fine it is; None where the grammar does not know it,
    where the day does not exist, and where it counts from something that is not known. Raises nothing.
    """
    phrase, known = " ".join(phrase.split()).strip(" .,;()"), _Known(note_date, anchors)
    if bracket := _BRACKETS.fullmatch(phrase):
        return _bracketed(bracket[1], known)
    lead = _LEAD.match(phrase)
    for said in (phrase, phrase[lead.end() :] if lead else ""):
        for rule in _RULES:
            if said and (match := rule.pattern.fullmatch(said)):
                return _meant(rule.meaning, match, known)
    return None


def find(text: str, note_date: date | None, anchors: Anchors = NO_ANCHORS) -> list[DateMention]:
    """All date phrases of a text in their order; of overlapping ones the longest. Relative ones count from the latest
    absolute date before them. Where no birth is given, it is estimated from the first age in the text. Raises nothing.
    """
    if anchors.birth is None:
        anchors = anchors._replace(birth=birth_of(text, note_date))
    known, taken = _Known(note_date, anchors), bytearray(len(text))
    chosen: list[tuple[int, int, re.Match[str], Meaning | None]] = []
    for match in _BRACKETS.finditer(text):  # what stands for a name may hold digits or a month: none of it is a date
        taken[match.start() : match.end()] = b"\1" * len(match[0])
        chosen.append((*match.span(), match, None))
    matches = [(match, rule) for rule in _RULES if rule.running for match in rule.pattern.finditer(text)]
    for match, rule in sorted(matches, key=lambda found: (found[0].start() - found[0].end(), found[0].start())):
        start, end = match.span()
        if not taken[start] and not taken[end - 1]:
            taken[start:end] = b"\1" * (end - start)
            chosen.append((start, end, match, rule.meaning))
    mentions = []
    for start, end, match, meaning in sorted(chosen, key=lambda found: found[:2]):
        meant = _meant(meaning, match, known) if meaning else _bracketed(match[1], known)
        if meant:
            mentions.append(DateMention(start, end, *meant))
            if meaning is None or meaning in _ABSOLUTE:
                known = known._replace(base=meant[:2])
    return mentions


def birth_of(text: str, note_date: date | None) -> date | None:
    """The middle of the year in which whoever is "28 years old" in a note was born; None without such an age."""
    aged = _AGED.search(text)
    if not aged or not note_date or int(aged[1]) >= min(130, note_date.year - 1):
        return None
    return shift(note_date, -int(aged[1]) - 0.5, "year")


def _bracketed(inside: str, known: _Known) -> Resolved | None:
    matches = [match for form in _BRACKETED if (match := form.fullmatch(inside))]
    return _meant(_calendar, matches[0], known) if matches else None


def _meant(meaning: Meaning, match: re.Match[str], known: _Known) -> Resolved | None:
    said = defaultdict(str, {name: (words or "").lower() for name, words in match.groupdict().items()})
    try:
        return meaning(said, known)
    except (ValueError, OverflowError):  # a day that does not exist, or none that a date can hold
        return None
