"""Documents as people read them: one self-contained HTML page, and Markdown as GitHub shows it."""

import base64
import re
import struct
from collections.abc import Mapping, Sequence
from html import escape

from synbrain_jax.document import (
    Cell,
    Claim,
    Document,
    Estimate,
    Figure,
    Section,
    Table,
    best_rows,
    cell_text,
    interval_text,
)

MAX_MARKDOWN_ROWS = 60  # of a table; the page has all of them
VERDICTS = {True: "holds", False: "does not hold", None: "could not be told"}
STYLE = """
:root { color-scheme: light dark; --ink: #1c2024; --soft: #5b6470; --line: #d7dce2; --page: #fff; --block: #f4f6f8;
  --link: #0060a0; --yes: #00694c; --no: #a83f00; --open: #5b6470; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e7eb; --soft: #a4adb8; --line: #3a424c; --page: #15181c;
  --block: #1f242a; --link: #7cc0f4; --yes: #4fcfa5; --no: #ff9a5c; --open: #a4adb8; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1480px; padding: 0 1.25rem 4rem; color: var(--ink); background: var(--page);
  font: 16px/1.55 system-ui, sans-serif; }
main { min-width: 0; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 1.5rem 0; }
h2 { font-size: 1.45rem; margin: 2.5rem 0 .75rem; padding-top: .75rem; border-top: 1px solid var(--line); }
h3 { font-size: 1.15rem; margin: 2rem 0 .5rem; }
p, li, dd, figcaption { max-width: 80ch; }
a { color: var(--link); }
code { font-size: .9em; background: var(--block); padding: .1em .3em; border-radius: 3px; overflow-wrap: anywhere; }
nav ul { list-style: none; margin: 0; padding-left: .75rem; }
nav > ul { padding: 1rem 0; font-size: .9rem; }
nav a { text-decoration: none; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1rem; font-size: .9rem; margin: 1rem 0;
  padding: .75rem 1rem; background: var(--block); border-radius: 6px; }
dt { color: var(--soft); }
dd { margin: 0; overflow-wrap: anywhere; }
small, .note { color: var(--soft); font-size: .85em; }
.claims { list-style: none; padding: 0; }
.claims li { display: flex; gap: .75rem; align-items: baseline; max-width: none; margin: .45rem 0; }
.claims span { flex: none; width: 12em; text-align: center; font-weight: 600; border: 1px solid; border-radius: 4px;
  font-size: .8em; }
.claims div { min-width: 0; max-width: 90ch; }
.claims a { color: inherit; }
.yes { color: var(--yes); } .yes::before { content: "✓ "; }
.no { color: var(--no); } .no::before { content: "✗ "; }
.open { color: var(--open); } .open::before { content: "? "; }
.wide { overflow-x: auto; margin: 0 0 .5rem; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
h4 { font-size: .95rem; margin: 1.5rem 0 .4rem; max-width: 80ch; }
th, td { padding: .3rem .55rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: baseline; }
thead th { border-bottom: 2px solid var(--soft); vertical-align: bottom; }
tbody th { font-weight: 400; white-space: nowrap; position: sticky; left: 0; background: var(--page); }
.n { text-align: right; white-space: nowrap; }
thead .n { white-space: normal; }
td small { display: block; white-space: nowrap; }
.apart { font-style: italic; }
figure { margin: 1.5rem 0; }
img { max-width: 100%; height: auto; background: #fff; border: 1px solid var(--line); border-radius: 6px; }
figcaption { color: var(--soft); font-size: .9rem; }
@media (min-width: 1200px) { body { display: grid; grid-template-columns: 13rem 1fr; gap: 2rem; }
  nav { position: sticky; top: 0; height: 100vh; overflow-y: auto; } }
@media print { :root { color-scheme: light; --ink: #000; --soft: #444; --line: #bbb; --page: #fff; --block: #f4f6f8;
  --link: #000; --yes: #00694c; --no: #a83f00; --open: #444; }
  body { display: block; max-width: none; font-size: 10pt; } nav { display: none; } .wide { overflow: visible; }
  table { font-size: 8pt; } th, td { padding: .15rem .35rem; } figure, tr, .claims li { break-inside: avoid; }
  h2, h3, h4 { break-after: avoid; } }
"""


# ---- Markdown --------------------------------------------------------------------------------------


def markdown(documents: Sequence[Document], figures: Sequence[str] | None = None) -> str:
    """The documents as GitHub shows them, one after the other, with all claims before them.

    `figures` says for each document what stands before NAME.png in the links: nothing, if the text lies beside it.
    """
    before = [""] * len(documents) if figures is None else figures
    blocks = [f"# {_marked(_page_title(documents))}"]
    if claims := _summary(documents):
        blocks += ["## Claims", _markdown_table(claims, most=len(claims.rows))]
    for document, prefix in zip(documents, before, strict=True):
        blocks += [f"## {_marked(document.title)}"] if len(documents) > 1 else []
        blocks.append("\n".join(f"* {_marked(name)}: {_marked(fact)}" for name, fact in document.facts.items()))
        for section in document.sections:
            blocks += _markdown_section(section, prefix)
    return "\n\n".join(block for block in blocks if block) + "\n"


def _markdown_section(section: Section, prefix: str) -> list[str]:
    blocks = [f"### {_marked(section.title)}", *map(_marked, _paragraphs(section.text))]
    claims = [
        f"* **{VERDICTS[claim.holds]}**: {_marked(claim.text)} ({_marked(claim.evidence)})" for claim in section.claims
    ]
    blocks.append("\n".join(claims))
    for table in section.tables:
        blocks += [f"**{_marked(table.title)}**", _markdown_table(table), *map(_marked, _paragraphs(table.note))]
        if (more := len(table.rows) - MAX_MARKDOWN_ROWS) > 0:
            blocks.append(f"{more} more rows are on the HTML page.")
    for figure in section.figures:
        blocks += [f"![{_marked(figure.name.replace('_', ' '))}]({prefix}{figure.name}.png)", _marked(figure.caption)]
    return blocks


def _markdown_table(table: Table, most: int = MAX_MARKDOWN_ROWS) -> str:
    rule = ["---", *("---:" if _is_numeric(table, at) else "---" for at in range(1, len(table.columns)))]
    marks = [best_rows(table, at) for at in range(len(table.columns))]
    rows = [[_in_table(name) for name in table.columns], rule]
    for number, row in enumerate(table.rows[:most]):
        cells = [_in_table(cell) if isinstance(cell, str) else cell_text(cell) for cell in row]
        rows.append([f"**{text}**" if number in marks[at] else text for at, text in enumerate(cells)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _marked(text: str) -> str:
    """Plain text as a Markdown block that shows it, on one line."""
    return re.sub(r"^(\d+(?=[.)](?:\s|$))|(?=[-+>]))", r"\1\\", _inline(text))


def _inline(text: str) -> str:
    """The same within a line; only what stands in backticks is code."""
    parts = re.split(r"(`[^`]+`)", " ".join(text.split()))
    parts[::2] = [re.sub(r"([\\*<|~$&`#]|(?<![^\W_])_|_(?![^\W_])|\](?=[(\[:]))", r"\\\1", part) for part in parts[::2]]
    return "".join(parts)


def _in_table(text: str) -> str:
    """The same in a cell, where a bar would end it even within code."""
    return re.sub(r"(?<!\\)\|", r"\\|", _inline(text))


# ---- what both have --------------------------------------------------------------------------------


def _page_title(documents: Sequence[Document]) -> str:
    return documents[0].title if len(documents) == 1 else "Results"


def _summary(documents: Sequence[Document]) -> Table | None:
    """All claims of all documents; None if there is none."""
    rows = tuple(
        (VERDICTS[claim.holds], claim.text, document.title) for document in documents for claim in document.claims
    )
    return Table("Claims", ("", "claim", "of"), rows) if rows else None


def _paragraphs(text: str) -> list[str]:
    return [paragraph for paragraph in re.split(r"\n\s*\n", text.strip()) if paragraph]


def _is_numeric(table: Table, column: int) -> bool:
    cells = [row[column] for row in table.rows]
    return not any(isinstance(cell, str) for cell in cells)


# ---- HTML ------------------------------------------------------------------------------------------


def html(documents: Sequence[Document], pictures: Sequence[Mapping[str, bytes]]) -> str:
    """One page of all documents, which needs no other file: figures are inside, and it has no script.

    `pictures` are each document's figures as PNG, by name (`document.read_figures`).
    """
    title = escape(_page_title(documents))
    contents = "".join(_contents(number, document) for number, document in enumerate(documents))
    bodies = "".join(_article(number, *pair) for number, pair in enumerate(zip(documents, pictures, strict=True)))
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<link rel="icon" href="data:,">
<title>{title}</title>
<style>{STYLE}</style>
</head>
<body>
<nav aria-label="Contents"><ul>{contents}</ul></nav>
<main>
<h1>{title}</h1>
{_claims_of_all(documents)}{bodies}</main>
</body>
</html>
"""


def _contents(number: int, document: Document) -> str:
    sections = "".join(
        f'<li><a href="#d{number}-{at}">{escape(section.title)}</a></li>'
        for at, section in enumerate(document.sections)
    )
    return f'<li><a href="#d{number}">{escape(document.title)}</a><ul>{sections}</ul></li>\n'


def _claims_of_all(documents: Sequence[Document]) -> str:
    parts = []
    for number, document in enumerate(documents):
        lines = [
            f'<li>{_verdict(claim)} <div><a href="#d{number}-{at}">{_coded(claim.text)}</a></div></li>\n'
            for at, section in enumerate(document.sections)
            for claim in section.claims
        ]
        title = f"<h3>{escape(document.title)}</h3>\n" if len(documents) > 1 else ""
        parts += [f'{title}<ul class="claims">\n{"".join(lines)}</ul>\n'] if lines else []
    if not parts:
        return ""
    held = [claim.holds for document in documents for claim in document.claims]
    counts = ", ".join(f"{verdict} {held.count(holds)}" for holds, verdict in VERDICTS.items())
    return f'<section id="claims"><h2>Claims: {counts}</h2>\n{"".join(parts)}</section>\n'


def _article(number: int, document: Document, pictures: Mapping[str, bytes]) -> str:
    facts = "".join(f"<dt>{_coded(name)}</dt><dd>{_coded(fact)}</dd>" for name, fact in document.facts.items())
    sections = "".join(
        f'<section id="d{number}-{at}">\n{_section_html(section, pictures)}</section>\n'
        for at, section in enumerate(document.sections)
    )
    title = escape(document.title)
    return f'<article id="d{number}">\n<h2>{title}</h2>\n<dl>{facts}</dl>\n{sections}</article>\n'


def _section_html(section: Section, pictures: Mapping[str, bytes]) -> str:
    parts = f"<h3>{escape(section.title)}</h3>\n{_html_paragraphs(section.text)}"
    if section.claims:
        claims = "".join(
            f"<li>{_verdict(claim)} <div>{_coded(claim.text)}<br><small>{_coded(claim.evidence)}</small></div></li>\n"
            for claim in section.claims
        )
        parts += f'<ul class="claims">\n{claims}</ul>\n'
    return (
        parts
        + "".join(map(_html_table, section.tables))
        + "".join(_html_figure(f, pictures[f.name]) for f in section.figures)
    )


def _verdict(claim: Claim) -> str:
    kind = {True: "yes", False: "no", None: "open"}[claim.holds]
    return f'<span class="{kind}">{VERDICTS[claim.holds]}</span>'


def _html_table(table: Table) -> str:
    marks = [best_rows(table, at) for at in range(len(table.columns))]
    numeric = [_is_numeric(table, at) for at in range(len(table.columns))]
    heads = "".join(
        f'<th scope="col"{" class=n" if numeric[at] else ""}>{_coded(name)}</th>'
        for at, name in enumerate(table.columns)
    )
    body = ""
    for number, row in enumerate(table.rows):
        cells = "".join(
            f"<td{' class=n' if numeric[at] else ''}>{_html_cell(cell, number in marks[at])}</td>"
            for at, cell in enumerate(row)
            if at
        )
        kind = ' class="apart"' if row[0] in table.apart else ""
        body += f'<tr{kind}><th scope="row">{_coded(cell_text(row[0]))}</th>{cells}</tr>\n'
    return (
        f'<h4>{_coded(table.title)}</h4>\n<div class="wide"><table>\n<thead><tr>{heads}</tr></thead>\n'
        f"<tbody>\n{body}</tbody></table></div>\n{_html_paragraphs(table.note, 'note')}"
    )


def _html_cell(cell: Cell, best: bool) -> str:
    value = _coded(cell_text(cell.value if isinstance(cell, Estimate) else cell))
    value = f"<b>{value}</b>" if best else value
    return f"{value} <small>{interval}</small>" if (interval := interval_text(cell)) else value


def _html_figure(figure: Figure, png: bytes) -> str:
    width, height = struct.unpack(">II", png[16:24])
    source = f"data:image/png;base64,{base64.b64encode(png).decode()}"
    caption = escape(figure.caption)
    return (
        f'<figure><img src="{source}" width="{width}" height="{height}" alt="{caption}">'
        f"<figcaption>{_coded(figure.caption)}</figcaption></figure>\n"
    )


def _html_paragraphs(text: str, kind: str = "") -> str:
    opening = f'<p class="{kind}">' if kind else "<p>"
    return "".join(f"{opening}{_coded(paragraph)}</p>\n" for paragraph in _paragraphs(text))


def _coded(text: str) -> str:
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text))
