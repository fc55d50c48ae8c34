"""Compare two recordings that `record.py` made; the exit code is 1 if they differ.

python tests/recorded/compare.py A.json B.json [--ignore-text] [--only PATTERN]
"""

import argparse
import fnmatch
import json
import sys
from collections.abc import Mapping
from pathlib import Path

_ABSENT = "(nothing)"


def differences(one, other, where=""):
    """Yield the path and both values of each difference; lists of equal length are compared entry by entry."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        for key in [*one, *(key for key in other if key not in one)]:
            place = f"{where} / {key}" if where else str(key)
            yield from differences(one.get(key, _ABSENT), other.get(key, _ABSENT), place)
    elif isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        for index, (mine, its) in enumerate(zip(one, other, strict=True)):
            yield from differences(mine, its, f"{where}[{index}]")
    elif one != other or type(one) is not type(other):
        yield where, one, other


def describe_differences(found, most):
    """Return lines: for each run the number of differences, and the first of them."""
    runs = {}
    for where, one, other in found:
        runs.setdefault(where.split(" / ")[0], []).append((where, one, other))
    lines = []
    for run, own in runs.items():
        lines.append(f"{run}: {len(own)} {'difference' if len(own) == 1 else 'differences'}")
        for where, one, other in own[:most]:
            place = where.partition(" / ")[2] or "the run"
            lines.append(f"    {place}:\n        {_short(one)}\n        {_short(other)}")
        if len(own) > most:
            lines.append(f"    and {len(own) - most} more")
    return lines


def _short(value):
    text = value if value == _ABSENT else json.dumps(value)
    return text if len(text) <= 400 else f"{text[:400]} ... ({len(text)} characters)"


def chosen(runs, pattern):
    """Return the runs whose names match."""
    return {name: run for name, run in runs.items() if fnmatch.fnmatchcase(name, pattern)}


def main(arguments=None):
    """Compare two files; return 1 if they differ."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("one", type=Path)
    parser.add_argument("other", type=Path)
    parser.add_argument("--ignore-text", action="store_true", help="compare facts only, not wording")
    parser.add_argument("--only", default="*", help="pattern of names, as in record.py")
    parser.add_argument("--most", type=int, default=4, help="number of differences shown per run")
    options = parser.parse_args(arguments)
    one, other = (json.loads(path.read_text()) for path in (options.one, options.other))
    if one["versions"] != other["versions"]:
        print(f"Note: recorded with {one['versions']} and with {other['versions']}; bits need not agree.")
    differ = False
    for kind in ("facts",) if options.ignore_text else ("facts", "text"):
        lines = describe_differences(
            differences(*(chosen(file[kind], options.only) for file in (one, other))), options.most
        )
        if lines:
            differ = True
            print(f"== {kind} ==", *lines, sep="\n")
    if not differ:
        print(
            f"{len(one['facts'])} runs, no difference" + (" but maybe of text" if options.ignore_text else "")
        )
    return int(differ)


if __name__ == "__main__":
    sys.exit(main())
