"""Render a diagnosis as text, Markdown and HTML.

Sentences are plain text with names in backticks; everything else is escaped for each form. The order is the same in
all: what happened, where and since when; the most likely cause and the first fix; symptoms; causes; fixes; where to
look further.
"""

from __future__ import annotations

import html
import re
import textwrap
from collections.abc import Callable
from typing import TYPE_CHECKING, TextIO

from lightning_gradguard.diagnosis.wording import MISTAKE, further_reading, headline, listing, number, quote
from lightning_gradguard.extras import needed_by

if TYPE_CHECKING:
    from lightning_gradguard.diagnosis.diagnosis import Cause, Diagnosis, Remedy

#: Columns of the plain text; short enough for a traceback, a log file and a terminal.
WIDTH = 100

_SYMPTOMS, _CAUSES, _FIXES = "Symptoms", "Causes, most likely first", "Fixes, best first"


def to_text(diagnosis: Diagnosis) -> str:
    """Render plain text of at most `WIDTH` columns.

    Longer names and code are not broken.

    Args:
        diagnosis: The diagnosis to render.
    """
    head = [
        *_wrapped(f"{headline(diagnosis.fault, diagnosis.measure)}, {_since(diagnosis)}."),
        *_wrapped(_summary(diagnosis)),
    ]
    symptoms, causes, fixes = [_SYMPTOMS], [_CAUSES], [_FIXES]
    for symptom in _symptoms(diagnosis):
        symptoms += _wrapped(symptom, "  - ", "    ")
    for rank, (cause, evidence) in enumerate(_causes(diagnosis), 1):
        causes += _wrapped(f"{cause}. {evidence}", f"  {rank}. ", "     ")
    if diagnosis.trials:
        fixes += [*_wrapped(" ".join(diagnosis.trials), "  ", "  "), *([""] if diagnosis.remedies else [])]
    for rank, remedy in enumerate(diagnosis.remedies, 1):
        fixes.append(f"  {rank}. {_one_line(remedy.name)}")
        fixes += [f"       {line}" for line in remedy.how.splitlines()]
        fixes += _wrapped(trial_result(remedy), "     ", "     ")
    sections = [head, symptoms, causes, fixes if len(fixes) > 1 else [], _wrapped(_further(diagnosis))]
    return "\n\n".join("\n".join(line.rstrip() for line in section) for section in sections if section)


def to_markdown(diagnosis: Diagnosis) -> str:
    """Render Markdown with a table of fixes.

    TensorBoard's Text tab and GitHub show it.

    Args:
        diagnosis: The diagnosis to render.
    """
    md = _markdown
    lines = [
        f"### {md(headline(diagnosis.fault, diagnosis.measure))}",
        "",
        f"**{md(_capital(_since(diagnosis)))}.**",
        "",
    ]
    lines += [md(_summary(diagnosis)), ""]
    lines += [f"#### {_SYMPTOMS}", "", *(f"- {md(symptom)}" for symptom in _symptoms(diagnosis)), ""]
    lines += [f"#### {_CAUSES}", ""]
    lines += [f"{i}. **{md(cause)}.** {md(text)}" for i, (cause, text) in enumerate(_causes(diagnosis), 1)]
    if diagnosis.remedies or diagnosis.trials:
        lines += ["", f"#### {_FIXES}"]
    if diagnosis.trials:
        lines += ["", md(" ".join(diagnosis.trials))]
    if diagnosis.remedies:
        tried = _any_tried(diagnosis.remedies)
        head = ["", "Fix", "How", *(["Tilt before", "Tilt after", "Loss"] if tried else [])]
        lines += ["", _row(head), _row(["---"] * len(head))]
        for rank, remedy in enumerate(diagnosis.remedies, 1):
            name = f"{remedy.name} ({remedy.note})" if remedy.note else remedy.name
            lines.append(
                _row([str(rank), md(name), _markdown_code(remedy.how), *(_cells(remedy) if tried else [])])
            )
    lines += ["", md(_further(diagnosis))]
    return "\n".join(lines) + "\n"


def mistake_to_markdown(text: str, cause: Cause, fix: Remedy) -> str:
    """Render a mistake in the code as Markdown, in the form of a diagnosis.

    Args:
        text: Description of the mistake.
        cause: Its cause.
        fix: Its fix.
    """
    md = _markdown
    lines = [f"### {MISTAKE}", md(text), f"**Most likely cause:** {md(_words(cause))}."]
    return (
        "\n\n".join([*lines, f"**Fix to try first:** {md(fix.name)}:", textwrap.indent(fix.how, " " * 4)])
        + "\n"
    )


def to_html(diagnosis: Diagnosis) -> str:
    """Render one self-contained HTML page with charts.

    It loads nothing and runs no script.

    Args:
        diagnosis: The diagnosis to render.

    Raises:
        MissingPackage: If jinja2, numpy or matplotlib is not installed.
    """
    with needed_by("Diagnosis.to_html()", "report"):
        return _page(diagnosis)


def _page(diagnosis: Diagnosis) -> str:
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    from lightning_gradguard.charts import BLANK_COLOUR, CLIPPED_COLOUR, NONFINITE_COLOUR
    from lightning_gradguard.diagnosis import charts

    loader = PackageLoader("lightning_gradguard.diagnosis")
    pages = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    pages.filters["prose"] = lambda text: Markup(_html(text))
    pages.filters["cells"], pages.filters["tilt"] = _cells, _tilt
    pages.filters["px"] = lambda length: f"{length:.1f}".removesuffix(".0")
    pages.filters["decade"] = lambda exponent: f"{float(exponent):g}".replace("-", "−")
    return pages.get_template("diagnosis.html").render(
        diagnosis=diagnosis,
        headline=headline(diagnosis.fault, diagnosis.measure),
        since=_capital(_since(diagnosis)),
        summary=_summary(diagnosis),
        headings={"symptoms": _SYMPTOMS, "causes": _CAUSES, "fixes": _FIXES},
        symptoms=_symptoms(diagnosis),
        causes=_causes(diagnosis),
        tried=_any_tried(diagnosis.remedies),
        further=_further(diagnosis),
        heat=charts.heat_map(diagnosis.course, diagnosis.step, diagnosis.parameters),
        panels=charts.fix_panels(diagnosis),
        size={"width": charts.WIDTH, "height": charts.HEIGHT},
        colours={"nonfinite": NONFINITE_COLOUR, "clipped": CLIPPED_COLOUR, "blank": BLANK_COLOUR},
        style=Markup(loader.get_source(pages, "diagnosis.css")[0]),
    )


def print_diagnosis(diagnosis: Diagnosis, file: TextIO | None = None) -> None:
    """Print a diagnosis, in colour on a terminal.

    Plain text without rich, or if ``file`` is no terminal.

    Args:
        diagnosis: The diagnosis to print.
        file: Stream to print to; standard output if None.
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
    text.highlight_regex(rf"(?m)^({_SYMPTOMS}|{_CAUSES}|{_FIXES})$", "bold")
    text.highlight_regex(r"`[^`]*`", "cyan")
    text.highlight_regex(r"(?m)^ {7}.*$", "green")
    Console(file=file, highlight=False, soft_wrap=True).print(text)


# What the forms have in common.


def _since(diagnosis: Diagnosis) -> str:
    where = f", worst in {listing(diagnosis.parameters)}" if diagnosis.parameters else ""
    return f"since step {diagnosis.step}{where}"


def _summary(diagnosis: Diagnosis) -> str:
    cause = diagnosis.causes[0]
    sentences = [f"Most likely cause: {_words(cause)}."] if cause.value != "unknown" else []
    if diagnosis.remedies:
        sentences.append(f"Fix to try first: {_one_line(diagnosis.remedies[0].name)}.")
    return " ".join(sentences)


def _symptoms(diagnosis: Diagnosis) -> list[str]:
    """Return the symptoms that no cause repeats."""
    evidence = set(diagnosis.evidence.values())
    return [symptom for symptom in diagnosis.signs if symptom not in evidence]


def _causes(diagnosis: Diagnosis) -> list[tuple[str, str]]:
    return [(_capital(_words(cause)), diagnosis.evidence.get(cause, "")) for cause in diagnosis.causes]


def _words(cause: Cause) -> str:
    return cause.value.replace("_", " ")


def _further(diagnosis: Diagnosis) -> str:
    tags, page = further_reading(diagnosis.fault)
    listed = ", ".join(quote(tag) for tag in tags[:-1]) + (" and " if len(tags) > 1 else "") + quote(tags[-1])
    return f"See also {listed} in TensorBoard, and {page}."


def trial_result(remedy: Remedy) -> str:
    """Return the result of a trial, or why there is none.

    Empty if neither is known.

    Args:
        remedy: The fix.
    """
    if remedy.note and not remedy.tried:
        return f"({remedy.note})"
    if not remedy.tried:
        return ""
    if remedy.note:
        return f"Tried: {remedy.note}{'' if remedy.loss is None else f', loss {number(remedy.loss)}'}."
    before, after, loss = _numbers(remedy)
    tilt = f"tilt {before or 'not measurable'} -> {after}" if after else "tilt not measurable"
    return f"Tried: {tilt}{f', loss {loss}' if loss else ''}."


def _any_tried(remedies: tuple[Remedy, ...]) -> bool:
    return any(remedy.tried for remedy in remedies)


def _numbers(remedy: Remedy) -> list[str]:
    """Return the tilt before, after, and the loss.

    Tilts are in decades. Each is empty if unknown.
    """
    loss = "" if remedy.loss is None else number(remedy.loss)
    return [_tilt(remedy.before), _tilt(remedy.after), loss]


def _cells(remedy: Remedy) -> list[str]:
    """Return the numbers for a table, which says what was not run: the fix, or only the steps of training with it."""
    if not remedy.tried:
        return ["not run"] * 3
    before, after, loss = _numbers(remedy)
    return [before, after, loss or "not run"]


def _tilt(decades: float | None) -> str:
    # A number that rounds to 0 has no sign.
    return "" if decades is None else f"{round(decades, 1) or 0.0:.1f}"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _one_line(text: str) -> str:
    return " ".join(text.split())


# Plain text, Markdown and HTML.


def _wrapped(text: str, first: str = "", rest: str = "") -> list[str]:
    return textwrap.wrap(
        _one_line(text),
        WIDTH,
        initial_indent=first,
        subsequent_indent=rest,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _spans(text: str, plain: Callable[[str], str], code: Callable[[str], str]) -> str:
    """Map backticked parts by ``code``, others by ``plain``."""
    parts = re.split(r"`([^`]*)`", _one_line(text))
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
    """Return a code span, or plain text.

    GitHub and TensorBoard escape a bar in code differently, so text with a bar is plain.
    """
    code = "; ".join(line.strip() for line in code.splitlines())
    if "|" in code or not code:
        return _markdown_plain(code)
    fence = "``" if "`" in code else "`"
    pad = " " if code.startswith("`") or code.endswith("`") else ""
    return f"{fence}{pad}{code}{pad}{fence}"


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _html(text: str) -> str:
    return _spans(text, _html_plain, lambda code: f"<code>{html.escape(code)}</code>")


def _html_plain(text: str) -> str:
    """Escape the text; superscript powers such as 10^6.6."""
    return re.sub(r"\b10\^(-?\d+(?:\.\d+)?)", r"10<sup>\1</sup>", html.escape(text))
