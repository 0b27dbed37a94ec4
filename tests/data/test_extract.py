"""Documents to sections: each format's reading, code to the letter, and how sections are cut."""

import io
import json
import re
import subprocess
import sys
import zipfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ftjax.data.engine import Processes
from ftjax.data.extract import ExtractOptions, extract, parts_of, read
from ftjax.data.extract.document import Document, Unreadable, outline
from ftjax.data.extract.sections import sections, tokens_estimate
from ftjax.data.pipeline import run
from ftjax.data.record import Judged
from ftjax.data.steps import Step
from ftjax.errors import UserError


def html(body: str, head: str = "") -> str:
    return read(f"<html><head>{head}</head><body>{body}</body></html>".encode(), "html").text


def crumbs(document: Document, most: int = 1500, least: int = 0) -> list[list[str]]:
    return [j.record.meta["breadcrumb"] for j in sections(document, "doc", most, least) if j.record]


# ── HTML ──

PAGE = """<!DOCTYPE html><html><head><title>Widgets — The Gadget 2.1 documentation</title>
<link rel="license" href="https://example.org/license"></head><body>
<nav><ul><li><a href="/">Home</a></li><li><a href="/docs">Docs</a></li></ul></nav>
<div class="sphinxsidebar"><h3>Previous topic</h3><p><a href="a.html">Gears</a></p></div>
<div role="main">
<h1><code>widgets</code> — Make widgets<a class="headerlink" href="#w" title="Permalink">¶</a></h1>
<p>A widget is a <em>small</em> thing; see <a href="gears.html">Gears</a> and use
<code>make()</code> with&nbsp;care, 2<sup>32</sup> times<br>at most
<a class="footnote-reference brackets" href="#f">1</a>.</p>
<div class="admonition warning"><p class="admonition-title">Warning</p><p>Do not drop it.</p></div>
<h2>Steps</h2>
<ol start="3"><li><p>Run this:</p>
<div class="highlight-python3"><div class="highlight"><pre><span></span><span
class="k">def</span> <span>f</span>(x):
    <span>return</span> x &lt; 1 &amp;&amp; "__init__"
</pre></div></div></li><li><p>Then rest.</p><ul><li>one<ul><li>deep</li></ul></li><li>two</li></ul></li></ol>
<table><thead><tr><th>Name</th><th>Means</th></tr></thead>
<tbody><tr><td rowspan="2">a|b</td><td>first</td></tr>
<tr><td><p>second</p><p>more</p></td></tr></tbody></table>
<dl class="py function"><dt class="sig sig-object py" id="widgets.make"><span>widgets.</span><span
class="sig-name">make</span>(<em>n</em>, <em>*</em>)<a class="reference internal" href="s.html"><span
class="viewcode-link">[source]</span></a><a class="headerlink" href="#m">¶</a></dt>
<dd><p>Makes <em>n</em> of them.</p></dd></dl>
<p>All of this is old.</p>
<dl><dt>Term</dt><dd>What it means.</dd></dl>
<img src="x.png" alt="a widget on a desk">
<aside class="footnote brackets"><span class="label"><span>[</span>1<span>]</span></span>
<p>As noted.</p></aside>
<script>alert("no")</script>
</div><footer>Copyright nobody</footer></body></html>"""

PAGE_MARKDOWN = """# `widgets` — Make widgets

A widget is a *small* thing; see Gears and use `make()` with care, 2^32 times
at most [1].

**Warning:** Do not drop it.

## Steps

3. Run this:

```python
def f(x):
    return x < 1 && "__init__"
```

4. Then rest.

   - one
     - deep
   - two

| Name | Means |
| --- | --- |
| a\\|b | first |
| a\\|b | second<br>more |

### `widgets.make(n, *)`

Makes *n* of them.

All of this is old.

- **Term**: What it means.

[image: a widget on a desk]

[1] As noted.
"""


def test_a_page_of_every_kind_of_block():
    document = read(PAGE.encode(), "html", url="https://example.org/docs/widgets.html")
    assert document.text == PAGE_MARKDOWN
    assert document.title == "widgets — Make widgets"
    assert document.meta["license"] == "https://example.org/license"


def test_a_description_ends_where_its_list_ends():
    found = [j.record for j in sections(read(PAGE.encode(), "html"), "w", 1500, 0)]
    by_crumb = {tuple(r.meta["breadcrumb"]): r.text for r in found}
    top = "widgets — Make widgets"
    assert "Makes *n*" in by_crumb[top, "Steps", "widgets.make(n, *)"]
    assert "All of this is old." not in by_crumb[top, "Steps", "widgets.make(n, *)"]
    assert found[-1].meta["breadcrumb"] == [top, "Steps"]


def test_links_keep_their_targets_if_wanted():
    options = ExtractOptions(links=True)
    document = read(PAGE.encode(), "html", url="https://example.org/docs/widgets.html", options=options)
    assert "see [Gears](https://example.org/docs/gears.html) and" in document.text


@settings(max_examples=60, deadline=None)
@given(
    code=st.text(st.characters(codec="utf-8", exclude_characters="\r\0\x0c"), min_size=1),
    where=st.sampled_from(
        [
            "{}",
            "<ul><li>{}</li></ul>",
            "<ol><li>a<ul><li>b{}</li></ul></li></ol>",
            "<blockquote>{}</blockquote>",
            "<dl><dt>t</dt><dd>{}</dd></dl>",
            "<table><tr><td>{}</td><td>x</td></tr></table>",
            "<font><b>{}</b></font>",
            "<div class='admonition note'><p class='admonition-title'>Note</p>{}</div>",
            "<a href=x>{}</a>",
        ]
    ),
)
def test_code_is_verbatim_wherever_it_stands(code, where):
    escaped = code.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    if not code.strip():
        return
    text = html(f"<main><p>{'words ' * 20}</p>" + where.format(f"<pre>\n{escaped}</pre>") + "</main>")
    assert f"\n{code.strip(chr(10)).rstrip()}\n" in text
    # and it is one block, whatever backticks it has
    assert len(outline(text)[1]) == 1


def test_code_with_line_numbers_line_breaks_and_languages():
    numbered = """<main><h1>A</h1><table class="highlighttable"><tr><td class="linenos"><pre>1\n2</pre></td>
    <td class="code"><div class="highlight"><pre>a = 1\nb = 2</pre></div></td></tr></table>
    <pre class="language-rust"><code>fn main() {<br>}</code></pre>
    <pre><code class="lang-sh">ls\nls</code></pre><p>and that is the whole of it, more or less</p></main>"""
    text = html(numbered)
    assert "```\na = 1\nb = 2\n```" in text and "1\n2\n" not in text.replace("a = 1", "")
    assert "```rust\nfn main() {\n}\n```" in text
    assert "```sh\nls\nls\n```" in text


def test_a_page_that_names_no_main_content_loses_its_navigation_and_no_text():
    body = """<div class=logo><a href="/"><img src=l.gif alt="Site"></a></div>
    <div class="tagline">Small. Fast.</div>
    <div class="menu"><ul><li><a href=a>Home</a><li><a href=b>About</a><li><a href=c>Download</a></ul></div>
    <div><ul><li><a href=d>Files</a><li><a href=e>Networks</a><li><a href=f>Processes</a></ul></div>
    <div class="fancy_toc"><a href="#x">1. One</a><a href="#y">2. Two</a></div>
    <h1>Statements</h1><blockquote><pre>
int open(const char*,
         int);
</pre></blockquote><p>This is what it does, at some length, so that it is a text and no label.</p>
    <p><ul><li>  ?<li>  :name</ul></p>
    <ul><li><a href=g>One thing</a><li><a href=h>Another</a><li><a href=i>The last</a></ul>
    <form><input value="no"></form>
    <div class="related">See also the <a href="u">other statements</a> that may be of use, of which
    there are many.</div>
    <footer>Contact us</footer>"""
    text = html(body, "<title>Statements</title>")
    assert text == (
        "# Statements\n\n```\nint open(const char*,\n         int);\n```\n\n"
        "This is what it does, at some length, so that it is a text and no label.\n\n- ?\n- :name\n\n"
        "- One thing\n- Another\n- The last\n\n"
        "See also the other statements that may be of use, of which there are many.\n"
    )


def test_what_stands_in_a_list_that_was_never_closed_is_kept_under_its_headings():
    body = (
        "<main><h1>A</h1><dl><dt>t<dd>said<h2>B</h2><pre>one\ntwo</pre><h2>C</h2><p>the end of it all at last"
    )
    document = read(f"<html><body>{body}".encode(), "html")
    assert crumbs(document) == [["A"], ["A", "B"], ["A", "C"]]
    assert "```\none\ntwo\n```" in document.text and "said" in document.text


@pytest.mark.parametrize(
    "body, code",
    [
        ("<script>render()</script><div id=root></div>", "X002"),
        ("<main><h1>Only a title</h1></main>", "X002"),
        (
            "<h1>Index</h1><ul>" + "".join(f"<li><a href=p{n}>entry {n}</a>" for n in range(90)) + "</ul>",
            "X008",
        ),
    ],
)
def test_a_page_with_nothing_to_learn_from_says_so(body, code):
    with pytest.raises(Unreadable) as caught:
        html(body)
    assert caught.value.code == code


@pytest.mark.parametrize("tag", ["<div>", "<b>", "<ul><li>", "<table><tr><td>"])
def test_a_page_nested_beyond_all_measure_is_said_to_be(tag):
    with pytest.raises(Unreadable, match="nested too deeply"):
        read((tag * 3000 + "words " * 30).encode(), "html")


def test_charsets():
    words = "<main><p>" + "Größe naïve — ".replace("—", "-") * 5 + "</p></main>"
    latin = ("<html><head><meta charset=iso-8859-1></head>" + words).encode("latin-1")
    assert "Größe" in read(latin, "html").text
    document = read(words.encode(), "html", charset="iso-8859-1")  # the header is wrong
    assert "Größe" in document.text and [v.code for v in document.verdicts] == ["X012"]
    document = read(words.encode("cp1252"), "html", charset="utf-8")
    assert "Größe" in document.text and [v.code for v in document.verdicts] == ["X012"]
    assert "Größe" in read(words.encode("utf-16"), "html").text
    assert "日本" in read("<main><p>日本語のページ".encode("shift_jis"), "html", charset="shift_jis").text
    with pytest.raises(Unreadable, match="X001"):
        read(bytes(range(256)) * 20, "text")


# ── Markdown, text, notebooks ──


def test_markdown_stays_as_it_is_and_its_front_matter_is_meta():
    body = (
        "Intro\n=====\n\ntext __init__\n\n```sh\n# no heading\n```\n\n"
        "## B `x` ##\n\n| a |\n|---|\n| 1 |\n\nTwo\n---\n\nend\n"
    )
    document = read(f"---\ntitle: T\nlicense: MIT\ndate: 2024-01-02\n---\n\n{body}".encode(), "markdown")
    assert document.text == body
    assert document.title == "T"
    assert document.meta == {
        "license": "MIT",
        "front_matter": {"title": "T", "license": "MIT", "date": "2024-01-02"},
    }
    assert crumbs(document) == [["T", "Intro"], ["T", "Intro", "B x"], ["T", "Intro", "Two"]]
    assert read(b"---\n\nonly a rule\n\n---\n\nafter\n", "markdown").text.startswith("---")


def test_plain_text_has_no_headings():
    document = read(b"# a comment\n\nwords\n", "text")
    assert document.text == "# a comment\n\nwords\n"
    assert crumbs(Document(document.text, "t", markdown=False)) == [["t"]]


def test_notebooks():
    cells = [
        {"cell_type": "markdown", "source": ["# Title\n", "words"]},
        {
            "cell_type": "code",
            "source": "x = '''```'''\nx",
            "outputs": [{"output_type": "stream", "text": ["hi\n"]}],
        },
        {"cell_type": "code", "source": "", "outputs": []},
    ]
    notebook = json.dumps(
        {"cells": cells, "metadata": {"language_info": {"name": "julia"}}, "nbformat": 4}
    ).encode()
    assert read(notebook, "notebook").text == "# Title\nwords\n\n````julia\nx = '''```'''\nx\n````\n"
    with_outputs = read(notebook, "notebook", options=ExtractOptions(outputs=True))
    assert with_outputs.text.endswith("````\n\n```\nhi\n```\n")
    with pytest.raises(Unreadable, match="X001"):
        read(b'{"cells": 3}', "notebook")


# ── reStructuredText ──

RST = r"""
======
Gadget
======

.. module:: gadget
   :synopsis: no

Use :func:`~gadget.make` or ``raw *text*``; see `the site <https://example.org>`_ [#n]_::

    >>> make(1)
    <Gadget>

Parts
-----

* one
* two::

      code in
        an item

#. first
#. second

.. code-block:: python3
   :linenos:

   def f():

       return "``x``"

.. note:: Take care,
   really.

.. function:: make(n, *, \
                   size=1)

   Makes them.

   .. versionadded:: 2.0
      The *size* argument.

After it.

=====  =====
a      b
=====  =====
1      ``x``
2      two
       lines
=====  =====

+---+-----+
| h | i   |
+===+=====+
| 1 | a|b |
+---+-----+

term
   its meaning

.. [#n] A footnote.
.. a comment
   of two lines
.. _target:

.. unknown-directive:: argument

   kept
"""

RST_MARKDOWN = """# Gadget

Use `make()` or `raw *text*`; see the site [n]:

```pycon
>>> make(1)
<Gadget>
```

## Parts

- one

- two:

```
code in
  an item
```

1. first
2. second

```python
def f():

    return "``x``"
```

**Note:** Take care, really.

### `make(n, *, size=1)`

Makes them.

New in version 2.0: The *size* argument.

After it.

| a | b |
| --- | --- |
| 1 | `x` |
| 2 | two lines |

```
+---+-----+
| h | i   |
+===+=====+
| 1 | a|b |
+---+-----+
```

- **term**: its meaning

[n] A footnote.

argument

kept
"""


def test_restructured_text():
    document = read(RST.encode(), "rst")
    expected = RST_MARKDOWN.replace(
        "```\n+---+-----+\n| h | i   |\n+===+=====+\n| 1 | a|b |\n+---+-----+\n```",
        "| h | i |\n| --- | --- |\n| 1 | a\\|b |",
    )
    assert document.text == expected
    assert ["Gadget", "Parts", "make(n, *, size=1)"] in crumbs(document)
    assert crumbs(document)[-1] == ["Gadget", "Parts"]


# ── PDF ──


def pdf(pages: list[str], bookmarks: list[tuple[str, int]] = ()) -> bytes:
    """A PDF made by hand, of lines of text."""
    objects: list[str] = ["", "", "<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>"]
    kids = []
    for lines in pages:
        shown = "".join(f"({line}) Tj 0 -14 Td " for line in lines.split("\n") if line)
        stream = f"BT /F1 12 Tf 72 720 Td {shown}ET"
        objects.append(f"<< /Length {len(stream)} >>\nstream\n{stream}\nendstream")
        objects.append(
            f"<< /Type /Page /Parent 2 0 R /Contents {len(objects)} 0 R /MediaBox [0 0 612 792] "
            "/Resources << /Font << /F1 3 0 R >> >> >>"
        )
        kids.append(len(objects))
    outlines = ""
    if bookmarks:
        first, root = len(objects) + 1, len(objects) + 1 + len(bookmarks)
        for at, (title, page) in enumerate(bookmarks, first):
            near = f"/Next {at + 1} 0 R " * (at + 1 < root) + f"/Prev {at - 1} 0 R " * (at > first)
            objects.append(f"<< /Title ({title}) /Parent {root} 0 R /Dest [{kids[page]} 0 R /Fit] {near}>>")
        objects.append(f"<< /Type /Outlines /First {first} 0 R /Last {root - 1} 0 R /Count {root - first} >>")
        outlines = f"/Outlines {root} 0 R "
    objects[0] = f"<< /Type /Catalog /Pages 2 0 R {outlines}>>"
    objects[1] = f"<< /Type /Pages /Kids [{' '.join(f'{k} 0 R' for k in kids)}] /Count {len(kids)} >>"
    out = b"%PDF-1.4\n"
    offsets = []
    for number, body in enumerate(objects, 1):
        offsets.append(len(out))
        out += f"{number} 0 obj\n{body}\nendobj\n".encode("latin-1")
    table = "".join(f"{at:010} 00000 n \n" for at in offsets)
    head = f"xref\n0 {len(objects) + 1}\n0000000000 65535 f \n{table}"
    return (
        out
        + f"{head}trailer << /Size {len(objects) + 1} /Root 1 0 R >>\nstartxref\n{len(out)}\n%%EOF".encode()
    )


def test_pdf():
    pages = [
        f"Gadget manual\n{n + 1} Part {n}\nA long line of text that goes on and breaks inside of a hyphen-\n"
        f"ated word here,\nand ends. Page text {'abc'[n % 3] * (n + 5)}\nPage {n + 1}"
        for n in range(4)
    ]
    document = read(pdf(pages, [("Part 0", 0), ("Part 2", 2)]), "pdf")
    assert "a hyphenated word here, and ends." in document.text
    assert "Gadget manual" not in document.text and "Page 3" not in document.text  # running heads
    found = [j.record.meta for j in sections(document, "d", 1500, 0)]
    assert [(m["breadcrumb"], m["pages"]) for m in found] == [(["Part 0"], [1, 2]), (["Part 2"], [3, 4])]
    with pytest.raises(Unreadable, match="X007"):
        read(pdf(["", ""]), "pdf")
    with pytest.raises(Unreadable, match="X001"):
        read(b"%PDF-1.4 nothing", "pdf")


# ── Word ──


def docx(body: str) -> bytes:
    w = 'xmlns:w="http://schemas.openxmlformats.org/wordprocessingml/2006/main"'
    styles = "".join(
        f'<w:style w:type="paragraph" w:styleId="{i}"><w:name w:val="{name}"/></w:style>'
        for i, name in [("T", "Title"), ("H1", "heading 1"), ("Ueb2", "heading 2"), ("Code", "Source Code")]
    )
    numbering = (
        '<w:abstractNum w:abstractNumId="0"><w:lvl w:ilvl="0"><w:numFmt w:val="decimal"/></w:lvl>'
        '<w:lvl w:ilvl="1"><w:numFmt w:val="bullet"/></w:lvl></w:abstractNum>'
        '<w:num w:numId="7"><w:abstractNumId w:val="0"/></w:num>'
    )
    notes = '<w:footnote w:id="2"><w:p><w:r><w:t>the note</w:t></w:r></w:p></w:footnote>'
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("word/document.xml", f"<w:document {w}><w:body>{body}</w:body></w:document>")
        archive.writestr("word/styles.xml", f"<w:styles {w}>{styles}</w:styles>")
        archive.writestr("word/numbering.xml", f"<w:numbering {w}>{numbering}</w:numbering>")
        archive.writestr("word/footnotes.xml", f"<w:footnotes {w}>{notes}</w:footnotes>")
    return out.getvalue()


def paragraph(text: str, style: str = "", numbered: int | None = None, runs: str = "") -> str:
    inside = f'<w:pStyle w:val="{style}"/>' if style else ""
    if numbered is not None:
        inside += f'<w:numPr><w:ilvl w:val="{numbered}"/><w:numId w:val="7"/></w:numPr>'
    return f'<w:p><w:pPr>{inside}</w:pPr>{runs}<w:r><w:t xml:space="preserve">{text}</w:t></w:r></w:p>'


def test_word():
    bold = '<w:r><w:rPr><w:b/></w:rPr><w:t xml:space="preserve">Bold </w:t></w:r>'
    bold += "<w:del><w:r><w:delText>x</w:delText></w:r></w:del>"
    mono = '<w:r><w:rPr><w:rFonts w:ascii="Consolas"/></w:rPr><w:t>y = 2</w:t></w:r>'
    cells = "".join(f"<w:tc>{paragraph(t)}</w:tc>" for t in ("k", "v"))
    body = (
        paragraph("Top", "H1")
        + paragraph("words", runs=bold)
        + paragraph("one", numbered=0)
        + paragraph("sub", numbered=1)
        + paragraph("two", numbered=0)
        + paragraph("Below", "Ueb2")
        + paragraph("def f():", "Code")
        + paragraph("    return 1", "Code")
        + f"<w:p>{mono}</w:p>"
        + f"<w:tbl><w:tr>{cells}</w:tr><w:tr>{cells}</w:tr></w:tbl>"
        + '<w:p><w:r><w:t>End</w:t></w:r><w:r><w:footnoteReference w:id="2"/></w:r></w:p>'
    )
    document = read(docx(body), "docx")
    assert document.text == (
        "# Top\n\n**Bold** words\n\n1. one\n  - sub\n2. two\n\n"
        "## Below\n\n```\ndef f():\n    return 1\ny = 2\n```\n\n"
        "| k | v |\n| --- | --- |\n| k | v |\n\nEnd[2]\n\n[2] the note\n"
    )
    assert crumbs(document) == [["Top"], ["Top", "Below"]]
    titled = read(docx(paragraph("Book", "T") + paragraph("One", "H1") + paragraph("words")), "docx")
    assert titled.text == "# Book\n\n## One\n\nwords\n\n[2] the note\n" and titled.title == "Book"
    with pytest.raises(Unreadable, match="X001"):
        read(b"PK nothing", "docx")


# ── sections ──

_words = st.sampled_from(["word", "other.", "12", "naïve"])
_lines = st.sampled_from(["a = 1", "", "# no heading", "    b"])
_blocks = st.lists(
    st.one_of(
        st.builds("{} {}".format, st.sampled_from(["#", "##", "###"]), st.sampled_from(["One", "Two"])),
        st.lists(_words, min_size=1, max_size=120).map(" ".join),
        st.lists(_lines, max_size=40).map(lambda lines: "\n".join(["```x", *lines, "```"])),
        st.integers(1, 30).map(lambda n: "\n".join(f"- item {i}" for i in range(n))),
        st.integers(1, 900).map(lambda n: "x" * n),
    ),
    max_size=12,
)


@settings(max_examples=150, deadline=None)
@given(_blocks, st.integers(50, 200), st.integers(0, 40))
def test_sections_are_within_the_limit_lose_nothing_and_keep_code_whole(blocks, most, least):
    text = "\n\n".join(blocks) + "\n"
    found = list(sections(Document(text, "T"), "doc", most, least))
    covered = 0
    for judged in found:
        record = judged.record
        start, end = record.meta["offset"]
        assert not text[covered:start].strip(), "text between two sections"
        covered = end
        cut = any(v.code == "X013" for v in judged.verdicts)
        if not cut:
            assert record.text == text[start:end]
            assert tokens_estimate(record.text) <= most
        else:
            assert text[start:end] in record.text and tokens_estimate(text[start:end]) <= most
        assert record.text.count("```") % 2 == 0
        assert record.meta["tokens_estimate"] == tokens_estimate(record.text)
        assert record.meta["breadcrumb"][0] == "T"
    assert not text[covered:].strip()
    for block in blocks:
        if block.startswith("```") and tokens_estimate(block) <= most:
            assert any(block in judged.record.text for judged in found)


def test_a_long_section_is_cut_between_paragraphs_into_about_equal_parts():
    paragraphs = [f"Paragraph {n} has about ten tokens in it." for n in range(20)]
    text = "# H\n\n" + "\n\n".join(paragraphs) + "\n"
    found = [j.record for j in sections(Document(text, "H"), "d", 150, 0)]
    sizes = [r.meta["tokens_estimate"] for r in found]
    assert max(sizes) <= 150 and max(sizes) < 1.5 * min(sizes)
    assert all(r.text.endswith("in it.") for r in found)
    assert {tuple(r.meta["breadcrumb"]) for r in found} == {("H",)}


def test_a_lead_in_stays_with_its_code():
    text = "word " * 60 + "\n\nLike this:\n\n```\n" + "x = 1\n" * 8 + "```\n\n" + "word " * 30 + "\n"
    found = [j.record.text for j in sections(Document(text, "T"), "d", 100, 0)]
    assert any(t.startswith("Like this:\n\n```") for t in found)


def test_small_sections_go_with_the_next_one():
    text = "# A\n\n## B\n\nsome words here\n\n### C\n\nx\n\n### D\n\ny\n\n## E\n\n" + "word " * 40 + "\n"
    found = [j.record for j in sections(Document(text, "A"), "d", 1500, 15)]
    assert [r.meta["breadcrumb"] for r in found] == [["A", "B"], ["A", "E"]]
    assert found[0].text.startswith("# A\n\n## B") and found[0].text.endswith("y")


def test_ids_are_of_the_place_and_stay_the_same():
    document = Document("# A\n\nx\n\n# B\n\ny\n", "T")
    first, second = ([j.record.meta["section"] for j in sections(document, g, 1500, 0)] for g in ("u", "v"))
    assert len(set(first + second)) == 4
    assert first == [j.record.meta["section"] for j in sections(document, "u", 1500, 0)]


def test_a_code_block_larger_than_a_section_is_cut_closed_and_said():
    code = "\n".join(f"line_{n} = {n}" for n in range(200))
    found = list(sections(Document(f"# A\n\n```python\n{code}\n```\n", "A"), "d", 200, 0))
    assert len(found) > 2
    assert all(j.verdicts[0].code == "X013" for j in found if j.record.text.startswith("```python"))
    lines = re.findall(r"line_\d+ = \d+", "\n".join(j.record.text for j in found))
    assert "\n".join(lines) == code
    assert all(j.record.text.count("```") == 2 for j in found if "line_" in j.record.text)


# ── sources ──


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "docs"
    (root / "_static").mkdir(parents=True)
    (root / "guide").mkdir()
    (root / "a.html").write_text(PAGE)
    (root / "copy.html").write_text(PAGE)
    (root / "empty.md").write_text("\n")
    (root / "guide" / "b.md").write_text("# B\n\nwords of b\n")
    (root / "guide" / "bad.ipynb").write_text("{}")
    (root / "logo.png").write_bytes(b"\x89PNG")
    (root / "_static" / "c.txt").write_text("not read")
    (root / ".hidden.md").write_text("not read")
    return root


def test_every_document_of_a_folder_is_accounted_for(folder):
    judged = list(extract([str(folder)]))
    ended = {
        v.source.removeprefix(f"{folder}/"): v.code for j in judged if j.record is None for v in j.verdicts
    }
    assert ended == {"copy.html": "X003", "empty.md": "X002", "guide/bad.ipynb": "X001", "logo.png": "X004"}
    kept = [j.record for j in judged if j.record]
    assert {r.meta["group"] for r in kept} == {f"{folder}/a.html", f"{folder}/guide/b.md"}
    assert all(r.task == "lm" and r.meta["source"] == r.meta["group"] for r in kept)
    assert kept[0].meta["license"] == "https://example.org/license"


def test_processes_give_the_same_and_options_apply(folder):
    options = ExtractOptions(base_url="https://example.org/d", license="MIT", exclude=["*.html"])
    here = [j.record and j.record.to_json() for j in extract([str(folder)], options)]
    assert here == [
        j.record and j.record.to_json() for j in extract([str(folder)], options, engine=Processes(2))
    ]
    meta = next(r for r in here if r)["meta"]
    assert meta["url"] == meta["group"] == "https://example.org/d/guide/b.md"
    assert meta["license"] == "MIT" and meta["source"] == f"{folder}/guide/b.md"


def test_documents_are_parts_of_a_pipeline(folder, tmp_path):
    class Same(Step):
        name = "same"

        def apply(self, records, decision, part):
            return map(Judged, records)

    parts = parts_of([str(folder)], ExtractOptions())
    stage = run(Same(None), parts, tmp_path / "work")
    assert [r.to_json() for r in stage.records()][-1]["text"] == "# B\n\nwords of b"
    before = parts[0].key()
    assert before == parts_of([str(folder)], ExtractOptions())[0].key()
    (folder / "guide" / "b.md").write_text("# B\n\nother words\n")
    assert before != parts[0].key()


def test_the_verb_writes_sections_and_accounts_for_every_document(folder, tmp_path, capsys):
    from ftjax.cli import main

    out, report = tmp_path / "sections.jsonl", tmp_path / "report.json"
    arguments = ["--output", str(out), "--report", str(report), "--max-tokens", "200", "--processes", "1"]
    assert main(["data", "extract", str(folder), *arguments]) == 3  # bad.ipynb is in error
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert rows == [
        j.record.to_json() for j in extract([str(folder)], ExtractOptions(max_tokens=200)) if j.record
    ]
    made = json.loads(report.read_text())
    (stage,) = made["stages"]
    assert stage["kept"] == len(rows) == made["outputs"][0]["rows"] and stage["dropped"] == 4
    assert {v["source"].removeprefix(f"{folder}/"): v["outcome"] for v in made["verdicts"]} == {
        name: "dropped" for name in ("copy.html", "empty.md", "guide/bad.ipynb", "logo.png")
    }
    assert "X003 same_document" in capsys.readouterr().out
    assert main(["data", "extract", str(folder), "--output", str(out), "--max-tokens", "ten"]) == 2
    assert "--max-tokens" in capsys.readouterr().err


def test_nothing_heavy_is_imported():
    heavy = "{'jax', 'transformers', 'datasets', 'grain', 'torch', 'selectolax', 'pypdf'}"
    code = f"import sys, ftjax.data.extract; assert not {heavy} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_sources_that_are_not_there_and_options_that_make_no_sense(tmp_path):
    with pytest.raises(UserError, match="no such file or folder"):
        list(extract([str(tmp_path / "nothing")]))
    with pytest.raises(UserError, match="begins with http"):
        list(extract(["ftp://example.org/x"]))
    with pytest.raises(UserError, match="min_tokens=90"):
        ExtractOptions(max_tokens=60, min_tokens=90)
    big = tmp_path / "big.txt"
    big.write_text("x" * 2000)
    (judged,) = extract([str(big)], ExtractOptions(max_mb=0.001))
    assert judged.verdicts[0].code == "X009"


@pytest.mark.parametrize("module, kind", [("selectolax.lexbor", "html"), ("pypdf", "pdf")])
def test_a_format_whose_library_is_missing_names_the_extra(module, kind, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=r"pip install 'ftjax\[data\]'"):
        read(b"<p>x", kind)
