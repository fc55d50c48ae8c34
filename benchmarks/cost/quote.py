"""Copy new numbers of a benchmark page into the tables of README and documentation that quote it.

    python benchmarks/cost/quote.py
    python benchmarks/cost/quote.py benchmarks/histograms.md

A quoted table stands below ``<!-- verbatim: benchmarks/overhead.md -->``. Each of its rows is replaced by the row of
the page with the same first cells, in a table with the same head. Prints the rows that the page no longer has; those
need a hand. Numbers in sentences are left to ``tests/test_docs.py``, which finds those that are wrong.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

#: Cells that name a row, most first.
_NAMES = (2, 1)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line; return the number of rows that were not found."""
    sources = list(sys.argv[1:] if arguments is None else arguments) or ["benchmarks/overhead.md"]
    missing = 0
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        text = path.read_text()
        for source in sources:
            text, lost = quote(text, source, (ROOT / source).read_text())
            for row in lost:
                print(f"{path.relative_to(ROOT)}: {source} has no row for {row}")
            missing += len(lost)
        path.write_text(text)
    return missing


def quote(text: str, source: str, page: str) -> tuple[str, list[str]]:
    """Return a text with the quotations of one page renewed, and the rows that were not found.

    Args:
        text: Text with tables below ``<!-- verbatim: source -->``.
        source: Name of the page in these comments.
        page: Text of the page.
    """
    tables = [found.splitlines() for found in re.findall(r"(?:^\|.*\n)+", page, re.MULTILINE)]
    lost: list[str] = []

    def renew(found: re.Match[str]) -> str:
        head, rule, *rows = found[2].splitlines()
        there = [row for table in tables if table[0] == head for row in table[2:]]
        new = [_same(row, there) for row in rows]
        lost.extend(row for row, other in zip(rows, new, strict=True) if other is None)
        return found[1] + "\n".join([head, rule, *(b or a for a, b in zip(rows, new, strict=True))]) + "\n"

    pattern = rf"(<!-- verbatim: {re.escape(source)} -->\n)((?:\|.*\n)+)"
    return re.sub(pattern, renew, text), lost


def _same(row: str, rows: Sequence[str]) -> str | None:
    """Return the only row with the same first two cells, or with the same first cell; None if there is none."""
    for count in _NAMES:
        found = [other for other in rows if _name(other, count) == _name(row, count)]
        if len(found) == 1:
            return found[0]
    return None


def _name(row: str, count: int) -> list[str]:
    return [cell.strip() for cell in row.strip("|").split("|")[:count]]


if __name__ == "__main__":
    raise SystemExit(main())
