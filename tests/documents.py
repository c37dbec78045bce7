"""The pages of this repository, their fenced blocks, and the commands in these."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for depth in ("*.md", "*/*.md", "*/*/*.md")
    for path in ROOT.glob(depth)
    if not any(part.startswith(".") or part == "runs" for part in path.relative_to(ROOT).parts)
    and not path.parent.is_symlink()  # gwt_dist/configs
)


@dataclass(frozen=True)
class Block:
    """A fenced block: its page, the number of its first line, what follows the fence, and the text."""

    page: str
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"

    def commands(self) -> list[str]:
        """One entry a command: continued lines joined, comments and empty lines dropped."""
        lines = re.sub(r"\\\n\s*", "", self.text).splitlines()
        bare = (re.sub(r"(^|\s+)#.*", "", line).strip() for line in lines)
        return [line for line in bare if line]


def blocks(page: str) -> list[Block]:
    """All fenced blocks of a page, in order. Raises for a fence that is not closed and for blocks by indentation."""
    found: list[Block] = []
    start, language, lines = 0, "", []
    before = ""
    for number, line in enumerate((ROOT / page).read_text(encoding="utf-8").splitlines(), 1):
        if line.lstrip().startswith("```"):
            if start:
                found.append(Block(page, start, language, "\n".join(lines)))
                start = 0
            else:
                start, language, lines = number + 1, line.strip()[3:].strip(), []
        elif start:
            lines.append(line)
        else:
            assert before or not line.startswith("    "), f"{page}:{number} is code by indentation; fence it"
        before = line
    assert not start, f"{page}:{start - 1} opens a block that nothing closes"
    return found


def all_blocks() -> list[Block]:
    return [block for page in PAGES for block in blocks(page)]


def anchors(page: str) -> list[str]:
    """The anchors of a page's headings, as GitHub makes them; the second of equal headings ends in -1, and so on."""
    fenced = {number for block in blocks(page) for number in range(block.line, block.line + block.text.count("\n") + 1)}
    found: list[str] = []
    for number, line in enumerate((ROOT / page).read_text(encoding="utf-8").splitlines(), 1):
        heading = re.fullmatch(r"#{1,6} +(.*?) *#*", line)
        if heading and number not in fenced:
            text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading[1]).lower()
            found.append(re.sub(r"[^\w\- ]", "", text).replace(" ", "-"))
    return [a if found[:i].count(a) == 0 else f"{a}-{found[:i].count(a)}" for i, a in enumerate(found)]
