"""What a free text says where a benchmark expects one of a few answers, by each one's official rules."""

from __future__ import annotations

import re
from collections.abc import Sequence
from string import ascii_uppercase


def exact(answer: str) -> str:
    """As LLaVA's ``convert_gqa_for_eval.py`` hands GQA's answers in: lower case, no full stop at the end."""
    return answer.strip().rstrip(".").lower()


def pope_says(answer: str) -> str:
    """``yes`` or ``no``: whatever lacks no, No and not in its first sentence is a yes (``evaluate.py`` of POPE)."""
    words = answer.strip().split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "not", "no"} & set(words) else "yes"


def mme_says(answer: str) -> str:
    """``yes``, ``no`` or ``other``, by the first four characters (``calculation.py`` of MME's evaluation tool)."""
    start = answer.strip().lower()[:4]
    return "yes" if "yes" in start else "no" if "no" in start else "other"


_LETTER = re.compile(r"([A-E])(\.?$|\. )")
_THE_ANSWER = re.compile(r"The answer is ([A-E])")


def scienceqa_says(answer: str) -> str:
    """The letter, or an empty text: alone, in front of ``. ``, or after ``The answer is`` (``eval_science_qa.py`` of
    LLaVA); a letter with its full stop counts too, as in lmms-eval."""
    text = answer.strip().replace("\n", ". ")
    found = _LETTER.match(text) or _THE_ANSWER.search(text)
    return found.group(1) if found else ""


def mmbench_says(answer: str, choices: Sequence[str]) -> str:
    """The letter, or an empty text, by the rules that VLMEvalKit (``matching_util.py``) tries before it asks a judge
    model: the only option's letter among the words, else the only option whose text the answer holds.

    Args:
        answer: what was said.
        choices: the options' texts.
    """
    letters = ascii_uppercase[: len(choices)]
    words = "".join(" " if mark in ".()[],:;!*#{}" else mark for mark in answer).split()
    named = {word for word in words if word in letters and len(word) == 1}
    if len(named) == 1 and not ("A" in named and len(words) > 3):  # an article
        return named.pop()
    said = answer.lower()
    if len(said) > 2 * sum(map(len, choices)):
        return ""
    held = [letter for letter, text in zip(letters, choices, strict=True) if text.lower() in said]
    return held[0] if len(held) == 1 and said.strip() else ""
