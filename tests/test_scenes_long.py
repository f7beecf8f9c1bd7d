"""scenes-long: deterministic, balanced, each answer the only right one, and made fast enough to train on."""

import hashlib
import io
import math
import re
from collections import Counter, defaultdict

import datasets
import numpy as np
import pytest
from PIL import Image

from maskgym.backbones import InputError
from maskgym.envs import load_queries
from maskgym.envs.data import scenes, scenes_long
from maskgym.envs.data.scene_questions import COLORS, SHAPES
from maskgym.envs.data.scene_sentences import CLEAR, SENTENCE_ASKERS
from maskgym.envs.data.scenes_long import LAYOUT, SHORT_ASKERS, ask, scene
from tests.pages import ROOT
from tests.test_scenes import answer_by_hand

KINDS = {**SHORT_ASKERS, **SENTENCE_ASKERS}


def crowds(count=60, seed=7):
    """Scenes without pictures, each with its generator."""
    for number in range(count):
        rng = np.random.default_rng((seed, number))
        yield scenes.draw_objects(rng, LAYOUT), rng


@pytest.fixture(scope="module")
def asked():
    """The questions of 300 scenes, half of each scene short."""
    counts = Counter()
    return [question for objects, rng in crowds(300) for question in ask(objects, counts, rng)]


@pytest.mark.parametrize(
    ("made", "texts", "pixels"),
    [
        (scenes, "9aa520ab9554cac8", "80a1823ca7498c6b"),
        (scenes_long, "2e9a80cf4eb56edc", "2ce30d031fe8f4af"),
    ],
    ids=["scenes", "scenes-long"],
)
def test_the_same_seed_gives_the_same_texts_and_pixels(made, texts, pixels):
    """What these versions have always given; whoever changes it raises the data's VERSION."""
    rows = list(made.generate("test", 64, 12, 0))
    said = [[value for column, value in row.items() if column != "image"] for row in rows]
    shown = [Image.open(io.BytesIO(row["image"]["bytes"])).tobytes() for row in rows[::8]]
    assert hashlib.sha256(repr(said).encode()).hexdigest()[:16] == texts
    assert hashlib.sha256(b"".join(shown)).hexdigest()[:16] == pixels


def test_splits_and_seeds_share_no_image():
    parts = [
        scenes_long.generate(*which) for which in (("train", 64, 20, 0), ("test", 64, 20, 0), ("train", 64, 20, 1))
    ]
    images = [{row["image"]["bytes"] for row in part} for part in parts]
    assert [len(own) for own in images] == [20] * 3 and len(set.union(*images)) == 60


def test_half_of_a_scenes_questions_are_short(asked):
    for start in range(0, len(asked), 8):
        own = asked[start : start + 8]
        assert len({question.text for question in own}) == 8
        assert [question.kind in SHORT_ASKERS for question in own] == [True] * 4 + [False] * 4
    counts = Counter(question.kind for question in asked)
    for askers in (SHORT_ASKERS, SENTENCE_ASKERS):
        even = len(asked) / 2 / len(askers)
        assert all(abs(counts[kind] - even) < 0.05 * even for kind in askers)


def guessed(questions):
    """By kind, how often the best answer to each template, learnt on one half, is right on the other; the names in a
    question stand for themselves in its answer."""

    def filled(question):
        text, answer = question.text, question.answer
        for place, word in enumerate(re.findall("|".join([*COLORS, *SHAPES]), text)):
            text, answer = text.replace(word, f"N{place}", 1), answer.replace(word, f"N{place}")
        return text, answer

    seen, right = defaultdict(Counter), defaultdict(list)
    half = len(questions) // 2
    for text, answer in map(filled, questions[:half]):
        seen[text][answer] += 1
    for question in questions[half:]:
        text, answer = filled(question)
        right[question.kind in SHORT_ASKERS].append(text in seen and seen[text].most_common(1)[0][0] == answer)
    return {"short": np.mean(right[True]), "long": np.mean(right[False])}


def test_a_question_alone_says_little(asked):
    found = guessed(asked)
    assert found["short"] <= 0.45 and found["long"] <= 0.05


def test_questions_picked_blindly_would_say_more():
    """The null of the test above: it is the balance that keeps guesses down, not the scenes."""
    blind = []
    for objects, rng in crowds(300):
        for askers in (SHORT_ASKERS, SENTENCE_ASKERS):
            possible = [question for asker in askers.values() for question in asker(objects)]
            blind += [possible[place] for place in rng.integers(len(possible), size=4)]
    found = guessed(blind)
    assert found["short"] > 0.5 and found["long"] > 0.1


def test_objects_are_many_apart_and_of_two_clear_sizes():
    numbers = Counter()
    for objects, _ in crowds():
        numbers[len(objects)] += 1
        for place, o in enumerate(objects):
            assert LAYOUT.radii[o.size] < min(o.x, o.y, 1 - o.x, 1 - o.y)
            for other in objects[place + 1 :]:
                apart = max(abs(o.x - other.x), abs(o.y - other.y)) - LAYOUT.radii[o.size] - LAYOUT.radii[other.size]
                assert apart > 2 / 128  # two pixels of background
    assert set(numbers) == set(range(6, 13))


def test_pictures_show_colors_and_sizes():
    for number in range(20):
        objects, picture = scene(np.random.default_rng(number))
        pixels = np.array(picture).astype(float)
        assert pixels.shape == (128, 128, 3)
        for o in objects:
            x, y = int(128 * o.x), int(128 * o.y)
            centre = np.median(pixels[y - 1 : y + 2, x - 1 : x + 2].reshape(-1, 3), axis=0)
            nearest = min(scenes.PALETTE, key=lambda name: np.abs(np.array(scenes.PALETTE[name]) - centre).sum())
            assert nearest == o.color
            column = pixels[max(0, y - 8) : y + 9, x]  # through its middle, ending before any other
            height = (np.abs(column - centre).sum(1) < 120).sum()
            assert height >= 15 if o.size == "large" else height <= 14


ORDER = {"left to right": "x", "top to bottom": "y"}
SIDES = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}


def sentence_by_hand(objects, question):
    """Long answers, read off the scene by a parser that shares no code with the questions' maker. Where the scene says
    several things are right, or nearly, it fails."""
    words = question.rstrip("?.").split()

    def one(color, shape):
        (found,) = [o for o in objects if (o.color, o.shape) == (color, shape)]
        return found

    def some(word):
        single = word.removesuffix("s")
        return [o for o in objects if word in (o.color, o.size) or single == o.shape]

    def nearest(o):
        far = sorted((math.dist((o.x, o.y), (other.x, other.y)), at) for at, other in enumerate(objects) if other != o)
        assert far[1][0] - far[0][0] >= CLEAR
        return objects[far[0][1]]

    def whole(o):
        return f"a {o.size} {o.color} {o.shape}"

    if words[0] == "list":
        order = " ".join(words[-3:])
        of = words[words.index("of") + 2] if "of" in words else words[2]
        group = sorted(some(of), key=lambda o: getattr(o, ORDER[order]))
        assert 2 <= len(group) <= 6 and min(np.diff([getattr(o, ORDER[order]) for o in group])) >= CLEAR
        tell = {"colors": "{0.color}", "shapes": "{0.shape}"}.get(words[2], "{0.color} {0.shape}")
        return ", ".join(tell.format(o) for o in group)
    if words[0] == "describe":
        o = one(*words[2:4])
        other = nearest(o)
        assert one(other.color, other.shape) is other
        reach = {side: (o.x - other.x) * x + (o.y - other.y) * y for side, (x, y) in SIDES.items()}
        best, second = sorted(reach, key=reach.get)[:-3:-1]
        assert reach[best] - reach[second] >= CLEAR
        return f"{whole(o)} {best} the {other.color} {other.shape}"
    if words[:2] == ["what", "is"]:
        anchor = one(*words[-2:])
        if words[2] == "nearest":
            return whole(nearest(anchor))
        x, y = SIDES[" ".join(words[2:-3])]
        reach = [(o.x - anchor.x) * x + (o.y - anchor.y) * y for o in objects if o != anchor]
        assert min(map(abs, reach)) >= CLEAR
        (only,) = [o for o in objects if o != anchor and (o.x - anchor.x) * x + (o.y - anchor.y) * y > 0]
        return whole(only)
    if words[:2] == ["how", "many"]:
        group = objects if words[2] == "things" else some(words[2])
        by = words[words.index("each") + 1]
        counts = {value: sum(value in (o.color, o.shape) for o in group) for value in (COLORS, SHAPES)[by == "shape"]}
        plural = {value: "s" * (by == "shape" and number > 1) for value, number in counts.items()}
        *first, last = [f"{number} {value}{plural[value]}" for value, number in counts.items() if number]
        return f"{', '.join(first)} and {last}"
    if words[:3] == ["are", "there", "more"]:
        one_kind, other_kind = re.fullmatch(r"are there more (.*) than (.*), and why\?", question).groups()
        numbers = [len(some(kind.split()[0])) for kind in (one_kind, other_kind)]
        said = [f"{n} {kind if n != 1 else kind[:-1]}" for n, kind in zip(numbers, (one_kind, other_kind), strict=True)]
        more = "yes" if numbers[0] > numbers[1] else "no"
        return f"{more}, because there {'is' if numbers[0] == 1 else 'are'} {said[0]} and {said[1]}"
    a, b = one(*words[2:4]), one(words[7], words[8].rstrip(","))
    if a.size == b.size:
        return f"no, because both are {a.size}"
    reason = f"the {a.color} {a.shape} is {a.size} and the {b.color} {b.shape} is {b.size}"
    return f"{'yes' if a.size == 'large' else 'no'}, because {reason}"


def test_every_answer_is_the_one_that_the_scene_gives():
    checked = Counter()
    for objects, _ in crowds():
        texts = {}
        for kind, asker in KINDS.items():
            for question in asker(objects):
                by_hand = answer_by_hand(objects, question.text, CLEAR) if kind in SHORT_ASKERS else None
                assert question.answer == (by_hand or sentence_by_hand(objects, question.text)), (question, objects)
                assert question.kind == kind and question.about and set(question.about) <= set(objects)
                assert texts.setdefault(question.text, question.answer) == question.answer
                checked[question.template if kind not in SHORT_ASKERS else kind] += 1
    kinds = Counter(template.split()[0] for template in checked if template not in SHORT_ASKERS)
    assert set(kinds) == {"list", "describe", "what", "how", "are", "is"}
    assert set(SHORT_ASKERS) <= set(checked)


def test_long_answers_have_three_to_twenty_five_tokens(asked):
    """As a byte-pair vocabulary like SmolLM2's splits them: a word or comma is one, a digit and its space are two."""
    lengths = [
        sum(2 if piece.isdigit() else 1 for piece in re.findall(r"\w+|,", question.answer))
        for question in asked
        if question.kind in SENTENCE_ASKERS
    ]
    assert min(lengths) >= 3 and max(lengths) <= 25 and 8 < np.mean(lengths) < 12


def test_one_scene_can_be_asked_many_questions():
    for objects, rng in crowds(10):
        many = ask(objects, counts := Counter(), rng, 24)
        assert len({question.text for question in many}) == 24
        assert sum(question.kind in SHORT_ASKERS for question in many) == 12
        assert sum(counts[kind] for kind in KINDS) == 24


def test_the_page_shows_what_is_made():
    page = (ROOT / "docs" / "data.md").read_text()
    rows = list(scenes_long.generate("test", 64, 10, 0))[-8:]
    assert all(f"| {row['type']} | {row['question']} | {row['answers'][0]} |" in page for row in rows)


def test_streams_draw_no_image_of_a_split():
    """The null: seeded by fewer numbers they may."""

    def objects_of(*seed):
        return scene(np.random.default_rng(seed), 64)[0]

    image = 0, list(scenes_long.SPLITS).index("test"), 0  # seed, split and number of the image
    assert objects_of(*image[:2]) == objects_of(*image) != objects_of(*image, 1)


def test_they_load_as_queries_with_options(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    queries = load_queries("scenes-long:images=3", "validation")
    assert len(queries) == 24 and queries[0].image.size == (128, 128) and len(queries.by_image()) == 3
    assert set(queries.kinds) <= set(KINDS) and len(set(queries.kinds)) > 6
    assert all(patches and set(patches) <= set(range(64)) for patches in queries.patches)
    rows = list(scenes_long.generate("validation", 128, 3, 0))
    assert [queries.text(number)[1:] for number in range(24)] == [(r["question"], tuple(r["answers"])) for r in rows]
    with pytest.raises(InputError, match=r"scenes-long of size=32, .* size must be at least 64"):
        load_queries("scenes-long:size=32", "test")
