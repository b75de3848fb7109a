// Blocks of code: the language, a button that copies, colours. The colours come as a tree, so no HTML is read.

import { Lazy } from "./lazy.js";
import { element } from "./patch.js";

const MOST_CHARACTERS = 100_000; // of a code with colours

const library = new Lazy(() => import("./vendor/highlight.js"));

/** Code with colours where its language is known. `info` is the text after the fence. Returns {node, complete}. */
export function codeBlock(code, info) {
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
  const complete = colour(inner, code, language);
  scrolled.append(inner);
  node.append(head, scrolled);
  return { node, complete };
}

/** Appends `code` to a node, with colours if they are known. Returns false while the library is on its way. */
export function colour(node, code, language) {
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
