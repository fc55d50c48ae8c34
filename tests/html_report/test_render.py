import base64
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from lightning_gradguard.charts import (
    BLANK_COLOUR,
    CLIPPED_COLOUR,
    NONFINITE_COLOUR,
    decode_png,
    paint,
    scale_uri,
)
from lightning_gradguard.html_report.event_reader import ReportError
from lightning_gradguard.html_report.figures import NONFINITE_CELL
from lightning_gradguard.html_report.render import RUNS, write_report

HOSTILE = """### <script>alert(1)</script>

<img src=x onerror=alert(1)> ![p](http://example.com/p.png) [link](javascript:alert(1)) <http://example.com>

| a | b |
|---|---|
| 1 | `x < y` |
"""


class Attributes(HTMLParser):
    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attrs):
        self.found += attrs


def page_of(folder, out="report.html"):
    write_report([folder], Path(out))
    return Path(out).read_text(encoding="utf-8")


def data_of(page):
    return json.loads(
        re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)[1]
    )


def test_markdown_is_rendered_and_all_else_is_escaped(written):
    page = page_of(written("<b>run", steps=40, diagnosis=HOSTILE))
    assert "<td><code>x &lt; y</code></td>" in page
    assert "<h3>&lt;script&gt;alert(1)&lt;/script&gt;</h3>" in page
    assert "&lt;img src=x" in page
    assert "<h1>&lt;b&gt;run</h1>" in page
    assert not re.search(r"<img|<a href=[^#]*(javascript|http)|<b>run", page)
    assert page.count("<script") == 2


def test_nothing_is_fetched(written):
    page = page_of(written(steps=40, kind="nan", diagnosis=HOSTILE))
    parser = Attributes()
    parser.feed(page)
    addresses = [value for name, value in parser.found if name in ("src", "href")]
    assert len(addresses) == 8
    assert all(address.startswith(("#", "data:")) for address in addresses)
    assert not [name for name, _ in parser.found if name.startswith("on")]
    assert "@import" not in page
    assert "url(http" not in page
    assert "default-src 'none'" in page


@pytest.mark.parametrize("kind", ["healthy", "vanishing", "exploding", "nan"])
@pytest.mark.parametrize("layers", [5, 30, 150, 500])
def test_all_sizes_and_kinds(written, kind, layers):
    page = page_of(written(layers=layers, kind=kind, steps=60, every=20))
    (run,) = data_of(page)["runs"]
    assert len(run["heat"]["names"]) == layers
    assert len(page) < 500_000
    assert ('class="verdict healthy"' in page) == (kind == "healthy")


def test_a_long_run_stays_small(written):
    folder = written(layers=150, kind="nan", steps=10_000, every=100, diagnosis=HOSTILE)
    assert len(page_of(folder).encode()) < 400_000


def test_the_heat_map_is_painted_as_in_tensorboard(written):
    page = page_of(written(steps=60, kind="nan"))
    (run,) = data_of(page)["runs"]
    image = run["heat"]["image"]
    shown = decode_png(base64.b64decode(image.removeprefix("data:image/png;base64,")))
    cells = np.frombuffer(base64.b64decode(run["heat"]["cells"]), "<i2").reshape(shown.shape[:2]) / 100
    cells[cells == NONFINITE_CELL / 100] = np.nan
    assert np.isnan(cells).any()
    assert np.abs(shown.astype(int) - paint(cells)).max() <= 2  # cells are rounded to hundredths of a decade
    assert f'<image href="{scale_uri()}"' in page
    for name, colour in (
        ("nonfinite", NONFINITE_COLOUR),
        ("clipped", CLIPPED_COLOUR),
        ("blank", BLANK_COLOUR),
    ):
        assert f"--{name}: {colour};" in page


def test_runs_stand_side_by_side(written):
    for name in ("one", "two"):
        written(f"logs/{name}", steps=30)
    page = page_of(Path("logs"))
    assert [run["title"] for run in data_of(page)["runs"]] == ["one", "two"]
    assert "<h1>2 runs</h1>" in page


def test_too_many_runs_are_refused_and_nothing_is_written(written):
    for i in range(RUNS + 1):
        written(f"logs/{i}", steps=2)
    with pytest.raises(ReportError, match=f"{RUNS + 1} runs are too many"):
        page_of(Path("logs"))
    assert not Path("report.html").exists()
