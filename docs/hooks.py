"""Hooks of mkdocs: pages may link to any file of the repository, and the API page has every public name.

Pages link to tests, measurements and settings by paths that work in a checkout, and the site may stand anywhere. So a
file outside of docs/ that a page links to becomes a part of the site, under tree/: Markdown as a page, whose links are
followed in turn, and all other text as plain text, which every browser shows.
"""

from __future__ import annotations

import ast
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
TREE = "tree/"
API = "api.md"
FENCE = re.compile(r"^( *```.*?^ *```[^\n]*$)", re.M | re.S)
LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#|/)([^)#\s]+)")
SHOWN = {".md", ".png", ".svg"}  # other files get the suffix .txt


def place(file: Path) -> str:
    """Where a file of the repository stands among the sources of the site."""
    if file.is_relative_to(DOCS):
        return file.relative_to(DOCS).as_posix()
    return TREE + file.relative_to(ROOT).as_posix() + ("" if file.suffix in SHOWN else ".txt")


def file_at(source: str) -> Path:
    """The Markdown file that stands at this place of the site."""
    return ROOT / source.removeprefix(TREE) if source.startswith(TREE) else DOCS / source


def change_links(text: str, change: Callable[[str], str]) -> str:
    """The page with `change` of each relative link, without its anchor, outside of fenced blocks."""
    parts = FENCE.split(text)
    parts[::2] = [LINK.sub(lambda found: change(found[1]), part) for part in parts[::2]]
    return "".join(parts)


def target(page: Path, link: str) -> Path:
    """The file that a link of a page names. Raises `ValueError` if the repository has none."""
    file = Path(os.path.normpath(page.parent / link))
    if not file.is_relative_to(ROOT) or not file.is_file():
        raise ValueError(f"{page.relative_to(ROOT)} links to {link}, and there is no such file in the repository")
    return file


def outside(pages: list[Path]) -> list[Path]:
    """All files outside of docs/ to which these pages lead, those to which Markdown among them leads included."""
    found: dict[Path, None] = {}
    todo = list(pages)
    for page in todo:  # grows as pages are found

        def note(link: str, page: Path = page) -> str:
            file = target(page, link)
            if not file.is_relative_to(DOCS) and file not in found:
                found[file] = None
                if file.suffix == ".md":
                    todo.append(file)
            return link

        change_links(page.read_text(encoding="utf-8"), note)
    return list(found)


def as_on_the_site(text: str, source: str) -> str:
    """The text of the page at `source` of the site, its links from there."""
    page, here = file_at(source), os.path.dirname(source) or "."
    return change_links(text, lambda link: os.path.relpath(place(target(page, link)), here))


def missing(html: str) -> list[str]:
    """Names of ``gwt_dist.__all__`` that have no heading of their own in the API page."""
    module = ast.parse((ROOT / "gwt_dist" / "__init__.py").read_text(encoding="utf-8"))
    (names,) = (
        ast.literal_eval(node.value)
        for node in module.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
    )
    assert names
    return [name for name in names if f'id="gwt_dist.{name}"' not in html]


def on_files(files: Any, config: Any) -> Any:
    """Add what pages link to, and what the navigation has, from outside of docs/."""
    from mkdocs.structure.files import File, InclusionLevel

    pages = [Path(file.abs_src_path) for file in files.documentation_pages()]
    named = [file_at(source) for source in re.findall(rf"{TREE}[\w./]+\.md", str(config.nav))]
    for path in dict.fromkeys([*named, *outside([*pages, *named])]):
        inclusion = InclusionLevel.NOT_IN_NAV  # no complaint about those that are not
        files.append(File.generated(config, place(path), abs_src_path=str(path), inclusion=inclusion))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links lead to where their files stand on the site."""
    return as_on_the_site(markdown, page.file.src_uri)


def on_page_content(html: str, page: Any, **_: Any) -> str:
    """Fails where a public name is not on the API page."""
    if page.file.src_uri == API and (names := missing(html)):
        from mkdocs.exceptions import PluginError

        raise PluginError(f"docs/{API} has nothing of {', '.join(names)}, which gwt_dist.__all__ names")
    return html
