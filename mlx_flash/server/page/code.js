// Blocks of code: the language, a button that copies, colours. The colours come as a tree, so no HTML is read.

import { Lazy } from "./lazy.js";
import { element, extend } from "./patch.js";

const MOST_CHARACTERS = 20_000; // of a code with colours: some languages take time with the square of the length
const SHARE = 20; // The colours of a code that grows take at most the 20th part of the time.

const library = new Lazy(() => import("./vendor/highlight.js"));
const growing = new WeakMap(); // <code> -> {coloured: the text before its last text node, next: when it is coloured again}

/**
 * Code with colours where its language is known. Returns {node, complete}.
 * info: the text after the fence. grows: whether more of the code comes; then its last line has no colours.
 */
export function codeBlock(code, info, grows = false) {
  const language = /^[^\s{]*/.exec(info.trim())[0];
  const node = element("div", "code");
  const head = element("div", "code-head");
  const button = element("button", "copy-code", "Copy");
  button.type = "button";
  button.title = "Copy this code";
  head.append(element("span", "language", language || "text"), button);
  const scrolled = element("pre");
  scrolled.tabIndex = 0; // The keyboard scrolls it.
  scrolled.setAttribute("role", "group");
  scrolled.setAttribute("aria-label", language ? `Code: ${language}` : "Code");
  const inner = element("code");
  const lines = grows ? code.slice(0, code.lastIndexOf("\n") + 1) : code;
  const complete = colour(inner, lines, language) && !grows;
  if (grows) inner.append(document.createTextNode(code.slice(lines.length)));
  scrolled.append(inner);
  node.append(head, scrolled);
  return { node, complete };
}

/** Notes that `node`, a block that grows, shows `code`, whose colours took `ms` milliseconds. */
export function noteGrowth(node, code, ms) {
  const coloured = code.slice(0, code.lastIndexOf("\n") + 1);
  growing.set(node.querySelector("code"), { coloured, next: performance.now() + SHARE * ms });
}

/** Shows more of a code in its node, without new colours. Returns false if it is time for these. */
export function grow(node, code) {
  const inner = node.querySelector("code");
  const { coloured, next } = growing.get(inner) ?? {};
  if (coloured === undefined || !code.startsWith(coloured)) return false;
  const rest = code.slice(coloured.length);
  if (rest.includes("\n") && performance.now() > next) return false;
  extend(inner.lastChild, rest);
  return true;
}

/** Appends `code` to a node, with colours if they are known. Returns false while the library is on its way. */
function colour(node, code, language) {
  if (!language || code.length > MOST_CHARACTERS) {
    node.append(code);
    return true;
  }
  const highlighter = library.get()?.highlighter;
  if (!highlighter?.getLanguage(language)) {
    node.append(code);
    return Boolean(highlighter);
  }
  const { _emitter: tree } = highlighter.highlight(code, { language, ignoreIllegals: true });
  appendTree(node, tree.root);
  return true;
}

/** highlight.js's tree: texts, and {scope, children}, where a scope is a name such as "title.function". */
function appendTree(parent, { children }) {
  for (const child of children) {
    if (typeof child === "string") parent.append(child);
    else if (!child.scope || child.scope.startsWith("language:")) appendTree(parent, child);
    else {
      const span = element("span", `hl-${child.scope.split(".")[0]}`);
      appendTree(span, child);
      parent.append(span);
    }
  }
}
