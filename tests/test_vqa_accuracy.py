"""VQA accuracy against hand-made pairs for every rule of the official normalisation."""

import pytest

from maskgym.envs.data.accepted import Accepted
from maskgym.envs.data.benchmarks.vqa import (
    CONTRACTIONS,
    leave_one_out,
    normalise_vqa,
    official_vqa_accuracy,
    submitted,
    textvqa_score,
    vizwiz_score,
    vqav2_score,
)
from maskgym.envs.data.scoring import score

NORMALISED = [
    # lower case and white space
    ("Red", "red"),
    ("  red  ", "red"),
    ("light  blue", "light blue"),
    ("light\nblue", "light blue"),
    ("light\tblue", "light blue"),
    ("\n", ""),
    ("", ""),
    ("ÉCOLE", "école"),
    ("日本", "日本"),
    # articles
    ("a dog", "dog"),
    ("An apple", "apple"),
    ("the the dog", "dog"),
    ("A", ""),
    ("cat and the dog", "cat and dog"),
    ("thea", "thea"),
    ("dog a", "dog"),
    # number words
    ("two", "2"),
    ("None", "0"),
    ("zero", "0"),
    ("ten dogs", "10 dogs"),
    ("eleven", "eleven"),
    ("twenty one", "twenty 1"),
    ("someone", "someone"),
    ("one-two", "1 2"),
    # contractions
    ("dont", "don't"),
    ("don't", "don't"),
    ("Isnt it", "isn't it"),
    ("couldnt've", "couldn't've"),
    ("couldn'tve", "couldn't've"),
    ("couldntve", "couldntve"),
    ("oclock", "o'clock"),
    ("5 oclock", "5 o'clock"),
    ("yall'll", "y'all'll"),
    ("'ow'sat", "'ow's'at"),
    ("twas", "'twas"),
    ("its", "its"),
    ("shes", "shes"),
    ("lets", "lets"),
    ("Im", "im"),
    ("somebody'd", "somebodyd"),
    ("somebodyd", "somebodyd"),
    ("man's", "man's"),
    # periods
    ("yes.", "yes"),
    ("u.s.a.", "usa"),
    ("2.5", "2.5"),
    ("2.", "2"),
    (".5", ".5"),
    ("a.m.", "am"),
    ("...", ""),
    (" . " * 40, " ".join("." * 8)),  # the flag that stands where a count belongs: 32 of 40 go
    # other punctuation
    ("black-white", "black white"),
    ("black - white", "black white"),
    ("black -white", "black white"),
    ("red/green", "red green"),
    ("red/ green/blue", "red greenblue"),
    ("(dog)", "dog"),
    ('"stop"', "stop"),
    ("stop!", "stop"),
    ("what?", "what"),
    ("a_b", "b"),
    ("x@y", "x y"),
    ("[1]", "1"),
    ("{1}", "1"),
    ("1=1", "1 1"),
    ("1+1", "1 1"),
    ("<b>", "b"),
    ("a\\b", "b"),
    ("`dog`", "dog"),
    ("red;blue", "red blue"),
    ("2:50 pm", "2:50 pm"),
    ("50%", "50%"),
    ("$5", "$5"),
    ("#1", "#1"),
    # commas
    ("red,white", "red white"),
    ("red, white", "red white"),
    ("100,978", "100978"),
    ("1,000-ish", "1000ish"),
    ("10, 000", "10 000"),
    ("1,000,000", "1000000"),
    (",", ""),
]


@pytest.mark.parametrize(("answer", "expected"), NORMALISED)
def test_every_rule_of_the_normalisation(answer, expected):
    assert normalise_vqa(answer) == expected
    assert normalise_vqa("other") == "other"


def test_every_contraction_gets_its_apostrophes():
    for word in CONTRACTIONS:
        for place in (place for place, letter in enumerate(word) if letter == "'"):
            assert normalise_vqa(word[:place] + word[place + 1 :]) == word


@pytest.mark.parametrize(
    ("matches", "expected"),
    [
        (0, 0),
        (1, 9 * (1 / 3) / 10),
        (2, (8 * (2 / 3) + 2 * (1 / 3)) / 10),
        (3, (7 * 1 + 3 * (2 / 3)) / 10),
        (4, 1),
        (10, 1),
    ],
)
def test_ten_answers_with_one_left_out(matches, expected):
    accepted = ["cat"] * matches + ["dog"] * (10 - matches)
    assert leave_one_out("cat", accepted) == pytest.approx(expected)
    assert official_vqa_accuracy("cat", accepted) == pytest.approx(expected)


OFFICIAL = [
    # where the annotators differ, both sides are normalised
    ("A dog", ["dog"] * 9 + ["cat"], 1),
    ("dog", ["the dog"] * 9 + ["cat"], 1),
    ("2", ["two"] * 9 + ["3"], 1),
    ("two", ["2"] * 2 + ["Two."] + ["3"] * 7, (7 * 1 + 3 * (2 / 3)) / 10),
    ("dont know", ["don't know"] * 9 + ["no"], 1),
    ("1000", ["1,000"] * 9 + ["no"], 1),
    # where they all say the same, only white space is
    ("yes", ["yes"] * 10, 1),
    (" yes\n", ["yes"] * 10, 1),
    ("Yes", ["yes"] * 10, 0),
    ("yes.", ["yes"] * 10, 0),
    ("two", ["2"] * 10, 0),
    ("the dog", ["the dog"] * 10, 1),
    # empty answers, no answers
    ("", ["yes"] * 10, 0),
    ("", [""] * 10, 1),
    ("the", ["a"] * 5 + ["an"] * 5, 1),
    ("yes", [], 0),
    ("yes", ["yes"], 0),
]


@pytest.mark.parametrize(("answer", "accepted", "expected"), OFFICIAL)
def test_the_official_accuracy(answer, accepted, expected):
    assert official_vqa_accuracy(answer, accepted) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("Yes.", "yes"),
        ("Red, white", "red white"),
        ("red,white", "redwhite"),
        ("1,000", "1000"),
        ("1,000-ish", "1000 ish"),
        ("what?no", "whatno"),
        ("The man's hat", "man 's hat"),
        ("That's", "that 's"),
        ("Don't know", "don't know"),
    ],
)
def test_answers_are_handed_in_as_published_scripts_do(answer, expected):
    assert submitted(answer) == expected


def test_the_three_variants_differ_in_what_they_normalise():
    said, mixed = "The Dog.", ["the dog"] * 9 + ["cat"]
    assert vqav2_score(said, mixed) == textvqa_score(said, mixed) == 1
    assert vizwiz_score(said, mixed) == 0, "VizWiz's annotators are taken by the letter"
    assert vqav2_score("Yes.", ["yes"] * 10) == 1, "handed in as yes"
    assert vqav2_score("dog", ["the dog"] * 10) == 0 and textvqa_score("dog", ["the dog"] * 10) == 1
    hats = ["man's hat"] * 9 + ["cat"]
    assert vqav2_score("man's hat", hats) == 0 and textvqa_score("man's hat", hats) == 1
    assert score("The Dog.", Accepted(mixed, "vizwiz")) == 0 and score("The Dog.", Accepted(mixed, "textvqa")) == 1
