"""What all pages have in common: the frame, the style, and how a page becomes a file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

# Distinct for most kinds of colour blindness, on white and on black.
COLOURS = ("#4477aa", "#66ccee", "#228833", "#ccbb44", "#ee6677", "#aa3377", "#888888")

# The policy makes the browser refuse to fetch or to send anything, whatever a page holds.
_FRAME = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; form-action 'none'; base-uri 'none';
 style-src 'unsafe-inline'{% block policy %}{% endblock %}">
<title>{{ title }}</title>
<style>
 :root { color-scheme: light dark; }
 body { font: 15px/1.5 system-ui, "Liberation Sans", sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
 h1 { font-size: 1.3rem; } h2 { font-size: 1.05rem; margin-top: 2rem; }
 table { border-collapse: collapse; width: 100%; } td, th { padding: .2rem .6rem; text-align: right; }
 td:first-child, th:first-child, td.text { text-align: left; } tr { border-bottom: 1px solid #8884; }
 .legend span, .legend label { display: inline-block; margin-right: 1rem; }
 .legend i { display: inline-block; width: .8em; height: .8em; margin-right: .3em; }
 {% block style %}{% endblock %}
</style></head><body>
<h1>{{ title }}</h1>
{% block body %}{% endblock %}
</body></html>
"""


def render(template: str, **values: Any) -> str:
    """A page from a template of jinja2 that extends "frame"; all values are escaped, and none may be missing."""
    from jinja2 import DictLoader, Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, loader=DictLoader({"frame": _FRAME}))
    return environment.from_string('{% extends "frame" %}' + template).render(**values)


def check_free(path: Path, force: bool) -> None:
    """Raise `ValueError` where `write_page` would, for what can be known before the page is there."""
    if path.is_dir():
        raise ValueError(f"{path} is a folder; name a file for the page")
    if path.exists() and not force:
        raise ValueError(f"{path} is there already and would be overwritten; name another file, or give --force")


def write_page(path: Path, text: str, *, force: bool) -> None:
    """Write a page that is either complete or not there.

    Raises:
        ValueError: it is there already and `force` is false, or it cannot be written.
    """
    check_free(path, force)
    fresh = path.with_name(path.name + ".new")
    try:
        fresh.write_text(text, encoding="utf-8")
        os.replace(fresh, path)
    except OSError as error:
        raise ValueError(f"{path} cannot be written: {error.strerror}") from error


def human(number: int) -> str:
    """Bytes in powers of 1024, three figures."""
    value, unit = float(number), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB", "PiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{number} B" if unit == "B" else f"{value:.4g} {unit}" if value >= 1000 else f"{value:.3g} {unit}"
