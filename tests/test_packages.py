"""Text of installed packages: what is taken, once, in which order, on which side, and how much of it."""

from __future__ import annotations

import hashlib
import os
import site
import sysconfig
from pathlib import Path

import pytest

from gwt_dist.train import packages
from gwt_dist.train.corpus import in_validation, is_dataset_name, load_corpus

SENTENCE = "a line of words that somebody wrote\n"


def place(monkeypatch: pytest.MonkeyPatch, *folders: Path) -> None:
    monkeypatch.setattr(packages, "roots", lambda: list(folders))


def many(folder: Path, count: int = 60) -> Path:
    """`count` files of 1000 bytes, each different."""
    folder.mkdir(parents=True)
    for i in range(count):
        (folder / f"{i}.py").write_text((f"number = {i:04d}  # one of many\n" * 40)[:1000])
    return folder


def test_source_and_prose_are_taken_and_what_programs_wrote_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paragraph = SENTENCE.replace("\n", " ") * 40
    taken = {
        "a.py": "x = 1  # a comment\n",
        "b/c.pyi": SENTENCE,
        "b/d.cuh": SENTENCE * 2,
        "b/e.md": paragraph,  # a line may be a paragraph
        "b/f.txt": "à la carte, naïve\n",
    }
    left = {
        "a.json": SENTENCE * 3,
        "b.txt": "1.5 2.5 3.5 x\n" * 50,
        "c.py": (paragraph[:200] + "\n") * 9,
        "d.py": "x = 1\n" * 600 + f"table = '{'a' * 1000}'\n",
        "e.py": "",
        "f.py": "# " + "é" * 40 + "\n",
        "__pycache__/g.py": SENTENCE * 4,
        "config-3.11/g.py": SENTENCE * 5,
        "some.dist-info/g.txt": SENTENCE * 6,
        "site-packages/g.py": SENTENCE * 7,
    }
    for name, text in (taken | left).items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    (tmp_path / "large.py").write_text(SENTENCE * (packages.FILE_BYTES // len(SENTENCE) + 1))
    (tmp_path / "latin.py").write_bytes(b"# letters, and caf\xe9\n")
    os.mkfifo(tmp_path / "pipe.py")  # opening it would wait for ever
    (tmp_path / "b" / "up").symlink_to(tmp_path)
    (tmp_path / "round.py").symlink_to(tmp_path / "round.py")
    (tmp_path / "again.py").symlink_to(tmp_path / "a.py")
    place(monkeypatch, tmp_path)
    found = list(packages.package_documents(None))
    assert sorted(text for _, text in found) == sorted(taken.values())
    assert [name for name, _ in found] == sorted(hashlib.sha256(t.encode()).hexdigest() for t in taken.values())


def test_the_same_files_elsewhere_are_the_same_corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = many(tmp_path / "one"), tmp_path / "two"
    place(monkeypatch, one)
    whole = load_corpus("packages")
    assert len(whole.train) + len(whole.validation) == 60 and whole.validation
    for i, file in enumerate(sorted(one.iterdir())):
        copy = two / f"folder{i % 7}" / f"other{i}.h"
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(file.read_bytes())
    place(monkeypatch, two, one)
    assert load_corpus("packages") == whole
    for side, held_out in ((whole.train, False), (whole.validation, True)):
        assert {in_validation(hashlib.sha256(text.encode()).hexdigest()) for text in side} == {held_out}
    (one / "0.py").write_text(SENTENCE)
    place(monkeypatch, one)
    assert load_corpus("packages").sha256 != whole.sha256


def test_a_cap_takes_the_first_and_a_larger_one_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place(monkeypatch, many(tmp_path / "one"))
    monkeypatch.setattr(packages, "MEGABYTE", 10_500)
    whole, first, more = (list(packages.package_documents(n)) for n in (None, 1, 2))
    assert first == whole[:10] and more == whole[:21]
    assert list(packages.package_documents(100)) == whole
    assert load_corpus("packages:1").sha256 != load_corpus("packages:2").sha256


def test_roots_are_those_that_are_there_each_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = packages.roots()
    assert Path(os.path.realpath(os.__file__)).parent in found
    assert Path(os.path.realpath(pytest.__file__)).parents[1] in found
    base = tmp_path / "base" / "site-packages"
    base.mkdir(parents=True)
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib64").symlink_to(tmp_path / "lib")
    places = {"purelib": "lib", "platlib": "lib64", "include": "absent"}
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path / places[name]) if name in places else None)
    monkeypatch.setattr(site, "getsitepackages", lambda prefixes: [str(base), str(tmp_path / "absent")])
    assert packages.roots() == [tmp_path / "lib", base]


@pytest.mark.parametrize("spec", ["packages:", "packages:0", "packages:much", "packages:1.5", "packages:-1"])
def test_a_cap_that_is_no_number(spec: str) -> None:
    with pytest.raises(ValueError, match="whole number N of megabytes"):
        load_corpus(spec)
    assert not is_dataset_name(spec) and packages.is_packages(spec)
