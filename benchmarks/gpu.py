"""All that a GPU can show of this project, in eight minutes and without a network.

Tests, engines, bits of batched products, step times, graphs, products, iterations: each part in a process of its own,
the most important first, every row written at once, so that a run which is cut off has what it had. What is not
installed is a row that says so, and a part that fails is a row with its error; the exit status is 1 if a check failed.
Writes a dated Markdown and JSON into ``benchmarks/results``::

    make gpu
    PYTHONPATH=. python benchmarks/gpu.py --minutes 8
    python benchmarks/gpu.py --device cpu --smoke       # the same code at tiny shapes
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
for folder in (ROOT / "benchmarks", ROOT):  # the package need not be installed
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

import torch  # noqa: E402
from gpu_parts import PARTS, Part  # noqa: E402
from gpu_parts.children import Child, Stopped  # noqa: E402
from gpu_parts.engines import DEEPSPEED, TORCH  # noqa: E402
from gpu_parts.report import Report, table  # noqa: E402
from gpu_parts.setting import NO_TIME, Row, Setting  # noqa: E402

LAST = 5.0  # seconds kept for the end


def main() -> int:
    """Run the parts; the exit status."""
    arguments = parsed()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the part ends too
    end = time.monotonic() + 60 * arguments.minutes - LAST
    report = Report(arguments.output, {key: str(value) for key, value in vars(arguments).items()})
    for part in PARTS:
        if part.name not in ("machine", *arguments.parts):
            continue
        begin = time.monotonic()
        report.begin(part.name, part.title, part.legend)
        seconds = part.seconds
        if begin + 3 > end:
            report.add(part.name, {"case": part.title, "note": NO_TIME}, part.checks)
            continue
        setting = Setting(
            torch.device(arguments.device), arguments.smoke, min(end, begin + seconds), tuple(arguments.engines)
        )
        rows = run(part, setting, report)
        print("\n".join(["", f"## {part.title}", "", *table(rows)]), flush=True)
        report.end(part.name, time.monotonic() - begin)
        if part.name == "machine" and any("error" in row for row in rows):
            return 1  # no such device
    report.complete()
    print(f"\nwritten: {report.paths}; failed: {', '.join(report.failed) or 'nothing'}")
    return int(bool(report.failed))


def run(part: Part, setting: Setting, report: Report) -> list[Row]:
    """The rows of a part, each in the report when it comes."""
    rows: list[Row] = []
    child = Child(part.rows, setting, leads=True)
    try:
        while True:
            # A part looks at the clock between its rows; one that does not come back is ended.
            row = child.receive(setting.deadline + LAST / 2)
            if row is None:
                break
            rows.append(row)
            report.add(part.name, row, part.checks)
    except Stopped as error:
        rows.append({"case": "the rest", "error": str(error)})
        report.add(part.name, rows[-1], part.checks)
    finally:
        child.end()
    return rows


def parsed() -> argparse.Namespace:
    """The command line."""
    names = [part.name for part in PARTS if part.name != "machine"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8.0, help="of the whole run; default: 8")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--smoke", action="store_true", help="tiny shapes and few rounds")
    parser.add_argument("--parts", nargs="*", default=names, choices=names, help="default: all, in this order")
    parser.add_argument(
        "--engines", nargs="*", default=(), choices=(*TORCH, *DEEPSPEED), help="default: all; in a smoke torch's"
    )
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the results")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
