"""Each benchmark from its official files: what is asked, and scores equal to hand-computed ones."""

import json
from pathlib import Path

import datasets
import numpy as np
import pytest

from maskgym.backbones import InputError
from maskgym.envs import load_queries
from maskgym.envs.data.answer_length import answer_cut
from maskgym.envs.data.benchmarks import reading
from maskgym.envs.data.benchmarks.metrics import MME_SUBTASKS
from maskgym.envs.data.benchmarks.parsing import exact, mmbench_says, mme_says, pope_says, scienceqa_says
from maskgym.envs.data.scoring import reference, score
from tests import benchmark_files
from tests.benchmark_files import picture

SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def load(tmp_path):
    """Loads a made-up benchmark by name, with options."""

    def loaded(name, split="test", options=""):
        root = tmp_path / name
        if not root.exists():
            getattr(benchmark_files, name)(root)
        return load_queries(f"{name}:root={root}{options}", split)

    return loaded


def scored(queries, texts):
    """The scores of some answers, and those of the data set."""
    scores = np.array([score(text, queries.text(number)[2]) for number, text in enumerate(texts)])
    return scores.tolist(), queries.metrics(range(len(queries)), texts, scores)


def test_vqav2(load):
    queries = load("vqav2", "validation")
    assert queries.text(0)[:2] == ("262148000", "Where is he looking?" + SHORT) and len(queries.text(0)[2]) == 10
    assert queries.image_key(0) == queries.image_key(1) != queries.image_key(2)
    assert queries[0].image.getpixel((0, 0))[0] > 200 and queries[2].image.getpixel((0, 0))[2] > 200
    assert [reference(queries.text(number)[2]) for number in range(3)] == ["down", "3", "yes"]
    scores, metrics = scored(queries, ["At table.", "two", "Yes"])
    # one of ten: 9 x 1/3; "two" and "2" are one answer: six of ten; handed in as "yes"
    assert scores == pytest.approx([0.3, 1, 1])
    assert metrics == {
        "other": {"accuracy": pytest.approx(0.3)},
        "number": {"accuracy": 1},
        "yes/no": {"accuracy": 1},
        "all": {"accuracy": pytest.approx(2.3 / 3)},
    }


def test_vqav2_files_may_be_in_different_orders(load, tmp_path):
    first = [load("vqav2").text(number) for number in range(3)]
    file = tmp_path / "vqav2" / "v2_mscoco_val2014_annotations.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps({**content, "annotations": content["annotations"][::-1]}))
    assert sorted(load("vqav2").text(number) for number in range(3)) == sorted(first)
    file.write_text(json.dumps({**content, "annotations": content["annotations"][1:]}))
    with pytest.raises(InputError, match="question 262148000 and 0 more are in one of v2_OpenEnded"):
        load("vqav2")


def test_gqa(load):
    queries = load("gqa")
    assert queries.text(1) == ("201307252", "What color is the bed?" + SHORT, ("white",))
    scores, metrics = scored(queries, ["No.", "White", "a comforter"])
    assert scores == [1, 1, 0]
    assert metrics == {"verify": {"accuracy": 1}, "query": {"accuracy": 0.5}, "all": {"accuracy": pytest.approx(2 / 3)}}


def test_textvqa_with_and_without_what_was_read(load):
    plain, read = load("textvqa"), load("textvqa", options=",ocr=true")
    assert plain.text(0)[1] == "What is the brand of this camera?" + SHORT
    assert read.text(0)[1] == "What is the brand of this camera?\nReference OCR token: DAKOTA, DIGITAL, é" + SHORT, (
        "the question as lmms-eval spells it, the tokens as LLaVA does"
    )
    # six are dakota; two dakota digital: (8 x 2/3 + 2 x 1/3) / 10; annotators' answers are processed too
    assert [score(said, plain.text(0)[2]) for said in ("Dakota", "dakota digital", "Dakota's")] == pytest.approx(
        [1, 0.6, 0.3]
    )
    assert plain.kinds is None and scored(plain, ["Dakota"])[1] == {"all": {"accuracy": 1}}


def test_vizwiz(load):
    queries = load("vizwiz")
    prompt = "\nWhen the provided information is insufficient, respond with 'Unanswerable'." + SHORT
    assert queries.text(2)[1] == prompt and queries.text(2)[0] == "VizWiz_val_00000002.jpg"
    scores, metrics = scored(queries, ["Unanswerable", "unanswerable", "basil leaves"])
    assert scores == pytest.approx([1, 0.3, 0])
    assert metrics["unanswerable"] == {"accuracy": 0.5} and metrics["other"] == {"accuracy": pytest.approx(0.3)}
    # said twice, once rightly, of two that are
    assert metrics["telling unanswerable"] == {"precision": 0.5, "recall": 0.5, "F1": 0.5}


def test_clevr(load):
    queries = load("clevr", "validation")
    scores, metrics = scored(queries, ["No", "two", "Red.", "no"])
    assert scores == [1, 0, 1, 0]
    assert {kind: part["accuracy"] for kind, part in metrics.items()} == {
        "compare numbers": 1,
        "count": 0,
        "query attribute": 1,
        "compare attribute": 0,
        "all": 0.5,
    }


def test_pope(load):
    queries = load("pope")
    assert queries.text(4)[0] == "popular-1" and queries.text(0)[1] == "Is there a thing 0 in the image?" + SHORT
    # random: yes yes no no; popular and adversarial: yes no
    scores, metrics = scored(queries, ["Yes", "No, there is not", "yes", "no", "Yes", "Yes", "no", "no"])
    assert scores == [1, 0, 0, 1, 1, 0, 0, 1]
    assert metrics["random"] == {"accuracy": 0.5, "precision": 0.5, "recall": 0.5, "F1": 0.5, "yes ratio": 0.5}
    popular = {"accuracy": 0.5, "precision": 0.5, "recall": 1, "F1": pytest.approx(2 / 3), "yes ratio": 1}
    assert metrics["popular"] == popular
    assert metrics["adversarial"] == {"accuracy": 0.5, "precision": 0, "recall": 0, "F1": 0, "yes ratio": 0}
    assert metrics["mean"]["F1"] == pytest.approx((0.5 + 2 / 3) / 3) and metrics["mean"]["yes ratio"] == 0.5
    one = load("pope", "train", ",part=adversarial")
    assert len(one) == 2 and one.kinds == ["adversarial"] * 2, "a part that is named serves every split"
    assert len(load("pope", options=",part=random-popular")) == 6


def test_mme(load):
    queries = load("mme")
    assert len(queries) == 2 * 15 and queries.text(1)[1] == "Is it é0?" + SHORT
    assert load("mme", options=",prompt=none").text(1)[1] == "Is it é0? Please answer yes or no."
    number = {id: place for place, id in enumerate(queries.text(row)[0] for row in range(30))}
    texts = [reference(queries.text(row)[2]) for row in range(30)]
    texts[number["count/0001.jpg: Is it é1? Please answer yes or no."]] = "Yes, it is"
    texts[number["OCR/0000.png: Are there 0? Please answer yes or no."]] = "There are no"  # neither in four letters
    scores, metrics = scored(queries, texts)
    assert sum(scores) == 28
    assert metrics["count"] == {"accuracy": 0.75, "accuracy+": 0.5, "score": 125}
    assert metrics["OCR"] == {"accuracy": 0.5, "accuracy+": 0, "score": 50}
    assert metrics["landmark"] == {"accuracy": 1, "accuracy+": 1, "score": 200}
    assert metrics["perception"] == {"score": 8 * 200 + 125 + 50} and metrics["cognition"] == {"score": 800}
    some = queries.head(3)
    assert scored(some, ["Yes", "No", "Yes"])[1] == {
        "existence": {"accuracy": 1, "accuracy+": 1, "score": 200},
        "count": {"accuracy": 1},
    }, "an image is asked of once only"
    assert list(metrics)[:14] == [subtask for subtasks in MME_SUBTASKS.values() for subtask in subtasks]


def test_nlvr2_shows_both_photographs_side_by_side(load):
    queries = load("nlvr2", "validation")
    query = queries[0]
    assert query.question.startswith(
        "The picture shows a left and a right photograph. True or false of them: There are"
    )
    # 20 x 10 and 20 x 20 halved, with a white gap of 16
    assert query.image.size == (20 + 16 + 10, 10)
    assert [query.image.getpixel((x, 5)) for x in (3, 28, 40)] == [(255, 0, 0), (255, 255, 255), (0, 0, 255)]
    assert queries.image_key(0) == queries.image_key(2) != queries.image_key(1)
    scores, metrics = scored(queries, ["True", "True", "false."])
    # the first sentence is wrong with one of its two pairs
    assert scores == [1, 0, 1] and metrics == {"all": {"accuracy": pytest.approx(2 / 3), "consistency": 0.5}}


def test_scienceqa_asks_only_what_has_an_image(load):
    queries = load("scienceqa")
    assert [queries.text(number)[0] for number in range(len(queries))] == ["5", "11"]
    assert queries.text(0)[1] == "Farthest north?\nA. West Virginia\nB. Louisiana\nC. Arizona" + LETTER
    assert queries.text(1)[1] == "Context: Look.\nWhich?\nA. é\nB. b" + LETTER
    scores, metrics = scored(queries, ["B", "B"])
    assert scores == [1, 0] and metrics["natural science"] == {"accuracy": 0.5}


def test_mmbench_counts_a_question_only_if_it_is_right_in_every_order(load):
    queries = load("mmbench")
    assert [queries.text(number)[0] for number in range(6)] == [
        "241",
        "1000241",
        "2000241",
        "3000241",
        "252",
        "1000252",
    ]
    assert queries.text(0)[1] == 'Which "animal"?\nA. cat\nB. dog\nC. a small cow\nD. hen' + LETTER
    assert queries.text(5)[1] == "Look at\nit.\nIs it?\nA. no\nB. yes" + LETTER
    assert queries[3].image.size == (16, 16), "by the number of the row that has the image"
    assert [queries.text(number)[2][0] for number in range(6)] == ["B", "A", "D", "C", "B", "A"]
    scores, metrics = scored(queries, ["B", "a dog", "(D)", "C.", "B", "B"])
    assert scores == [1, 1, 1, 1, 1, 0]
    assert metrics["l2-attr"] == {"accuracy": 1, "circular": 1}
    assert metrics["l2-scene"] == {"accuracy": 0.5, "circular": 0}
    assert metrics["all"] == {"accuracy": pytest.approx(5 / 6), "circular": 0.5}
    some = load("mmbench").head(5)
    metrics = scored(some, ["B", "A", "D", "C", "A"])[1]
    assert metrics["all"] == {"accuracy": 0.8, "circular": 1}, "a question not asked in every order does not count"
    assert metrics["l2-scene"] == {"accuracy": 0}


@pytest.mark.parametrize(
    ("read", "answer", "expected"),
    [
        (exact, " White. ", "white"),
        (exact, "É", "é"),
        (exact, "", ""),
        (pope_says, "Yes, there is. No doubt", "yes"),
        (pope_says, "There is not", "no"),
        (pope_says, "No", "no"),
        (pope_says, "NO", "yes"),
        (pope_says, "nothing", "yes"),
        (pope_says, "", "yes"),
        (mme_says, "Yes, it is", "yes"),
        (mme_says, "NO.", "no"),
        (mme_says, "I say yes", "other"),
        (mme_says, "not", "no"),
        (mme_says, "", "other"),
        (scienceqa_says, "B", "B"),
        (scienceqa_says, " B\n", "B"),
        (scienceqa_says, "B.", "B"),
        (scienceqa_says, "B. Louisiana", "B"),
        (scienceqa_says, "B\nbecause", "B"),
        (scienceqa_says, "I think The answer is C.", "C"),
        (scienceqa_says, "Because", ""),
        (scienceqa_says, "(B)", ""),
        (scienceqa_says, "F", ""),
        (scienceqa_says, "", ""),
    ],
)
def test_what_free_texts_say(read, answer, expected):
    assert read(answer) == expected


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("B", "B"),
        ("B.", "B"),
        ("(B) dog", "B"),
        ("The answer is B", "B"),
        ("A", "A"),
        ("A dog in the sun", "B"),  # an article, and the only option held
        ("A or B", ""),
        ("dog", "B"),
        ("DOG!", "B"),
        ("the small cow", ""),
        ("a small cow", "C"),
        ("cat or dog", ""),
        ("E", ""),
        ("AB", ""),
        ("a dog" + " and so on" * 20, ""),
        ("", ""),
    ],
)
def test_what_an_answer_to_mmbench_says(answer, expected):
    assert mmbench_says(answer, ["cat", "dog", "a small cow", "hen"]) == expected


def test_prompts_can_be_left_out_or_replaced(load, tmp_path):
    assert load("gqa", options=",prompt=none").text(0)[1] == "Is it overcast?"
    (tmp_path / "mine.txt").write_text("Briefly, please: {question}\n")
    assert load("gqa", options=f",prompt={tmp_path / 'mine.txt'}").text(0)[1] == "Briefly, please: Is it overcast?"
    (tmp_path / "empty.txt").write_text("Briefly, please\n")
    with pytest.raises(InputError, match=r"the prompt in .*empty.txt' has no {question}; write it"):
        load("gqa", options=f",prompt={tmp_path / 'empty.txt'}")
    with pytest.raises(InputError, match=r"prompt is 'qwen'; it must be llava, none, or a readable text file"):
        load("gqa", options=",prompt=qwen")


MISSING = {
    "vqav2": "v2_OpenEnded_mscoco_val2014_questions.json; v2_mscoco_val2014_annotations.json; val2014",
    "gqa": "testdev_balanced_questions.json; images",
    "textvqa": "TextVQA_0.5.1_val.json; train_images or train_val_images/train_images",
    "vizwiz": "val.json; val",
    "clevr": "questions/CLEVR_val_questions.json; images/val",
    "pope": "coco_pope_random.json; val2014; coco_pope_popular.json; coco_pope_adversarial.json",
    "mme": "existence; count; position; color",
    "nlvr2": "test1.json; images/test1 or test1",
    "scienceqa": "problems.json; pid_splits.json; images/test or test",
    "mmbench": "mmbench_dev_20230712.tsv or MMBench_dev_20230712.tsv",
}


@pytest.mark.parametrize("name", MISSING)
def test_missing_files_are_named_all_at_once(name, tmp_path):
    with pytest.raises(InputError) as caught:
        load_queries(f"{name}:root={tmp_path}", "test")
    assert f"data {name!r}: {str(tmp_path)!r} lacks {MISSING[name]}" in str(caught.value)
    with pytest.raises(InputError, match=f"data '{name}' needs root=FOLDER, .*; '/nowhere' does not exist"):
        load_queries(f"{name}:root=/nowhere", "test")
    with pytest.raises(InputError, match=f"data '{name}' needs root=FOLDER"):
        load_queries(name, "test")


def test_what_read_words_need_is_named_too(load, tmp_path):
    benchmark_files.textvqa(tmp_path / "textvqa", ocr=False)
    load("textvqa")
    with pytest.raises(InputError, match=r"lacks TextVQA_Rosetta_OCR_v0.2_val.json"):
        load("textvqa", options=",ocr=true")


def test_benchmarks_without_training_questions_say_so(load):
    with pytest.raises(InputError, match="'pope' is there to test on and has no split 'train'"):
        load("pope", "train")
    with pytest.raises(InputError, match="'vqav2' has no part 'test2015' with public answers; use train2014, val2014"):
        load("vqav2", options=",part=test2015")


BROKEN = [
    ("gqa", "testdev_balanced_questions.json", '{"1": {"imageId": "n1"', "is not whole JSON"),
    (
        "gqa",
        "testdev_balanced_questions.json",
        '{"1": {"imageId": "n1"}}',
        "entry 0 is not as published .no 'question'.",
    ),
    ("gqa", "testdev_balanced_questions.json", '{"1": {"question": "?"}}', "files of 'testdev_balanced' are not as"),
    ("clevr", "CLEVR_v1.0/questions/CLEVR_val_questions.json", '{"info": {}}', "has no 'questions'; it is not"),
    ("gqa", "testdev_balanced_questions.json", '{"1" 2}', "':' expected, '2' found"),
    ("pope", "coco_pope_random.json", '{"question_id": 1}\nno', "line 2 is not JSON|are not as published"),
    (
        "vizwiz",
        "Annotations/val.json",
        '[{"image": "a.jpg", "question": "?", "answers": []}]',
        "entry 0 has no answers",
    ),
    ("mme", "MME_Benchmark_release_version/OCR/0000.txt", "Is it? Yes\n", "is not a question, a tab, and Yes or No"),
]


@pytest.mark.parametrize(("name", "file", "content", "words"), BROKEN)
def test_files_that_are_not_as_published_are_named(load, tmp_path, name, file, content, words):
    getattr(benchmark_files, name)(tmp_path / name)
    (tmp_path / name / file).write_text(content)
    with pytest.raises(InputError, match=words):
        load(name)


def test_a_changed_file_is_read_anew(load, tmp_path):
    assert load("gqa").text(0)[2] == ("no",)
    file = tmp_path / "gqa" / "testdev_balanced_questions.json"
    file.write_text(file.read_text().replace('"answer": "no"', '"answer": "maybe"'))
    assert load("gqa").text(0)[2] == ("maybe",)


def copy_of(queries, where: Path, rows):
    """A copy as on the hub: the images in the table, the official fields as columns."""
    images = [{"bytes": picture(color="blue"), "path": None} for _ in rows]
    made = datasets.Dataset.from_list([{**row, "image": image} for row, image in zip(rows, images, strict=True)])
    made = made.cast_column("image", datasets.Image())
    where.mkdir()
    if queries == "parquet":
        (where / "data").mkdir()
        made.to_parquet(where / "data" / "validation-00000-of-00001.parquet")
        made.select([0]).to_parquet(where / "data" / "test-00000-of-00001.parquet")
    else:
        datasets.DatasetDict(validation=made, test=made.select([0])).save_to_disk(where)


@pytest.mark.parametrize("form", ["parquet", "save_to_disk"])
def test_copies_on_disk_ask_the_same(load, tmp_path, form):
    official = load("vqav2", "validation")
    rows = [
        {
            "question_id": id,
            "question": question,
            "answer_type": kind,
            "answers": [{"answer": each, "answer_id": place} for place, each in enumerate(answers)],
        }
        for id, _, question, kind, answers in benchmark_files.VQAV2
    ]
    copy_of(form, tmp_path / "copy", rows)
    copied = load_queries(f"vqav2:root={tmp_path / 'copy'}", "validation")
    assert [copied.text(number) for number in range(3)] == [official.text(number) for number in range(3)]
    assert copied.kinds == official.kinds and copied[0].image.getpixel((0, 0)) == (0, 0, 255)
    assert len(load_queries(f"vqav2:root={tmp_path / 'copy'}", "test")) == 3, "the test split has no public answers"


def test_copies_may_hold_sequences_of_mappings_numbers_and_labels(load, tmp_path):
    """``datasets`` turns a sequence of mappings into a mapping of sequences, and stores labels as numbers."""
    official = load("vqav2", "validation")
    rows = [
        {"question_id": id, "question": question, "answer_type": kind, "answers": {"answer": answers}}
        for id, _, question, kind, answers in benchmark_files.VQAV2
    ]
    copy_of("save_to_disk", tmp_path / "copy", rows)
    copied = load_queries(f"vqav2:root={tmp_path / 'copy'}", "validation")
    assert [copied.text(number) for number in range(3)] == [official.text(number) for number in range(3)]

    rows = [{"question_index": place, "question": "How many?", "answer": place} for place in range(2)]
    copy_of("parquet", tmp_path / "numbers", rows)
    counted = load_queries(f"clevr:root={tmp_path / 'numbers'}", "validation")
    assert [counted.text(number)[2] for number in range(2)] == [("0",), ("1",)]

    images = [{"bytes": picture(), "path": None}] * 3
    columns = {
        "image": (datasets.Image(), images),
        "question_id": (datasets.Value("string"), ["0", "1", "2"]),
        "question": (datasets.Value("string"), ["Is there?"] * 3),
        "answer": (datasets.ClassLabel(names=["no", "yes"]), [1, 0, 1]),
        "category": (datasets.ClassLabel(names=["popular", "random"]), [1, 0, 0]),
    }
    features = datasets.Features({name: kind for name, (kind, _) in columns.items()})
    made = datasets.Dataset.from_dict({name: cells for name, (_, cells) in columns.items()}, features=features)
    made.save_to_disk(tmp_path / "labels")
    part = load_queries(f"pope:root={tmp_path / 'labels'},part=popular", "test")
    assert [part.text(number)[0] for number in range(2)] == ["popular-1", "popular-2"]
    assert [part.text(number)[2] for number in range(2)] == [("no",), ("yes",)]


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"question": "?", "answer": None}, "an answer is missing"),
        ({"question": None, "answer": "yes"}, "its question is missing"),
        ({"question": "?", "answer": {"a": "x" * 1000}}, "it must be a text or a number"),
    ],
)
def test_copies_without_a_text_are_refused_by_entry(tmp_path, entry, words):
    copy_of("save_to_disk", tmp_path / "copy", [{"question_index": 0, "question": "?", "answer": None, **entry}])
    with pytest.raises(InputError, match=rf"data 'clevr': entry 0 is not as published \({words}\)") as caught:
        load_queries(f"clevr:root={tmp_path / 'copy'}", "validation")
    assert len(str(caught.value)) < 300


def test_copies_of_several_parts_and_without_images(tmp_path):
    rows = [
        {"question_id": str(place), "question": f"Is there {place}?", "answer": "yes", "category": category}
        for place, category in enumerate(("random", "popular", "popular"))
    ]
    copy_of("save_to_disk", tmp_path / "copy", rows)
    data = f"pope:root={tmp_path / 'copy'}"
    part = load_queries(f"{data},part=popular", "validation")
    assert [part.text(number)[0] for number in range(2)] == ["popular-1", "popular-2"] and len(part) == 2
    bare = datasets.Dataset.from_list(rows)
    bare.save_to_disk(tmp_path / "bare")
    with pytest.raises(InputError, match="lacks the columns image; it has question_id, question, answer, category"):
        load_queries(f"pope:root={tmp_path / 'bare'}", "test")


def test_benchmarks_join_with_other_data(load, small, tmp_path):
    gqa = load("gqa")
    both = load_queries(f"{gqa.name}+scenes:size=32,images=2", "test")
    assert len(both) == 3 + 16 and answer_cut(small, both) == 16
    assert score("White.", both.text(1)[2]) == 1 and both.metrics(range(19), ["no"] * 19, np.zeros(19)) is None
    assert both.text(3)[2] == load_queries("scenes:size=32,images=2", "test").text(0)[2]
    assert answer_cut(small, load_queries("scenes:size=32,images=2", "test")) == 1


def test_your_own_data_can_name_a_rule(tmp_path):
    rows = {"image": [picture()] * 2, "question": ["?"] * 2, "answers": [["yes"], ["no"]], "scoring": ["pope"] * 2}
    made = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    made.save_to_disk(tmp_path / "mine")
    queries = load_queries(str(tmp_path / "mine"), "test")
    assert [score("I do not know", queries.text(number)[2]) for number in range(2)] == [0, 1]
    made.remove_columns("scoring").add_column("scoring", ["bleu"] * 2).save_to_disk(tmp_path / "other")
    with pytest.raises(InputError, match="scoring is 'bleu'; it must be one of vqav2, "):
        load_queries(str(tmp_path / "other"), "test")


@pytest.mark.parametrize("chunk", [1, 7, 1 << 20])
def test_json_is_read_in_pieces_of_any_size(monkeypatch, tmp_path, chunk):
    monkeypatch.setattr(reading, "CHUNK", chunk)
    content = {"info": {"a": [1, "}"]}, "entries": [{"n": 123}, 45, 'é"]', [], None, -1.5e3], "later": 1}
    file = tmp_path / "a.json"
    file.write_text(json.dumps(content, indent=1, ensure_ascii=False), encoding="utf-8")
    assert [value for _, value in reading.json_entries(file, "entries")] == content["entries"]
    assert dict(reading.json_entries(file)) == content
    assert list(reading.json_entries(file, "info")) == [("a", [1, "}"])]
    file.write_text("[]")
    assert list(reading.json_entries(file)) == []
