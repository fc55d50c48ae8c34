"""Self-contained HTML page that fetches nothing."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markdown_it import MarkdownIt
from markupsafe import Markup

from lightning_gradguard._version import __version__
from lightning_gradguard.charts import (
    BLANK_COLOUR,
    CLIPPED_COLOUR,
    NONFINITE_COLOUR,
    SCALE,
    scale_uri,
)
from lightning_gradguard.html_report.event_reader import ReportError, read_runs
from lightning_gradguard.html_report.figures import BLANK_CELL, NONFINITE_CELL
from lightning_gradguard.html_report.summary import Sheet, charts_of, sheets_of
from lightning_gradguard.stats.histogram import EDGES

#: Largest number of runs side by side; more columns cannot be read.
RUNS = 12

_SCRIPTS = ("drawing.js", "heatmap.js", "charts.js", "page.js")
# Raw HTML is escaped. Pictures would be fetched, and links in logged text could lead anywhere.
_MARKDOWN = MarkdownIt("commonmark", {"html": False}).enable("table").disable(["image", "link", "autolink"])


def write_report(folders: Sequence[Path], out: Path) -> list[Sheet]:
    """Write the page about some runs.

    Args:
        folders: Folders of runs, or folders with such folders below them.
        out: The HTML file; an existing file is replaced.

    Returns:
        What the page shows of each run.

    Raises:
        ReportError: If a folder holds nothing to report on, or there are too many runs. Nothing is written then.
        OSError: If the file cannot be written.
    """
    runs = read_runs(folders)
    sheets = [sheet for run in runs for sheet in sheets_of(run)]
    if len(sheets) > RUNS:
        raise ReportError(
            f"{len(sheets)} runs are too many for one page; give at most {RUNS} of their folders"
        )
    # Half a surrogate, from the name of a folder or a file's JSON, has no bytes of its own.
    out.write_text(render(sheets), encoding="utf-8", errors="replace")
    return sheets


def render(sheets: Sequence[Sheet]) -> str:
    """Return the page as text."""
    pages = Environment(
        loader=PackageLoader("lightning_gradguard.html_report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    pages.filters["markdown"] = lambda text: Markup(_MARKDOWN.render(text))
    pages.filters["inline"] = lambda text: Markup(_MARKDOWN.renderInline(text))
    pages.filters["sentence"] = lambda text: text[:1].upper() + text[1:]
    pages.filters["count"] = lambda number: "–" if number is None else f"{number:,}"
    pages.filters["exponent"] = lambda number: f"{number:g}".replace("-", "−")
    script = "\n".join(_source(pages, name) for name in _SCRIPTS)
    charts = charts_of(sheets)
    data = {
        "runs": [sheet.figures for sheet in sheets],
        "charts": [{key: chart[key] for key in ("name", "title", "limits")} for chart in charts],
        "edges": EDGES,
        "blankCell": BLANK_CELL,
        "nonfiniteCell": NONFINITE_CELL,
    }
    return pages.get_template("page.html").render(
        sheets=sheets,
        charts=charts,
        data=data,
        scale=SCALE,
        scale_image=scale_uri(),
        colours={"nonfinite": NONFINITE_COLOUR, "clipped": CLIPPED_COLOUR, "blank": BLANK_COLOUR},
        style=Markup(_source(pages, "page.css")),
        script=Markup(script),
        digest=base64.b64encode(hashlib.sha256(f"\n{script}\n".encode()).digest()).decode(),
        version=__version__,
    )


def _source(pages: Environment, name: str) -> str:
    assert pages.loader is not None
    return pages.loader.get_source(pages, name)[0]
