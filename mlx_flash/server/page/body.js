// The body of an answer: a text in Markdown that may still grow. Only what has changed is drawn again.

import { Lazy } from "./lazy.js";
import { extend } from "./patch.js";

// A last line of nothing but marks may become anything, so it waits for its next character.
const MARKS_ONLY = /(^|\n)[ \t]*(?:[-=*_#`~>|+:$\\[(]|\d+[.)]?)[-=*_#`~>|+:$. \t]*$/;

const library = new Lazy(() => import("./markdown.js"));

export class Body {
  #blocks = []; // {source, node, complete}: those on the screen
  #finished = 0; // blocks before this one do not change any more
  #start = 0; // where the text of that block begins
  #shown = ""; // the text that is shown, as it came
  #streaming = false;
  #references = {};

  /** node: the element to fill. */
  constructor(node) {
    this.node = node;
  }

  /** Whether the text stands there in its final form. */
  get complete() {
    return !this.#streaming && !this.node.classList.contains("plain") && this.#blocks.every(({ complete }) => complete);
  }

  /** Shows `text` as it is, for the time until it is shown as Markdown. */
  plain(text) {
    this.node.classList.add("plain");
    if (this.node.firstChild) extend(this.node.firstChild, text);
    else this.node.append(text);
  }

  /** Shows `text`. streaming: more of it will come. */
  show(text, streaming = false) {
    const markdown = library.get();
    if (!markdown) {
      this.plain(text);
      return;
    }
    if (this.node.classList.contains("plain")) {
      this.node.classList.remove("plain");
      this.node.replaceChildren();
    }
    const all = text.replaceAll("\r\n", "\n").replaceAll(/[\r\0]/g, "\n");
    const fixed = this.#blocks.slice(0, this.#finished).every(({ complete }) => complete);
    const continues = streaming && this.#streaming && fixed && all.startsWith(this.#shown);
    if (!continues) {
      this.#finished = this.#start = 0;
      this.#references = {};
    }
    this.#shown = all;
    this.#streaming = streaming;
    const rest = all.slice(this.#start);
    const found = markdown.blocks(streaming ? rest.replace(MARKS_ONLY, "") : rest, this.#references, streaming);
    // A definition may stand behind the link that it defines.
    const linked = !streaming && Object.keys(this.#references).length > 0;
    found.forEach((block, i) => {
      this.#draw(this.#finished + i, block, markdown, linked, streaming && i === found.length - 1);
    });
    for (const { node } of this.#blocks.splice(this.#finished + found.length)) node.remove();
    if (found.length > 0 && streaming) {
      this.#finished += found.length - 1;
      this.#start += found.at(-1).start;
    }
  }

  #draw(i, block, markdown, linked, grows) {
    const old = this.#blocks[i];
    if (old?.source === block.source && old.complete && !linked) return;
    const { node, complete } = markdown.draw(block, old?.node, grows);
    if (!old) this.node.append(node);
    else if (old.node !== node) old.node.replaceWith(node);
    this.#blocks[i] = { source: block.source, node, complete };
  }
}
