"""A diagnosis as plain text, Markdown, HTML, and on a terminal.

Sentences are plain text in which names stand in backticks; whatever else they hold is escaped for each form.
"""

from __future__ import annotations

import html
import re
import textwrap
from collections.abc import Callable
from typing import TYPE_CHECKING, TextIO

from lightning_gradguard.diagnosis.wording import listing, number
from lightning_gradguard.results import Fault

if TYPE_CHECKING:
    from lightning_gradguard.diagnosis.diagnosis import Diagnosis, Remedy

#: Columns of the plain text; short enough for a traceback, a log file and a terminal.
WIDTH = 100

HEADLINES = {
    Fault.NONFINITE: "The gradients or the loss are NaN or infinite",
    Fault.UNDERFLOW: "Gradients are too small for the precision they are held in",
    Fault.DISCONNECTED: "Layers that are in use get no gradient",
    Fault.DEAD: "Most units of a layer are dead: their gradient is exactly zero",
    Fault.VANISHING: "Gradients vanish on their way from the output to the input",
    Fault.VANISHING_IN_TIME: "Gradients vanish on their way back through the sequence",
    Fault.EXPLODING: "Gradients explode",
    Fault.SPIKE: "The gradient of this step is far above the usual",
    Fault.OVERSIZED_UPDATE: "Steps are too large for the weights",
    Fault.STALLED: "The weights hardly move, and the loss stands still",
}


def to_text(diagnosis: Diagnosis) -> str:
    """Plain text of at most `WIDTH` columns, save for names and code that are longer."""
    lines = _wrapped(f"{HEADLINES[diagnosis.fault]}, {_since(diagnosis)}.", "", "")
    lines += ["", "Signs"]
    for sign in diagnosis.signs:
        lines += _wrapped(sign, "  - ", "    ")
    lines += ["", "Causes, most likely first"]
    for rank, (cause, evidence) in enumerate(_causes(diagnosis), 1):
        lines += _wrapped(f"{cause}. {evidence}", f"  {rank}. ", "     ")
    if diagnosis.remedies:
        lines += ["", *_remedy_table(diagnosis.remedies)]
    if diagnosis.trials:
        lines += ["", *_wrapped(" ".join(diagnosis.trials), "", "")]
    return "\n".join(line.rstrip() for line in lines)


def to_markdown(diagnosis: Diagnosis) -> str:
    """Markdown with a table, as TensorBoard's text tab and GitHub show it."""
    md = _markdown
    lines = [f"### {md(HEADLINES[diagnosis.fault])}", "", f"**{md(_capital(_since(diagnosis)))}.**", ""]
    lines += ["#### Signs", "", *(f"- {md(sign)}" for sign in diagnosis.signs), ""]
    lines += ["#### Causes, most likely first", ""]
    lines += [f"{i}. **{md(cause)}.** {md(text)}" for i, (cause, text) in enumerate(_causes(diagnosis), 1)]
    if diagnosis.remedies:
        tried = _any_tried(diagnosis.remedies)
        head = ["", "Remedy", "How", *(["Tilt before", "Tilt after", "Loss"] if tried else [])]
        lines += ["", "#### Remedies, best first", "", _row(head), _row(["---"] * len(head))]
        for rank, remedy in enumerate(diagnosis.remedies, 1):
            name = f"{remedy.name} ({remedy.note})" if remedy.note else remedy.name
            lines.append(
                _row([str(rank), md(name), _markdown_code(remedy.how), *(_numbers(remedy) if tried else [])])
            )
    for sentence in diagnosis.trials:
        lines += ["", md(sentence)]
    return "\n".join(lines) + "\n"


def to_html(diagnosis: Diagnosis) -> str:
    """One self-contained HTML page with pictures of what is known; nothing is fetched and no script runs."""
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    from lightning_gradguard.diagnosis import charts

    loader = PackageLoader("lightning_gradguard.diagnosis")
    pages = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    pages.filters["prose"] = lambda text: Markup(_html(text))
    pages.filters["numbers"], pages.filters["tilt"] = _numbers, _tilt
    pages.filters["px"] = lambda length: f"{length:.1f}".removesuffix(".0")
    pages.filters["decade"] = lambda exponent: f"{float(exponent):g}".replace("-", "−")
    return pages.get_template("diagnosis.html").render(
        diagnosis=diagnosis,
        headline=HEADLINES[diagnosis.fault],
        since=_capital(_since(diagnosis)),
        causes=_causes(diagnosis),
        tried=_any_tried(diagnosis.remedies),
        heat=charts.heat_map(diagnosis.timeline, diagnosis.step, diagnosis.parameters),
        panels=charts.fix_panels(diagnosis),
        size={"width": charts.WIDTH, "height": charts.HEIGHT},
        style=Markup(loader.get_source(pages, "diagnosis.css")[0]),
    )


def print_diagnosis(diagnosis: Diagnosis, file: TextIO | None = None) -> None:
    """Prints in colour where ``file`` is a terminal and rich is there, else as plain text.

    Args:
        diagnosis: What to print.
        file: Where to; standard output if None.
    """
    try:
        from rich.console import Console
        from rich.text import Text
    except ImportError:
        print(diagnosis, file=file)
        return
    # Built as a Text, so that a name such as "[red]" is not read as markup.
    text = Text(to_text(diagnosis))
    text.highlight_regex(r"\A[^\n]*(\n[^\n]+)*", "bold red")
    text.highlight_regex(r"(?m)^(Signs|Causes, most likely first|Remedies, best first)\b", "bold")
    text.highlight_regex(r"`[^`]*`", "cyan")
    text.highlight_regex(r"(?m)^ {7}.*$", "green")
    Console(file=file, highlight=False, soft_wrap=True).print(text)


def _remedy_table(remedies: tuple[Remedy, ...]) -> list[str]:
    """Name and, where any was tried, its tilts in columns; the code below each."""
    tried = _any_tried(remedies)
    title = "Remedies, best first"
    width = max(len(title), *(len(_line(r.name)) + 5 for r in remedies))
    lines = [f"{title:{width}}  {'tilt before':>11}  {'after':>6}  {'loss':>8}" if tried else title]
    for rank, remedy in enumerate(remedies, 1):
        before, after, loss = _numbers(remedy)
        numbers = f"  {before:>11}  {after:>6}  {loss:>8}" if tried else ""
        lines.append(f"{f'  {rank}. {_line(remedy.name)}':{width}}{numbers}")
        lines += [f"       {line}" for line in remedy.how.splitlines()]
        lines += _wrapped(f"({remedy.note})", " " * 5, " " * 5) if remedy.note else []
    return lines


def _since(diagnosis: Diagnosis) -> str:
    where = f", worst in {listing(diagnosis.parameters)}" if diagnosis.parameters else ""
    return f"since step {diagnosis.step}{where}"


def _causes(diagnosis: Diagnosis) -> list[tuple[str, str]]:
    return [(_capital(c.value.replace("_", " ")), diagnosis.evidence.get(c, "")) for c in diagnosis.causes]


def _any_tried(remedies: tuple[Remedy, ...]) -> bool:
    return any(remedy.tried for remedy in remedies)


def _numbers(remedy: Remedy) -> list[str]:
    """Tilts in decades and the loss, as far as they are known."""
    loss = "" if remedy.loss is None else number(remedy.loss)
    return [_tilt(remedy.before), _tilt(remedy.after), loss]


def _tilt(decades: float | None) -> str:
    # Of what is rounded to nothing the sign says nothing.
    return "" if decades is None else f"{round(decades, 1) or 0.0:.1f}"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _line(text: str) -> str:
    return " ".join(text.split())


def _wrapped(text: str, first: str, rest: str) -> list[str]:
    return textwrap.wrap(
        _line(text),
        WIDTH,
        initial_indent=first,
        subsequent_indent=rest,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _spans(text: str, plain: Callable[[str], str], code: Callable[[str], str]) -> str:
    """Text with its backticked parts through ``code`` and the others through ``plain``."""
    parts = re.split(r"`([^`]*)`", _line(text))
    return "".join(code(part) if i % 2 else plain(part) for i, part in enumerate(parts))


def _markdown(text: str) -> str:
    return _spans(text, _markdown_plain, _markdown_code)


def _markdown_plain(text: str) -> str:
    escaped = (
        re.sub(r"([\\`*_\[\]#|])", r"\\\1", text)
        .replace("&", "&amp;")
        .replace("<", "&lt;")
        .replace("~", "&#126;")
    )
    return re.sub(r"^(\s*)([-+>]|\d+[.)])(?=\s)", r"\1\\\2", escaped)


def _markdown_code(code: str) -> str:
    """A code span; text where it holds a bar, which GitHub and TensorBoard escape differently in code."""
    code = "; ".join(line.strip() for line in code.splitlines())
    if "|" in code or not code:
        return _markdown_plain(code)
    fence = "``" if "`" in code else "`"
    pad = " " if code.startswith("`") or code.endswith("`") else ""
    return f"{fence}{pad}{code}{pad}{fence}"


def _html(text: str) -> str:
    return _spans(text, html.escape, lambda code: f"<code>{html.escape(code)}</code>")
