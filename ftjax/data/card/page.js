"use strict";
/* Browses the rows of a card. Data becomes text nodes and nothing else. */
(() => {
  const $ = (id) => document.getElementById(id);
  const HEIGHT = 72, KEPT_CHUNKS = 12, MARKS = 5000;
  const number = (n) => n.toLocaleString("en");

  function make(tag, css, ...children) {
    const node = document.createElement(tag);
    if (css) node.className = css;
    node.append(...children.filter((child) => child !== null && child !== undefined && child !== ""));
    return node;
  }

  // ── data ──────────────────────────────────────────────────────────────────────────────────

  async function unpacked(name) {
    const binary = atob($("data-" + name).textContent);
    const bytes = new Uint8Array(binary.length);
    for (let i = 0; i < binary.length; i++) bytes[i] = binary.charCodeAt(i);
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    return JSON.parse(await new Response(stream).text());
  }

  function strings(value, out) {
    if (typeof value === "string") out.push(value);
    else if (typeof value === "number") out.push(String(value));
    else if (value && typeof value === "object") for (const inner of Object.values(value)) strings(inner, out);
    return out;
  }

  class Table {
    constructor(name, index) {
      Object.assign(this, index);
      this.name = name;
      this.starts = [0];
      for (const size of this.chunks) this.starts.push(this.starts.at(-1) + size);
      this.open = new Map(); // the chunks looked at last
      this.texts = []; // of each chunk, once searched: each row's text in lower case
    }

    async chunk(i) {
      const made = this.open.get(i) ?? unpacked(`${this.name}-${i}`);
      this.open.delete(i);
      this.open.set(i, made);
      if (this.open.size > KEPT_CHUNKS) this.open.delete(this.open.keys().next().value);
      return made;
    }

    chunkOf(row) {
      let low = 0, high = this.chunks.length - 1;
      while (low < high) {
        const middle = (low + high + 1) >> 1;
        if (this.starts[middle] <= row) low = middle; else high = middle - 1;
      }
      return low;
    }

    async body(row) {
      const i = this.chunkOf(row);
      return (await this.chunk(i))[row - this.starts[i]];
    }

    async searchable(i) {
      if (!this.texts[i]) {
        const bodies = await this.chunk(i);
        this.texts[i] = bodies.map(({ record, verdicts, raw }) =>
          strings([record, verdicts, raw], []).join("\n").toLowerCase());
      }
      return this.texts[i];
    }

    name_of(column, row) {
      const value = this.columns[column]?.[row];
      return this.names[column] ? this.names[column][value] : value;
    }
  }

  // ── state, which is the address ───────────────────────────────────────────────────────────

  const FACETS = {
    rows: [["split", "split"], ["task", "task"], ["language", "language"], ["source", "source"], ["codes", "verdict"]],
    left: [["stage", "stage"], ["codes", "verdict"], ["source", "source"]],
  };
  const tables = {};
  let about, table = null, state = new URLSearchParams(), part = "overview";
  let found = [], selected = -1, searching = 0, view = 0, white = false;

  function readAddress() {
    const [where, query] = location.hash.slice(1).split(/\?(.*)/s);
    const next = tables[where] ? where : "overview";
    if (next === part && query === state.toString()) return;
    part = next;
    state = new URLSearchParams(query || "");
    open();
  }

  function set(key, value) {
    if (value) state.set(key, value); else state.delete(key);
    writeAddress();
  }

  function writeAddress() {
    const query = state.toString();
    history.replaceState(null, "", `#${part}${query ? "?" + query : ""}`);
  }

  function open() {
    for (const link of document.querySelectorAll(".top nav a"))
      if (link.id === "tab-" + part) link.setAttribute("aria-current", "page");
      else link.removeAttribute("aria-current");
    $("overview").hidden = part !== "overview";
    $("browser").hidden = part === "overview";
    if (part === "overview") return;
    table = tables[part];
    $("query").value = state.get("q") || "";
    drawFilters();
    search();
  }

  // ── filters and search ────────────────────────────────────────────────────────────────────

  function shown(column, value) {
    if (column === "codes") return `${value} ${about.codes[value]?.[0] ?? ""}`.trim();
    return value || "none";
  }

  function drawFilters() {
    const box = $("filters");
    box.replaceChildren();
    for (const [column, label] of FACETS[part]) {
      const counts = new Map();
      for (let row = 0; row < table.rows; row++)
        for (const value of [table.name_of(column, row) ?? []].flat())
          counts.set(value, (counts.get(value) || 0) + 1);
      const wanted = state.get(column);
      if (counts.size < (column === "codes" ? 1 : 2) && !wanted) continue;
      const select = make("select", wanted ? "set" : "");
      select.setAttribute("aria-label", label);
      select.dataset.column = column;
      select.append(new Option(`any ${label}`, ""));
      for (const [value, n] of [...counts].sort((a, b) => b[1] - a[1]).slice(0, 1000))
        if (value !== "") select.append(new Option(`${shown(column, value)}  (${number(n)})`, value));
      if (wanted && !counts.has(wanted)) select.append(new Option(`${shown(column, wanted)}  (0)`, wanted));
      select.value = wanted || "";
      select.onchange = () => { select.classList.toggle("set", select.value); set(column, select.value); search(); };
      box.append(select);
    }
    if (table.columns.tokens) {
      const pair = make("div", "lengths");
      for (const [key, words] of [["min", "tokens ≥"], ["max", "tokens ≤"]]) {
        const input = make("input");
        Object.assign(input, { type: "number", min: 0, placeholder: words, value: state.get(key) || "" });
        input.setAttribute("aria-label", words);
        input.oninput = () => { set(key, input.value); search(); };
        pair.append(input);
      }
      box.append(pair);
      const order = make("select", state.get("order") ? "set" : "");
      order.setAttribute("aria-label", "order");
      const scores = new Set(table.columns.scores.flatMap((of) => Object.keys(of ?? {})));
      const orders = [["", "file order"], ["long", "longest first"], ["short", "shortest first"], ["mixed", "shuffled"]];
      for (const name of [...scores].sort())
        orders.push([`high ${name}`, `highest ${name} first`], [`low ${name}`, `lowest ${name} first`]);
      for (const [value, words] of orders) order.append(new Option(words, value));
      order.value = state.get("order") || "";
      order.onchange = () => { order.classList.toggle("set", order.value); set("order", order.value); search(); };
      box.append(order);
    }
  }

  const terms = () => [...(state.get("q") || "").toLowerCase().matchAll(/"([^"]+)"|(\S+)/g)]
    .map((match) => match[1] ?? match[2].replaceAll('"', "")).filter(Boolean);

  function filtered() {
    const checks = [];
    for (const [column] of FACETS[part]) {
      const wanted = state.get(column);
      if (!wanted) continue;
      const values = table.columns[column] ?? [];
      if (column === "codes") checks.push((row) => values[row].includes(wanted));
      else {
        const i = table.names[column]?.indexOf(wanted) ?? -1;
        checks.push((row) => values[row] === i);
      }
    }
    const tokens = table.columns.tokens;
    if (tokens && state.get("min")) checks.push((row) => tokens[row] >= +state.get("min"));
    if (tokens && state.get("max")) checks.push((row) => tokens[row] <= +state.get("max"));
    const rows = [];
    for (let row = 0; row < table.rows; row++) if (checks.every((check) => check(row))) rows.push(row);
    return rows;
  }

  function ordered(rows) {
    const tokens = table.columns.tokens, order = state.get("order");
    if (order === "long") return rows.sort((a, b) => tokens[b] - tokens[a] || a - b);
    if (order === "short") return rows.sort((a, b) => tokens[a] - tokens[b] || a - b);
    const [, way, score] = /^(high|low) (.+)$/s.exec(order ?? "") ?? [];
    if (score) {
      const sign = way === "high" ? -1 : 1;
      const value = (row) => table.columns.scores[row]?.[score] ?? sign * Infinity; // those without it last
      return rows.sort((a, b) => (value(a) === value(b) ? a - b : sign * (value(a) - value(b))));
    }
    const key = (row) => Math.imul(row + 1, 0x9e3779b1) >>> 0; // the same shuffle each time
    if (order === "mixed") return rows.sort((a, b) => key(a) - key(b));
    return rows;
  }

  async function search() {
    const mine = ++searching, words = terms(), candidates = filtered();
    const narrowed = ["q", "min", "max", ...FACETS[part].map(([column]) => column)].some((key) => state.get(key));
    $("clear").hidden = !narrowed;
    if (!words.length) return finish(candidates, true);
    const hits = [];
    let said = performance.now(), at = 0;
    for (let i = 0; i < table.chunks.length; i++) {
      if (candidates[at] >= table.starts[i + 1]) continue;
      if (at >= candidates.length) break;
      const texts = await table.searchable(i);
      if (mine !== searching) return;
      for (; at < candidates.length && candidates[at] < table.starts[i + 1]; at++) {
        const text = texts[candidates[at] - table.starts[i]];
        if (words.every((word) => text.includes(word))) hits.push(candidates[at]);
      }
      if (performance.now() - said > 120) {
        finish(hits.slice(), false, at / candidates.length);
        await new Promise((done) => setTimeout(done));
        if (mine !== searching) return;
        said = performance.now();
      }
    }
    finish(hits, true);
  }

  function finish(rows, whole, share) {
    found = ordered(rows);
    const all = found.length === table.rows ? `${number(table.rows)} rows` :
      `${number(found.length)} of ${number(table.rows)} rows`;
    $("found").textContent = whole ? all : `${all} … ${Math.floor(100 * share)}% searched`;
    $("tall").style.height = `${found.length * HEIGHT}px`;
    const wanted = state.get("row");
    const place = wanted === null ? -1 : found.findIndex((row) => String(table.columns.id[row]) === wanted);
    if (place >= 0) select(place, false);
    else if (whole || found.length) {
      selected = -1;
      $("list").scrollTop = 0;
      if (found.length && !narrow()) select(0, false); else { drawList(); if (whole && !narrow()) nothing(); }
    }
    document.documentElement.dataset.state = whole ? "ready" : "searching";
  }

  function nothing() {
    $("row").replaceChildren(make("p", "empty", found.length ? "Choose a row." : "No row has all of this."));
  }

  // ── the list ──────────────────────────────────────────────────────────────────────────────

  function drawList() {
    const list = $("list"), first = Math.max(0, Math.floor(list.scrollTop / HEIGHT) - 4);
    const last = Math.min(found.length, Math.ceil((list.scrollTop + list.clientHeight) / HEIGHT) + 4);
    const items = [];
    for (let place = first; place < last; place++) items.push(item(place));
    $("tall").replaceChildren(...items);
    if (selected >= 0) list.setAttribute("aria-activedescendant", `item-${selected}`);
    else list.removeAttribute("aria-activedescendant");
  }

  function item(place) {
    const row = found[place], c = table.columns;
    const codes = c.codes[row].slice(0, 3).map((code) => make("span", `code ${severity(code)}`, code));
    const length = c.tokens ? `${number(c.tokens[row])} tokens` : "";
    const where = c.line[row] ? `:${number(c.line[row])}` : "";
    const node = make("div", "item",
      make("div", "title", c.title[row] || "(nothing)"), make("div", "answer", c.answer[row] || "\u00a0"),
      make("div", "small", make("span", "", [table.name_of("split", row) ?? table.name_of("stage", row),
        base(table.name_of("source", row)) + where].filter(Boolean).join(" · ")), ...codes, make("span", "", length)));
    node.id = `item-${place}`;
    node.style.top = `${place * HEIGHT}px`;
    node.setAttribute("role", "option");
    node.setAttribute("aria-selected", place === selected);
    node.setAttribute("aria-setsize", found.length);
    node.setAttribute("aria-posinset", place + 1);
    node.onclick = () => select(place, true);
    return node;
  }

  const base = (name) => name.split("/").at(-1);
  const severity = (code) => about.codes[code]?.[1] ?? "note";
  const narrow = () => matchMedia("(max-width: 760px)").matches;

  function select(place, reading) {
    if (!found.length) return;
    selected = Math.max(0, Math.min(place, found.length - 1));
    const list = $("list"), top = selected * HEIGHT;
    if (reading) $("browser").classList.add("reading");
    if (top < list.scrollTop) list.scrollTop = top;
    else if (top + HEIGHT > list.scrollTop + list.clientHeight) list.scrollTop = top + HEIGHT - list.clientHeight;
    set("row", String(table.columns.id[found[selected]]));
    drawList();
    drawRow();
  }

  // ── one row ───────────────────────────────────────────────────────────────────────────────

  // What hides or reorders text is always shown by its number; spaces and line ends on demand.
  const ODD = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u00ad\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ufffd\ue000-\uf8ff]/u;
  const WHITE = /[ \t\n\u00a0\u3000]/;
  const SEEN = { " ": "·", "\t": "⇥\t", "\n": "↵\n", "\u00a0": "⍽", "\u3000": "□" };

  function pattern() {
    const words = terms().map((word) => word.replace(/[.*+?^${}()|[\]\\]/g, "\\$&"));
    const parts = [...(words.length ? [`(?<word>${words.join("|")})`] : []), `(?<odd>${ODD.source})`];
    if (white) parts.push(`(?<white>${WHITE.source})`);
    return new RegExp(parts.join("|"), "giu");
  }

  function write(node, text, how = pattern()) {
    let at = 0, marks = 0;
    for (const match of text.matchAll(how)) {
      if (++marks > MARKS) break;
      node.append(text.slice(at, match.index));
      const { word, odd } = match.groups;
      if (word !== undefined) node.append(make("mark", "", word));
      else if (odd !== undefined) {
        const code = odd.codePointAt(0).toString(16).toUpperCase().padStart(4, "0");
        node.append(make("span", "odd", `U+${code}`), odd === "\u2028" || odd === "\u2029" ? "\n" : "");
      } else node.append(make("span", "white", SEEN[match[0]]));
      at = match.index + match[0].length;
    }
    node.append(text.slice(at));
    return node;
  }

  function prose(text) {
    // code between fences in its own box, the fences with it: what is shown is what is there
    return text.split(/(^```[^\n]*\n[\s\S]*?(?:^```[^\n]*$|$(?![\s\S])))/m).filter(Boolean).map((piece) =>
      piece.startsWith("```") ? write(make("pre"), piece.replace(/\n$/, "")) :
        piece.trim() || white ? write(make("div", "text"), piece.replace(/^\n|\n$/g, "")) : "");
  }

  const pretty = (value) => typeof value === "string" ? value : JSON.stringify(value, null, 2);

  function content(message) {
    const parts = [];
    if (message.reasoning_content) {
      const box = make("details", "", make("summary", "", "thinking"), ...prose(message.reasoning_content));
      box.open = true;
      parts.push(box);
    }
    for (const part of [message.content ?? ""].flat()) {
      if (typeof part === "string") parts.push(...prose(part));
      else if (part.type === "image_url") parts.push(picture(part.image_url?.url ?? ""));
      else if (typeof part.text === "string") parts.push(...prose(part.text));
      else parts.push(write(make("pre"), pretty(part)));
    }
    for (const call of message.tool_calls ?? [])
      parts.push(make("div", "call", write(make("h4"), `${call.function?.name ?? "?"}()`),
        write(make("pre"), pretty(call.function?.arguments ?? {}))));
    return parts;
  }

  function picture(url) {
    if (!/^data:image\/(png|jpeg|gif|webp);/.test(url)) return write(make("div", "text"), `[image ${url.slice(0, 300)}]`);
    const image = make("img");
    image.src = url;
    image.alt = "image of the row";
    return image;
  }

  function turn(message, trained) {
    const said = [];
    if (message.name) said.push(message.name);
    if (message.tool_call_id) said.push(message.tool_call_id);
    if (message.role === "assistant" && "weight" in message && message.weight !== 1)
      said.push(message.weight ? `weight ${message.weight}` : "not trained");
    const role = /^[a-z]+$/.test(message.role) ? message.role : "";
    return make("section", `turn ${role} ${trained === false ? "untrained" : ""}`,
      make("div", "who", message.role, write(make("span"), said.join(" · "))),
      make("div", "bubble", ...content(message)));
  }

  const turns = (messages) => (messages ?? []).map((m) => turn(m, m.role === "assistant" ? m.weight !== 0 : undefined));

  function conversation({ record, raw }) {
    if (!record) return raw === undefined ? [make("p", "empty", about.masked ?
      "The row itself is not shown: the recipe looked for personal data, and this may be some." :
      "The file that this row stood in is not at hand.")] :
      [make("h3", "", "The row as it was"), write(make("pre", "json"), reformatted(raw))];
    const nodes = [];
    if (record.tools?.length) {
      const names = record.tools.map((tool) => (tool.function ?? tool).name).join(", ");
      nodes.push(make("details", "turn", write(make("summary"), `tools: ${names}`),
        write(make("pre"), pretty(record.tools))));
    }
    nodes.push(...turns(record.messages));
    if (record.text) nodes.push(make("section", "turn assistant", make("div", "who", "text"),
      make("div", "bubble", ...prose(record.text))));
    if (record.chosen || record.rejected) nodes.push(make("div", "pair",
      make("div", "", make("h3", "ok", "chosen"), ...turns(record.chosen)),
      make("div", "", make("h3", "no", "rejected"),
        ...(record.rejected ?? []).map((m) => turn(m, false)))));
    (record.completions ?? []).forEach((text, i) => nodes.push(make("section", "turn assistant",
      make("div", "who", `step ${i + 1}`, make("span", record.labels?.[i] ? "ok" : "no", record.labels?.[i] ? "✓" : "✗")),
      make("div", "bubble", ...prose(text)))));
    if (record.label !== undefined) nodes.push(make("p", record.label ? "ok" : "no",
      record.label ? "✓ labelled a good answer" : "✗ labelled a bad answer"));
    return nodes;
  }

  function reformatted(raw) {
    try { return JSON.stringify(JSON.parse(raw), null, 2); } catch { return raw; }
  }

  function mask({ mask: documents, problem }) {
    if (problem) return [make("p", "empty", `This row can't be rendered: ${problem}.`)];
    const partly = documents.some(({ runs }) => runs.some(([, weight]) => weight && weight !== 1));
    const nodes = [make("p", "key", make("i", "on", "trained"),
      partly ? make("i", "part", "trained with another weight") : "", make("i", "", "given, not trained"))];
    for (const { name, tokens: all, trained, runs, notes } of documents) {
      nodes.push(make("h3", "", `${name ? name + ": " : ""}${number(all)} tokens, ${number(trained)} trained`));
      const box = make("div", "mask");
      for (const [text, weight, tokens] of runs) {
        const run = make("span", weight === 1 ? "on" : weight ? "part" : "");
        run.title = weight ? `${number(tokens)} tokens, weight ${weight}` : `${number(tokens)} tokens, not trained`;
        box.append(write(run, text));
      }
      nodes.push(box, ...notes.map((note) => make("p", "soft", `Note: ${note}.`)));
    }
    return nodes;
  }

  function verdicts(list) {
    const groups = new Map();
    for (const v of list) {
      const key = `${v.stage} ${v.code} ${v.outcome}`;
      groups.set(key, [...(groups.get(key) ?? []), v]);
    }
    return [...groups.values()].map((group) => {
      const [{ stage, code, outcome, fix: own }] = group, [name, grave, usual] = about.codes[code] ?? ["", "note", ""];
      const lines = group.map((v) => make("p", "", v.path ? write(make("span", "soft"), `${v.path}: `) : "",
        write(make("span"), v.text)));
      const more = lines.splice(4);
      const fix = outcome === "changed" ? "" : own || usual;
      return make("div", `verdict ${grave}`, make("b", "", `${code} ${name}`), " ",
        make("span", "soft", [stage, outcome === "changed" ? "and changed" : ""].filter(Boolean).join(" · ")), ...lines,
        more.length ? make("details", "", make("summary", "", `${number(more.length)} more`), ...more) : "",
        fix ? write(make("p", "soft"), `What would be right: ${fix}`) : "");
    });
  }

  function provenance(record) {
    const rows = Object.entries(record?.meta ?? {}).map(([key, value]) => {
      const cell = make("td");
      if (typeof value === "string" && /^https?:\/\//.test(value)) {
        const link = make("a", "", value);
        Object.assign(link, { href: value, target: "_blank", rel: "noopener noreferrer" });
        cell.append(link);
      } else write(cell, pretty(value));
      return make("tr", "", make("td", "", key), cell);
    });
    if (record?.sample_weight !== undefined)
      rows.unshift(make("tr", "", make("td", "", "weight"), make("td", "", String(record.sample_weight))));
    return rows.length ? [make("table", "meta", make("tbody", "", ...rows))] : [];
  }

  let drawn = 0;
  async function drawRow() {
    const row = found[selected], mine = ++drawn, from = table;
    const body = await from.body(row);
    if (mine !== drawn) return;
    const views = [["Conversation", conversation]];
    if (body.mask?.length || body.problem) views.push(["Mask", mask]);
    if (body.record) views.push(["JSON", () => [write(make("pre", "json"), JSON.stringify(body.record, null, 2))]]);
    const now = views.find(([name]) => name === ["Conversation", "Mask", "JSON"][view]) ?? views[0];
    const buttons = views.map(([name]) => {
      const button = make("button", "", name);
      button.type = "button";
      button.setAttribute("aria-pressed", name === now[0]);
      button.onclick = () => { view = ["Conversation", "Mask", "JSON"].indexOf(name); drawRow(); };
      return button;
    });
    const c = from.columns, back = make("button", "back", "← rows");
    back.type = "button";
    back.onclick = leaveRow;
    const where = `${base(from.name_of("source", row))}${c.line[row] ? ":" + c.line[row] : ""}`;
    const facts = [from.name_of("task", row), from.name_of("language", row),
      c.tokens ? `${number(c.tokens[row])} tokens${about.estimate ? " (estimate)" : `, ${number(c.trained[row])} trained`}` : ""];
    const place = make("span", "place", where);
    place.title = from.name_of("source", row);
    const bar = make("div", "rowbar", back, make("span", "", `${number(selected + 1)} / ${number(found.length)}`),
      place, make("span", "facts", facts.filter(Boolean).join(" · ")),
      views.length > 1 ? make("span", "views", ...buttons) : "");
    const said = [...(body.verdicts ?? []), ...(from.said[row] ?? [])];
    const article = $("row");
    article.replaceChildren(bar, ...verdicts(said), ...now[1](body),
      ...(now[0] === "JSON" ? [] : provenance(body.record)));
    article.scrollTop = 0;
    document.documentElement.dataset.row = c.id[row];
    const hit = article.querySelector("mark");
    if (hit) hit.scrollIntoView({ block: "center" });
  }

  function leaveRow() {
    $("browser").classList.remove("reading");
    drawList();
    $("list").focus();
  }

  // ── keys and clicks ───────────────────────────────────────────────────────────────────────

  function key(event) {
    if (event.ctrlKey || event.metaKey || event.altKey || $("help").open) return;
    const typing = event.target.matches?.("input, select, textarea");
    if (event.key === "Escape") {
      if (typing) event.target.blur(); else leaveRow();
      return;
    }
    if (event.key === "Enter" && event.target === $("query")) {
      event.preventDefault();
      event.target.blur();
      return $("list").focus();
    }
    if (event.key === "ArrowDown" && event.target === $("query")) { event.target.blur(); }
    else if (typing) return;
    if (event.key === "?") return $("help").showModal();
    if (event.key === "/" && part === "overview") location.hash = "#rows";
    if (part === "overview" && event.key !== "/") return;
    const page = Math.max(1, Math.floor($("list").clientHeight / HEIGHT) - 1);
    const reading = $("browser").classList.contains("reading");
    const keys = {
      "/": () => { $("browser").classList.remove("reading"); $("query").focus(); $("query").select(); },
      j: () => select(selected + 1, reading), ArrowDown: () => select(selected + 1, reading),
      k: () => select(selected - 1, reading), ArrowUp: () => select(selected - 1, reading),
      PageDown: () => select(selected + page, reading), PageUp: () => select(selected - page, reading),
      Home: () => select(0, reading), End: () => select(found.length - 1, reading),
      Enter: () => select(Math.max(0, selected), true),
      r: () => select(Math.floor(Math.random() * found.length), reading),
      " ": () => $("row").scrollBy({ top: (event.shiftKey ? -0.85 : 0.85) * $("row").clientHeight }),
      w: () => { white = !white; if (selected >= 0) drawRow(); },
    };
    for (const i of [0, 1, 2]) keys[i + 1] = () => { view = i; if (selected >= 0) drawRow(); };
    if (event.target.matches?.("button, a, summary") && (event.key === "Enter" || event.key === " ")) return;
    if (!keys[event.key]) return;
    event.preventDefault();
    keys[event.key]();
  }

  async function start() {
    about = await unpacked("about");
    for (const name of ["rows", "left"]) {
      const index = await unpacked(name);
      if (name === "rows" || index.rows) tables[name] = new Table(name, index);
    }
    $("search").onsubmit = (event) => event.preventDefault();
    $("query").oninput = () => { set("q", $("query").value.trim()); search(); };
    $("clear").onclick = () => {
      const keep = [["row", state.get("row")], ["order", state.get("order")]].filter(([, value]) => value);
      state = new URLSearchParams(keep);
      writeAddress();
      open();
    };
    let due = false;
    $("list").onscroll = () => {
      if (!due) requestAnimationFrame(() => { due = false; drawList(); });
      due = true;
    };
    $("help-open").onclick = () => $("help").showModal();
    addEventListener("keydown", key);
    addEventListener("hashchange", readAddress);
    addEventListener("resize", () => { if (part !== "overview") drawList(); });
    part = "";
    readAddress();
    document.documentElement.dataset.ready = "yes";
  }

  start().catch((error) => $("overview").prepend(make("p", "empty",
    `The rows can't be shown: ${error.message}. The page needs a browser of 2023 or later.`)));
})();
