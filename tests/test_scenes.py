"""scenes: deterministic, balanced, true to its pictures, and cached whole or not at all."""

import io
import re
from collections import Counter, defaultdict

import datasets
import numpy as np
import pytest
from PIL import Image

from maskgym.backbones import InputError
from maskgym.envs import load_queries
from maskgym.envs.data.scene_questions import APART, ASKERS, COLORS, SHAPES, SIDES
from maskgym.envs.data.scenes import PALETTE, QUESTIONS, RADII, draw_objects, generate, render

ROWS = 150


@pytest.fixture(scope="module")
def rows():
    return list(generate("train", 64, ROWS, 0))


@pytest.mark.slow
def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(rows):
    assert list(generate("train", 64, ROWS, 0)) == rows
    other = list(generate("train", 64, ROWS, 1))
    assert all(one["image"] != two["image"] for one, two in zip(rows[::8], other[::8], strict=True))


@pytest.mark.slow
def test_splits_share_no_image(rows):
    splits = [rows, *(list(generate(split, 64, ROWS, 0)) for split in ("validation", "test"))]
    images = [{row["image"]["bytes"] for row in split} for split in splits]
    assert [len(own) for own in images] == [ROWS] * 3
    assert len(set.union(*images)) == 3 * ROWS


def test_every_image_has_different_questions_of_many_kinds(rows):
    for start in range(0, len(rows), QUESTIONS):
        own = rows[start : start + QUESTIONS]
        assert len({row["question"] for row in own}) == QUESTIONS and len({row["type"] for row in own}) >= 3
        assert max(Counter(row["type"] for row in own).values()) <= 3
    counts = Counter(row["type"] for row in rows)
    assert set(counts) == set(ASKERS) and min(counts.values()) > 0.7 * len(rows) / len(ASKERS)


def test_a_question_alone_says_little(rows):
    """The best answer to each template, learnt on one half, is right on at most 45 % of the other."""

    def template(question):
        return re.sub("|".join(COLORS), "C", re.sub("|".join(SHAPES), "S", question))

    seen = defaultdict(Counter)
    half = len(rows) // 2
    for row in rows[:half]:
        seen[template(row["question"])][row["answers"][0]] += 1
    right = [seen[template(row["question"])].most_common(1)[0][0] == row["answers"][0] for row in rows[half:]]
    assert np.mean(right) <= 0.45
    for counts in seen.values():
        if sum(counts.values()) >= 60 and set(counts) == {"yes", "no"}:
            assert abs(counts["yes"] - counts["no"]) <= 2


def scenes_by_hand(count=60):
    for number in range(count):
        yield draw_objects(np.random.default_rng((7, number)))


def test_objects_neither_overlap_nor_leave_the_image():
    for objects in scenes_by_hand():
        assert 3 <= len(objects) <= 6
        for place, o in enumerate(objects):
            assert RADII[o.size] < min(o.x, o.y, 1 - o.x, 1 - o.y)
            for other in objects[place + 1 :]:
                assert max(abs(o.x - other.x), abs(o.y - other.y)) > RADII[o.size] + RADII[other.size]


def test_pictures_show_the_objects():
    for number, objects in enumerate(scenes_by_hand()):
        pixels = np.array(render(objects, 64, np.random.default_rng(number))).astype(float)
        for o in objects:
            x, y = int(64 * o.x), int(64 * o.y)
            centre = np.median(pixels[y - 1 : y + 2, x - 1 : x + 2].reshape(-1, 3), axis=0)
            nearest = min(PALETTE, key=lambda name: np.abs(np.array(PALETTE[name]) - centre).sum())
            assert nearest == o.color


def test_larger_images_show_the_same_scene():
    small, large = (next(generate("test", size, 1, 3)) for size in (64, 128))
    images = [Image.open(io.BytesIO(row["image"]["bytes"])) for row in (small, large)]
    assert [image.size for image in images] == [(64, 64), (128, 128)]
    assert small["question"] == large["question"]


def answer_by_hand(objects, question, apart=APART):
    """Answers read off the scene by a parser that shares no code with the questions' maker."""
    words = question.rstrip("?").split()

    def find(color, shape):
        found = [o for o in objects if o.color == color and o.shape == shape]
        assert len(found) == 1
        return found[0]

    if question.startswith("is there a"):
        return "yes" if any([o.color, o.shape] == words[3:5] for o in objects) else "no"
    if question.startswith("how many"):
        value = words[2].removesuffix("s") if words[2].removesuffix("s") in SHAPES else words[2]
        return str(sum(value in (o.shape, o.color) for o in objects))
    if question.startswith("are there more"):
        first, second = (sum(o.shape == words[place][:-1] for o in objects) for place in (3, 5))
        return "yes" if first > second else "no"
    if "larger" in question:
        sizes = [find(*words[place : place + 2]).size for place in (2, 7)]
        return "yes" if sizes == ["large", "small"] else "no"
    place = {"left of": ("x", -1), "right of": ("x", 1), "above": ("y", -1), "below": ("y", 1)}
    for side in SIDES:
        if f" {side} the " in question:
            axis, sign = place[side]
            anchor = find(*words[-2:])
            if question.startswith("is the"):
                return "yes" if sign * (getattr(find(*words[2:4]), axis) - getattr(anchor, axis)) > 0 else "no"
            beyond = [o for o in objects if sign * (getattr(o, axis) - getattr(anchor, axis)) >= apart]
            assert len(beyond) == 1
            return getattr(beyond[0], words[1])
    if words[1] == "size":
        return find(*words[-2:]).size
    (only,) = [o for o in objects if (o.shape if words[1] == "color" else o.color) in words[3:]]
    return getattr(only, words[1])


def test_answers_follow_from_the_scene():
    checked = Counter()
    for objects in scenes_by_hand():
        for kind, asker in ASKERS.items():
            for question in asker(objects):
                assert question.answer == answer_by_hand(objects, question.text), (question, objects)
                assert set(question.about) <= set(objects) and question.about
                checked[kind] += 1
    assert min(checked.values()) > 100


def test_patches_cover_what_the_question_is_about(rows):
    for row in rows[:200]:
        assert row["patches"] == sorted(set(row["patches"])) and set(row["patches"]) <= set(range(64))
    sizes = {kind: np.mean([len(row["patches"]) for row in rows if row["type"] == kind]) for kind in ASKERS}
    assert sizes["attribute"] < sizes["relation"] < sizes["compare"] * 2


def test_scenes_load_as_queries_with_options(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    queries = load_queries("scenes:size=32,images=3,seed=5", "validation")
    assert len(queries) == 24 and queries[0].image.size == (32, 32) and queries.name == "scenes:size=32,images=3,seed=5"
    assert len(queries.by_image()) == 3
    both = load_queries("scenes:images=3+easy-vqa", "test")
    assert len(both) == 24 + 9673 and both[23].id.startswith("test-2-") and both.text(24)[0] == "test-0"


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ("scenes:size=8", "size must be at least 32"),
        ("scenes:images=0", "images 1"),
        ("scenes:colors=3", "no option 'colors=3'; its options are whole numbers for size, images, seed"),
        ("scenes:size=big", "no option 'size=big'"),
        ("easy-vqa:size=3", "'easy-vqa' has no option 'size=3'; it has no options"),
        ("scenes+nothing", "unknown data 'nothing'"),
    ],
)
def test_bad_options_are_named(data, words):
    with pytest.raises(InputError, match=words):
        load_queries(data, "test")


def test_a_broken_off_cache_is_not_taken_for_a_whole_one(monkeypatch, tmp_path):
    import maskgym.envs.data.scenes

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)

    def full_disk(**options):
        yield from list(generate("test", 32, 2, 0))[:9]
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(InputError, match=r"could not be cached in .* make room there"):
        patch.setattr(maskgym.envs.data.scenes, "generate", full_disk)
        load_queries("scenes:size=32,images=2", "test")
    assert len(load_queries("scenes:size=32,images=2", "test")) == 16
