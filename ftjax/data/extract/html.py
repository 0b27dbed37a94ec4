"""HTML to Markdown: the main content only, code blocks verbatim, tables and lists kept, navigation gone.

Code is never indented or quoted, not even in a list or a block quote: what is between the fences is the
`<pre>`'s text to the letter, and a list that it interrupts goes on with its next number.
"""

import re
from collections.abc import Iterator
from typing import Any
from urllib.parse import urljoin

from ftjax.data.extract.document import Document, Unreadable
from ftjax.data.extract.writer import Writer
from ftjax.errors import UserError

_DROPPED = (
    "script,style,noscript,template,svg,canvas,iframe,object,audio,video,button,input,select,textarea,"
    "nav,[role=navigation],[role=search],[role=banner],[role=contentinfo],[aria-hidden=true],dialog,"
    "a.headerlink,.viewcode-link,.viewcode-back,.backrefs,td.linenos,td.gutter,.lineno,.linenos,.line-numbers-rows,"
    ".sr-only,.visually-hidden,.skip-link,.copybtn,.mw-editsection"
)
_AROUND = "header,footer,aside,[role=complementary]"  # of a page that says nowhere what its main content is
_NAVIGATION = re.compile(
    r"(?:^|[\s_-])(?:nav|navbar|navigation|nav-?header|nav-?footer|menu|(?:main|sub|search)menu|toc\w*|contents|sidebar|sphinxsidebar|"
    r"breadcrumbs?|pagination|pager|prev-?next|related|footer|site-?header|masthead|banner|tagline|logo|skip\w*|"
    r"search|share|social|cookies?|adverts?|newsletter|promo|edit-?page)(?=[\s_-]|$)",
    re.I,
)
_SKIPPED = frozenset(
    ("-comment", "head", "title", "meta", "link", "base", "col", "colgroup", "area", "map", "source")
)
_BLOCKS = frozenset(
    "html body main article section div p pre ul ol li dl dt dd table thead tbody tfoot tr td th caption "
    "h1 h2 h3 h4 h5 h6 blockquote hr figure figcaption details summary header footer aside address center "
    "form fieldset legend hgroup menu search listing xmp plaintext".split()
)
_INDENTING = frozenset(("ul", "ol", "menu", "dl", "blockquote"))
_CODE = frozenset(("code", "tt", "kbd", "samp"))
_MARKED = {
    "em": "*",
    "i": "*",
    "cite": "*",
    "var": "*",
    "dfn": "*",
    "strong": "**",
    "b": "**",
    "s": "~~",
    "del": "~~",
}
_LANGUAGES = {
    "python3": "python",
    "pycon3": "pycon",
    "ipython3": "python",
    "default": "",
    "none": "",
    "text": "",
}
_LANGUAGE = re.compile(
    r"(?:^|\s)(?:highlight-source-|highlight-|language-|lang-|brush:\s*|sourceCode\s+)([\w+#.-]+)"
)
_BREAK = "\ue000"  # a <br>, while white space is collapsed
_WHITE = re.compile(r"[ \t\r\n\f\xa0]+")
_LOOKS_LIKE_MARKDOWN = re.compile(r"^(#{1,6}\s|```|~~~)", re.M)
_ANCHOR_SIGNS = frozenset(("¶", "#", "§", "🔗", "\uf0c1"))


def read(data: bytes | str, url: str = "", links: bool = False) -> Document:
    """The page's main content. `links` keeps links' targets (absolute, by `url`), not only their text.

    Raises Unreadable where nothing is left (X002) or nearly all of it is links (X008).
    """
    tree = _parse(data)
    title = _title(tree)
    license = tree.css_first("link[rel=license],a[rel=license]")
    main = _main(tree)
    if main is None:
        raise Unreadable("X002", "the page has no body")
    written = len(main.text(strip=True))
    linked = sum(len(link.text(strip=True)) for link in main.css("a"))
    if not written:
        raise Unreadable("X002", "no text in the page's main content")
    if written and linked > 0.75 * written and not any(_prose(p) for p in main.css("p,li,td,dd")):
        raise Unreadable(
            "X008", f"{linked / written:.0%} of its text are links: an index, nothing to learn from"
        )
    renderer = _Renderer(url, links)
    renderer.flow(main)
    document = renderer.document(title)
    if license is not None and license.attributes.get("href"):
        document.meta["license"] = urljoin(url, license.attributes["href"] or "")
    return document


def links_of(data: bytes | str, url: str) -> list[str]:
    """Absolute http(s) addresses of a page's links, in order, without fragments; none that say nofollow."""
    tree = _parse(data)
    if (robots := tree.css_first("meta[name=robots]")) is not None:
        if "nofollow" in (robots.attributes.get("content") or "").lower():
            return []
    base = tree.css_first("base[href]")
    url = urljoin(url, base.attributes["href"] or "") if base is not None else url
    found = {}
    for link in tree.css("a[href]"):
        if "nofollow" in (link.attributes.get("rel") or ""):
            continue
        try:
            target = urljoin(url, (link.attributes["href"] or "").strip()).partition("#")[0]
        except ValueError:  # e.g. an unclosed [ of an IPv6 address
            continue
        if target.startswith(("http://", "https://")):
            found[target] = None
    return list(found)


def _parse(data: bytes | str) -> Any:
    try:
        from selectolax.lexbor import LexborHTMLParser
    except ImportError:
        raise UserError(
            "HTML is read by selectolax, which is not installed: pip install 'ftjax[data]'"
        ) from None
    return LexborHTMLParser(data)


def _title(tree: Any) -> str:
    """The title, without the site's name after a dash or bar."""
    node = tree.css_first("head > title") or tree.css_first("title")
    text = _WHITE.sub(" ", node.text()).strip() if node is not None else ""
    return re.split(r"\s+[—–|·»-]\s+(?=[^—–|·»]*$)", text)[0] if text.count(" ") else text


def _main(tree: Any) -> Any:
    """The element with the main content, cleared of what is no content."""
    body = tree.body
    if body is None:
        return None
    named = body.css("main,[role=main]") or body.css("article")
    node = max(named, key=lambda n: len(n.text()), default=None)
    # several articles are a list of them, and an empty <main> is filled by a script
    if node is None or (len(named) > 1 and node.tag == "article") or len(node.text(strip=True)) < 50:
        node, certain = body, False
    else:
        certain = True
    dropped = node.css(_DROPPED if certain else f"{_DROPPED},{_AROUND}")
    always = ("nav", "script", "style")
    _remove([each for each in dropped if certain or each.css_first("h1") is None or each.tag in always])
    _drop_navigation(node, certain)
    return node


def _drop_navigation(node: Any, certain: bool) -> None:
    """Drops what is called navigation and is mostly links, lists of links into the page itself, and, where
    the page does not say what its main content is, lists of links before the text begins."""
    whole = len(node.text())
    begun = certain
    gone = []
    for block in node.css("div,ul,ol,section,aside,table,p,header,dl,h2"):
        tag = block.tag
        if not begun and (tag == "h2" or (tag == "p" and _prose(block))):
            begun = True
        attributes = block.attributes
        name = attributes.get("class") or ""
        if tag == "div" and "section" not in name:  # there the id is the heading's anchor
            name += " " + (attributes.get("id") or "")
        called = name != " " and _NAVIGATION.search(name) is not None
        if not called and tag not in ("ul", "ol", "div", "table"):
            continue
        found = block.css("a[href]")
        text = len(block.text(strip=True))
        if not text or (not called and len(found) < 3):
            continue
        share = sum(len(a.text(strip=True)) for a in found) / text
        inward = share > 0.8 and all((a.attributes.get("href") or "").startswith("#") for a in found)
        drop = (called and share > 0.5 and len(found) > 1) or (inward and text < whole / 2)
        drop = drop or (not begun and share > 0.7 and len(found) > 2 and text < whole / 2)
        if not drop and called and not certain and text < (300 if share > 0.3 else 60) and text < whole / 4:
            drop = block.css_first("pre,p,h1,h2,h3") is None
        if drop and block.css_first("h1") is None:
            gone.append(block)
    _remove(gone)


def _remove(nodes: list[Any]) -> None:
    """Takes the nodes out of the tree, the outermost first; what was in one that is gone is not touched."""
    ids = {node.mem_id for node in nodes}
    outermost = []
    for node in nodes:
        above = node.parent
        while above is not None and above.mem_id not in ids:
            above = above.parent
        if above is None:
            outermost.append(node)
    for node in outermost:
        node.decompose()


def _prose(node: Any) -> bool:
    written = len(node.text(strip=True))
    return written > 60 and sum(len(a.text(strip=True)) for a in node.css("a")) < written / 2


class _Renderer(Writer):
    def __init__(self, url: str, links: bool):
        super().__init__()
        self.url, self.links = url, links
        self._block_inside = False
        self._in_tight = False

    # ── blocks ──

    def flow(self, node: Any) -> None:
        """The children: runs of inline ones are paragraphs."""
        run: list[str] = []
        for child in node.iter(include_text=True, skip_empty=False):
            tag = child.tag
            if tag == "-text":
                run.append(child.text_content)
            elif tag in _SKIPPED:
                continue
            elif tag in _BLOCKS:
                self._paragraph(run)
                self.block(child, tag)
            else:
                self._block_inside = False
                text = self.inline(child, tag)
                if self._block_inside:
                    self._block_inside = False
                    self._paragraph(run)
                    self.flow(child)
                else:
                    run.append(text)
        self._paragraph(run)

    def _paragraph(self, run: list[str]) -> None:
        if run:
            text = _collapsed("".join(run))
            run.clear()
            if text:
                self.put(_LOOKS_LIKE_MARKDOWN.sub(r"\\\1", text))

    def block(self, node: Any, tag: str) -> None:
        if tag in ("pre", "listing", "xmp", "plaintext"):
            self.pre(node)
        elif tag in _INDENTING and node.css_first("h1,h2,h3") is not None:
            self.flow(node)  # never closed, most likely: the rest of the page is in it
        elif tag[0] == "h" and tag[1:].isdigit():
            text = _collapsed("".join(self.inlines(node))).replace("\n", " ")
            if self.indent:  # in a list: it divides nothing but the item
                self.put(f"**{text.strip('*')}**")
            else:
                self.heading(int(tag[1]), text)
        elif tag in ("ul", "ol", "menu"):
            self.items(node, tag == "ol")
        elif tag == "table":
            self.table(node)
        elif tag == "dl":
            self.definitions(node)
        elif tag == "hr":
            pass
        elif tag == "blockquote":
            self.quote(node)
        elif tag in ("summary", "figcaption", "caption", "legend"):
            if text := _collapsed("".join(self.inlines(node))):
                self.put(f"**{text.strip('*')}**")
        elif tag == "p" and "admonition-title" in (node.attributes.get("class") or ""):
            lead = self.indent if self.bullet is None else self.bullet
            self.bullet = f"{lead}**{_collapsed(node.text())}:** "
        elif tag in ("aside", "div") and "footnote" in (node.attributes.get("class") or "").split():
            label = node.css_first(".label")
            if label is not None:
                self.bullet = f"{self.indent}[{_collapsed(label.text()).strip('[]')}] "
                label.decompose()
            self.flow(node)
        else:
            self.flow(node)

    def pre(self, node: Any) -> None:
        for line_break in node.css("br"):
            line_break.replace_with("\n")
        text = node.text()
        if text.strip():
            self.put_code(text.lstrip("\n").rstrip(), _language(node))

    def quote(self, node: Any) -> None:
        """Quoted text; one that only indents code, a list or a table (old pages do) is none."""
        if node.css_first("pre,table,ul,ol,dl,blockquote blockquote") is not None:
            self.flow(node)
            return
        before = self.indent, self.bullet
        self.bullet = (self.indent if self.bullet is None else self.bullet) + "> "
        self.indent += "> "
        first = len(self.out)
        self.flow(node)
        for index in range(first + 1, len(self.out)):  # the empty lines between are of the quote
            text = self.out[index].replace("\n\n", f"\n{self.indent.rstrip()}\n", 1)
            self.size += len(text) - len(self.out[index])
            self.out[index] = text
        self.indent, self.bullet = before[0], None

    def items(self, node: Any, numbered: bool) -> None:
        number = int(node.attributes.get("start") or 1) if _is_int(node.attributes.get("start") or "1") else 1
        before = self.indent, self.tight, self.bullet
        within = self._in_tight
        items = [child for child in node.iter() if child.tag == "li"]
        tight = all(
            sum(c.tag in _BLOCKS and c.tag not in ("ul", "ol") for c in li.iter()) < 2 for li in items
        )
        self._in_tight = tight
        first = True
        for child in node.iter():
            if child.tag != "li":  # a list in a list, without its item
                self.indent, self.tight, self.bullet = before[0] + "  ", tight, None
                if child.tag in _BLOCKS:
                    self.block(child, child.tag)
                elif child.tag not in _SKIPPED:
                    self.flow(child)
                continue
            given = child.attributes.get("value") or ""
            number = int(given) if numbered and _is_int(given) else number
            sign = f"{number}. " if numbered else "- "
            number += 1
            # the first item of a list that begins its item's text stands on the outer bullet's line
            self.bullet = (before[2] if first and before[2] is not None else before[0]) + sign
            self.indent = before[0] + " " * len(sign)
            self.tight = tight and (not first or within)
            first = False
            self.flow(child)
        self._in_tight = within
        self.indent, self.tight, self.bullet = before[0], before[1], None if not first else before[2]

    def definitions(self, node: Any) -> None:
        """API signatures are headings, footnotes are [1] text, other terms are list items."""
        groups: list[tuple[list[Any], Any]] = []
        terms: list[Any] = []
        for child in _unwrapped(node):
            if child.tag == "dt":
                terms.append(child)
            elif child.tag not in _SKIPPED:
                groups.append((terms, child))
                terms = []
        if terms:
            groups.append((terms, None))
        if any(map(_is_signature, groups[0][0] if groups else [])) and not self.indent:
            self.signatures(groups)
            return
        notes = "footnote" in (node.attributes.get("class") or "") or "citation" in (
            node.attributes.get("class") or ""
        )
        before, tight = self.indent, self.tight
        for terms, body in groups:
            if notes:
                label = "[" + _collapsed("".join(t.text() for t in terms)).strip("[]") + "]"
                self.bullet, self.indent = before + label + " ", before + "  "
                self.tight = True
            else:
                said = ", ".join(_collapsed("".join(self.inlines(t))) for t in terms)
                said = said if said.startswith(("`", "**")) or not said else f"**{said}**"
                self.bullet, self.indent = before + (f"- {said}: " if said else ""), before + "  "
                self.tight = False
            if body is not None:
                self.flow(body)
            if self.bullet is not None and self.bullet.strip():
                self.bullet = self.bullet.rstrip(": ")
                self.put("")
            self.bullet = None
        self.indent, self.tight = before, tight

    def signatures(self, groups: list[tuple[list[Any], Any]]) -> None:
        outer = self.level
        for terms, body in groups:
            for number, term in enumerate(terms):
                text = _quoted(_collapsed(term.text()).replace("\n", " "))
                if number == 0:
                    self.heading(outer + 1, text)
                else:
                    self.put(f"**{text}**" if text else "")
            if body is not None:
                self.flow(body)
            self.level = outer
        self.end_of_headings(outer + 1)

    # ── tables ──

    def table(self, node: Any) -> None:
        rows = [tr for tr in node.css("tr") if _table_of(tr).mem_id == node.mem_id]
        grid = [[c for c in tr.iter() if c.tag in ("td", "th")] for tr in rows]
        grid = [cells for cells in grid if cells]
        caption = node.css_first("caption")
        width = max((len(cells) for cells in grid), default=0)
        layout = (
            width < 2
            or len(grid) < 2
            or node.css_first("td table,th table,pre,h1,h2,h3,h4,dl,blockquote") is not None
        )
        if not layout and node.css_first("th") is None:
            layout = any(len(cell.text()) > 600 for cells in grid for cell in cells)
        if caption is not None and _table_of(caption).mem_id == node.mem_id:
            self.block(caption, "caption")
        if layout:
            for cells in grid:
                for cell in cells:
                    self.flow(cell)
            return
        self.put_table(_spanned(grid, self._cell))

    def _cell(self, node: Any) -> str:
        self._block_inside = False
        text = _collapsed("".join(self.inlines(node)))
        if self._block_inside:
            self._block_inside = False
            inner = _Renderer(self.url, self.links)
            inner.flow(node)
            text = "".join(inner.out)
        return text

    # ── inline ──

    def inlines(self, node: Any) -> list[str]:
        run = []
        for child in node.iter(include_text=True, skip_empty=False):
            tag = child.tag
            if tag == "-text":
                run.append(child.text_content)
            elif tag not in _SKIPPED:
                run.append(self.inline(child, tag))
        return run

    def inline(self, node: Any, tag: str) -> str:
        """Markdown of an inline element; sets `_block_inside` where it holds a block."""
        if tag == "br":
            return _BREAK
        if tag in _BLOCKS:
            self._block_inside = True
            return " " + "".join(self.inlines(node)) + " "
        if tag in _CODE:
            if node.css_first("pre,p,div") is not None:
                self._block_inside = True
            return _quoted(node.text())
        if tag == "img":
            alt = (node.attributes.get("alt") or "").strip()
            linked = (
                node.parent is not None and node.parent.tag == "a"
            )  # logos and buttons, unless they say more
            return f"[image: {alt}]" if len(alt) > (20 if linked else 2) else ""
        if tag == "math":
            tex = node.css_first("annotation[encoding='application/x-tex']")
            return f"${tex.text().strip()}$" if tex is not None else node.text()
        text = "".join(self.inlines(node))
        if self._block_inside:
            return text
        if tag in _MARKED:
            return _wrapped(text, _MARKED[tag])
        if tag == "a":
            return self._link(node, text)
        if tag == "sup":
            inner = text.strip()
            return (
                f"^{inner}" if inner and not inner.startswith("[") and node.css_first("a") is None else text
            )
        if tag == "q":
            return f'"{text.strip()}"'
        return text

    def _link(self, node: Any, text: str) -> str:
        stripped = text.strip()
        if stripped in _ANCHOR_SIGNS:
            return ""
        attributes = node.attributes
        name = attributes.get("class") or ""
        if "footnote-reference" in name and not stripped.startswith("["):
            return f"[{stripped}]"
        target = attributes.get("href") or ""
        if self.links and stripped and target and not target.startswith(("#", "javascript:")):
            try:
                return f"[{stripped}]({urljoin(self.url, target)})"
            except ValueError:
                return text
        return text


def _collapsed(text: str) -> str:
    text = _WHITE.sub(" ", text)
    if _BREAK in text:
        text = re.sub(f" ?{_BREAK} ?", "\n", text)
        text = re.sub(r"\n{2,}", "\n", text)
    return text.strip(" \n")


def _wrapped(text: str, sign: str) -> str:
    """The signs stand at the letters, the white space around them outside."""
    inner = text.strip()
    if not inner or _BREAK in inner or inner.startswith(sign) or inner[0] == "`" == inner[-1]:
        return text
    at = text.index(inner[0])
    return text[:at] + sign + inner + sign + text[at + len(inner) :]


def _quoted(code: str) -> str:
    """An inline code span, with enough backticks."""
    code = _WHITE.sub(" ", code)
    inner = code.strip()
    if not inner:
        return code
    if "`" not in inner:
        quoted = f"`{inner}`"
    else:
        sign = "`" * (max(map(len, re.findall("`+", inner))) + 1)
        quoted = f"{sign} {inner} {sign}"
    return (" " if code[0] == " " else "") + quoted + (" " if code[-1] == " " else "")


def _language(node: Any) -> str:
    """The language that classes name, on the <pre>, its <code>, or the two elements around it."""
    code = node.css_first("code")
    around = node.parent
    for each in (code, node, around, around.parent if around is not None else None):
        if each is None or each.tag not in ("pre", "code", "div", "figure", "span"):
            continue
        attributes = each.attributes
        given = attributes.get("data-lang") or attributes.get("data-language")
        found = _LANGUAGE.search(attributes.get("class") or "")
        if given or found:
            name = (given or found[1]).lower()  # type: ignore[index]
            return _LANGUAGES.get(name, name)
    return ""


def _unwrapped(node: Any) -> Iterator[Any]:
    """A <dl>'s children, and those of the <div>s that group them."""
    for child in node.iter():
        if child.tag == "div" and child.css_first("dt") is not None:
            yield from child.iter()
        else:
            yield child


def _is_signature(term: Any) -> bool:
    name = term.attributes.get("class") or ""
    return name.split(" ")[0] == "sig" or term.css_first(".sig-name,code.descname") is not None


def _table_of(node: Any) -> Any:
    node = node.parent
    while node.tag != "table":
        node = node.parent
    return node


def _spanned(grid: list[list[Any]], text: Any) -> list[list[str]]:
    """The cells' texts; one over several rows is in each of them, one over several columns in its first."""
    table: list[list[str]] = []
    below: dict[int, tuple[int, str]] = {}  # column -> (rows still to fill, text)
    for cells in grid:
        row: list[str] = []

        def fill(row=row) -> None:
            while len(row) in below:
                left, said = below.pop(len(row))
                if left > 1:
                    below[len(row)] = (left - 1, said)
                row.append(said)

        for cell in cells:
            fill()
            said = text(cell)
            down, across = (_span(cell, name) for name in ("rowspan", "colspan"))
            for number in range(across):
                if down > 1:
                    below[len(row)] = (down - 1, said if number == 0 else "")
                row.append(said if number == 0 else "")
        fill()
        table.append(row)
    return table


def _span(cell: Any, name: str) -> int:
    given = cell.attributes.get(name) or ""
    return min(max(int(given), 1), 100) if _is_int(given) else 1


def _is_int(text: str) -> bool:
    return text.strip().isascii() and text.strip().isdigit()
