"""Text, Markdown and HTML of a diagnosis.

They are complete, in order, narrow enough, and safe for any tensor name.
"""

import dataclasses
import html.parser
import io
import math
import pickle
import re
import sys
import warnings
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from lightning_gradguard.diagnosis.diagnosis import Cause, Diagnosis, Remedy, Timeline
from lightning_gradguard.diagnosis.rendering import WIDTH, mistake_to_markdown, print_diagnosis
from lightning_gradguard.diagnosis.wording import further_reading, headline, quote
from lightning_gradguard.loggers.tags import NOTES
from lightning_gradguard.results import Fault, GradientHalt

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # from the HTML sanitizer that TensorBoard bundles
    from tensorboard.plugin_util import markdown_to_safe_html

ROOT = Path(__file__).parents[2]
DIAGNOSIS = Diagnosis(
    fault=Fault.VANISHING,
    step=30,
    parameters=("net.0.weight", "net.2.weight", "net.4.weight"),
    signs=("The loss has plateaued: from 2.31 to 2.3 in 80 steps.", "The weights hardly change."),
    causes=(Cause.SATURATING_ACTIVATION, Cause.BAD_INITIALIZATION),
    evidence={
        Cause.SATURATING_ACTIVATION: "11 sigmoid activations on the path to `net.0.weight`.",
        Cause.BAD_INITIALIZATION: "The weights are 0.58 times as large as Xavier's.",
    },
    remedies=(Remedy("ReLU", "x = torch.relu(x)  # not sigmoid"), Remedy("He", "nn.init.kaiming_normal_(w)")),
)
TRIED = dataclasses.replace(
    DIAGNOSIS,
    remedies=(
        Remedy("ReLU", "f()", tried=True, before=9.5, after=0.42, loss=1.875),
        Remedy("GELU", "g()", note="could not be tried: RuntimeError"),
        DIAGNOSIS.remedies[1],
    ),
    trials=("1 fix was tried, in 5 passes.", "Without it the loss is 2.3."),
)
NAMES = tuple(f"net.{2 * i}.weight" for i in range(5))
PICTURED = dataclasses.replace(
    TRIED,
    course=Timeline(
        steps=(28, 29, 30, 31),
        layers=NAMES,
        rms_log10=tuple((-9.0 + 2 * i, -8.5 + 2 * i, math.nan, -math.inf) for i in range(5)),
        skipped=(False, False, True, False),
        clipped=(True, False, False, False),
        losses=(2.31, 2.3, math.nan, 2.3),
    ),
    layers=NAMES,
    profile=(-9.0, -7.0, -5.0, -3.0, -1.0),
    remedies=(
        dataclasses.replace(TRIED.remedies[0], profile=(-1.0, -1.2, -1.0, -math.inf, math.inf)),
        *TRIED.remedies[1:],
    ),
)
FORMS = (str, Diagnosis.to_markdown, Diagnosis.to_html)
NASTY = [
    "a<b>|c",
    "``x``",
    "*bold*",
    "_under_ __init__",
    "line\nbreak",
    "[red]x[/red]",
    "\x1b[31m",
    "<script>",
    "a\\`b",
    "&lt;",
]


#: Elements that are never closed.
VOID = {"meta", "br"}


class Reader(html.parser.HTMLParser):
    """Text and tags of a page.

    Tags must be closed in the reverse order of opening.
    """

    def __init__(self, page):
        super().__init__()
        self.tags, self.texts, self.open = [], [], []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.open += [tag] * (tag not in VOID)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def shown(page):
    return " ".join("".join(Reader(page).texts).split())


@pytest.mark.parametrize("form", FORMS)
def test_all_parts_come_in_order(form):
    text = form(DIAGNOSIS)
    parts = [
        headline(Fault.VANISHING),
        "ince step 30",
        "net.0.weight",
        "and 1 more",
        "Most likely cause: saturating activation. Fix to try first: ReLU.",
        "Symptoms",
        "from 2.31 to 2.3 in 80",
        "Causes, most likely first",
        "Saturating activation",
        "11 sigmoid",
        "Bad initialization",
        "0.58 times",
        "Fixes, best first",
        "x = torch.relu(x)  # not",
        "kaiming",
        "See also",
        "gradguard/depth_tilt_decades",
    ]
    places = [text.find(part) for part in parts]
    assert -1 not in places
    assert places == sorted(places)


def test_the_text_begins_with_what_where_and_since_when():
    first, second = str(DIAGNOSIS).split("\n\n")[0].split(".\n")
    assert " ".join(first.split()) == (
        "Gradients vanish on their way from the output to the input, since step 30, worst in `net.0.weight`, "
        "`net.2.weight` and 1 more"
    )
    assert second == "Most likely cause: saturating activation. Fix to try first: ReLU."


def test_an_unknown_cause_is_not_called_the_most_likely():
    unknown = dataclasses.replace(
        DIAGNOSIS, causes=(Cause.UNKNOWN,), evidence={Cause.UNKNOWN: "No cause fits."}
    )
    assert "Most likely cause" not in str(unknown)
    assert "Fix to try first: ReLU." in str(unknown)
    assert "1. Unknown. No cause fits." in str(unknown)


@pytest.mark.parametrize("form", FORMS)
def test_a_symptom_that_is_the_evidence_is_not_repeated(form):
    sentence = "Batch 7 contains bad data"
    evidence = {**DIAGNOSIS.evidence, Cause.BAD_INITIALIZATION: sentence}
    repeated = dataclasses.replace(DIAGNOSIS, signs=(*DIAGNOSIS.signs, sentence), evidence=evidence)
    assert form(repeated).count(sentence) == 1


@pytest.mark.parametrize("form", FORMS)
def test_results_of_trials_are_shown_only_if_a_fix_was_tried(form):
    assert not re.search("tried|ilt before|tilt [-0-9]", form(DIAGNOSIS), flags=re.IGNORECASE)
    text = form(TRIED)
    assert "tilt 9.5 -> 0.4" in text or "Tilt before" in text
    parts = ("9.5", "0.4", "1.88", "could not be tried: RuntimeError", "the loss is 2.3")
    assert all(part in text for part in parts)
    assert "None" not in text
    # The account of the trials explains the numbers, so it comes before them.
    assert text.index("1 fix was tried, in 5 passes.") < text.index("f()")


@pytest.mark.parametrize(
    ("before", "after", "loss", "result"),
    [
        (9.5, 0.42, 1.875, "Tried: tilt 9.5 -> 0.4, loss 1.88."),
        (9.5, 0.42, None, "Tried: tilt 9.5 -> 0.4."),
        (None, 0.42, math.inf, "Tried: tilt not measurable -> 0.4, loss inf."),
        (None, None, 2.0, "Tried: tilt not measurable, loss 2."),
        (9.5, None, None, "Tried: tilt not measurable."),
    ],
)
def test_the_result_of_a_trial_is_a_line_below_the_fix(before, after, loss, result):
    fix = Remedy("ReLU", "f()", tried=True, before=before, after=after, loss=loss)
    lines = str(dataclasses.replace(TRIED, remedies=(fix,))).splitlines()
    assert lines[lines.index("  1. ReLU") + 1 :][:2] == ["       f()", f"     {result}"]


def test_the_text_is_narrow_and_small():
    long = dataclasses.replace(DIAGNOSIS, signs=("word " * 60,) * 6)
    lines = str(long).splitlines()
    assert max(map(len, lines)) <= WIDTH
    assert len(str(DIAGNOSIS).splitlines()) <= 26
    assert lines == [line.rstrip() for line in lines]


def test_the_exception_carries_the_text():
    halt = GradientHalt(DIAGNOSIS, (), 81)
    assert str(halt) == str(DIAGNOSIS)
    assert pickle.loads(pickle.dumps(halt)).diagnosis == DIAGNOSIS


def named(name):
    return dataclasses.replace(
        DIAGNOSIS,
        parameters=(name,),
        signs=(f"Norm 1 in {quote(name)}.", name),
        evidence={Cause.SATURATING_ACTIVATION: f"In {quote(name)}.", Cause.BAD_INITIALIZATION: f"{name}."},
        remedies=(Remedy(name, f"layer = model[{name!r}]  # | a | b", note=name), Remedy("other", "f()")),
        trials=(f"Not tried: {name}.",),
    )


@pytest.mark.parametrize("name", NASTY)
def test_no_name_escapes_its_form(name):
    diagnosis = named(name)
    head = str(diagnosis).split("\n\n")[0]
    assert quote(name) in " ".join(head.split("\n"))

    page = Reader(diagnosis.to_html())
    plain = Reader(dataclasses.replace(DIAGNOSIS, trials=("x",)).to_html())
    assert [t for t, _ in page.tags if t not in ("code",)] == [t for t, _ in plain.tags if t not in ("code",)]

    rendered = markdown_to_safe_html(diagnosis.to_markdown())
    assert {t for t, _ in Reader(rendered).tags} <= {"h3", "h4", "p", "strong", "code", "ul", "li", "ol"} | {
        "table",
        "thead",
        "tbody",
        "tr",
        "th",
        "td",
    }
    assert rendered.count("<td") == 2 * 3
    assert rendered.count("<li") == 2 + 2
    # GitHub ends a cell at a bar even inside a code span.
    rows = [line for line in diagnosis.to_markdown().splitlines() if line.startswith("| ")]
    assert [len(re.findall(r"(?<!\\)\|", row)) for row in rows] == [4] * 4


@pytest.mark.parametrize("name", NASTY)
def test_a_mistake_shows_any_name_and_its_code_as_they_are(name):
    fix = Remedy("Mend it", "a = [x_1, x_2]\nb = a[0] * a[1] * 2")
    text = mistake_to_markdown(f"It is in {quote(name)}.", Cause.BAD_INITIALIZATION, fix)
    rendered = markdown_to_safe_html(text)
    assert {t for t, _ in Reader(rendered).tags} <= {"h3", "p", "strong", "code", "pre"}
    for part in (f"It is in {quote(name)[1:-1]}.", "Most likely cause: bad initialization.", fix.how):
        assert " ".join(part.replace("`", "").split()) in shown(rendered).replace("`", "")


# Markdown drops blanks at the edges of a code span.
@given(name=st.text(min_size=1, max_size=20).filter(lambda name: name == name.strip()))
def test_any_name_is_shown_whole_on_one_line(name):
    quoted = quote(name)
    assert re.fullmatch(r"`[^`\n]+`", quoted)
    assert quoted[1:-1].isprintable()
    sentence = dataclasses.replace(DIAGNOSIS, signs=(f"Norm 1 in {quoted}.",))
    # A browser shows any white space as one blank.
    visible = " ".join(f"Norm 1 in {quoted[1:-1]}.".split())
    assert visible in shown(sentence.to_html())
    assert visible in shown(markdown_to_safe_html(sentence.to_markdown()))


def test_different_names_stay_different():
    names = ["a`b", "a\\x60b", "a\nb", "a\\nb", "ab"]
    assert len({quote(name) for name in names}) == len(names)


@given(text=st.text(max_size=60))
def test_any_sentence_is_safe_in_html(text):
    diagnosis = dataclasses.replace(DIAGNOSIS, signs=(text,))
    tags = [tag for tag, _ in Reader(diagnosis.to_html()).tags if tag != "code"]
    assert tags == [
        tag for tag, _ in Reader(dataclasses.replace(DIAGNOSIS, signs=("x",)).to_html()).tags if tag != "code"
    ]


@given(text=st.text(st.sampled_from("ab `*_#|<>[]()!-+.1~\\&\n"), max_size=30))
def test_tensorboard_shows_the_sentence_without_its_backticks(text):
    assume(not re.search(r"`\s|\s`", text))  # Markdown drops blanks at the edges of a code span
    marked = dataclasses.replace(DIAGNOSIS, signs=(f"x {text} y",)).to_markdown()
    item = re.search(r"<li>(.*?)</li>", markdown_to_safe_html(marked), re.DOTALL).group(1)
    expected = " ".join(re.sub(r"`([^`]*)`", r"\1", " ".join(f"x {text} y".split())).split())
    assert shown(item) == expected


def test_powers_of_ten_are_superscripts_on_the_page():
    page = dataclasses.replace(DIAGNOSIS, signs=("They shrink by a factor of 10^6.6.",)).to_html()
    assert "a factor of 10<sup>6.6</sup>.</li>" in page


def test_markdown_is_safe_if_html_is_not_removed():
    """No tag or entity remains outside code spans.

    GitHub keeps some HTML.
    """
    sentence = "a <b> c & `<d>` <script>"
    marked = dataclasses.replace(DIAGNOSIS, signs=(sentence,)).to_markdown()
    assert "- a &lt;b> c &amp; `<d>` &lt;script>\n" in marked


def test_the_page_loads_nothing():
    page = Reader(DIAGNOSIS.to_html())
    assert not {"script", "link", "img", "iframe"} & {tag for tag, _ in page.tags}
    assert not [
        a for _, attributes in page.tags for a in attributes if a in ("src", "href") or a.startswith("on")
    ]
    assert "url(" not in DIAGNOSIS.to_html()


def of_kind(page, tag):
    return [attributes for kind, attributes in Reader(page).tags if kind == tag]


def test_known_facts_are_charted():
    page = PICTURED.to_html()
    assert Reader(page).open == []
    labels = [attributes["aria-label"] for attributes in of_kind(page, "svg") if "aria-label" in attributes]
    assert len(labels) == 2
    assert "since step 30" in shown(page)
    assert all(name in shown(page) for name in NAMES)
    for word in (
        "The newest steps",
        "NaN or Inf",
        "no gradient",
        "skipped",
        "clipped",
        "loss",
        "worst layers",
    ):
        assert word in shown(page)
    assert "tilt 8.0" not in shown(page)  # with the fix only three layers have a gradient
    assert len(of_kind(page, "polyline")) == 2 + 2


@pytest.mark.parametrize(
    ("unknown", "pictures"),
    [
        ({"course": None}, 1),
        ({"layers": ()}, 1),
        ({"profile": ()}, 1),
        ({"remedies": TRIED.remedies}, 1),
        ({"remedies": ()}, 1),
        ({"course": None, "remedies": ()}, 0),
    ],
)
def test_unknown_facts_are_not_charted(unknown, pictures):
    page = dataclasses.replace(PICTURED, **unknown).to_html()
    assert len([a for a in of_kind(page, "svg") if "aria-label" in a]) == pictures
    assert ("The newest steps" in page) == ("course" not in unknown)
    assert ("What was tried" in page) == (pictures == 1 and "course" in unknown)


def test_without_known_facts_the_page_has_no_chart():
    page = DIAGNOSIS.to_html()
    assert not {"svg", "figure", "image"} & {tag for tag, _ in Reader(page).tags}
    assert Reader(page).open == []


@pytest.mark.parametrize("name", NASTY)
def test_no_name_escapes_a_chart(name):
    def page(name):
        timeline = dataclasses.replace(PICTURED.course, layers=(name, *NAMES[1:]))
        remedies = (dataclasses.replace(PICTURED.remedies[0], name=name), *PICTURED.remedies[1:])
        nasty = dataclasses.replace(PICTURED, course=timeline, layers=timeline.layers, remedies=remedies)
        return Reader(nasty.to_html())

    assert [tag for tag, _ in page(name).tags if tag != "code"] == [
        tag for tag, _ in page("plain").tags if tag != "code"
    ]
    assert page(name).open == []


def test_a_page_with_charts_loads_nothing():
    page = Reader(PICTURED.to_html())
    assert not {"script", "link", "img", "iframe", "use"} & {tag for tag, _ in page.tags}
    named = [(a, value) for _, attributes in page.tags for a, value in attributes.items()]
    assert {value.partition(",")[0] for a, value in named if a in ("src", "href", "xlink:href")} == {
        "data:image/png;base64"
    }
    assert not [a for a, _ in named if a.startswith("on") or a == "style"]
    assert "url(" not in PICTURED.to_html()


@pytest.mark.parametrize("layers", [5, 150, 1000])
def test_a_page_is_small_however_many_layers_there_are(layers):
    names = tuple(f"net.encoder.blocks.{i}.attention.projection.weight" for i in range(layers))
    noise = [[math.sin(i * j) - 9 * (i < 3) for j in range(128)] for i in range(layers)]
    flags = tuple(j % 2 == 0 for j in range(128))
    timeline = Timeline(tuple(range(128)), names, tuple(map(tuple, noise)), flags, flags, tuple(noise[-1]))
    remedies = tuple(
        Remedy(f"fix {k}", "f()", tried=True, profile=tuple(row[k] for row in noise)) for k in range(6)
    )
    big = dataclasses.replace(
        DIAGNOSIS, course=timeline, layers=names, profile=tuple(row[9] for row in noise), remedies=remedies
    )
    assert len(big.to_html().encode()) < 500_000


def test_chart_data_is_neither_compared_nor_printed():
    assert pickle.loads(pickle.dumps(PICTURED)) == PICTURED
    assert "course" not in repr(PICTURED)
    assert "profile" not in repr(PICTURED)


def test_text_and_markdown_need_neither_jinja2_nor_matplotlib(monkeypatch):
    expected = str(PICTURED), PICTURED.to_markdown()
    for name in ("jinja2", "markupsafe", "matplotlib", "matplotlib.image", "matplotlib.colors"):
        monkeypatch.setitem(sys.modules, name, None)
    assert (str(PICTURED), PICTURED.to_markdown()) == expected


@pytest.mark.parametrize(("tilt", "text"), [(-0.04, "0.0"), (0.0, "0.0"), (-0.05001, "-0.1"), (None, "")])
def test_a_tilt_that_rounds_to_0_has_no_sign(tilt, text):
    remedy = dataclasses.replace(TRIED.remedies[0], before=tilt, after=tilt)
    cells = re.findall(r"<td>(.*?)</td>", dataclasses.replace(TRIED, remedies=(remedy,)).to_html())
    assert cells[-3:-1] == [text, text]


def test_a_table_says_what_was_not_run():
    untrained = dataclasses.replace(TRIED.remedies[0], loss=None)
    some = dataclasses.replace(TRIED, remedies=(*TRIED.remedies, untrained))
    rows = [
        re.findall(r"<td>(.*?)</td>", row)[-3:] for row in re.findall(r"<tr>.*?</tr>", some.to_html())[1:]
    ]
    assert rows == [["9.5", "0.4", "1.88"], ["not run"] * 3, ["not run"] * 3, ["9.5", "0.4", "not run"]]
    assert [line.split(" | ")[-3:] for line in some.to_markdown().splitlines() if "not run |" in line] == [
        [*row[:2], f"{row[2]} |"] for row in rows[1:]
    ]
    none = dataclasses.replace(DIAGNOSIS, remedies=TRIED.remedies[1:])
    assert "not run" not in none.to_html() + none.to_markdown()


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def colour(monkeypatch):
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")


def test_a_file_gets_plain_text(colour):
    file = io.StringIO()
    print_diagnosis(DIAGNOSIS, file)
    assert file.getvalue() == f"{DIAGNOSIS}\n"


def test_standard_output_is_the_default(capsys):
    print_diagnosis(DIAGNOSIS)
    assert capsys.readouterr().out == f"{DIAGNOSIS}\n"


@pytest.mark.parametrize("name", ["plain", "[red]x[/red]", "[/]"])
def test_a_terminal_gets_the_same_text_in_colour(colour, name):
    file = Terminal()
    print_diagnosis(named(name), file)
    bare = re.sub(r"\x1b\[[0-9;]*m", "", file.getvalue())
    assert bare != file.getvalue()
    assert bare == f"{named(name)}\n"


def test_without_rich_a_terminal_gets_plain_text(colour, monkeypatch):
    monkeypatch.setitem(sys.modules, "rich.console", None)
    file = Terminal()
    print_diagnosis(DIAGNOSIS, file)
    assert file.getvalue() == f"{DIAGNOSIS}\n"


CUSTOM = Fault.custom("mixed_up")


@pytest.mark.parametrize("fault", [*Fault, CUSTOM])
def test_each_fault_has_a_headline_and_further_reading(fault):
    diagnosis = dataclasses.replace(DIAGNOSIS, fault=fault)
    tags, page = further_reading(fault)
    assert str(diagnosis).startswith(headline(fault))
    for form in FORMS:
        assert all(part in shown(form(diagnosis)) for part in (*tags, page))


def test_a_custom_fault_has_the_headline_of_its_name():
    assert headline(CUSTOM) == "Custom fault: mixed up"
    assert len({headline(fault) for fault in Fault}) == len(Fault)


@pytest.mark.parametrize("fault", [*Fault, CUSTOM])
def test_further_reading_exists(fault):
    tags, page = further_reading(fault)
    assert {tag.removeprefix("gradguard/") for tag in tags} <= set(NOTES)
    assert (ROOT / page).is_file()
