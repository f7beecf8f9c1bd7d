"""Images of every kind that ``datasets`` and Pillow know, by every door: the same upright picture in RGB, held against
what Pillow, ``datasets`` and ``transformers`` themselves make of it; or a refusal by name."""

from __future__ import annotations

import io

import datasets
import numpy as np
import pytest
from datasets import Array2D, Array3D, Features, List, Value
from PIL import Image, ImageOps
from transformers.image_transforms import convert_to_rgb

from maskgym.adaptive import _queries
from maskgym.backbones import InputError
from maskgym.backbones.encodings.encoding import Query
from maskgym.backbones.encodings.images import read_image
from maskgym.envs.data.queries import DatasetQueries
from maskgym.eval.demo.uploads import uploaded_query
from maskgym.lmms.requests import Request
from tests.test_bad_data import drawn, encoded

ORIENTATION = 0x0112


def half_clear(mode: str) -> Image.Image:
    """Noise whose left half is transparent."""
    image = drawn("RGBA")
    image.paste(0, (0, 0, 20, 30))
    return image.convert(mode)


def keyed(mode: str) -> Image.Image:
    """Noise with one colour that stands for transparent, as PNG and GIF have it."""
    image = drawn(mode)
    image.info["transparency"] = image.getpixel((0, 0))
    return image


MODES = {
    **{mode: drawn(mode) for mode in ("1", "L", "P", "RGB", "CMYK", "YCbCr", "LAB", "HSV", "RGBX")},
    **{f"{mode} in part transparent": half_clear(mode) for mode in ("LA", "RGBA", "PA")},
    "opaque RGBA": drawn("RGBA"),
    **{f"{mode} with a clear colour": keyed(mode) for mode in ("L", "P", "RGB")},
    "one pixel": drawn(size=(1, 1)),
    "a thin line": drawn(size=(300, 1)),
}
"""What ``transformers`` converts as we do: on white where it is transparent."""

PREMULTIPLIED = {"RGBa": half_clear("RGBA").convert("RGBa"), "La": half_clear("LA").convert("La")}
"""What only Pillow takes, from one mode."""

RAMP = np.linspace(0, 65535, 1200).reshape(30, 40)
DEEP = {
    "I;16": (Image.fromarray(RAMP.astype("<u2")), RAMP.astype(np.uint16) >> 8),
    "I;16B": (Image.fromarray(RAMP.astype(">u2")), RAMP.astype(np.uint16) >> 8),
    "I of 16 bits": (Image.fromarray(RAMP.astype(np.int32)), RAMP.astype(np.uint16) >> 8),
    "I of 8 bits": (Image.fromarray((RAMP // 257).astype(np.int32)), RAMP // 257),
    "I;16 of 8 bits": (Image.fromarray((RAMP // 257).astype(np.uint16)), RAMP // 257),
    "F to 1": (Image.fromarray((RAMP / 65535).astype(np.float32)), np.round(RAMP / 257)),
    "F to 255": (Image.fromarray((RAMP // 257).astype(np.float32)), RAMP // 257),
    "F to 65535": (Image.fromarray(RAMP.astype(np.float32)), RAMP // 256),
    "F of ones": (Image.fromarray(np.ones((30, 40), np.float32)), np.full((30, 40), 255)),
    "I of nothing": (Image.new("I", (40, 30)), np.zeros((30, 40))),
}
"""Deeper than 8 bits, each with its grey in 8 bits; Pillow cuts off what is above 255."""


def as_arrays(image: Image.Image) -> np.ndarray:
    return convert_to_rgb(image, return_numpy=True)


def expected(name: str) -> np.ndarray:
    if name in MODES:
        return as_arrays(MODES[name])
    if name in PREMULTIPLIED:
        return as_arrays(PREMULTIPLIED[name].convert({"RGBa": "RGBA", "La": "LA"}[name]))
    return np.repeat(DEEP[name][1].astype(np.uint8)[..., None], 3, axis=2)


def image_named(name: str) -> Image.Image:
    return {**MODES, **PREMULTIPLIED, **{deep: image for deep, (image, _) in DEEP.items()}}[name]


def from_data(image, feature=None):
    """As the one image of a data set."""
    rows = {"image": [image], "question": ["what?"], "answers": [["red"]]}
    features = {"image": feature or datasets.Image(), "question": Value("string"), "answers": List(Value("string"))}
    return DatasetQueries(datasets.Dataset.from_dict(rows, features=Features(features)), "odd", "test")


def from_harness(image):
    documents = {"task": {"test": [None]}}
    request = type("", (), {"args": ("what?", {}, lambda _: [image], 0, "task", "test"), "metadata": {}})
    return Request.to_generate(request, documents).query()


DOORS = {
    "a query": lambda image: Query("q", image, "what?").the_image(),
    "AdaptiveVLM": lambda image: _queries(image, "what?")[0].the_image(),
    "lmms-eval": lambda image: from_harness(image).the_image(),
}
"""Where images come in as Pillow's."""


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("name", [*MODES, *PREMULTIPLIED, *DEEP])
def test_every_mode_keeps_its_picture(name, door):
    shown = DOORS[door](image_named(name))
    assert shown.mode == "RGB" and np.array_equal(np.asarray(shown), expected(name))


FILES = [
    *[(name, "PNG") for name in ("1", "L", "P", "RGB", "LA in part transparent", "RGBA in part transparent", "I;16")],
    *[(f"{mode} with a clear colour", "PNG") for mode in ("L", "P", "RGB")],
    *[(name, "TIFF") for name in ("CMYK", "YCbCr", "LAB", "RGBA in part transparent", "I;16", "I;16B", "I of 16 bits")],
    *[(name, "TIFF") for name in ("F to 1", "F to 255", "1", "one pixel")],
    *[(name, "WEBP") for name in ("RGBA in part transparent", "RGB")],
]


@pytest.mark.parametrize(("name", "format"), FILES)
def test_files_of_every_mode_keep_their_picture(name, format):
    """Held against what Pillow reads of the file, so that what a format itself loses does not count."""
    options = {"lossless": True} if format == "WEBP" else {}
    content = encoded(image_named(name), format, **options)
    with Image.open(io.BytesIO(content)) as opened:
        opened.load()
        whole = expected(name) if name in DEEP else as_arrays(opened)
    for shown in (
        read_image(io.BytesIO(content), "image"),
        from_data({"bytes": content, "path": None})[0].image,
        uploaded_query(content, "a", "what?", 1, 1).image,
    ):
        assert shown.mode == "RGB" and np.array_equal(np.asarray(shown), whole)


def test_colours_of_16_bits_and_grey_of_16_bits_agree():
    """Pillow keeps the upper 8 bits of colours; a grey image says the same."""
    raw = (RAMP.astype(">u2")).tobytes()
    with Image.open(
        io.BytesIO(b"P6 40 30 65535\n" + np.repeat(RAMP.astype(">u2")[..., None], 3, 2).tobytes())
    ) as colour:
        colours = np.asarray(colour.convert("RGB")).astype(int)
    grey = np.asarray(read_image(io.BytesIO(b"P5 40 30 65535\n" + raw), "grey")).astype(int)
    assert np.abs(colours - grey).max() <= 1 and grey.max() == 255 and grey.min() == 0


@pytest.mark.parametrize("turn", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_photographs_stand_upright(turn, format, tmp_path):
    """As ``datasets`` shows them, by path, as bytes, as an upload, and as a picture that was only opened."""
    exif = Image.Exif()
    exif[ORIENTATION] = turn
    content = encoded(drawn(), format, exif=exif)
    (tmp_path / "photo").write_bytes(content)
    theirs = np.asarray(datasets.Image().decode_example({"bytes": content, "path": None}))
    assert theirs.shape == ((30, 40, 3) if turn < 5 else (40, 30, 3))
    shown = [
        from_data(str(tmp_path / "photo"))[0].image,
        from_data({"bytes": content, "path": None})[0].image,
        read_image(tmp_path / "photo", "image"),
        uploaded_query(content, "photo", "what?", 1, 1).image,
        _queries(str(tmp_path / "photo"), "what?")[0].the_image(),
        *(door(Image.open(io.BytesIO(content))) for door in DOORS.values()),
    ]
    assert all(np.array_equal(np.asarray(image), theirs) for image in shown)
    again = Query("q", shown[0], "what?").the_image()
    assert again is shown[0]  # it is not turned once more, nor copied


def test_a_picture_that_is_upright_and_in_rgb_is_the_same_object():
    image = drawn()
    assert Query("q", image, "what?").the_image() is image


def test_the_first_picture_of_an_animation_is_shown():
    first, second = drawn(), drawn(size=(40, 30)).transpose(Image.Transpose.ROTATE_180)
    for format in ("GIF", "WEBP", "PNG", "TIFF"):
        content = encoded(first, format, save_all=True, append_images=[second])
        with Image.open(io.BytesIO(content)) as opened:
            opened.seek(0)
            theirs = as_arrays(opened)
        assert np.array_equal(np.asarray(read_image(io.BytesIO(content), "image")), theirs)


NOISE = np.asarray(drawn())
GREY = NOISE[..., 0]
ARRAYS = {
    "array of colours": (NOISE, Array3D((30, 40, 3), "uint8"), NOISE),
    "array of any height": (NOISE, Array3D((None, 40, 3), "uint8"), NOISE),
    "array of grey": (GREY, Array2D((30, 40), "uint8"), GREY),
    "array of whole numbers": (NOISE.astype(np.int64), Array3D((30, 40, 3), "int64"), NOISE),
    "nested lists": (NOISE.tolist(), List(List(List(Value("int64")))), NOISE),
    "nested lists of grey": (GREY.tolist(), List(List(Value("uint8"))), GREY),
    "one channel": (GREY[..., None], Array3D((30, 40, 1), "uint8"), GREY),
    "floats to 1": ((NOISE / 255).astype(np.float32), Array3D((30, 40, 3), "float32"), NOISE),
    "floats to 255": (NOISE.astype(np.float64).tolist(), List(List(List(Value("float64")))), NOISE),
    "16 bits": (NOISE.astype(np.uint16) * 257, Array3D((30, 40, 3), "uint16"), NOISE),
    "16 bits of grey": (GREY.astype(np.uint16) * 257, Array2D((30, 40), "uint16"), GREY),
    "truth": (GREY > 99, Array2D((30, 40), "bool"), np.where(GREY > 99, 255, 0)),
    "NumPy as an image": (NOISE, datasets.Image(), NOISE),
}


@pytest.mark.parametrize("name", ARRAYS)
def test_arrays_are_images(name):
    given, feature, meant = ARRAYS[name]
    queries = from_data(given, feature)
    theirs = meant if meant.ndim == 3 else np.repeat(meant[..., None], 3, 2)
    assert np.array_equal(np.asarray(queries[0].image), theirs)
    assert queries.image_key(0) == from_data(given, feature).image_key(0) and queries.by_image() == [[0]]
    changed = np.array(given)[::-1]
    assert queries.image_key(0) != from_data(
        changed.tolist() if isinstance(given, list) else changed, feature
    ).image_key(0)


def test_an_array_with_alpha_is_on_white():
    clear = np.asarray(half_clear("RGBA"))
    shown = from_data(clear, Array3D((30, 40, 4), "uint8"))[0].image
    assert np.array_equal(np.asarray(shown), convert_to_rgb(Image.fromarray(clear), return_numpy=True))


BAD_ARRAYS = {
    "channels first": (
        np.moveaxis(NOISE, 2, 0),
        Array3D((3, 30, 40), "uint8"),
        r"of shape \(3, 30, 40\); .*transpose it",
    ),
    "below zero": (NOISE - 300.0, Array3D((30, 40, 3), "float64"), r"has values from -300 to -45; they must be within"),
    "beyond 16 bits": (NOISE.astype(np.int64) * 1000, Array3D((30, 40, 3), "int64"), "has values from 0 to 255000"),
    "not a number": (np.full((4, 4), np.nan), Array2D((4, 4), "float64"), "has values from nan to nan"),
    "rows of several lengths": ([[1, 2], [3]], List(List(Value("int64"))), "has rows of several lengths"),
    "holes": ([[1, None], [3, 4]], List(List(Value("int64"))), "has values from nan"),
    "two numbers a pixel too many": (np.zeros((4, 4, 5)), Array3D((4, 4, 5), "float64"), r"of shape \(4, 4, 5\)"),
}


@pytest.mark.parametrize("name", BAD_ARRAYS)
def test_arrays_that_are_no_image_are_refused_by_name(name):
    given, feature, words = BAD_ARRAYS[name]
    with pytest.raises(InputError, match=f"^image row 0 of query '0' .*{words}") as caught:
        from_data(given, feature)[0]
    assert len(str(caught.value)) < 250


STORED = {
    "path": (Value("string"), "path"),
    "long path": (Value("large_string"), "path"),
    "bytes": (Value("binary"), "bytes"),
    "many bytes": (Value("large_binary"), "bytes"),
    "mapping": ({"bytes": Value("binary"), "path": Value("string")}, "both"),
    "mapping of a path": ({"path": Value("string")}, {"path"}),
    "undecoded": (datasets.Image(decode=False), "path"),
    "another mode": (datasets.Image(mode="L"), "path"),
}


@pytest.mark.parametrize("name", STORED)
def test_images_are_read_however_they_are_stored(name, tmp_path):
    drawn().save(tmp_path / "a.png")
    path, content = str(tmp_path / "a.png"), (tmp_path / "a.png").read_bytes()
    feature, form = STORED[name]
    given = (
        {"path": path, "bytes": content, "both": {"bytes": content, "path": "a.png"}}.get(form, {"path": path})
        if isinstance(form, str)
        else {"path": path}
    )
    queries = from_data(given, feature)
    assert np.array_equal(np.asarray(queries[0].image), NOISE)
    missing = from_data(None, feature)
    assert missing.by_image() == []
    with pytest.raises(InputError, match="query '0' has no image"):
        missing[0]


@pytest.mark.parametrize("door", DOORS)
def test_pictures_that_cannot_be_decoded_are_refused_by_name(door, tmp_path):
    content = encoded(drawn(), "PNG")
    closed = drawn()
    closed.close()
    for image, words in (
        (Image.open(io.BytesIO(content[:500])), r"cannot be decoded \(.*\); replace or remove it"),
        (Image.new("RGB", (0, 4)), "has no pixels"),
        (Image.fromarray(np.full((4, 4), -1.0, np.float32)), "has values from -1 to -1; they must be within"),
        (closed, "cannot be decoded"),
    ):
        with pytest.raises(InputError, match=f"image of .*{words}"):
            DOORS[door](image)


@pytest.mark.parametrize("text", ["https://example.org/a.png", "data:image/png;base64," + "A" * 10_000, "x" * 10_000])
def test_texts_that_are_no_path_are_refused_in_a_short_line(text):
    with pytest.raises(
        InputError, match=r"is a link|written as text|cannot be decoded \(File name too long\)"
    ) as caught:
        _queries(text, "what?")
    assert len(str(caught.value)) < 400


def test_datasets_turns_a_photograph_as_pillow_does():
    """What these tests are held against does not itself read the image as we do."""
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    with Image.open(io.BytesIO(encoded(drawn(), "PNG", exif=exif))) as opened:
        assert np.array_equal(np.asarray(ImageOps.exif_transpose(opened)), np.rot90(NOISE, -1))
