// Markdown to nodes. Nothing here reads HTML: a model's tags are text, and every element is one of those made below.

import { codeBlock, grow, noteGrowth } from "./code.js";
import { formula, withFormulas } from "./formulas.js";
import { element, patch } from "./patch.js";
import { MarkdownIt } from "./vendor/markdown-it.js";

const SAFE = /^(https?:\/\/|mailto:)/i;
const PLAIN = new Set(
  "p ul li blockquote hr table thead tbody tr th td em strong s".split(" "), // an ol and the headings are made apart
);

const parser = new MarkdownIt("default", { html: false, linkify: true });
parser.disable("lheading"); // A model's "---" under a line is a rule. As a heading, the line would jump while it arrives.
parser.validateLink = (url) => SAFE.test(url);
parser.linkify.set({ fuzzyLink: false, fuzzyEmail: false }); // server.py is not a link
withFormulas(parser);

/**
 * The blocks of a text: [{source, start, tokens}], where `start` is the offset of its first line.
 * references: the link definitions so far, by name; those of `text` are added. streaming: whether more text comes.
 */
export function blocks(text, references, streaming) {
  const env = { references, streaming };
  const tokens = parser.parse(text, env);
  const lines = [0];
  for (let at = text.indexOf("\n"); at !== -1; at = text.indexOf("\n", at + 1)) lines.push(at + 1);
  const offset = (line) => lines[line] ?? text.length;
  const found = [];
  for (const token of tokens) {
    if (token.level === 0 && token.nesting >= 0) {
      const [first, after] = token.map;
      found.push({ source: text.slice(offset(first), offset(after)), start: offset(first), tokens: [] });
    }
    found.at(-1).tokens.push(token);
  }
  return found;
}

/**
 * Shows a block in `old`, the element of an earlier form of it, or in a new element.
 * grows: whether more of it comes. Returns {node, complete}; complete is false if it must be drawn again at the end, or
 * when a library has arrived that it needs.
 */
export function draw(block, old, grows) {
  const [token] = block.tokens;
  const growing = grows && token.type === "fence";
  const code = block.source.endsWith("\n") ? token.content : token.content.replace(/\n$/, "");
  if (growing && old?.className === "code" && grow(old, code)) return { node: old, complete: false };
  const began = performance.now();
  const { node: made = element("p"), complete } = growing ? codeBlock(code, token.info, true) : build(block);
  const ms = performance.now() - began;
  const same = old?.nodeName === made.nodeName && old.className === made.className;
  if (same) patch(old, made);
  const node = same ? old : made;
  if (growing) noteGrowth(node, code, ms);
  return { node, complete };
}

function build({ tokens }) {
  const root = document.createDocumentFragment();
  const state = { complete: true };
  append(root, tokens, state);
  return { node: root.firstChild ?? undefined, complete: state.complete };
}

function append(root, tokens, state) {
  const path = [root];
  for (const token of tokens) {
    const parent = path.at(-1);
    if (token.nesting === 1) {
      const inner = opened(parent, token);
      path.push(inner);
    } else if (token.nesting === -1) path.pop();
    else if (token.type === "inline") append(parent, token.children, state);
    else leaf(parent, token, state);
  }
}

/** Appends an element that has others inside, and returns where these go. */
function opened(parent, token) {
  if (token.hidden) return parent; // the paragraph of an item in a tight list
  const { tag } = token;
  let made;
  if (token.type === "heading_open") {
    const level = Number(tag[1]);
    made = element(`h${Math.min(6, level + 3)}`, `level-${level}`); // below the page's own headings
  } else if (token.type === "link_open") {
    made = link(token.attrGet("href"));
    const title = token.attrGet("title");
    if (title) made.title = title;
  } else if (tag === "ol") {
    made = element("ol");
    const start = Number(token.attrGet("start") ?? 1);
    if (start !== 1) made.start = start;
  } else made = element(PLAIN.has(tag) ? tag : "span");
  if (tag === "th" || tag === "td") {
    const side = /text-align:(left|right|center)/.exec(token.attrGet("style") ?? "")?.[1];
    if (side) made.className = `to-${side}`;
  }
  if (tag === "table") {
    const scrolled = element("div", "table");
    scrolled.tabIndex = 0; // The keyboard scrolls it.
    scrolled.setAttribute("role", "group");
    scrolled.setAttribute("aria-label", "Table");
    scrolled.append(made);
    parent.append(scrolled);
  } else parent.append(made);
  return made;
}

function leaf(parent, token, state) {
  const add = ({ node, complete }) => {
    parent.append(node);
    if (!complete) state.complete = false;
  };
  if (token.type === "fence") add(codeBlock(token.content.replace(/\n$/, ""), token.info));
  else if (token.type === "code_block") add(codeBlock(token.content.replace(/\n$/, ""), ""));
  else if (token.type === "formula") add(formula(token));
  else if (token.type === "code_inline") parent.append(element("code", "", token.content));
  else if (token.type === "softbreak" || token.type === "hardbreak") parent.append(element("br"), "\n");
  else if (token.type === "hr") parent.append(element("hr"));
  else if (token.type === "image") parent.append(pictured(token));
  else parent.append(token.content);
}

/** An image is a link to it: the page loads nothing from elsewhere. */
function pictured(token) {
  const made = link(token.attrGet("src"));
  made.append(token.content ? `Image: ${token.content}` : "Image");
  return made;
}

function link(address) {
  const made = element("a");
  if (!SAFE.test(address ?? "")) return made; // without an address it does nothing
  made.href = address;
  made.target = "_blank";
  made.rel = "noopener noreferrer";
  return made;
}
