"""What is read of every type of cell and every layout of files: what ``datasets`` makes of it, as a person writes it,
or a refusal of one short line that names the row."""

from __future__ import annotations

import datetime
import decimal
import gzip
import json
import re

import datasets
import huggingface_hub
import numpy as np
import pyarrow as pa
import pytest
from datasets import ClassLabel, Features, Json, LargeList, List, Value
from PIL import Image

from maskgym.backbones import InputError
from maskgym.envs.data.queries import DatasetQueries, load_queries
from tests.local_hub import local_hub

LABELS = ClassLabel(names=["red", "dark blue"])
DAY = datetime.datetime(2020, 1, 31)
NOON = datetime.datetime(2020, 1, 31, 12, 30)

CELLS = {
    "text": (Value("string"), ["red", " two  words "], ["red", " two  words "]),
    "large text": (Value("large_string"), ["red"], ["red"]),
    "text view": (Value("string_view"), ["red"], ["red"]),
    "whole": (Value("int64"), [3, -1], ["3", "-1"]),
    "small whole": (Value("uint8"), [255], ["255"]),
    "large whole": (Value("uint64"), [2**63 - 1], ["9223372036854775807"]),
    "float": (
        Value("float64"),
        [3.0, 2.5, 0.1, 1e-7, -0.0, 1e15],
        ["3", "2.5", "0.1", "0.0000001", "0", "1" + 15 * "0"],
    ),
    "short float": (Value("float32"), [0.1, 3.0], ["0.1", "3"]),
    "half float": (Value("float16"), [0.1, 3.0], ["0.1", "3"]),
    "label": (LABELS, [1, 0], ["dark blue", "red"]),
    "decimal": (Value("decimal128(5, 2)"), [decimal.Decimal("3.50")], ["3.50"]),
    "date": (Value("date32"), [DAY.date()], ["2020-01-31"]),
    "moment": (Value("timestamp[ns]"), [NOON, DAY], ["2020-01-31 12:30:00", "2020-01-31 00:00:00"]),
    "days as moments": (Value("timestamp[s]"), [DAY, DAY], ["2020-01-31", "2020-01-31"]),
    "fractions": (Value("timestamp[ms]"), [NOON.replace(microsecond=5000)], ["2020-01-31 12:30:00.005"]),
    "zoned moment": (Value("timestamp[us, tz=UTC]"), [NOON], ["2020-01-31 12:30:00Z"]),
    "time": (Value("time64[us]"), [NOON.time()], ["12:30:00"]),
    "JSON": (Json(), ["red", 3, 2.5], ["red", "3", "2.5"]),
}
"""By type: cells, and the texts that they are."""


def table(**columns):
    """A data set of two rows or as many as the columns have; a column is a pair of type and cells."""
    rows = max(len(cells) for _, cells in columns.values())
    whole = {
        "image": (datasets.Image(), [Image.new("RGB", (4, 4))] * rows),
        "question": (Value("string"), ["what?"] * rows),
        "answers": (List(Value("string")), [["red"]] * rows),
        **columns,
    }
    if "answer" in columns:
        del whole["answers"]
    features = Features({name: kind for name, (kind, _) in whole.items()})
    return datasets.Dataset.from_dict({name: cells for name, (_, cells) in whole.items()}, features=features)


def read(**columns):
    return DatasetQueries(table(**columns), "mine", "test")


@pytest.mark.parametrize("kind", CELLS)
def test_a_cell_reads_as_a_person_writes_it(kind):
    """As question, id, kind, group and the one answer, in a list and in annotators' mappings."""
    feature, cells, expected = CELLS[kind]
    queries = read(
        **{name: (feature, cells) for name in ("question", "id", "type", "group", "answers")},
        choices=(List(feature), [cells] * len(cells)),
    )
    assert [queries.text(row) for row in range(len(cells))] == [(text, text, (text,)) for text in expected]
    assert queries.kinds == expected and queries._cell("group", 0) == expected[0]
    assert queries._cell("choices", 0) == expected
    assert read(answer=(feature, cells)).text(0)[2] == (expected[0],)
    listed = [(List(feature), [cells]), (LargeList(feature), [cells])]
    if kind != "half float":  # which Arrow cannot have in a mapping's lists
        listed += [
            (
                List({"answer": feature, "answer_confidence": Value("string")}),
                [[{"answer": c, "answer_confidence": "yes"} for c in cells]],
            ),
            ({"answer": List(feature)}, [{"answer": cells}]),
        ]
    for nested, given in listed:
        assert read(answers=(nested, given)).text(0)[2] == tuple(expected), nested


@pytest.mark.parametrize("kind", CELLS)
def test_what_is_missing_is_refused_by_row_or_empty(kind):
    feature, cells, _ = CELLS[kind]
    gapped = [cells[0], None]
    queries = read(type=(feature, gapped), group=(feature, gapped))
    assert queries.kinds == [read(type=(feature, cells[:1])).kinds[0], ""] and queries._cell("group", 1) is None
    for name in ("question", "answers", "answer", "id"):
        with pytest.raises(
            InputError, match=f"data 'mine', row 1: {name.replace('answer', 'answers')[:7]}.* is None; it must be"
        ):
            read(**{name: (feature, gapped)})
    with pytest.raises(InputError, match=r"row 0: answers is .*none of them missing"):
        read(answers=(List(feature), [gapped]))


def test_texts_agree_with_what_datasets_decodes():
    for kind in ("whole", "small whole", "large whole", "label", "decimal", "date", "JSON", "text view"):
        feature, cells, expected = CELLS[kind]
        decoded = table(question=(feature, cells))["question"][:]
        told = [feature.int2str(cell) if kind == "label" else str(cell) for cell in decoded]
        assert told == expected, kind


MISSING = {"unlabelled": (LABELS, [0, -1]), "not a number": (Value("float64"), [1.0, float("nan")])}


@pytest.mark.parametrize("kind", MISSING)
def test_what_stands_for_nothing_is_missing(kind):
    with pytest.raises(InputError, match=r"row 1: question is .*; it must be a text"):
        read(question=MISSING[kind])
    assert read(type=MISSING[kind]).kinds[1] == ""


TRUTH = "a truth value has no one spelling: write the word that is meant"
REFUSED = {
    "truth": (Value("bool"), [None, True], TRUTH),
    "truth in JSON": (Json(), ["red", True], TRUTH),
    "infinite": (Value("float64"), [1.0, float("inf")], "a finite number"),
    "more digits than a float keeps": (Value("float64"), [1.0, 1e19], "more digits than a float keeps"),
    "more digits than a short float keeps": (Value("float32"), [1.0, 1e9], "more digits than a float keeps"),
    "bytes": (Value("binary"), [None, b"x" * 10_000], "10,000 bytes; it must be a text or a number"),
    "duration": (Value("duration[s]"), [None, datetime.timedelta(1)], "it must be a text or a number"),
    "mapping": ({"a": Value("string")}, [None, {"a": "x" * 10_000}], "it must be a text or a number"),
    "lists of lists": (List(List(Value("string"))), [None, [["x" * 10_000]]], "it must be a text or a number"),
    "a long list in JSON": (Json(), ["red", {"a": ["x" * 10_000] * 100}], "it must be a text or a number"),
    "array": (datasets.Array2D((100, 100), "int64"), [None, np.ones((100, 100), np.int64)], "it must be a text"),
    "translation": (datasets.Translation(["en"]), [None, {"en": "red"}], "it must be a text or a number"),
    "image": (datasets.Image(), [None, Image.new("RGB", (4, 4))], "it must be a text or a number"),
}


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.parametrize("name", ["question", "answers", "answer", "id", "type", "group", "scoring", "choices"])
def test_a_cell_whose_text_cannot_be_known_is_refused_by_row(kind, name):
    feature, cells, words = REFUSED[kind]
    if name in ("question", "answers", "answer", "id"):  # which need a cell in every row
        feature, cells = (feature, cells) if cells[0] is not None else (feature, cells[1:])
    with pytest.raises(InputError) as caught:
        read(**{name: (feature, cells)})
    message, row = str(caught.value), len(cells) - 1
    assert message.startswith(f"data 'mine', row {row}: {name.replace('answer', 'answers')[:7]}") or name == "choices"
    assert words in message and len(message) < 260 and "\n" not in message, message


def test_numbers_among_json_texts_keep_their_digits(tmp_path):
    """``datasets`` stores a text like ``1.50`` as the number that it also is."""
    lines(tmp_path / "a.jsonl", [{"answers": "1.50"}, {"answers": 3}, {"answers": "red"}, {"answers": ["a", 12.5]}])
    queries = load_queries(str(tmp_path / "a.jsonl"))
    assert [queries.text(row)[2] for row in range(4)] == [("1.50",), ("3",), ("red",), ("a", "12.5")]


def test_dates_in_json_stay_as_they_stand_there(tmp_path):
    for given in (
        ["2020-01-31"],
        ["2020-01-31 00:00:00"],
        ["2020-01-31T10:20"],
        "2020-01-31",
        [{"answer": "2020-01-31"}],
    ):
        lines(tmp_path / "a.jsonl", [{"answers": given, "question": "2020-01-01 00:00:00"}] * 2)
        _, question, answers = load_queries(str(tmp_path / "a.jsonl")).text(1)
        first = given if isinstance(given, str) else given[0]
        assert answers == (first["answer"] if isinstance(first, dict) else first,)
        assert question == "2020-01-01 00:00:00"


def test_an_answer_right_in_json_is_right(tmp_path):
    """One number among texts once made every text a quoted one, which no answer equals."""
    from maskgym.envs.data.scoring import score

    lines(tmp_path / "a.jsonl", [{"answers": ["red"]}, {"answers": [3]}])
    queries = load_queries(str(tmp_path / "a.jsonl"))
    assert [score(said, queries.text(row)[2]) for row, said in enumerate(("red", "3"))] == [1.0, 1.0]


LISTS = [
    ('["red", "dark red"]', ("red", "dark red")),
    ("[3, 2.50]", ("3", "2.50")),
    ('[{"answer": "red"}]', ("red",)),
    ("red", ("red",)),
    ("red [sic]", ("red [sic]",)),
]


@pytest.mark.parametrize(("cell", "expected"), LISTS)
def test_lists_written_as_texts(cell, expected):
    assert read(answers=(Value("string"), [cell])).text(0)[2] == expected


@pytest.mark.parametrize(
    "cell", ["['red', 'blue']", "['red' 'blue']", "[", '["red", ["blue"]]', "[null]", "[true]", "[]"]
)
def test_lists_written_in_another_way_are_refused(cell):
    with pytest.raises(InputError, match=r"row 0: answers is .*; .*(JSON|text or a number|none of them|spelling|one)"):
        read(answers=(Value("string"), [cell]))
    assert read(answer=(List(Value("string")), [[cell]])).text(0)[2] == (cell,)


def test_the_row_of_a_bad_cell_is_told_in_chunks_and_slices():
    cells = [["a"], ["b"], ["c"], None]
    whole = table(answers=(List(Value("string")), cells))
    with pytest.raises(InputError, match="row 2: answers is None"):
        DatasetQueries(whole.select([1, 2, 3]), "mine", "test")
    pair = datasets.concatenate_datasets([whole.select([0, 1]), whole.select([2, 3])])
    with pytest.raises(InputError, match="row 3: answers is None"):
        DatasetQueries(pair, "mine", "test")
    mixed = table(answers=(List(Json()), [["a", 1], [], None, ["b", 2.5], ["c", {"x": 1}]])).select([0, 3, 4])
    with pytest.raises(InputError, match=r"row 2: answers is .*; it must be a text or a number"):
        DatasetQueries(mixed, "mine", "test")
    assert DatasetQueries(mixed.select([1, 0]), "mine", "test").text(0)[2] == ("b", "2.5")


def test_dictionaries_of_arrow_are_texts():
    made = table(question=(Value("string"), ["a?", "b?"]))
    coded = made.with_format("arrow")[:].set_column(1, "question", pa.array(["a?", "b?"]).dictionary_encode())
    assert DatasetQueries(datasets.Dataset(coded), "mine", "test").text(1)[1] == "b?"


NO_TABLES = {
    "stream": (lambda made: made.to_iterable_dataset(), "is a stream, .*load it without streaming=True"),
    "splits": (lambda made: datasets.DatasetDict(train=made, test=made), "has the splits train, test; give one"),
    "streams": (lambda made: datasets.IterableDatasetDict(train=made.to_iterable_dataset()), "is a stream"),
    "rows": (lambda made: list(made), "is of type list; it must be a datasets.Dataset"),
}


@pytest.mark.parametrize("kind", NO_TABLES)
def test_what_is_no_table_is_refused(kind):
    make, words = NO_TABLES[kind]
    with pytest.raises(InputError, match=f"^data 'mine' {words}"):
        DatasetQueries(make(table(question=(Value("string"), ["a?"]))), "mine", "test")


def lines(file, rows):
    """JSON lines of rows; what they leave out is filled in."""
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4), "red").save(file.parent / "a.png")
    whole = {"image": "a.png", "question": "what?", "answers": ["red"]}
    if any("file_name" in row for row in rows):
        del whole["image"]
    file.write_text("".join(json.dumps({**whole, **row}) + "\n" for row in rows))


def asked(split, rows=2):
    return [{"question": f"{split} {row}?"} for row in range(rows)]


def as_parquet(file, rows):
    file.parent.mkdir(parents=True, exist_ok=True)
    table(question=(Value("string"), [row["question"] for row in rows])).to_parquet(file)


def as_table(file, rows):
    """In the format that its name says."""
    suffixes = "".join(file.suffixes)
    if file.suffix == ".parquet":
        return as_parquet(file, rows)
    lines(file, rows)
    full = [json.loads(line) for line in file.read_text().splitlines()]
    texts = [{**row, "answers": row["answers"][0]} for row in full]
    if suffixes == ".json":
        file.write_text(json.dumps(full))
    elif file.suffix in (".csv", ".tsv"):
        separator = "\t" if file.suffix == ".tsv" else ","
        heads = [separator.join(texts[0])]
        file.write_text("\n".join(heads + [separator.join(row.values()) for row in texts]) + "\n")
    elif file.suffix == ".arrow":
        with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, pa.Table.from_pylist(full).schema) as stream:
            stream.write_table(pa.Table.from_pylist(full))
    elif file.suffix == ".gz":
        file.write_bytes(gzip.compress(file.read_bytes()))
    return None


BOTH = {"train": "train", "test": "test"}
LAYOUTS = {
    "files": ({"train.jsonl": "train", "validation.jsonl": "validation", "test.jsonl": "test"}, {}),
    "shards": (
        {
            "data/train-00000-of-00002.parquet": "train",
            "data/train-00001-of-00002.parquet": "more",
            "data/test-00000-of-00001.parquet": "test",
        },
        {"train": ["train 0?", "train 1?", "more 0?", "more 1?"]},
    ),
    "shards beside each other": (
        {
            "train-00000-of-00002.parquet": "train",
            "train-00001-of-00002.parquet": "more",
            "test-00000-of-00001.parquet": "test",
        },
        {"train": ["train 0?", "train 1?", "more 0?", "more 1?"]},
    ),
    "a folder a split": ({"train/a.jsonl": "train", "test/a.jsonl": "test", "val/a.jsonl": "validation"}, {}),
    "csv": ({"train.csv": "train", "test.csv": "test"}, {}),
    "tsv": ({"train.tsv": "train", "test.tsv": "test"}, {}),
    "json": ({"train.json": "train", "test.json": "test"}, {}),
    "arrow": ({"train.arrow": "train", "test.arrow": "test"}, {}),
    "packed": ({"train.jsonl.gz": "train", "test.jsonl.gz": "test"}, {}),
    "of two formats": ({"train.parquet": "train", "test.jsonl": "test"}, {}),
    **{name: ({f"{name}.jsonl": "validation", "train.jsonl": "train"}, {}) for name in ("val", "dev", "valid")},
    "val in shards": (
        {"data/val-00000-of-00001.parquet": "validation", "data/train-00000-of-00001.parquet": "train"},
        {},
    ),
    "beside other files": (
        {"train.jsonl": "train", "test.jsonl": "test"},
        {"beside": ["images/train/a.png", "test/b.png", "README.md", "notes.txt"]},
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_folders_as_people_have_them(name, tmp_path):
    """Each split's own rows, whatever the layout."""
    files, more = LAYOUTS[name]
    for file, split in files.items():
        as_table(tmp_path / file, asked(split))
    for file in more.get("beside", []):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_bytes(b"words")
    for split in ("train", "validation", "test"):
        if split in files.values():
            queries = load_queries(str(tmp_path), split)
            questions = [queries.text(row)[1] for row in range(len(queries))]
            assert questions == more.get(split, [f"{split} 0?", f"{split} 1?"])
            assert queries[0].image.size == (4, 4) and queries.text(0)[2] == ("red",)
        else:
            with pytest.raises(InputError, match=f"has no split '{split}'; it has .*train"):
                load_queries(str(tmp_path), split)


@pytest.mark.parametrize("name", ["train.csv", "all.tsv", "x.json", "x.ndjson", "x.arrow", "x.jsonl.gz", "x.parquet"])
def test_a_file_of_every_format_serves_every_split(name, tmp_path):
    as_table(tmp_path / name, asked("own"))
    for split in ("train", "test"):
        assert load_queries(str(tmp_path / name), split).text(1)[1] == "own 1?"


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # a file that datasets leaves open
def test_image_folders_with_a_table_a_split(suffix, tmp_path):
    for split in ("train", "validation"):
        folder = tmp_path / split
        lines(folder / "metadata.jsonl", [{**row, "file_name": "a.png"} for row in asked(split)])
        rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
        if suffix != "jsonl":
            (folder / "metadata.jsonl").unlink()
        if suffix == "csv":
            (folder / "metadata.csv").write_text(
                "file_name,question,answers\n" + "".join(f"a.png,{row['question']},red\n" for row in rows)
            )
        elif suffix == "parquet":
            datasets.Dataset.from_list(rows).to_parquet(folder / "metadata.parquet")
    for split in ("train", "validation"):
        queries, theirs = load_queries(str(tmp_path), split), datasets.load_dataset(str(tmp_path), split=split)
        assert [queries.text(row)[1] for row in range(2)] == theirs["question"][:] == [f"{split} 0?", f"{split} 1?"]
        assert queries[0].image.tobytes() == theirs[0]["image"].tobytes()
        assert queries.image_key(0) == str(tmp_path / split / "a.png")


def test_splits_of_saved_data_go_by_any_of_their_names(tmp_path):
    made = {split: table(question=(Value("string"), [f"{split}?"])) for split in ("train", "dev", "testing")}
    datasets.DatasetDict(made).save_to_disk(tmp_path / "saved")
    told = [load_queries(str(tmp_path / "saved"), split).text(0)[1] for split in ("train", "validation", "test")]
    assert told == ["train?", "dev?", "testing?"]


def test_a_readme_names_the_files(tmp_path):
    as_parquet(tmp_path / "one.parquet", asked("one"))
    as_parquet(tmp_path / "two.parquet", asked("two"))
    splits = "".join(
        f"  - split: {split}\n    path: {name}.parquet\n" for split, name in (("train", "one"), ("test", "two"))
    )
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n- config_name: default\n  data_files:\n{splits}---\n")
    assert [load_queries(str(tmp_path), split).text(0)[1] for split in ("train", "test")] == ["one 0?", "two 0?"]


def test_files_that_belong_to_no_split_serve_none(tmp_path):
    """A single split serves every request, so what another file is for must not be guessed."""
    for name in ("train", "held_out-00000-of-00001"):
        lines(tmp_path / f"{name}.jsonl", asked(name))
    assert load_queries(str(tmp_path), "train").text(0)[1] == "train 0?"
    with pytest.raises(InputError, match="has no split 'test'; it has train, held_out"):
        load_queries(str(tmp_path), "test")


def test_files_without_a_split_in_their_names_are_one_source_if_they_are_shards(tmp_path):
    for number in range(2):
        lines(tmp_path / "shards" / f"part-{number}.jsonl", asked(f"part {number}"))
        lines(tmp_path / "others" / f"{'ab'[number]}.jsonl", asked(f"part {number}"))
    queries = load_queries(str(tmp_path / "shards"), "test")
    assert [queries.text(row)[1] for row in range(4)] == ["part 0 0?", "part 0 1?", "part 1 0?", "part 1 1?"]
    with pytest.raises(InputError, match="has no split 'test'; it has a, b"):
        load_queries(str(tmp_path / "others"), "test")


def test_splits_may_have_other_columns(tmp_path):
    """Only the split that is asked for is read."""
    lines(tmp_path / "train.jsonl", asked("train"))
    (tmp_path / "test.jsonl").write_text('{"other": 1}\n')
    assert len(load_queries(str(tmp_path), "train")) == 2
    with pytest.raises(InputError, match="lacks the column 'image'; it has other"):
        load_queries(str(tmp_path), "test")


def test_several_formats_of_one_split_are_refused(tmp_path):
    lines(tmp_path / "train.jsonl", asked("train"))
    as_parquet(tmp_path / "train.parquet", asked("train"))
    with pytest.raises(
        InputError, match=r"come in several formats \(train.jsonl, train.parquet\); give one file's path"
    ):
        load_queries(str(tmp_path), "train")


def test_csv_cells_are_the_texts_that_stand_there(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    cells = ["007", "1.50", "None", "NA", "true", "2020-01-31", "3", '"a, b"']
    body = "".join(f"a.png,what?,{cell}\n" for cell in cells)
    (tmp_path / "a.csv").write_text("image,question,answers\n" + body)
    queries = load_queries(str(tmp_path / "a.csv"))
    assert [queries.text(row)[2][0] for row in range(len(cells))] == [*cells[:-1], "a, b"]
    (tmp_path / "b.csv").write_text("image,question,answers\n" + body + "a.png,what?,\n")
    with pytest.raises(InputError, match="row 8: answers is None; it must be"):
        load_queries(str(tmp_path / "b.csv"))


def test_paths_are_relative_to_their_own_file(tmp_path):
    for part, color in (("one", "red"), ("two", "blue")):
        lines(tmp_path / "train" / part / "a.jsonl", asked(part))
        Image.new("RGB", (4, 4), color).save(tmp_path / "train" / part / "a.png")
    queries = load_queries(str(tmp_path), "train")
    shown = {queries.text(row)[1]: queries[row].image.getpixel((0, 0)) for row in range(4)}
    assert shown == {"one 0?": (255, 0, 0), "one 1?": (255, 0, 0), "two 0?": (0, 0, 255), "two 1?": (0, 0, 255)}


def test_data_of_different_types_join(tmp_path):
    table(answer=(LABELS, [1]), id=(Value("int64"), [7])).save_to_disk(tmp_path / "labels")
    lines(tmp_path / "texts.jsonl", [{"answers": "red"}, {"answers": 3}])
    pixels = (datasets.Array3D((4, 4, 3), "uint8"), [np.full((4, 4, 3), 9, np.uint8)])
    table(image=pixels, answers=(Value("int64"), [5])).save_to_disk(tmp_path / "numbers")
    joined = load_queries("+".join(str(tmp_path / name) for name in ("labels", "texts.jsonl", "numbers")))
    assert [joined.text(row)[2] for row in range(4)] == [("dark blue",), ("red",), ("3",), ("5",)]
    assert [joined.text(row)[0] for row in range(4)] == ["7", "0", "1", "0"]
    assert [joined[row].image.getpixel((0, 0)) for row in range(4)] == [(0, 0, 0), (255, 0, 0), (255, 0, 0), (9, 9, 9)]


LINK = "is a link; download the image, and give the path of its file"
ENCODED = r"is an image written as text \(base64\); decode it, and give its bytes or a file"
NO_PATHS = [
    ("https://example.org/a.png", LINK),
    ("hf://datasets/owner/name/a.png", LINK),
    ("data:image/png;base64,iVBORw0KGgoAAAANSUhEUg", ENCODED),
    ("iVBORw0KGgoAAAANSUhEUg" + "A" * 100_000, ENCODED),
    ("/9j/4AAQSkZJRgABAQ" + "A" * 100_000, ENCODED),
    ("R0lGODlhAQABAIAAAAAAAP", ENCODED),
]


@pytest.mark.parametrize(("text", "words"), NO_PATHS)
def test_links_and_encoded_images_are_refused_in_a_short_line(text, words, tmp_path):
    lines(tmp_path / "a.jsonl", [{}, {"image": text}])
    for joined in ("a.jsonl", "a.jsonl+a.jsonl"):
        with pytest.raises(InputError, match=f"^data '.*', row 1: image {words}$") as caught:
            load_queries("+".join(str(tmp_path / name) for name in joined.split("+")))
        assert len(str(caught.value)) < 400
    with pytest.raises(InputError, match=f"row 0: beside {words}$"):
        read(beside=(Value("string"), [text]))


def test_bytes_may_be_named_by_a_link():
    """As data sets that were fetched from the web have it."""
    queries = read(image=(datasets.Image(decode=False), [{"path": "https://example.org/a.png", "bytes": png()}]))
    assert queries[0].image.size == (4, 4)


def png():
    from io import BytesIO

    file = BytesIO()
    Image.new("RGB", (4, 4)).save(file, "PNG")
    return file.getvalue()


def test_errors_of_datasets_are_one_short_line(tmp_path, caplog):
    (tmp_path / "a.jsonl").write_text('{"image": ' + "x" * 100_000)
    with pytest.raises(InputError, match=r"could not be read \(JSON parse error") as caught:
        load_queries(str(tmp_path / "a.jsonl"))
    assert len(str(caught.value)) < 600 and not re.search(r"\n|xxxxx", str(caught.value))
    assert not caplog.records  # where datasets says the same, and more


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub on this machine in place of the real one."""
    with local_hub() as server:
        address = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        for module, names in (
            (datasets.config, {"HF_ENDPOINT": address, "HF_DATASETS_CACHE": tmp_path / "cache"}),
            (
                huggingface_hub.constants,
                {"ENDPOINT": address, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_DISABLE_XET": True},
            ),
        ):
            for name, value in names.items():
                monkeypatch.setattr(module, name, value)
        template = address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        huggingface_hub.HfFileSystem.clear_instance_cache()
        yield server
        huggingface_hub.HfFileSystem.clear_instance_cache()


def test_a_hub_id_is_fetched_split_by_split(hub, tmp_path):
    for split in ("train", "val"):
        as_parquet(tmp_path / f"{split}.parquet", asked(split))
    whole, spoilt = (tmp_path / "val.parquet").read_bytes(), b"which is not asked for"
    hub.files["me/vqa"] = {"data/train-00000-of-00001.parquet": spoilt, "data/val-00000-of-00001.parquet": whole}
    queries = load_queries("me/vqa", "validation")
    assert [queries.text(row)[1] for row in range(2)] == ["val 0?", "val 1?"] and queries[1].image.size == (4, 4)
    with pytest.raises(InputError, match="data 'me/vqa' has no split 'test'; it has train, val"):
        load_queries("me/vqa", "test")
    with pytest.raises(InputError, match=r"data 'me/vqa' has no option 'part=1'; its options are .* config, revision"):
        load_queries("me/vqa:part=1", "train")
    with pytest.raises(
        InputError, match=r"data 'me/other' is no path here, and could not be fetched .*hf download me/other"
    ):
        load_queries("me/other", "train")


def test_without_network_a_hub_id_says_what_to_put_where(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    words = (
        r"'me/mine' is no path here, .*run `hf download me/mine --repo-type dataset --local-dir FOLDER`, and give that"
    )
    with pytest.raises(InputError, match=words):
        load_queries("me/mine")
    with pytest.raises(
        InputError, match=r"unknown data 'folder/missing.parquet'; use one of .*, a path that exists, or a hub id"
    ):
        load_queries("folder/missing.parquet")
