import json

import datasets
import pytest
from PIL import Image

from maskgym.backbones import EncodingBank, InputError
from maskgym.envs.data.queries import DatasetQueries, load_queries
from tests.conftest import build, make_dataset


@pytest.mark.slow
def test_easy_vqa_has_its_official_splits():
    train, validation, test = (load_queries("easy-vqa", split) for split in ("train", "validation", "test"))
    assert len(test) == 9673
    assert len(train) + len(validation) == 38575
    keys = [{split.image_key(number) for number in range(len(split))} for split in (train, validation, test)]
    assert [len(split_keys) for split_keys in keys] == [3600, 400, 1000]
    assert not keys[0] & keys[1] and not keys[0] & keys[2]
    query = test[0]
    assert query.image.size == (64, 64) and query.image.mode == "RGB"
    assert len(query.answers) == 1 and query.id == "test-0"


@pytest.mark.parametrize("form", ["save_to_disk", "dict", "parquet", "splits", "jsonl", "imagefolder"])
def test_local_paths_in_every_form_give_the_same_queries(tmp_path, form):
    made = make_dataset(6)
    expected = DatasetQueries(made, "made", "train")
    where = tmp_path / "data"
    if form == "save_to_disk":
        made.save_to_disk(where)
    elif form == "dict":
        datasets.DatasetDict(train=made, test=make_dataset(4, seed=1)).save_to_disk(where)
    elif form == "parquet":
        where = tmp_path / "data.parquet"
        made.to_parquet(where)
    elif form == "splits":
        where.mkdir()
        made.to_parquet(where / "train.parquet")
        make_dataset(4, seed=1).to_parquet(where / "test.parquet")
    else:
        where.mkdir()
        rows = []
        for number in range(6):
            expected[number].image.save(where / f"{number}.png")
            id, question, answers = expected.text(number)
            key = "image" if form == "jsonl" else "file_name"
            rows.append({key: f"{number}.png", "id": id, "question": question, "answers": list(answers)})
        name = "all.jsonl" if form == "jsonl" else "metadata.jsonl"
        (where / name).write_text("\n".join(map(json.dumps, rows)))
    loaded = load_queries(str(where), "train")
    assert len(loaded) == 6
    for number in range(6):
        assert loaded.text(number) == expected.text(number)
        assert loaded[number].image.tobytes() == expected[number].image.tobytes()


def test_data_that_names_files_joins_data_that_holds_images(tmp_path):
    made = make_dataset(4)
    made.save_to_disk(tmp_path / "saved")
    made[0]["image"].save(tmp_path / "one.png")
    row = {"image": "one.png", "question": "which?", "answers": ["this"]}
    (tmp_path / "listed.jsonl").write_text(json.dumps(row) + "\n")
    for order in (("saved", "listed.jsonl"), ("listed.jsonl", "saved")):
        joined = load_queries("+".join(str(tmp_path / name) for name in order), "train")
        (place,) = (number for number in range(5) if joined[number].question == "which?")
        assert len(joined) == 5 and place == (4 if order[0] == "saved" else 0)
        assert joined[place].image.tobytes() == made[0]["image"].tobytes()


def test_head_keeps_the_first_queries():
    assert [load_queries("easy-vqa", "test", 3).text(n)[0] for n in range(3)] == ["test-0", "test-1", "test-2"]


def test_equal_images_share_a_key(source):
    assert source.image_key(0) == source.image_key(1) != source.image_key(2)


class CountingEncoder:
    signals = frozenset()

    def __init__(self, backbone):
        self.backbone, self.images = backbone, 0

    def encode_images(self, images, ids):
        self.images += len(images)
        return self.backbone.encode_images(images, ids)

    def assemble(self, *args):
        return self.backbone.assemble(*args)


def test_bank_encodes_each_image_once_and_in_order(small, source):
    encoder = CountingEncoder(small)
    bank = EncodingBank(encoder, source)
    numbers = [5, 0, 1, 5, 11, 4]
    first, second = bank.gather(numbers), bank.gather(numbers)
    assert encoder.images == 3  # 5 and 4 share one image, 0 and 1 another
    direct = small.encode([source[number] for number in numbers])
    for encoding in (first, second):
        assert encoding.ids == direct.ids and encoding.answers == direct.answers
        assert (encoding.visual_BND - direct.visual_BND).abs().max() < 1e-5
        assert (encoding.text_BTD == direct.text_BTD).all()


def test_bank_forgets_the_least_recent_image_when_full(source):
    small = build()  # one of its own: what a tower was asked by other tests takes room too
    encoder = CountingEncoder(small)
    one = small.layout.tokens * small.hidden * 4
    bank = EncodingBank(encoder, source, capacity_bytes=2 * one)
    for numbers, images in (([0], 1), ([2], 2), ([0], 2), ([4], 3), ([0], 3), ([2], 4), ([0, 2, 4, 6], 6)):
        encoding = bank.gather(numbers)
        assert encoder.images == images, numbers
        direct = small.encode([source[number] for number in numbers])
        assert (encoding.visual_BND - direct.visual_BND).abs().max() < 1e-5


def bad_image(tmp_path, kind):
    if kind == "missing":
        return str(tmp_path / "nowhere.png")
    path = tmp_path / f"{kind}.png"
    Image.new("RGB", (16, 16), "red").save(path)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2] if kind == "truncated" else b"not an image at all")
    return str(path)


@pytest.mark.parametrize(
    ("kind", "words"),
    [("missing", "does not exist"), ("truncated", "cannot be decoded"), ("text", "cannot be decoded")],
)
def test_unreadable_images_are_named_with_their_query(tmp_path, kind, words):
    rows = {"id": ["q7"], "image": [bad_image(tmp_path, kind)], "question": ["what?"], "answers": [["red"]]}
    dataset = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    source = DatasetQueries(dataset, "made", "train")
    assert source.text(0)[1] == "what?"
    with pytest.raises(InputError, match=words) as caught:
        source[0]
    assert "q7" in str(caught.value) and kind in str(caught.value).replace("nowhere", "missing")


def test_bad_sources_are_named(tmp_path):
    with pytest.raises(InputError, match="unknown data 'easy-vqb'; use one of easy-vqa"):
        load_queries("easy-vqb")
    with pytest.raises(InputError, match="split is 'dev'"):
        load_queries("easy-vqa", "dev")
    with pytest.raises(InputError, match="limit is 0"):
        load_queries("easy-vqa", "test", 0)
    with pytest.raises(InputError, match="lacks the column 'answers'"):
        DatasetQueries(make_dataset().remove_columns("answers"), "made", "train")
    with pytest.raises(InputError, match="has no rows"):
        DatasetQueries(make_dataset().select([]), "made", "train")
    (tmp_path / "a.txt").write_text("image,question\n")
    with pytest.raises(InputError, match=r"suffix '.txt'; supported"):
        load_queries(str(tmp_path / "a.txt"))
    (tmp_path / "b.jsonl").write_text("{not json")
    with pytest.raises(InputError, match="could not be read"):
        load_queries(str(tmp_path / "b.jsonl"))
    folder = tmp_path / "two"
    folder.mkdir()
    make_dataset(2).to_parquet(folder / "train.parquet")
    make_dataset(2).to_parquet(folder / "test.parquet")
    with pytest.raises(InputError, match="no split 'validation'; it has train, test"):
        load_queries(str(folder), "validation")


def test_bank_refuses_numbers_outside(small, source):
    with pytest.raises(InputError, match="query number 12 does not exist; the source has 12"):
        EncodingBank(small, source).gather([0, 12])
