"""Text as documents: order, splits, hash, and what is refused."""

from __future__ import annotations

import json
import sysconfig
from pathlib import Path

import pytest

from gwt_dist.train import corpus
from gwt_dist.train.corpus import in_validation, is_dataset_name, load_corpus


def write(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def test_standard_library_is_split_by_path() -> None:
    found = load_corpus("stdlib")
    root = Path(sysconfig.get_path("stdlib"))
    held_out = (root / "textwrap.py").read_text(encoding="utf-8")
    assert in_validation("textwrap.py") == (held_out in found.validation)
    assert in_validation("textwrap.py") != (held_out in found.train)
    documents = len(found.train) + len(found.validation)
    assert documents > 500
    assert 0.03 < len(found.validation) / documents < 0.07
    assert len(found.sha256) == 64


def test_standard_library_leaves_out_packages_and_builds(tmp_path: Path) -> None:
    names = ("b.py", "a/c.txt", "a/d.rst", "a/e.so", "site-packages/f.py", "config-3.11/g.py")
    write(tmp_path, dict.fromkeys((*names, "__pycache__/h.py"), "text"))
    (tmp_path / "latin.py").write_bytes(b"# caf\xe9\n")
    documents = list(corpus._stdlib_documents(tmp_path))
    assert [name for name, _ in documents] == ["a/c.txt", "a/d.rst", "b.py"]


def test_folder_glob_and_file_give_the_same_text(tmp_path: Path) -> None:
    folder = write(tmp_path / "text", {"a.txt": "one\n", "b/c.txt": "two\n", "d.md": "not text"})
    whole = load_corpus(str(folder))
    assert sorted(whole.train + whole.validation) == ["one\n", "two\n"]
    assert load_corpus(str(folder / "**" / "*.txt")) == corpus.Corpus(
        source=str(folder / "**" / "*.txt"),
        train=whole.train,
        validation=whole.validation,
        sha256=whole.sha256,
    )


def test_one_long_file_is_cut_at_line_ends(tmp_path: Path) -> None:
    text = "".join(f"line {i}\n" for i in range(40000))
    path = write(tmp_path, {"long.txt": text}) / "long.txt"
    found = load_corpus(str(path))
    assert len(found.validation) >= 1
    assert sum(map(len, found.train + found.validation)) == len(text)
    assert all(piece.endswith("\n") for piece in found.train + found.validation)


def test_jsonl_lines_are_documents(tmp_path: Path) -> None:
    texts = [f"document {i}\u2028with an odd separator" for i in range(50)]
    lines = "\n".join(json.dumps({"text": t, "id": 1}, ensure_ascii=False) for t in texts) + "\n\n"
    write(tmp_path, {"a.jsonl": lines})
    found = load_corpus(str(tmp_path))
    assert sorted(found.train + found.validation) == sorted(texts)


def test_sha256_covers_texts_and_names(tmp_path: Path) -> None:
    folder = write(tmp_path, {"a.txt": "one", "b.txt": "two"})
    before = load_corpus(str(folder)).sha256
    assert load_corpus(str(folder)).sha256 == before
    write(folder, {"b.txt": "twO"})
    changed = load_corpus(str(folder)).sha256
    (folder / "b.txt").rename(folder / "c.txt")
    assert len({before, changed, load_corpus(str(folder)).sha256}) == 3


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "holds 0 files, none of them .txt or .jsonl"),
        ({"a.md": "text"}, "holds 1 files, none of them .txt or .jsonl"),
        ({"a.txt": "one"}, "holds 1 documents with text; at least 2"),
        ({"a.txt": "", "b.txt": ""}, "holds 0 documents with text"),
        (
            {"a.jsonl": '{"text": "x"}\n{"txt": "y"}\n'},
            r'a\.jsonl:2: expected an object with a "te',
        ),
        ({"a.jsonl": '{"text": "x"}\n{"text": 3}\n'}, r'a\.jsonl:2: expected an object with a "te'),
        ({"a.jsonl": "{\n"}, r"a\.jsonl:1: not a line of JSON"),
    ],
)
def test_folder_without_usable_text(tmp_path: Path, files: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_corpus(str(write(tmp_path, files)))


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such folder, file or glob match"):
        load_corpus(str(tmp_path / "nothing"))


def test_text_that_is_not_utf8_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match=r"a\.txt cannot be read as UTF-8"):
        load_corpus(str(tmp_path))


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("allenai/c4", True),
        ("allenai/c4:en", True),
        ("stdlib", False),
        ("./text", False),
        ("/data/text", False),
        ("text/*.txt", False),
        ("text/part.jsonl", False),
        ("a/b/c", False),
        ("here/missing", False),
    ],
)
def test_dataset_names(spec: str, expected: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    assert is_dataset_name(spec) == expected
