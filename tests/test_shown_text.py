"""Pages show what others have written as text: no markup of theirs, and no paths of this machine."""

import importlib.util
import re
from dataclasses import replace

import pytest
from PIL import Image

from maskgym.backbones import InputError
from maskgym.backbones.backbone import Backbone
from maskgym.backbones.encodings.encoding import Query
from maskgym.eval import cli
from maskgym.eval.demo.command import PAGE, Demo, Served
from maskgym.eval.demo.comparison import Comparison
from maskgym.eval.experiment.claims import Answer
from maskgym.eval.experiment.page import Picture, write_page
from maskgym.eval.experiment.tables import Table
from tests.conftest import build

SCRIPT = "<script>alert(1)</script>"
LINK = "![x](https://example.org/seen) [y](javascript:z) :red[w] $a$ `b`"


def test_the_report_escapes_all_that_is_put_into_it(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    picture = Picture(tmp_path / "a.png", f'"{SCRIPT}')
    table = Table(SCRIPT, [[SCRIPT], [SCRIPT]], SCRIPT)
    write_page(
        tmp_path / "report.html",
        title=SCRIPT,
        question=SCRIPT,
        answers=[Answer(SCRIPT, SCRIPT, (SCRIPT, SCRIPT))],
        remarks=[SCRIPT],
        tables=[table],
        pictures=[picture],
        gallery=[replace(picture)],
        missing=[(SCRIPT, SCRIPT)],
        facts={SCRIPT: SCRIPT},
        commands=[SCRIPT],
    )
    page = (tmp_path / "report.html").read_text()
    assert "<script" not in page and page.count("&lt;script&gt;") == 20
    assert 'alt="&#34;&lt;script' in page, "a caption could leave its attribute"


def test_a_terminal_acts_on_nothing_that_a_command_says(capsys):
    """Of names and errors of somebody's: colours, bells, titles, ends of lines, text from right to left."""

    def main():
        raise InputError("policy '\x1b]0;title\x07\x1b[2J\r\n\u202eevil\x9b31m\ud800' with ä and 日本 is unknown")

    with pytest.raises(SystemExit):
        cli.run(main)
    shown = r"\x1b]0;title\x07\x1b[2J \u202eevil\x9b31m\ud800"
    assert capsys.readouterr().err == f"error: policy '{shown}' with ä and 日本 is unknown\n"


@pytest.fixture
def page(monkeypatch, tmp_path):
    """The demo's page with a policy, a VLM, a query and answers of somebody's."""
    if importlib.util.find_spec("streamlit") is None:
        pytest.skip("no Streamlit here")
    from streamlit.testing.v1 import AppTest

    monkeypatch.setattr(Backbone, "_detokenize", lambda *_: f"{SCRIPT} {LINK}")
    backbone = build()
    backbone.name = str(tmp_path / "secret" / f"vlm{LINK}")
    comparison = Comparison("even", backbone)
    comparison.policy.name = f"{SCRIPT} {LINK}"
    query = Query(SCRIPT, Image.new("RGB", (16, 16)), f"{SCRIPT} what?", ("red",), image_key="a")
    monkeypatch.setattr(Served, "now", Served(comparison, [query], Demo()))
    shown = AppTest.from_file(str(PAGE), default_timeout=60).run()
    shown.slider[0].set_value(90).run()
    return shown


@pytest.mark.slow
def test_the_demo_shows_names_and_answers_as_they_are(page, tmp_path):
    marked = [*page.markdown, *page.subheader, *page.error]
    texts = [element.value for element in marked]
    assert not page.exception and sum("script" in text for text in texts) >= 4
    assert not any(getattr(element.proto, "allow_html", False) for element in marked)
    for text in texts:
        plain = re.sub(r"\\.", "", text)  # what is left once escaped characters are gone
        assert not re.search(r"<|!\[|\]\(|:\w+\[w|\$|://", plain), text
        assert str(tmp_path) not in text.replace("\\", ""), "a visitor is told where files are"


def test_the_demo_listens_here_and_shows_no_tracebacks(monkeypatch):
    """What Streamlit is started with."""
    from streamlit.web import cli as streamlit

    given = []
    monkeypatch.setattr(streamlit, "main", given.extend)
    monkeypatch.setattr(Served, "now", None)
    Demo(queries=2, port=8599).run()
    assert {"--server.address=127.0.0.1", "--client.showErrorDetails=none", "--server.maxUploadSize=10"} <= set(given)
    assert Served.now is not None and Served.now.limits.upload_megapixels == 25
