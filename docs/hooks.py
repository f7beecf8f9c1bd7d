"""What the site does beyond MkDocs: links to and pictures of the repository, a guard against parts from elsewhere."""

from __future__ import annotations

import logging
import re
import shutil
from pathlib import Path
from typing import Any

log = logging.getLogger("mkdocs.hooks")

PICTURE = re.compile(r"!\[(?P<words>[^\]]*)\]\(\.\./(?P<path>[^)]+)\)")
TO_REPOSITORY = re.compile(r"\[(?P<words>[^\]]+)\]\((?:\.\./)+(?P<path>[^)]+)\)")
FROM_ELSEWHERE = re.compile(r"<(?:script|link|img|iframe)\b[^>]*?(?:src|href)=[\"']?((?:https?:)?//[^\"'\s>]+)")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """A file of the repository that is no page of the site is named by its path there; a picture is shown."""

    def named(link: re.Match[str]) -> str:
        words, path = link["words"], link["path"]
        return f"`{path}`" if words == path else f"{words} (`{path}`)"

    return TO_REPOSITORY.sub(named, PICTURE.sub(r'<img alt="\g<words>" src="\g<path>">', markdown))


def on_post_build(config: Any, **_: Any) -> None:
    """Pictures of the repository that pages show come with the site."""
    docs = Path(config["docs_dir"])
    for page in docs.glob("*.md"):
        for found in PICTURE.finditer(page.read_text()):
            place = Path(config["site_dir"]) / found["path"]
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(docs.parent / found["path"], place)


def on_post_page(output: str, page: Any, **_: Any) -> str:
    """Pages are to be read without a network: a script, style sheet or picture from elsewhere is a warning."""
    for address in FROM_ELSEWHERE.findall(output):
        log.warning("%s loads %s; put a copy into docs/", page.file.src_uri, address)
    return output
