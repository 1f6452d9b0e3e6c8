"""What an answer is worth, as lmms-eval 0.7.3 defines it for each benchmark (tests/score compares with its own functions).

Written anew from the benchmarks' definitions: VQA (Antol et al. 2015) as EvalAI's processor reads answers, ChartQA's relaxed
accuracy (Masry et al. 2022), MME (Fu et al. 2023), MMBench (Liu et al. 2023).
"""

import re
import string
from collections.abc import Mapping, Sequence

_NUMBERS = {
    "none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6", "seven": "7",
    "eight": "8", "nine": "9", "ten": "10",
}  # fmt: skip
_MARKS = ';/[]"{}()=+\\_-><@`,?!'
# Words that VQA spells with their apostrophes where an answer leaves one out.
_SHORTENED = re.compile(r"\S+").findall("""
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's how'd
    how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've o'clock oughtn't
    'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've
    someone'll someone's something'd something'd've something'll that's there'd there'd've there're there's they'd they'd've
    they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's where'd where's where've
    who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd
    you'd've you'll you're you've
""")


def _misspelt(word: str) -> list[str]:
    """A word with one of its apostrophes left out."""
    return [word[:place] + word[place + 1 :] for place, letter in enumerate(word) if letter == "'"]


_CONTRACTIONS = {wrong: word for word in _SHORTENED for wrong in _misspelt(word)} | {"somebody'd": "somebodyd"}
_PHRASES = [
    *(f"{head}answer is" for head in ("", "the ", "correct ", "the correct ", "best ", "the best ", "my ")),
    *(f"{head}option is" for head in ("correct ", "the correct ", "best ", "the best ")),
    *(f"{head}choice is" for head in ("", "the ", "correct ", "the correct ", "my ")),
    *("i choose", "i select", "i pick"),
]


def without_marks(text: str) -> str:
    """VQA's punctuation: a mark beside a blank goes, one between letters becomes a blank; 1,000 loses all of its kind."""
    grouped = re.search(r"(?<=\d),+(?=\d)", text) is not None
    found = text
    for mark in _MARKS:
        found = found.replace(mark, "" if grouped or f"{mark} " in text or f" {mark}" in text else " ")
    return re.sub(r"\.(?!\d)", "", found)


def plain_words(text: str) -> str:
    """Lower case, numbers as digits, no articles, apostrophes where they belong."""
    words = (_NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in ("a", "an", "the"))


def _flat(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def vqa_words(text: str) -> str:
    """An answer as VQAv2 compares it."""
    return plain_words(without_marks(_flat(text)))


def textvqa_words(text: str) -> str:
    """An answer as TextVQA compares it: commas and question marks go first, and 's stands apart."""
    return vqa_words(text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip())


def soft_accuracy(answer: str, references: Sequence[str]) -> float:
    """VQA's: of ten people three must agree, the mean over leaving each of them out in turn. Texts are compared as they are."""
    same, others = sum(answer == reference for reference in references), len(references)
    if not others:
        return 0.0
    return (same * min(1.0, (same - 1) / 3) + (others - same) * min(1.0, same / 3)) / others


def same_text(answer: str, reference: str) -> float:
    """Equal in lower case without ASCII punctuation."""
    gone = str.maketrans("", "", string.punctuation)
    return float(answer.lower().translate(gone) == reference.lower().translate(gone))


def relaxed(answer: str, reference: str) -> float:
    """ChartQA's: a number may be 5 % off, words must be equal but for their case."""
    given, wanted = _number(answer), _number(reference)
    if given is not None and wanted:
        return float(abs(given - wanted) / abs(wanted) <= 0.05)
    return float(answer.lower() == reference.lower())


def _number(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def yes_or_no(answer: str) -> str:
    """MME's reading of an answer: yes, no or other."""
    text = answer.lower().strip().replace(".", "")
    if len(text) == 1:
        return {"y": "yes", "n": "no"}.get(text, "other")
    return next((word for word in ("yes", "no") if word in text[:4]), "other")


def first_letter(answer: str, reference: str) -> float:
    """SEED's: the first letter of the answer, its case aside."""
    return float(answer.strip()[:1].lower() == reference.strip().lower())


def letter_or_option(answer: str, reference: str) -> float:
    """ScienceQA's: the letter alone, or at the beginning as "B. ..."."""
    text = answer.strip()
    begins = len(text) >= 2 and text[0].isupper() and text[1] == "."
    return float(reference.lower() in (text.lower(), text[0].lower() if begins else text.lower()))


def led_by_letter(answer: str, reference: str) -> float:
    """AI2D's: what stands before the first full stop where that is one capital letter, else all of it."""
    found = re.match(r"\s*([A-Z])\.", answer)
    return same_text(found[1] if found else answer, reference)


def pick_letter(answer: str, letters: Sequence[str]) -> str:
    """The option that an answer in words means; "" for none (MMStar, and MMBench's last resort).

    In this order: the letter at the beginning, at the end, behind words such as "the answer is", as (A), A., A:, A), before a
    blank, anywhere; the last place in the answer where several letters stand in that way.
    """
    text = answer.strip()
    for mark in ",.!?;:'\"":
        text = text.strip(mark)
    bare, text = text.strip(), f" {text} "
    if not bare:
        return ""
    if bare[0] in letters and not bare[1:2].isalpha():
        return bare[0]
    if bare[-1] in letters and not bare[-2:-1].isalpha():
        return bare[-1]
    small = text.lower()
    ends = [small.find(phrase) + len(phrase) for phrase in _PHRASES if phrase in small]
    places = [(text.find(letter, end), letter) for end in ends for letter in letters]
    if behind := max((place for place in places if place[0] >= 0), default=None):
        return behind[1]
    for form in ("({})", "{}.", "{}:", "{})", "{} ", "{}"):
        place, letter = max((text.rfind(form.format(letter)), letter) for letter in letters)
        if place >= 0:
            return letter
    return ""


_AROUND = ("{}", "{}.", "{},", "{}:", "{})", "{}).", "({})", "({}).", ":{}", ":{},", ":{}.", ":{})", ":{}).")


def infer_option(answer: str, options: Mapping[str, str]) -> str:
    """MMBench's: the one letter that stands as a word, else the one option whose words the answer has, else `pick_letter`."""
    words = answer.split()
    for form in _AROUND:
        found = [letter for letter in "ABCDE" if form.format(letter) in words]
        if len(found) == 1 and not (form == "{}" and found == ["A"] and len(words) > 3):  # "a" cat is no answer
            return found[0]
    said = [letter for letter, option in options.items() if option.lower() in answer.lower()]
    return said[0] if len(said) == 1 else pick_letter(answer, sorted(options))
