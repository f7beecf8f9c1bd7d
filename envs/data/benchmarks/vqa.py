"""VQA accuracy with the answer normalisation of the official evaluation (Antol et al. 2015, Goyal et al. 2017).

Written anew from what the official code does (``vqaEval.py`` of github.com/GT-Vision-Lab/VQA), its peculiarities
included, so that scores agree to the last digit. TextVQA and VizWiz have variants of it, which differ in what is
normalised.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

ARTICLES = frozenset(("a", "an", "the"))
_COUNTED = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
NUMBERS = {"none": "0", **{word: str(value) for value, word in enumerate(_COUNTED)}}
_CONTRACTIONS = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd
    he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've mustn't
    needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've
    somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll
    that's there'd there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've
    weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll
    why're why's won't would've wouldn't wouldn't've y'all y'all'd've y'all'll you'd you'd've you'll you're you've
"""
CONTRACTIONS = _CONTRACTIONS.split()
"""Each is restored where one of its apostrophes is missing. Official entries with a capital (``Im``) never match, for
answers are in lower case by then."""
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'

_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")
_MOST_PERIODS = 32
"""The official code passes a flag where ``re.sub`` takes a count: of a long answer only so many periods go."""


def _restored() -> dict[str, str]:
    """By spelling with one apostrophe missing, the right one."""
    table = {}
    for word in CONTRACTIONS:
        for place, letter in enumerate(word):
            if letter == "'":
                table[word[:place] + word[place + 1 :]] = word
    return table | {"somebody'd": "somebodyd"}  # the wrong way round in the official table


RESTORED = _restored()


def without_punctuation(answer: str) -> str:
    """Punctuation removed where it touches a space, or anywhere in an answer that has a number with a comma;
    replaced by a space elsewhere; periods removed unless a digit follows."""
    number_with_comma = _COMMA_IN_NUMBER.search(answer) is not None
    cleaned = answer
    for mark in PUNCTUATION:
        loose = f"{mark} " in answer or f" {mark}" in answer or number_with_comma
        cleaned = cleaned.replace(mark, "" if loose else " ")
    return _PERIOD.sub("", cleaned, count=_MOST_PERIODS)


def without_articles(answer: str) -> str:
    """Lower case, number words as digits, without articles, contractions with their apostrophes."""
    words = (NUMBERS.get(word, word) for word in answer.lower().split())
    return " ".join(RESTORED.get(word, word) for word in words if word not in ARTICLES)


def normalise_vqa(answer: str) -> str:
    """An answer as the official evaluation compares it."""
    return without_articles(without_punctuation(_one_line(answer)))


def submitted(answer: str) -> str:
    """An answer as the published scripts hand it in, and as TextVQA compares it.

    In lower case, without commas and question marks, with 's on its own, then normalised: ``EvalAIAnswerProcessor`` of
    MMF, which LLaVA's scripts (``convert_vqav2_for_submission.py``) and lmms-eval apply to what the model says.
    """
    spelled = answer.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    return normalise_vqa(spelled)


def leave_one_out(answer: str, accepted: Sequence[str]) -> float:
    """Mean, over leaving one annotator out, of min(matches among the others / 3, 1); 0 where nobody answered."""
    if not accepted:
        return 0.0
    matches = sum(other == answer for other in accepted)
    return sum(min(1.0, (matches - (other == answer)) / 3) for other in accepted) / len(accepted)


def official_vqa_accuracy(answer: str, accepted: Sequence[str]) -> float:
    """VQA accuracy as ``vqaEval.py`` computes it; where all annotators say the same, nothing is normalised.

    Args:
        answer: to be scored.
        accepted: the annotators' answers, ten as a rule.
    """
    given, others = _one_line(answer), [_one_line(other) for other in accepted]
    if len(set(others)) > 1:
        given, others = normalise_vqa(given), [normalise_vqa(other) for other in others]
    return leave_one_out(given, others)


def vqav2_score(answer: str, accepted: Sequence[str]) -> float:
    """The official VQA accuracy of an answer handed in as LLaVA hands it in."""
    return official_vqa_accuracy(submitted(answer), accepted)


def textvqa_score(answer: str, accepted: Sequence[str]) -> float:
    """TextVQA's accuracy (``TextVQAAccuracyEvaluator`` of MMF): annotators' answers are processed like the model's."""
    return leave_one_out(submitted(answer), [submitted(other) for other in accepted])


def vizwiz_score(answer: str, accepted: Sequence[str]) -> float:
    """VizWiz's accuracy (``vqaEval.py`` of the VizWiz API): annotators' answers are compared as they are."""
    return leave_one_out(normalise_vqa(submitted(answer)), accepted)


def _one_line(answer: str) -> str:
    return answer.replace("\n", " ").replace("\t", " ").strip()
