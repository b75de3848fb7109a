// Formulas: where they begin and end in Markdown, and their MathML, which needs no fonts and no styles of its own.

import { Lazy } from "./lazy.js";
import { element } from "./patch.js";

const MOST_CHARACTERS = 10_000; // of a formula
const MOST_KEPT = 500;
const MOST_SIZE = [30, 300]; // em and pt, of a length in a formula
const MATHML = "http://www.w3.org/1998/Math/MathML";
const UNWANTED = /^(style|href|xlink.*|src|id|on.*)$/i; // attributes
const MARKS = [
  ["$$", "$$"],
  ["\\[", "\\]"],
  ["\\(", "\\)"],
  ["$", "$"],
];

const library = new Lazy(() => import("./vendor/temml.js"));
const kept = new Map(); // source -> element

/** Adds formulas to a parser. While env.streaming is set, a formula that has not ended yet is one that comes. */
export function withFormulas(parser) {
  parser.inline.ruler.before("escape", "formula", inlineFormula);
  parser.block.ruler.before("fence", "formula", blockFormula, {
    alt: ["paragraph", "reference", "blockquote", "list"],
  });
}

function inlineFormula(state, silent) {
  const { src, pos, posMax } = state;
  const [open, close] = MARKS.find(([mark]) => src.startsWith(mark, pos)) ?? [];
  if (!open) return false;
  const from = pos + open.length;
  const money = open === "$";
  if (money && (/[\w$]/.test(src[pos - 1] ?? "") || /\s/.test(src[from] ?? " "))) return false;
  const end = inlineEnd(state, close, from);
  if (end === -1 && (money || !state.env.streaming)) return false;
  if (money && (/\s/.test(src[end - 1]) || /\d/.test(src[end + 1] ?? ""))) return false;
  const content = src.slice(from, end === -1 ? posMax : end);
  if (end !== -1 && !content.trim()) return false;
  if (!silent) {
    const token = state.push("formula", "", 0);
    token.content = content;
    token.markup = open;
    token.info = end === -1 ? "coming" : "";
  }
  state.pos = end === -1 ? posMax : end + close.length;
  return true;
}

/** Where an unescaped `close` stands in a paragraph, or -1. Many marks without an end are searched through only once. */
function inlineEnd(state, close, from) {
  const { src, posMax } = state;
  const without = (state.withoutEnd ??= {}); // close -> [from, most]: it is not between these
  const [first, most] = without[close] ?? [];
  if (from >= first && posMax <= most) return -1;
  const end = endOf(src, close, from, posMax);
  if (end === -1) without[close] = [from, posMax];
  return end;
}

/** Where an unescaped `close` stands, or -1. */
function endOf(src, close, from, most) {
  for (let at = src.indexOf(close, from); at !== -1 && at + close.length <= most; at = src.indexOf(close, at + 1)) {
    let backslashes = 0;
    while (src[at - 1 - backslashes] === "\\") backslashes++;
    if (backslashes % 2 === 0) return at;
  }
  return -1;
}

/** A formula whose mark begins a line. It ends at its closing mark, which ends a line; an empty line breaks it off. */
function blockFormula(state, startLine, endLine, silent) {
  if (state.sCount[startLine] - state.blkIndent >= 4) return false;
  const first = state.src.slice(state.bMarks[startLine] + state.tShift[startLine], state.eMarks[startLine]);
  const [open, close] = MARKS.slice(0, 2).find(([mark]) => first.startsWith(mark)) ?? [];
  if (!open) return false;
  // Later lines of a formula that failed fail like it. Each of many such lines would search through all the others.
  const where = [state.level, state.blkIndent, endLine].join();
  const failed = (state.failedFormulas ??= {})[open];
  if (failed?.where === where && failed.from < startLine && startLine < failed.line) return false;
  let line = startLine;
  let content = first.slice(open.length);
  let end = endOf(content, close, 0, content.length);
  while (end === -1 && ++line < endLine && !state.isEmpty(line) && state.sCount[line] >= state.blkIndent) {
    const more = state.src.slice(state.bMarks[line] + state.tShift[line], state.eMarks[line]);
    const at = endOf(more, close, 0, more.length);
    if (at !== -1) end = content.length + 1 + at;
    content += `\n${more}`;
  }
  const after = end === -1 ? "" : content.slice(end + close.length).trim();
  const endless = end === -1 && !(state.env.streaming && line === endLine);
  if (endless || /[^.,;:]/.test(after) || (end !== -1 && !content.slice(0, end).trim())) {
    state.failedFormulas[open] = { where, from: startLine, line };
    return false;
  }
  if (silent) return true;
  state.line = Math.min(line + 1, endLine);
  const token = state.push("formula", "", 0);
  token.block = true;
  token.content = end === -1 ? content : content.slice(0, end) + (after ? `\\text{${after}}` : "");
  token.markup = open;
  token.info = end === -1 ? "coming" : "";
  token.map = [startLine, state.line];
  return true;
}

/** A formula's element. Returns {node, complete}; complete is false while the library is on its way. */
export function formula({ content, markup, info, block }) {
  const display = markup === "$$" || markup === "\\[";
  const source = `${markup}${content}${info ? "" : MARKS.find(([open]) => open === markup)[1]}`;
  const key = `${block ? "block" : ""}${source}`;
  const known = kept.get(key);
  if (known) return { node: known.cloneNode(true), complete: true };
  const node = element(block ? "div" : "span", `formula${display ? " display" : ""}`);
  const readable = !info && content.length <= MOST_CHARACTERS;
  const temml = readable ? library.get()?.temml : null;
  try {
    if (temml) {
      const options = { displayMode: display, throwOnError: true, trust: false, maxSize: MOST_SIZE };
      appendTree(node, temml.__renderToMathMLTree(content, options));
    }
  } catch (error) {
    node.replaceChildren(); // Half a formula may stand there.
    node.title = error.message;
  }
  if (!node.hasChildNodes()) node.append(element("code", "formula-source", source));
  if (temml) {
    if (kept.size >= MOST_KEPT) kept.delete(kept.keys().next().value);
    kept.set(key, node.cloneNode(true));
  }
  return { node, complete: Boolean(temml) || (!readable && !info) };
}

/** Temml's tree. A style in its HTML would be against the page's policy, so styles are set one by one. */
function appendTree(parent, node) {
  if (!node.type) {
    if (node.children?.length) for (const child of node.children) appendTree(parent, child);
    else parent.append(node.toText());
    return;
  }
  const made = document.createElementNS(MATHML, node.type);
  for (const [name, value] of Object.entries(node.attributes)) {
    if (!UNWANTED.test(name)) made.setAttribute(name, value);
  }
  if (node.classes.length > 0) made.setAttribute("class", node.classes.filter(Boolean).join(" "));
  for (const [name, value] of Object.entries(node.style)) {
    if (!/url/i.test(value)) made.style[name] = value;
  }
  for (const child of node.children) appendTree(made, child);
  parent.append(made);
}
