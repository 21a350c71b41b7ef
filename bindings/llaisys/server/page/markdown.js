// The markdown that models write, as DOM nodes: headings, paragraphs, lists, quotes, tables, fenced code, emphasis,
// links. The text is hostile: it only ever becomes text nodes and a few fixed elements, links go to http, https and
// mailto alone, pictures become links (a picture would tell its host who reads), formulas stay as they are written.
// Every loop is linear in the text, and nesting is bounded, so that no answer can hang the page.

import { copyButton, h } from "./dom.js";

const MAX_DEPTH = 12; // of quotes, lists and emphasis
const MAX_INLINE = 20000; // characters of a paragraph beyond which it is shown as plain text

const FENCE = /^ {0,3}(`{3,}|~{3,})([^`]*)$/;
const HEADING = /^ {0,3}(#{1,6})(?:\s|$)/;
const RULE = /^ {0,3}(?:(?:\*[ \t]*){3,}|(?:-[ \t]*){3,}|(?:_[ \t]*){3,})$/;
const QUOTE = /^ {0,3}>/;
const ITEM = /^( {0,3})([-*+]|\d{1,9}[.)])(?:[ \t]|$)/;
const FORMULA = /^\s*(\\\[|\$\$)/;
const DELIMITERS = /^[ \t]*\|?[ \t]*:?-+:?[ \t]*(?:\|[ \t]*:?-+:?[ \t]*)*\|?[ \t]*$/;
const BLANK = /^\s*$/;

/** Shows a text that grows. Blocks that are complete are left alone, so that a long answer costs no more a word. */
export class MarkdownView {
  #element;
  #done = []; // of the blocks shown, {text, element}

  constructor(element) {
    this.#element = element;
  }

  show(source) {
    // A line that is not complete yet can change its block and the one before: all others stay.
    const kept = Math.max(0, this.#done.length - 2);
    const start = this.#done.slice(0, kept).reduce((sum, block) => sum + block.text.length, 0);
    let i = kept;
    for (const { text, render } of blocks(source.slice(start))) {
      if (this.#done[i]?.text !== text) {
        const element = render(0);
        if (this.#done[i]) this.#done[i].element.replaceWith(element);
        else this.#element.append(element);
        this.#done[i] = { text, element };
      }
      i++;
    }
    for (const { element } of this.#done.splice(i)) element.remove();
  }
}

/** Yields {text, render(depth)} of each block; the texts together are the source. */
function* blocks(source) {
  const lines = source.match(/[^\n]*\n|[^\n]+$/g) ?? [];
  for (let i = 0; i < lines.length; ) {
    const start = i;
    const { end, render } = block(lines, i);
    for (i = end; i < lines.length && BLANK.test(lines[i]); ) i++;
    yield { text: lines.slice(start, i).join(""), render };
  }
}

const line = (text) => text.replace(/\r?\n$/, "");

const itemOf = (text) => ITEM.exec(line(text));

/** The block that starts at lines[i]. */
function block(lines, i) {
  const first = line(lines[i]);
  let match;
  if (BLANK.test(first)) return { end: i + 1, render: () => h("p", { hidden: true }) };
  if ((match = FENCE.exec(first))) return fence(lines, i, match);
  if ((match = HEADING.exec(first))) {
    const level = match[1].length;
    const text = first.trim().slice(level).trim();
    return { end: i + 1, render: (depth) => filled(`h${Math.min(level + 1, 6)}`, text, depth) };
  }
  if (RULE.test(first)) return { end: i + 1, render: () => h("hr") };
  if (QUOTE.test(first)) return quote(lines, i);
  if (itemOf(first)) return list(lines, i);
  if ((match = FORMULA.exec(first))) return formula(lines, i, match);
  if (isTable(lines, i)) return table(lines, i);
  return paragraph(lines, i);
}

function fence(lines, i, [, marks, info]) {
  let end = i + 1;
  const closes = (text) => text.length >= marks.length && text === marks[0].repeat(text.length);
  while (end < lines.length && !closes(lines[end].trim())) end++;
  const indent = lines[i].search(/\S/);
  const code = lines.slice(i + 1, end).map((text) => text.slice(Math.min(indent, Math.max(0, text.search(/\S/)))));
  const language = info.trim().split(/\s/)[0].slice(0, 40);
  return { end: end + 1, render: () => codeBlock(line(code.join("")), language) };
}

function codeBlock(code, language) {
  return h("div", { class: "code" },
    h("div", { class: "bar" }, h("span", {}, language || "text"), copyButton("Copy code", () => code)),
    h("pre", { tabindex: "0" }, h("code", {}, code)));
}

/** Up to the line that closes it, or to a blank one. */
function formula(lines, i, [opening, mark]) {
  const close = mark === "$$" ? "$$" : "\\]";
  const closes = (j) => lines[j].includes(close, j === i ? opening.length : 0);
  let end = i;
  while (end < lines.length && !BLANK.test(lines[end]) && !closes(end)) end++;
  if (end < lines.length && closes(end)) end++;
  return { end, render: () => h("pre", { class: "math" }, lines.slice(i, end).join("").trim()) };
}

function quote(lines, i) {
  let end = i;
  while (end < lines.length && QUOTE.test(lines[end])) end++;
  const inner = lines.slice(i, end).map((text) => text.replace(/^ {0,3}> ?/, "")).join("");
  return { end, render: (depth) => fill(h("blockquote"), inner, depth + 1) };
}

function list(lines, i) {
  const [, , marker] = itemOf(lines[i]);
  const kind = marker.at(-1);
  const items = [];
  let end = i;
  let indent = 0; // of an item's text
  let nested = Infinity; // models indent what belongs to "1." by 2 or by 3
  while (end < lines.length) {
    const text = lines[end];
    const match = itemOf(text);
    const lead = text.search(/\S/);
    if (lead >= nested) {
      items.at(-1).push(text.slice(Math.min(indent, lead)));
    } else if (match && match[2].at(-1) === kind && !RULE.test(line(text))) {
      indent = match[1].length + match[2].length + 1;
      nested = match[1].length + 2;
      items.push([text.slice(indent) || "\n"]);
    } else if (BLANK.test(text)) {
      const next = lines.slice(end, end + 3).find((other) => !BLANK.test(other));
      const more = next && (next.search(/\S/) >= nested || itemOf(next)?.[2].at(-1) === kind);
      if (!more) break;
      items.at(-1).push("\n");
    } else if (!BLANK.test(lines[end - 1]) && !interrupts(lines, end)) {
      items.at(-1).push(text); // a paragraph that goes on without indent
    } else break;
    end++;
  }
  const ordered = /\d/.test(marker);
  return {
    end,
    render: (depth) => h(ordered ? "ol" : "ul", { start: ordered && parseInt(marker, 10) },
      ...items.map((item) => listItem(item.join(""), depth + 1))),
  };
}

function listItem(source, depth) {
  const task = /^\[([ xX])\][ \t]/.exec(source);
  const item = fill(h("li", { class: task && "task" }), task ? source.slice(task[0].length) : source, depth);
  if (task) item.prepend(task[1] === " " ? "☐ " : "☑ ");
  return item;
}

const isTable = (lines, i) =>
  lines[i].includes("|") && i + 1 < lines.length && lines[i + 1].length < 1000 && DELIMITERS.test(line(lines[i + 1])) &&
  cells(lines[i]).length === cells(lines[i + 1]).length;

function cells(text) {
  const row = text.trim().replace(/^\|/, "").replace(/(?<!\\)\|$/, "");
  return row.split(/(?<!\\)\|/).map((cell) => cell.trim().replaceAll("\\|", "|"));
}

function table(lines, i) {
  let end = i + 2;
  while (end < lines.length && lines[end].includes("|")) end++;
  const row = (tag, text, depth) => h("tr", {}, ...cells(text).map((cell) => filled(tag, cell, depth)));
  return {
    end,
    render: (depth) => h("div", { class: "table", tabindex: "0" }, h("table", {},
      h("thead", {}, row("th", lines[i], depth)),
      h("tbody", {}, ...lines.slice(i + 2, end).map((text) => row("td", text, depth))))),
  };
}

/** Whether the block at lines[i] ends a paragraph without a blank line. */
function interrupts(lines, i) {
  const text = line(lines[i]);
  const item = itemOf(text);
  // "1984." at the start of a line of prose is no list
  if (item) return !/\d/.test(item[2]) || parseInt(item[2], 10) === 1;
  return FENCE.test(text) || HEADING.test(text) || RULE.test(text) || QUOTE.test(text) || isTable(lines, i);
}

function paragraph(lines, i) {
  let end = i + 1;
  while (end < lines.length && !BLANK.test(lines[end]) && !interrupts(lines, end)) end++;
  const text = lines.slice(i, end).join("").trim();
  return { end, render: (depth) => filled("p", text, depth) };
}

/** Fills an element with blocks; a lone paragraph stands without its p. */
function fill(element, source, depth) {
  if (depth > MAX_DEPTH) {
    element.append(source);
    return element;
  }
  const parts = [...blocks(source)].map(({ render }) => render(depth));
  const lead = parts[0]?.tagName === "P" && element.tagName === "LI" ? parts.shift() : null;
  element.append(...(lead ? lead.childNodes : []), ...parts);
  return element;
}

const filled = (tag, text, depth) => {
  const element = h(tag);
  if (text.length > MAX_INLINE) element.append(text);
  else element.append(...inline(text, depth));
  return element;
};

const SPECIAL = /[\\`*_~[!<h$\n]/g;
const ADDRESS = /https?:\/\/[^\s<>"`]{1,2000}/y;
const LETTER = /[\p{L}\p{N}]/u;
const SPACE = /\s/;

/** Nodes of a text within a block. */
function inline(text, depth) {
  if (depth > MAX_DEPTH) return [text];
  const nodes = [];
  const missing = new Set(); // marks that close nowhere further on: not looked for again
  let plain = 0; // start of the text that is not in nodes yet
  let i = 0;
  for (;;) {
    SPECIAL.lastIndex = i;
    const match = SPECIAL.exec(text);
    if (!match) break;
    i = match.index;
    const found = span(text, i, depth, missing);
    if (!found) {
      i++;
      continue;
    }
    nodes.push(text.slice(plain, i), ...found.nodes);
    i = plain = found.end;
  }
  nodes.push(text.slice(plain));
  return nodes.filter((node) => node !== "");
}

/** What the special character at i begins: {nodes, end}, or nothing. */
function span(text, i, depth, missing) {
  switch (text[i]) {
    case "\n":
      return { nodes: [h("br")], end: i + 1 };
    case "\\":
      return escaped(text, i, missing);
    case "`":
      return code(text, i, missing);
    case "*":
    case "_":
    case "~":
      return emphasis(text, i, depth, missing);
    case "$":
      return text[i + 1] === "$" ? between(text, i, "$$", "$$", missing) : null;
    case "!":
      return text[i + 1] === "[" ? link(text, i + 1, depth) : null;
    case "[":
      return link(text, i, depth);
    case "<":
      return angle(text, i);
    default:
      return address(text, i);
  }
}

function escaped(text, i, missing) {
  const next = text[i + 1];
  if (next === "(") return between(text, i, "\\(", "\\)", missing);
  if (next === "[") return between(text, i, "\\[", "\\]", missing);
  return next && /[!-/:-@[-`{-~]/.test(next) ? { nodes: [next], end: i + 2 } : null;
}

/** A formula, as it is written: emphasis has no business in it. */
function between(text, i, open, close, missing) {
  if (missing.has(close)) return null;
  const end = text.indexOf(close, i + open.length);
  if (end < 0) return missing.add(close) && null;
  return { nodes: [h("span", { class: "math" }, text.slice(i, end + close.length))], end: end + close.length };
}

/** The length of the run of one character at i. */
function run(text, i) {
  let end = i + 1;
  while (text[end] === text[i]) end++;
  return end - i;
}

function code(text, i, missing) {
  const length = run(text, i);
  const mark = "`".repeat(length);
  const whole = { nodes: [mark], end: i + length };
  if (missing.has(mark)) return whole;
  for (let j = i + length; (j = text.indexOf("`", j)) >= 0; j += run(text, j)) {
    if (run(text, j) !== length) continue;
    const inner = text.slice(i + length, j).replaceAll("\n", " ");
    const trimmed = /^ .*\S.* $/.test(inner) ? inner.slice(1, -1) : inner;
    return { nodes: [h("code", {}, trimmed)], end: j + length };
  }
  missing.add(mark);
  return whole;
}

const TAGS = { "*": "em", _: "em", "**": "strong", __: "strong", "~~": "del" };

function emphasis(text, i, depth, missing) {
  const length = run(text, i);
  const mark = text[i].repeat(length > 1 ? 2 : 1);
  const whole = { nodes: [text.slice(i, i + length)], end: i + length };
  const start = i + mark.length;
  const inWord = text[i] === "_" && LETTER.test(text[i - 1] ?? " ");
  if (!TAGS[mark] || length > 3 || missing.has(mark) || inWord || SPACE.test(text[i + length] ?? " ")) return whole;
  for (let j = i + length; (j = text.indexOf(mark[0], j)) >= 0; ) {
    const closing = run(text, j);
    const fits = mark.length === 2 ? closing >= 2 : closing !== 2;
    const word = mark[0] === "_" && LETTER.test(text[j + closing] ?? " ");
    if (fits && !word && !SPACE.test(text[j - 1])) {
      const end = j + closing - mark.length; // of "***", the inner pair closes first
      return { nodes: [h(TAGS[mark], {}, ...inline(text.slice(start, end), depth + 1))], end: end + mark.length };
    }
    j += closing;
  }
  missing.add(mark);
  return whole;
}

/** [words](address): a link if the address may be followed, else as it is written. */
function link(text, i, depth) {
  const match = /\[((?:[^[\]\\]|\\.){0,1000})\]\(<?([^\s<>()]{1,2000}(?:\([^\s<>()]{0,200}\)[^\s<>()]{0,200})?)>?(?:\s+"[^"]{0,500}")?\)/y;
  match.lastIndex = i;
  const found = match.exec(text);
  if (!found) return null;
  const [all, words, target] = found;
  const picture = text[i - 1] === "!";
  const anchor = anchorTo(target, ...(words ? inline(words, depth + 1) : [picture ? "picture" : target]));
  if (!anchor) return null;
  for (const inner of anchor.querySelectorAll("a")) inner.replaceWith(...inner.childNodes);
  return { nodes: [anchor], end: i + all.length };
}

function angle(text, i) {
  const match = /<br *\/?>|<(https?:\/\/[^\s<>]{1,2000})>/iy;
  match.lastIndex = i;
  const found = match.exec(text);
  if (!found) return null;
  const node = found[1] ? anchorTo(found[1], found[1]) : h("br");
  return node && { nodes: [node], end: i + found[0].length };
}

function address(text, i) {
  ADDRESS.lastIndex = i;
  const found = ADDRESS.exec(text);
  if (!found || LETTER.test(text[i - 1] ?? " ")) return null;
  let target = found[0].replace(/[.,;:!?'*_~\]]+$/, "");
  if (target.endsWith(")") && !target.includes("(")) target = target.slice(0, -1);
  const anchor = anchorTo(target, target);
  return anchor && { nodes: [anchor], end: i + target.length };
}

function anchorTo(target, ...words) {
  if (!/^(?:https?:\/\/|mailto:)/i.test(target) || !URL.canParse(target)) return null;
  return h("a", { href: target, target: "_blank", rel: "noopener noreferrer nofollow" }, ...words);
}
