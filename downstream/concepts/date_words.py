"""The words of date phrases: numbers, months, units, and the pieces that the patterns of dates.py are made of."""

from __future__ import annotations

import calendar
import re
from datetime import date, timedelta

_ONES = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen"
_ONES += " eighteen nineteen twenty thirty forty fifty sixty"
_NTHS = "first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth thirteenth fourteenth"
_NUMBERS = dict(zip(_ONES.split(), [*range(1, 21), 30, 40, 50, 60], strict=True))
_NUMBERS |= {word: place for place, word in enumerate(_NTHS.split(), 1)}
_VAGUE = {"couple": (2.0, 3.0), "few": (2.0, 5.0), "several": (3.0, 7.0)}
MONTHS = {name.lower(): place for place, name in enumerate(calendar.month_abbr) if name}
SEASONS = {"spring": 3, "summer": 6, "autumn": 9, "fall": 9, "winter": 12}  # first month, northern hemisphere
UNITS = {"y": "year", "m": "month", "w": "week", "d": "day", "h": "hour"}
WEEKDAYS = [name.lower() for name in calendar.day_name]

_PIECES = {
    "WORD": f"(?:{'|'.join(_ONES.split())})(?:[\\s-](?:{'|'.join(_ONES.split()[:9])}))?",
    "NUM": r"(?:\d{1,3}(?:\.\d{1,2})?½?|½|@WORD|half\san?|an?\scouple\sof|an?\sfew|few|several|an?)",
    "AMOUNT": r"(?P<length>@NUM(?:,?\s?(?:,|and|to|or|–|-)\s?(?:a\shalf|@NUM)){0,4})",
    "LENGTH": r"@AMOUNT(?:(?<=[\d½])|(?<=\w)[\s-])[\s-]{0,2}"
    r"(?P<unit>(?:years?|yrs?|months?|mos?|weeks?|wks?|days?|hours?|hrs?|[hd])(?![a-z]))",
    "MANY": r"(?P<many>year|month|week|decade)",
    "MONTH": r"(?P<month>(?:jan(?:uary)?|feb(?:ruary)?|mar(?:ch)?|apr(?:il)?|may|june?|july?|aug(?:ust)?"
    r"|sept?(?:ember)?|oct(?:ober)?|nov(?:ember)?|dec(?:ember)?)(?![a-z]))\.?",
    "YEAR": r"(?P<year>(?:19|20|21)\d\d)(?!\d)",
    "SHORT": r"(?P<year>(?:19|20|21)?\d\d)(?!\d)",
    "DAY": r"(?P<day>[0-3]?\d)(?:st|nd|rd|th)?(?!\d)",
    "MD": r"(?P<month>[01]?\d)[/-](?P<day>[0-3]?\d)",
    "PART": r"(?P<part>early|mid|middle|late|beginning|start|end)(?:\s(?:of|in))?(?:\sthe)?[\s-]{1,2}",
    "NTH": rf"(?P<nth>\d{{1,3}}(?:st|nd|rd|th)|{_NTHS.replace(' ', '|')})",
    "EVENT": r"(?P<event>admission|hospitali[sz]ation|presentation|discharge|surgery|operation|procedure|treatment"
    r"|therapy|radiotherapy|chemotherapy|onset|diagnosis|recovery|visit)(?![a-z])",
    "TAIL": r"(?:\s(?:[\w-]{1,20}\s){0,3}?(?:\w{1,8}-)?@EVENT(?:\swas\sstarted|\sof(?:\s\w{1,20}){1,2})?)?",
    "AFTER": r"(?:later|after(?:wards?)?|following|thereafter|from|post[\w-]{0,12}|follow-?up)",
    "BEFORE": r"(?P<before>prior?|before(?:hand)?|earlier|previously|preceding)",
    "SAID": r"(?:(?<=\bon\s)|(?<=\bin\s)|(?<=\bof\s)|(?<=\bsince\s)|(?<=\bfrom\s)|(?<=\buntil\s))",
    "SEASON": f"(?P<season>{'|'.join(SEASONS)})",
    "WEEKDAY": f"(?P<unit>{'|'.join(WEEKDAYS)})",
    "TIME": "(?:morning|afternoon|evening|night)",
    # 2,000 mL, 2010 cells and 2015/min are no years
    "UNCOUNTED": r"(?!\s?(?:m?mol|[mµμnpk]?g|[mdµμ]?l|cc|k?cal|cells?|units?|iu|mm|cm|hz|db)\b)(?!\s?[%/×+]|[.,:-]\d)",
}


def expanded(pattern: str) -> str:
    """A pattern with its @PIECES written out."""
    while "@" in pattern:
        pattern = re.sub(r"@([A-Z]+)", lambda piece: _PIECES[piece[1]], pattern)
    return pattern


def amount(text: str) -> tuple[float, float]:
    """The least and the most of "3", "a few", "two and a half", "1, 3 and 6"; "" is one."""
    for word, span in _VAGUE.items():
        if word in text:
            return span
    if re.fullmatch(r"½|half\san?", text):
        return 0.5, 0.5
    half = 0.5 if re.search(r"½|and\sa\shalf", text) else 0.0
    said = re.findall(expanded(r"\d{1,3}(?:\.\d{1,2})?|@WORD|\ban?\b"), re.sub(r"½|and\sa\shalf", "", text))
    numbers = [half + number_of(word) for word in said] or [1.0]
    return min(numbers), max(numbers)


def number_of(word: str) -> float:
    """Of "3", "3rd", "twenty-two"; a word that is no number is one."""
    if digits := re.match(r"\d+(?:\.\d+)?", word):
        return float(digits[0])
    return float(sum(_NUMBERS.get(part, 1) for part in re.split(r"[\s-]", word)))


def shift(day: date, count: float, unit: str) -> date:
    """The day so many units later, by the calendar. Raises ValueError, OverflowError where no date can hold it."""
    if unit in ("day", "week", "hour"):
        return day + timedelta(days=round(count * {"day": 1, "week": 7, "hour": 1 / 24}[unit]))
    whole = count * {"month": 1, "year": 12, "decade": 120}[unit]
    year, month = divmod(day.year * 12 + day.month - 1 + int(whole // 1), 12)
    moved = date(year, month + 1, min(day.day, calendar.monthrange(year, month + 1)[1]))
    return moved + timedelta(days=round(whole % 1 * 30))
