"""The site of docs/, as far as it can be known without mkdocs; `make docs` builds it, and stops at the first fault."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest
import yaml

import gwt_dist
from documents import ROOT


@pytest.fixture(scope="module")
def hooks() -> ModuleType:
    spec = importlib.util.spec_from_file_location("hooks", ROOT / "docs" / "hooks.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_api_page_has_every_public_name_or_is_refused(hooks: ModuleType) -> None:
    """What `make docs` asks of the page that it built: a heading for each name, with mkdocstrings' anchor."""
    headings = [f'<h2 id="gwt_dist.{name}" class="doc">' for name in gwt_dist.__all__]
    assert hooks.missing("".join(headings)) == []
    for number, name in enumerate(gwt_dist.__all__):
        assert hooks.missing("".join(headings[:number] + headings[number + 1 :])) == [name]
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    assert re.search(r"^::: gwt_dist$", page, re.M)
    modules = {path.stem for path in (ROOT / "gwt_dist" / "integrations").glob("*.py")}
    modules -= {"__init__", "engaged", "portable"}  # the last is exported by transformers
    assert {f"gwt_dist.integrations.{name}" for name in modules} <= set(re.findall(r"^::: (\S+)$", page, re.M))


def test_links_out_of_docs_lead_into_the_site(hooks: ModuleType) -> None:
    text = "[a](../tests/test_faq.py) [b](plan.md#what-fits) [c](../README.md#use) [d](https://x.y/z.md)\n"
    text += "```text\n[e](no.md)\n```\n![f](../benchmarks/results/quality/curves.png)\n[g](#lora)\n"
    assert hooks.as_on_the_site(text, "faq.md") == (
        "[a](tree/tests/test_faq.py.txt) [b](plan.md#what-fits) [c](tree/README.md#use) [d](https://x.y/z.md)\n"
        "```text\n[e](no.md)\n```\n![f](tree/benchmarks/results/quality/curves.png)\n[g](#lora)\n"
    )
    back = hooks.as_on_the_site("[a](../docs/plan.md#what-fits) [b](fsdp2.yaml)", "tree/configs/README.md")
    assert back == "[a](../../plan.md#what-fits) [b](fsdp2.yaml.txt)"
    for link in ("no.md", "../no.py", "../../README.md", "../configs"):
        with pytest.raises(ValueError, match=re.escape(f"docs/faq.md links to {link}, and there is no such file")):
            hooks.as_on_the_site(f"[a]({link})", "faq.md")


def test_what_a_linked_page_links_to_is_there_too(hooks: ModuleType) -> None:
    found = {path.relative_to(ROOT).as_posix() for path in hooks.outside([ROOT / "docs" / "quality.md"])}
    assert "benchmarks/results/2026-11-26-first-study.md" in found
    assert "benchmarks/results/quality/first-study-table.md" in found  # which that page links to
    assert not any(name.startswith("docs/") for name in found)


def test_every_page_is_in_the_navigation() -> None:
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    navigation = yaml.safe_load(text[text.index("\nnav:") :])["nav"]
    pages = [page for section in navigation for value in section.values() for page in places(value)]
    assert len(pages) == len(set(pages))
    assert {path.name for path in (ROOT / "docs").glob("*.md")} == {page for page in pages if "/" not in page}
    assert [page for page in pages if "/" in page and not (ROOT / page.removeprefix("tree/")).is_file()] == []


def places(value: str | list[dict[str, str]]) -> list[str]:
    return [value] if isinstance(value, str) else [Path(page).as_posix() for one in value for page in one.values()]
