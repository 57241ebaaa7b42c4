"""Documents: what is kept comes back, what is shown is what was said, and a page needs nothing but itself."""

import base64
import io
import itertools
import json
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from matplotlib.image import imsave

from synbrain_jax import page
from synbrain_jax.document import (
    Claim,
    Document,
    Estimate,
    Figure,
    Section,
    Table,
    best_rows,
    cell_text,
    load,
    read_figures,
)
from synbrain_jax.errors import InputError

NASTY = "a|b <b>&amp; *x* _y_ [l](u) $z$ `c|<d>` ~~s~~ \\n"


def picture(width: int = 40, height: int = 30) -> bytes:
    buffer = io.BytesIO()
    imsave(buffer, np.random.default_rng(0).random((height, width, 3)), format="png")
    return buffer.getvalue()


def document(title: str = "Encoding", text: str = "One.\n\n- two") -> Document:
    table = Table(
        title="Voxel r",
        columns=("", "r", "mse", "count", "kind"),
        rows=(
            ("model", Estimate(0.5, 0.4, 0.6), 1.25, 12345, text),
            ("ridge", Estimate(0.3, 0.2, 0.35), 1.5, None, "linear"),
            ("ceiling", 0.9, math.nan, 3, "-"),
        ),
        note=text,
        best={"r": "high", "mse": "low"},
        apart=("ceiling",),
    )
    claims = (Claim("It holds", True, ".5 > .3"), Claim(text, False, text), Claim("Who knows", None, "-"))
    sections = (
        Section("Scores", text, tables=(table,), claims=claims),
        Section("Pictures", figures=(Figure("one", text), Figure("two_b", "Second."))),
    )
    return Document(title, {"command": "`synbrain experiment encode haxby`", "seeds": "0, 1"}, sections)


PICTURES = {"one": picture(), "two_b": picture(20, 50)}


# ---- kept ------------------------------------------------------------------------------------------


def test_a_document_comes_back_as_it_was(tmp_path):
    known = document()
    path = known.save(tmp_path)
    assert path == tmp_path / "document.json"
    loaded = load(tmp_path)
    cell = loaded.sections[0].tables[0].rows[2][2]
    assert cell is None  # it was NaN, which is not JSON
    expected = known.sections[0].tables[0].rows
    assert loaded.sections[0].tables[0].rows == (*expected[:2], ("ceiling", 0.9, None, 3, "-"))
    assert loaded.sections[0].claims == known.sections[0].claims
    assert loaded.sections[1] == known.sections[1]
    assert (loaded.title, loaded.facts) == (known.title, known.facts)
    assert page.markdown([loaded]) == page.markdown([known])
    assert loaded.sections[0].tables[0].best == {"r": "high", "mse": "low"}


def test_numbers_of_numpy_and_estimates_of_nothing_are_kept(tmp_path):
    row = ("a", np.float64(0.25), Estimate(math.nan, math.inf, None), Estimate(2.0))
    Document("x", {}, (Section("s", tables=(Table("t", ("", "a", "b", "c"), (row,)),)),)).save(tmp_path)
    *first, undefined, alone = load(tmp_path).sections[0].tables[0].rows[0]
    assert first == ["a", 0.25]
    assert math.isnan(undefined.value)
    assert (undefined.low, undefined.high) == (None, None)
    assert alone == Estimate(2.0)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: "{", "is no document"),
        (lambda content: "[]", "is no document"),
        (lambda content: json.dumps(content | {"format": 2}), "format 2, expected 1"),
        (lambda content: json.dumps({k: v for k, v in content.items() if k != "facts"}), "no field 'facts'"),
        (lambda content: json.dumps(content | {"sections": [{"title": "x"}]}), "no field 'text'"),
        (lambda content: json.dumps(content).replace('"ridge", ', ""), "has not 5 cells"),
        (lambda content: json.dumps(content).replace('"low":', '"lower":'), "lower"),
    ],
)
def test_a_damaged_document_is_named(damage, message, tmp_path):
    path = document().save(tmp_path)
    path.write_text(damage(json.loads(path.read_text())))
    with pytest.raises(InputError, match=f"{re.escape(str(path))}: .*{message}.*run its command again"):
        load(tmp_path)


def test_a_missing_document_or_figure_is_named(tmp_path):
    with pytest.raises(InputError, match=r"document\.json: cannot be read"):
        load(tmp_path)
    (tmp_path / "one.png").write_bytes(PICTURES["one"])
    with pytest.raises(InputError, match=r"two_b\.png: cannot be read"):
        read_figures(document(), tmp_path)
    (tmp_path / "two_b.png").write_bytes(b"JFIF")
    with pytest.raises(InputError, match=r"two_b\.png: is no PNG"):
        read_figures(document(), tmp_path)
    (tmp_path / "two_b.png").write_bytes(PICTURES["two_b"])
    assert read_figures(document(), tmp_path) == PICTURES


def test_a_table_is_checked_when_it_is_made():
    with pytest.raises(ValueError, match=r"\('b',\) has not 2 cells"):
        Table("t", ("", "r"), (("a", 1.0), ("b",)))
    with pytest.raises(ValueError, match="best of"):
        Table("t", ("", "r"), (("a", 1.0),), best={"rr": "high"})


# ---- cells -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cell", "text"),
    [
        (None, "-"),
        (math.nan, "-"),
        (-math.inf, "-"),
        ("word", "word"),
        (12345, "12,345"),
        (0.12349, "0.123"),
        (-0.0001, "0.000"),
        (9999.0, "9999.000"),
        (12345.0, "1.23e+04"),
        (Estimate(0.5), "0.500"),
        (Estimate(0.5, 0.25, 0.75), "0.500 [0.250, 0.750]"),
        (Estimate(0.5, 0.25, math.nan), "0.500"),
        (Estimate(math.nan), "-"),
    ],
)
def test_cells_are_printed(cell, text):
    assert cell_text(cell) == text


def marked(goal, *cells, apart=()) -> list[int]:
    rows = tuple((str(number), cell) for number, cell in enumerate(cells))
    best = {} if goal is None else {"r": goal}
    return sorted(best_rows(Table("t", ("", "r"), rows, best=best, apart=apart), 1))


def test_the_best_of_a_column_is_marked_only_where_it_is_known():
    assert marked("high", 1.0, 3.0, 2.0) == [1]
    assert marked("low", 1.0, 3.0, 2.0) == [0]
    assert marked(1.0, 0.8, 1.5, 1.1, -1.0) == [2]
    assert marked("high", 1.0, 3.0, 2.0, apart=("1",)) == [2]
    assert marked("high", 1.0, 3.00001, 3.0) == [1, 2]  # printed alike
    assert marked("high", None, math.nan, 3.0, 2.0, "x") == [2]
    assert marked("high", 3.0, Estimate(2.0, 1.0, 3.1), Estimate(2.5, 2.4, 2.9)) == [0, 1]
    assert marked("high", 3.0, Estimate(2.0, 1.0, 3.1)) == []  # cannot be told apart
    assert marked("high", 1.0, 1.0) == []
    assert marked("high", None) == []
    assert marked("high", 1.0) == []
    assert marked(None, 1.0, 3.0) == []


# ---- Markdown --------------------------------------------------------------------------------------


def shown(tokens) -> str:
    """The text of Markdown tokens as a reader sees it."""
    return "".join(
        token.content if token.type in ("text", "code_inline") else shown(token.children or []) for token in tokens
    )


def parsed(text: str):
    return MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).parse(text)


OTHER = page.markdown([document(text="SOMETHING")])


@settings(deadline=None)
@example("> a")
@example("---")
@example("1. a")
@example("12) a")
@example("+ a")
@example("[a]: b")
@example("a_b _c_ __d ___")
@given(st.text(st.characters(exclude_characters="`", categories=["L", "N", "P", "S", "Zs"]), min_size=1))
def test_markdown_shows_any_text_as_it_is(text):
    text = " ".join(text.split()) or "x"
    tokens = parsed(page.markdown([document(text=text)]))
    assert {token.tag for token in tokens} <= {"h1", "h2", "h3", "p", "ul", "li", "table", "thead", "tbody", "tr", "th",
                                               "td", ""}  # fmt: skip
    texts, others = ([shown([token]) for token in of if token.type == "inline"] for of in (tokens, parsed(OTHER)))
    assert sum("SOMETHING" in other for other in others) == 6
    assert texts == [other.replace("SOMETHING", text) for other in others]


def test_code_stays_code_in_markdown():
    tokens = parsed(page.markdown([document(text=NASTY)]))
    code = [child.content for token in tokens for child in token.children or [] if child.type == "code_inline"]
    assert code.count("c|<d>") == 7
    assert "synbrain experiment encode haxby" in code


def test_markdown_tables_have_every_cell_in_its_place():
    text = page.markdown([document()])
    table = text[text.index("**Voxel r**") :].splitlines()[2:7]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    assert cells == [
        ["", "r", "mse", "count", "kind"],
        ["---", "---:", "---:", "---:", "---"],
        ["model", "**0.500 [0.400, 0.600]**", "**1.250**", "12,345", "One. - two"],
        ["ridge", "0.300 [0.200, 0.350]", "1.500", "-", "linear"],
        ["ceiling", "0.900", "-", "3", "-"],
    ]


def test_markdown_has_claims_first_and_figures_where_they_are():
    known = [document("A"), document("B")]
    text = page.markdown(known, ["figures/a/", "figures/b/"])
    assert text.startswith("# Results\n\n## Claims\n")
    summary = text[: text.index("## A")]
    assert summary.count("| holds | It holds |") == summary.count("| does not hold |") == 2
    assert re.findall(r"\]\((.+?)\)", text) == [
        f"figures/{folder}/{name}.png" for folder in ("a", "b") for name in ("one", "two_b")
    ]
    alone = page.markdown(known[:1])
    assert alone.startswith("# A\n")
    assert "## A" not in alone
    assert re.findall(r"\]\((.+?)\)", alone) == ["one.png", "two_b.png"]


def test_a_long_markdown_table_is_cut_and_says_so():
    rows = tuple((f"row {number}", number) for number in range(page.MAX_MARKDOWN_ROWS + 7))
    long = Document("x", {}, (Section("s", tables=(Table("t", ("", "n"), rows),)),))
    text = page.markdown([long])
    assert text.count("| row ") == page.MAX_MARKDOWN_ROWS
    assert "7 more rows are on the HTML page." in text
    assert page.html([long], [{}]).count('<th scope="row">row ') == len(rows)


def test_no_claim_is_left_out_of_their_table():
    claims = tuple(Claim(f"claim {number}", None, "") for number in range(page.MAX_MARKDOWN_ROWS + 7))
    text = page.markdown([Document("one", {}, (Section("s", claims=claims),))])
    assert text.count("| could not be told | claim ") == len(claims)


# ---- HTML ------------------------------------------------------------------------------------------


class Reader(HTMLParser):
    """What a browser would find in a page: tags with attributes, and the text in each."""

    VOID = ("meta", "link", "img", "br")

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.texts: list[tuple[str, str]] = []
        self._open: list[tuple[str, int]] = []
        self._said = ""
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag, attributes):
        assert len(dict(attributes)) == len(attributes)
        self.tags.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self._open.append((tag, len(self._said)))

    def handle_endtag(self, tag):
        opened, start = self._open.pop()
        assert opened == tag
        self.texts.append((tag, self._said[start:]))

    def handle_data(self, data):
        self._said += data

    def attributes(self, tag: str) -> list[dict]:
        return [attributes for name, attributes in self.tags if name == tag]


@settings(deadline=None)
@given(st.text(st.characters(exclude_characters="`", exclude_categories=["C"]), min_size=1))
def test_html_shows_any_text_as_it_is(text):
    text = " ".join(text.split()) or "x"
    reader = Reader(page.html([document(text, text)], [PICTURES]))
    assert [said for tag, said in reader.texts if tag == "figcaption"] == [text, "Second."]
    assert [said for tag, said in reader.texts if tag in ("title", "h1", "h2")][1:] == [
        text,
        "Claims: holds 1, does not hold 1, could not be told 1",
        text,
    ]
    assert [said for tag, said in reader.texts if tag == "td"][3] == text
    assert [said for tag, said in reader.texts if tag == "p"] == [text, text]
    assert [said for tag, said in reader.texts if tag == "li"].count(f"does not hold {text}{text}") == 1
    assert [image["alt"] for image in reader.attributes("img")] == [text, "Second."]
    assert not {tag for tag, _ in reader.tags} & {"script", "iframe", "object"}


def test_a_page_needs_nothing_but_itself():
    documents = [document("A", NASTY), document("B")]
    text = page.html(documents, [PICTURES, PICTURES])
    reader = Reader(text)
    ids = [attributes["id"] for _, attributes in reader.tags if "id" in attributes]
    assert len(ids) == len(set(ids)) >= 7
    links = [attributes["href"] for attributes in reader.attributes("a")]
    assert {link[1:] for link in links} <= set(ids)
    assert {link[0] for link in links} == {"#"}
    assert [attributes["href"] for attributes in reader.attributes("link")] == ["data:,"]
    images = reader.attributes("img")
    assert len(images) == 4
    for image, png in zip(images, itertools.cycle(PICTURES.values()), strict=False):
        kind, content = image["src"].split(",")
        assert kind == "data:image/png;base64"
        assert base64.b64decode(content, validate=True) == png
    assert [(image["width"], image["height"]) for image in images[:2]] == [("40", "30"), ("20", "50")]
    outside = re.sub(r"data:image/png;base64,[\w+/=]+", "", text)
    assert not re.findall(r"https?:|//|url\(|@import", outside)
    assert [said for tag, said in reader.texts if tag == "code"].count("c|<d>") == 7


def test_html_tables_have_every_cell_in_its_place():
    text = page.html([document(text="x")], [PICTURES])
    rows = re.findall(r"<tr(.*?)>(.*?)</tr>", text)
    assert [re.findall(r"<t[hd].*?>(.*?)</t[hd]>", row) for _, row in rows] == [
        ["", "r", "mse", "count", "kind"],
        ["model", "<b>0.500</b> <small>[0.400, 0.600]</small>", "<b>1.250</b>", "12,345", "x"],
        ["ridge", "0.300 <small>[0.200, 0.350]</small>", "1.500", "-", "linear"],
        ["ceiling", "0.900", "-", "3", "-"],
    ]
    assert [attributes for attributes, _ in rows] == ["", "", "", ' class="apart"']


BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
SEEN = """<script>
const pictures = [...document.images], root = document.documentElement;
root.dataset.seen = pictures.filter(one => one.naturalWidth > 0 && one.getBoundingClientRect().width > 0).length;
root.dataset.overflow = Math.max(0, root.scrollWidth - root.clientWidth);
</script></body>"""


# Optional: a browser is no dependency; the tests above read the same page with a parser.
@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
@pytest.mark.parametrize("width", [500, 1400])
def test_a_browser_shows_every_figure_and_has_nothing_to_complain_of(width, tmp_path):
    def open_(text: str) -> subprocess.CompletedProcess:
        (tmp_path / "page.html").write_text(text)
        options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'user'}"]
        options += [f"--window-size={width},900", "--enable-logging=stderr", "--dump-dom"]
        command = [BROWSER, *options, (tmp_path / "page.html").as_uri()]
        return subprocess.run(command, capture_output=True, text=True, timeout=120)

    row = ("a", *(Estimate(0.5, 0.4, 0.6) for _ in range(20)))
    wide = Document("Wide", {}, (Section("s", tables=(Table("t", tuple(map(str, range(21))), (row,)),)),))
    text = page.html([document(text=NASTY), document("B"), wide], [PICTURES, PICTURES, {}])
    done = open_(text)
    assert "CONSOLE" not in done.stderr
    # The page allows no script, so that a copy which does must be asked.
    asked = text.replace("default-src 'none';", "default-src 'none'; script-src 'unsafe-inline';")
    root = Reader(open_(asked.replace("</body>", SEEN)).stdout).attributes("html")[0]
    assert (root["data-seen"], root["data-overflow"]) == ("4", "0")
    assert "CONSOLE" in open_(text.replace("</body>", SEEN)).stderr  # it does complain where there is cause
