"""The demo page: clicked through in a real browser, and what it says where it cannot start or an upload is no use."""

import importlib.util
import io
import socket
import subprocess
import sys
import time
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import numpy as np
import pytest
from PIL import Image, ImageDraw

import maskgym.eval.__main__ as eval_main
from maskgym.backbones.encodings.encoding import Query
from maskgym.common.errors import InputError
from maskgym.eval.demo.comparison import Comparison
from maskgym.eval.demo.uploads import uploaded_query
from maskgym.eval.measure.plan_pictures import plan_png
from tests.browser import CHROMIUM, browser
from tests.conftest import command

ROOT = Path(__file__).parent.parent
IDLE = "document.querySelector('[data-testid=stApp][data-test-script-state=notRunning]') !== null"
PICTURES = "[...document.querySelectorAll('[data-testid=stImage] img')].map(image => image.src)"
NO_PAGE = CHROMIUM is None or importlib.util.find_spec("streamlit") is None


def triangle(size=64):
    image = Image.new("RGB", (size, size), "white")
    ImageDraw.Draw(image).polygon([(10, 50), (30, 14), (50, 50)], fill="red")
    return image


@pytest.fixture(scope="module")
def address(place, tmp_path_factory):
    """Of a page that takes uploads of 1 MB and 0.25 million pixels."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("demo") / "log"
    options = ["--backbone", "tiny", "--data", place / "data", "--port", port, "--upload-megabytes", 1]
    line = [sys.executable, "-m", "maskgym.eval", "demo", "even", *options, "--upload-megapixels", 0.25]
    with log.open("w") as output:
        server = subprocess.Popen([*map(str, line)], cwd=ROOT, stdout=output, stderr=output)
    try:
        ends = time.monotonic() + 120
        while True:
            try:
                urlopen(f"http://127.0.0.1:{port}/").close()
                break
            except URLError:
                assert time.monotonic() < ends and server.poll() is None, log.read_text()
                time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/"
    finally:
        server.terminate()
        server.wait(20)


@pytest.fixture(scope="module")
def page(address, tmp_path_factory):
    with browser(tmp_path_factory.mktemp("browser"), address) as tab:
        tab.wait(f"{PICTURES}.length == 3")
        yield tab


def upload(page, path):
    page.choose_file("input[type=file]", path)
    page.wait(f"document.body.innerText.includes({path.name!r})")


def ask(page, question):
    """About an upload, nothing of which has been asked yet."""
    page.wait(f"document.body.innerText.includes('Ask something about the image.') && {IDLE}")
    page.run("document.querySelector('input[aria-label=Question]').focus()")
    page.write(question)
    page.press("Enter", 13)
    page.wait(f"{PICTURES}.length == 3 && {IDLE}")


@pytest.mark.skipif(NO_PAGE, reason="no Chromium or no Streamlit here")
def test_upload_ask_and_slide_change_the_picture(page, tmp_path):
    full, policy, _ = page.run(PICTURES)
    assert "64 of 64 visual tokens" in page.text() and full != policy
    triangle().save(tmp_path / "triangle.png")
    upload(page, tmp_path / "triangle.png")
    ask(page, "what is the color of the shape?")
    asked = page.run(PICTURES)
    assert asked[0] != full and asked[1] != policy, "the pictures are not of the upload"
    assert page.text().count("red") >= 2, "tiny does not see the triangle's colour"
    assert "100.0% of the LLM FLOPs" in page.text() and "ms to the first token" in page.text()
    page.run("document.querySelector('input[type=range]').focus()")
    for _ in range(10):
        page.press("ArrowLeft", 37)
    page.wait(f"{PICTURES}[1] && {PICTURES}[1] != {asked[1]!r} && {IDLE}")
    page.wait("/\\b3[89]\\.\\d% of the LLM FLOPs/.test(document.body.innerText)")
    slid = page.wait(f"{PICTURES}.length == 3 && {IDLE} && {PICTURES}")
    assert slid[0] == asked[0] and slid[1] != asked[1] and slid[2] != asked[2], "the full model follows no budget"
    page.screenshot(tmp_path / "page.png")  # to look at


@pytest.mark.skipif(NO_PAGE, reason="no Chromium or no Streamlit here")
def test_what_cannot_be_shown_is_said(page, tmp_path):
    (tmp_path / "notes.png").write_text("no image")
    Image.new("RGB", (1000, 1000)).save(tmp_path / "large.png")
    noise = np.random.default_rng(0).integers(0, 256, (700, 700, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "heavy.png")
    for name, words in (
        ("notes.png", "upload 'notes.png' cannot be decoded"),
        ("large.png", "upload 'large.png' has 1,000 x 1,000 pixels; at most 0.25 million are taken"),
        ("heavy.png", "File must be 1.0MB or smaller."),
    ):
        upload(page, tmp_path / name)
        page.wait(f"document.body.innerText.includes({words!r})")
    triangle().save(tmp_path / "small.png")
    upload(page, tmp_path / "small.png")
    ask(page, "what is it?")
    page.run("document.querySelector('input[type=range]').focus()")
    page.press("Home", 36)
    page.wait("document.body.innerText.includes('the least budget here is')")
    assert len(page.wait(f"{IDLE} && {PICTURES}")) == 1, "the full model is shown all the same"


@pytest.mark.skipif(NO_PAGE, reason="no Chromium or no Streamlit here")
def test_other_addresses_are_not_listened_on(address):
    port = int(address.rstrip("/").rpartition(":")[2])
    with pytest.raises(OSError), socket.create_connection(("127.0.0.2", port), timeout=5):
        pass


@pytest.mark.slow
def test_sides_are_remembered_by_image_question_and_budget(tiny):
    comparison = Comparison("even", tiny)
    query, other = (Query("u", triangle(), f"what {word} is the shape?", image_key="t") for word in ("color", "size"))
    first = comparison.side(comparison.policy, query, 0.5)
    assert comparison.side(comparison.policy, query, 0.5) is first
    for planner, asked, budget in (
        (comparison.policy, query, 0.6),
        (comparison.policy, other, 0.5),
        (comparison.full, query, 0.5),
    ):
        assert comparison.side(planner, asked, budget) is not first
    full = comparison.side(comparison.full, query, 0.5)
    assert full is comparison.side(comparison.full, query, 0.6) and full.reply.llm_flops_ratio == 1
    assert first.reply.llm_flops_ratio <= 0.5 and first.ttft_ms > 0 and first.visual_tokens == 64
    assert "full" not in comparison.baselines and {"random", "fastv", "divprune"} < set(comparison.baselines)


def test_a_picture_shows_what_is_kept():
    """Of a white image, the first of four tokens and one of two heads kept: light and dark as they should be."""
    tokens, heads = np.array([True, False, False, False]), np.array([[True, False]])
    drawn = Image.open(io.BytesIO(plan_png(Image.new("RGB", (8, 8), "white"), tokens, heads))).convert("RGBA")
    pixels = np.asarray(drawn)
    colors = {tuple(pixel) for pixel in pixels[pixels[..., 3] == 255]}
    assert {(255, 255, 255, 255), (63, 63, 63, 255), (0x1F, 0x77, 0xB4, 255), (0xDD, 0xDD, 0xDD, 255)} <= colors
    dark = (pixels[..., :3] == 63).all(2).sum()
    light = (pixels == 255).all(2).sum()
    assert 2.8 < dark / light < 3.2
    other = plan_png(Image.new("RGB", (8, 8), "white"), ~tokens, heads)
    assert not np.array_equal(np.asarray(Image.open(io.BytesIO(other)).convert("RGBA")), pixels)


def content(image, **options):
    file = io.BytesIO()
    image.save(file, "PNG", **options)
    return file.getvalue()


def test_uploads_are_turned_as_their_camera_says():
    exif = Image.Exif()
    exif[0x0112] = 6  # stored on its left side
    image = Image.new("RGB", (40, 20), "red")
    query = uploaded_query(content(image, exif=exif), "photo.png", "what?", 1, 1)
    assert query.image.size == (20, 40) and (query.id, query.question) == ("photo.png", "what?")
    assert query.image_key != uploaded_query(content(image), "photo.png", "what?", 1, 1).image_key


@pytest.mark.parametrize(
    ("file", "megabytes", "megapixels", "words"),
    [
        (b"rubbish", 1, 1, "upload 'a.png' cannot be decoded"),
        (content(Image.new("RGB", (100, 100)))[:60], 1, 1, "upload 'a.png' cannot be decoded"),
        (b"0" * 2_500_000, 2, 1, r"upload 'a.png' has 2\.5 MB; at most 2 are taken: scale it down"),
        (content(Image.new("RGB", (100, 101))), 1, 0.01, r"has 100 x 101 pixels; at most 0\.01 million are taken"),
    ],
)
def test_uploads_beyond_the_limits_are_named(file, megabytes, megapixels, words):
    with pytest.raises(InputError, match=words):
        uploaded_query(file, "a.png", "what?", megabytes, megapixels)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--queries", "0"], "--queries is 0; it must be at least 1"),
        (["--upload-megapixels", "0"], "--upload-megapixels is 0; it must be above 0"),
        (["--upload-megabytes", "0"], "--upload-megabytes is 0; it must be at least 1"),
        (["--port", "99999"], "--port is 99999; it must be between 1 and 65535"),
        (["--host", "203.0.113.1"], "cannot listen on 203.0.113.1, port 8501"),
    ],
)
def test_bad_options_end_with_status_2_and_one_line(monkeypatch, capsys, options, words):
    with pytest.raises(SystemExit) as caught:
        command(monkeypatch, eval_main.main, "demo", *options)
    errors = capsys.readouterr().err.splitlines()
    assert caught.value.code == 2 and len(errors) == 1 and words in errors[0]


def test_a_port_that_is_taken_is_named(monkeypatch, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(SystemExit):
        command(monkeypatch, eval_main.main, "demo", "--port", taken.getsockname()[1])
    assert "give another --port or --host" in capsys.readouterr().err


def test_without_the_extra_one_line_names_it(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "streamlit", None)
    with pytest.raises(SystemExit) as caught:
        command(monkeypatch, eval_main.main, "demo")
    errors = capsys.readouterr().err.splitlines()
    assert caught.value.code == 2 and len(errors) == 1 and "pip install 'maskgym[demo]'" in errors[0]
