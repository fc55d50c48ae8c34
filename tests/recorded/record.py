"""Record the package's behaviour to the bit, so that two versions of its code can be compared.

    python tests/recorded/record.py OUT.json [--only PATTERN] [--checkout FOLDER] [--keep]

It uses only public names, so that it runs on code with other module names. `compare.py` lists the differences between
two recordings. Facts and text are separate: text is wording, which may change on purpose.
"""

import argparse
import fnmatch
import importlib
import json
import os
import sys
import tempfile
import time
from pathlib import Path

#: Kinds of runs, each a module beside this one with ``names()`` and ``run(name, keep=...)``.
KINDS = {
    "surface": "surface",
    "zoo": "zoo_runs",
    "guard": "guard_runs",
    "trainer": "trainer_runs",
    "sharded": "sharded_runs",
}


def prepare(checkout):
    """Import the package from a checkout and verify that; set one thread, no colours, a fixed width."""
    os.environ.update(OMP_NUM_THREADS="1", COLUMNS="100", NO_COLOR="1", PYTHONPATH=str(checkout))
    os.environ.pop("GRADGUARD", None)
    sys.path[:0] = [str(checkout), str(Path(__file__).parent)]
    for name in ("lightning_gradguard", "benchmarks.zoo"):
        found = Path(importlib.import_module(name).__file__).resolve()
        if checkout not in found.parents:
            raise SystemExit(f"{name} must lie in {checkout}, but it is {found}; set PYTHONPATH={checkout}")
    import torch

    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float32)


def main(arguments=None):
    """Record, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--only", default="*", help="pattern of names, such as 'zoo/*' or 'guard/AGC*'")
    parser.add_argument(
        "--checkout", type=Path, default=Path.cwd(), help="folder of the package; the current one by default"
    )
    parser.add_argument(
        "--keep", action="store_true", help="keep all numbers of each report, not just a digest"
    )
    options = parser.parse_args(arguments)
    out, checkout = options.out.resolve(), options.checkout.resolve()
    prepare(checkout)
    import torch

    facts, text, spent = {}, {}, {}
    began = time.perf_counter()
    home = Path.cwd()
    for kind, module in KINDS.items():
        runs = importlib.import_module(module)
        for name in runs.names():
            full = f"{kind}/{name}"
            if not (fnmatch.fnmatchcase(full, options.only) or options.only in (kind, name)):
                continue
            start = time.perf_counter()
            torch.manual_seed(0)
            with tempfile.TemporaryDirectory() as folder:
                os.chdir(folder)
                try:
                    result = runs.run(name, keep=options.keep)
                finally:
                    os.chdir(home)
            facts[full], text[full] = result.facts, result.text
            spent[full] = time.perf_counter() - start
    if not facts:
        raise SystemExit(f"--only must match at least one name, got {options.only!r}")
    versions = {"torch": torch.__version__, "python": sys.version.split()[0]}
    out.write_text(json.dumps({"versions": versions, "facts": facts, "text": text}, indent=1) + "\n")
    slowest = sorted(spent, key=spent.get)[-5:]
    print(f"{len(facts)} runs in {time.perf_counter() - began:.0f} s; slowest: ", end="")
    print(", ".join(f"{name} {spent[name]:.0f} s" for name in reversed(slowest)))


if __name__ == "__main__":
    main()
