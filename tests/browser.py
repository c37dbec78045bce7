"""A page as a browser shows it: what is in the document after its scripts ran, and what they said."""

from __future__ import annotations

import contextlib
import html.parser
import os
import re
import shutil
import signal
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
# The sandbox needs what containers do not give, and /dev/shm is small in them.
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--enable-logging=stderr", "--v=0")


@dataclass
class Element:
    """One element of a document, and the text right in it."""

    tag: str
    attributes: dict[str, str]
    within: tuple[str, ...]  # ids and classes of what it is in
    text: str = ""


class Document(html.parser.HTMLParser):
    """All elements in order, and where a document would reach out."""

    _VOID = ("meta", "input", "br", "hr", "img", "link", "base", "source", "area", "col", "embed", "track", "wbr")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[Element] = []
        self._open: list[Element] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = {name: value or "" for name, value in attrs}
        words = [w for e in self._open for w in (e.attributes.get("id", ""), *e.attributes.get("class", "").split())]
        self.elements.append(Element(tag, attributes, tuple(word for word in words if word)))
        if tag not in self._VOID:
            self._open.append(self.elements[-1])

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self._VOID:
            self._open.pop()

    def handle_endtag(self, tag: str) -> None:
        while self._open and self._open.pop().tag != tag:
            pass

    def handle_data(self, data: str) -> None:
        if self._open:
            self._open[-1].text += data

    @property
    def outside(self) -> list[str]:
        """What would be fetched, or gone to."""
        names = ("src", "href", "xlink:href", "data", "action", "formaction", "srcset", "poster", "background")
        values = [e.attributes[name] for e in self.elements for name in names if name in e.attributes]
        return [value for value in values if not value.startswith(("#", "data:"))]

    def find(self, tag: str, class_: str = "", within: str = "") -> list[Element]:
        """Elements of a tag, with a class, in what has an id or a class."""
        return [
            e
            for e in self.elements
            if e.tag == tag
            and (not class_ or class_ in e.attributes.get("class", "").split())
            and (not within or within in e.within)
        ]

    def texts(self, tag: str, class_: str = "", within: str = "") -> list[str]:
        """Their text."""
        return [e.text.strip() for e in self.find(tag, class_, within)]


@dataclass
class Shown(Document):
    """A document after its scripts ran, and their messages, errors and refusals among them."""

    dom: str
    console: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__(self.dom)


def browser() -> str:
    """Its program; skips the test where there is none."""
    found = next((path for name in NAMES if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip("there is no chromium (Debian: chromium; .ci/run installs it)")
    return found


def shown(page: Path, folder: Path, width: int = 1280) -> Shown:
    """Open a page in a headless chromium, whose own files go into a `folder`."""
    size, profile = f"--window-size={width},1000", f"--user-data-dir={folder / 'profile'}"
    command = [browser(), *FLAGS, size, profile, "--virtual-time-budget=5000", "--dump-dom", page.as_uri()]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        out, err = process.communicate(timeout=60)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert process.returncode == 0 and out, err
    return Shown(out, re.findall(r":CONSOLE:\d+\] (.*)", err))
