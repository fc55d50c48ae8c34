"""Start Python programs for tests by forking one process that has torch and Lightning imported.

``python process_server.py`` reads one order a line from stdin, as JSON, and answers each on stdout. Importing torch and
Lightning takes over three seconds of CPU time, a fork a hundredth of one. A program that is forked sees what a new
process would see: its own arguments, environment, working directory, ``__main__``, and random numbers. It imports
``lightning_gradguard`` by itself. `conftest.Python` is the client.
"""

import gc
import json
import os
import random
import runpy
import sys
import types
import warnings

import lightning.pytorch  # noqa: F401
import numpy as np
import torch
from lightning_utilities.core.rank_zero import rank_zero_only


def serve():
    """Answer orders until stdin ends; in a forked child, return the order that it has to carry out."""
    for line in sys.stdin:
        order = json.loads(line)
        if "wait" in order:
            pid, status = os.waitpid(order["wait"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        else:
            answer = os.fork()
            if answer == 0:
                return order
        print(json.dumps(answer), flush=True)
    return None


def become(order):
    """Turn this process into the one that was ordered."""
    os.chdir(order["cwd"])
    os.environ.clear()
    os.environ.update(order["env"])
    for path, target in ((os.devnull, 0), (order["stdout"], 1), (order["stderr"], 2)):
        opened = os.open(path, os.O_RDWR | os.O_CREAT)
        os.dup2(opened, target)
        os.close(opened)
    sys.stdin = os.fdopen(0, closefd=False)  # without what the server has read ahead
    random.seed()
    np.random.seed()
    torch.set_num_threads(1)
    rank_zero_only.rank = int(os.environ.get("LOCAL_RANK", 0))
    warnings.resetwarnings()
    warnings.simplefilter(order["warnings"])


def run(order):
    """Run the program as Python itself would; what it raises ends this process."""
    kind, program, arguments = order["kind"], order["program"], order["arguments"]
    sys.argv = [program if kind != "code" else "-c", *arguments]
    if kind == "module":
        sys.path[0] = order["cwd"]
        runpy.run_module(program, run_name="__main__", alter_sys=True)
        return
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    if kind == "code":
        sys.path[0] = order["cwd"]
        exec(compile(program, "<string>", "exec"), main.__dict__)
        return
    sys.path[0], main.__file__ = os.path.dirname(program), program
    with open(program) as file:
        source = file.read()
    exec(compile(source, program, "exec"), main.__dict__)


if __name__ == "__main__":
    gc.freeze()  # children collect no garbage of what is imported here, which takes a second at their exit
    taken = serve()
    if taken is not None:
        become(taken)
        run(taken)
