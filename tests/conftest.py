"""Shared by all tests: one thread, fixed seeds, no log folders left behind, programs that start at once, a browser."""

import contextlib
import gc
import itertools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # here and in all that is started; workers run side by side

import torch
from hypothesis import HealthCheck, settings

COMMON = {"deadline": None, "derandomize": True, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("quick", max_examples=15, **COMMON)
settings.register_profile("thorough", max_examples=100, **COMMON)
settings.load_profile("quick")

torch.set_num_threads(1)
HERE = Path(__file__).parent


def pytest_collection_finish():
    """Leave what is imported by now out of garbage collections: each would take a third of a second for it."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _calm(tmp_path, monkeypatch):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    monkeypatch.chdir(tmp_path)


#: Folder for pictures of all pages that tests open; git ignores it.
PICTURES = Path(__file__).parents[1] / "test-artifacts" / "pages"

FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip


@pytest.fixture(scope="session")
def chromium():
    """A headless browser. Without one its tests are skipped, or fail if GRADGUARD_REQUIRE_BROWSER is 1."""
    lacks = pytest.fail if os.environ.get("GRADGUARD_REQUIRE_BROWSER") == "1" else pytest.skip
    try:
        from playwright import sync_api as api
    except ImportError:
        lacks("needs Playwright: pip install playwright")
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    with api.sync_playwright() as playwright:
        try:
            browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
        except api.Error:
            lacks("needs a Chromium: make browser, or playwright install chromium")
        yield browser
        browser.close()


@pytest.fixture
def opened(chromium, request):
    """Open pages from disk. A console message, a request to the network or an error makes the test fail."""
    contexts, problems = [], []

    def open_page(path, width=1280, height=900, scheme="light"):
        context = chromium.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: problems.append(f"console: {message.text}"))
        page.on("pageerror", lambda error: problems.append(f"error: {error}"))
        page.on(
            "request",
            lambda request: problems.append(request.url) if request.url.startswith(("http", "ws")) else None,
        )
        page.goto(path.resolve().as_uri())
        return page

    yield open_page
    PICTURES.mkdir(parents=True, exist_ok=True)
    name = re.sub(r"\W+", "_", request.node.name).strip("_")
    for number, context in enumerate(contexts):
        for page in context.pages:
            page.screenshot(path=PICTURES / f"{name}_{number}.png", full_page=True)
        context.close()
    assert problems == []


class Server:
    """A process that forks programs; see ``process_server.py``."""

    def __init__(self):
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-W", "ignore", str(HERE / "process_server.py")]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment)

    def ask(self, order):
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def close(self):
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


class Program:
    """A program that was started: ``returncode`` once it has ended, and what it printed so far."""

    def __init__(self, server, order):
        self.server, self.order, self.returncode = server, order, None
        self.pid = server.ask(order)

    @property
    def stdout(self):
        return Path(self.order["stdout"]).read_text()

    @property
    def stderr(self):
        return Path(self.order["stderr"]).read_text()

    def wait(self, timeout=150):
        """Return the exit status, or raise TimeoutError after so many seconds."""
        end = time.monotonic() + timeout
        while self.returncode is None:
            self.returncode = self.server.ask({"wait": self.pid})
            if self.returncode is None:
                if time.monotonic() > end:
                    raise TimeoutError(f"{self.order['program']} has not ended:\n{self.stderr[-3000:]}")
                time.sleep(0.01)
        return self.returncode

    def kill(self):
        if self.returncode is None:
            os.kill(self.pid, signal.SIGKILL)
            self.wait()


class Python:
    """Start Python programs without the seconds that importing torch and Lightning takes.

    Two servers are kept, since strings hash differently in each: ranks that go by the order of a set are found out.

    Args:
        folder: Where stdout and stderr of the programs go.
    """

    def __init__(self, folder):
        self.folder, self.servers, self.numbers = folder, {}, itertools.count()

    def start(self, program, *arguments, kind="script", cwd=None, env=(), warnings="default", server=0):
        """Start a script, a module (``kind="module"``) or a text (``kind="code"``); return it at once."""
        if server not in self.servers:
            self.servers[server] = Server()
        number = next(self.numbers)
        order = {
            "kind": kind, "program": str(program), "arguments": [str(a) for a in arguments],
            "cwd": str(cwd or Path.cwd()), "env": {**os.environ, "OMP_NUM_THREADS": "1", **dict(env)},
            "warnings": warnings, "stdout": str(self.folder / f"{number}.out"),
            "stderr": str(self.folder / f"{number}.err"),
        }  # fmt: skip
        return Program(self.servers[server], order)

    def run(self, program, *arguments, timeout=150, **options):
        """Start a program and return it when it has ended."""
        return self.finish([self.start(program, *arguments, **options)], timeout)[0]

    def ranks(self, program, *arguments, world=2, timeout=150, env=(), **options):
        """Run a program as so many ranks of one job, as Lightning or torchrun would start them; return all of them."""
        job = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "NODE_RANK": "0"}
        started = []
        for rank in range(world):
            own = {**job, "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)} if world > 1 else {}
            options["env"] = {**dict(env), **own}
            started.append(self.start(program, *arguments, server=rank % 2, **options))
        return self.finish(started, timeout)

    def finish(self, started, timeout=150):
        """Wait for all; one that hangs is ended, and fails the test."""
        try:
            for one in started:
                one.wait(timeout)
        finally:
            for one in started:
                one.kill()
        return started

    def close(self):
        for server in self.servers.values():
            server.close()


_PORTS = itertools.count()


def free_port():
    """Return a port that nobody listens on, and that no other process of tests is given at the same time."""
    for number in _PORTS:
        port = 10_000 + (16 * os.getpid() + number) % 20_000
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise AssertionError


@pytest.fixture(scope="session")
def python(tmp_path_factory):
    """Programs in processes of their own: ``run``, ``start``, and ``ranks``."""
    python = Python(tmp_path_factory.mktemp("programs"))
    yield python
    python.close()
