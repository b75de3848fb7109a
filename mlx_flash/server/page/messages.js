// The conversation on the screen. Text from a model or a user is only ever put into text nodes.

import { folded } from "./attachments.js";
import { NONE } from "./format.js";
import { picture } from "./pictures.js";

const NEAR_PX = 48; // Within this distance from the end, the view follows new text.

function element(tag, className, text) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

/** A fold with the thoughts before an answer; hidden if there are none. */
function foldedThoughts(message) {
  const details = element("details", "thoughts");
  const [title, text] = [document.createTextNode("Thoughts"), document.createTextNode(message.thoughts ?? "")];
  const summary = element("summary");
  summary.append(title);
  const body = element("div", "thought-text");
  body.append(text);
  details.append(summary, body);
  details.hidden = !message.thoughts;
  return { details, title, text };
}

/** Changes a text node to `wanted`. Appending keeps the user's selection in the earlier text. */
function extend(node, wanted) {
  if (wanted.startsWith(node.data)) node.appendData(wanted.slice(node.data.length));
  else node.data = wanted;
}

export class Messages {
  #shown = []; // {message, article, text, thoughts, foot}
  #frame = null;
  #along = true; // whether the end of the conversation is visible
  #model = "Model";

  /** actions: (message, whether it is the last) -> the buttons under it. */
  constructor(log, empty, scroll, composer, actions) {
    this.log = log;
    this.empty = empty;
    this.scroll = scroll;
    this.composer = composer;
    this.actions = actions;
    addEventListener("scroll", () => (this.#along = this.#below() < NEAR_PX), { capture: true, passive: true });
    // If the input or the settings below grow, the end must stay visible for a user who reads it.
    const resized = new ResizeObserver(() => this.#along && this.toEnd());
    resized.observe(scroll);
    resized.observe(composer);
  }

  set model(name) {
    this.#model = name;
    for (const name of this.log.querySelectorAll(".assistant > .who.unknown")) name.textContent = this.#model;
  }

  show(messages) {
    this.#shown = [];
    this.log.replaceChildren();
    for (const message of messages) this.#append(message);
    this.#finish();
    this.toEnd();
  }

  add(message) {
    this.#append(message);
    this.#finish();
    this.toEnd();
  }

  /** Draws the last message again in the next frame. */
  update() {
    this.#frame ??= requestAnimationFrame(() => {
      this.#frame = null;
      this.#finish();
    });
  }

  #append(message) {
    const article = element("article", message.role);
    const who = message.role === "user" ? "You" : message.model;
    article.append(element("h3", who ? "who" : "who unknown", who ?? this.#model));
    const text = document.createTextNode(message.content);
    const body = element("div", "text");
    const seen = element("div", "pictures");
    seen.append(...(message.images ?? []).map((url, i) => picture(url, i + 1)));
    seen.append(...folded(message.files));
    seen.hidden = !seen.hasChildNodes();
    body.append(text);
    const thoughts = foldedThoughts(message);
    const foot = element("p", "foot");
    article.append(seen, thoughts.details, body, foot);
    this.log.append(article);
    this.#foot({ message, article, foot }, false);
    this.#shown.push({ message, article, text, thoughts, foot });
  }

  #finish() {
    this.empty.hidden = this.#shown.length > 0;
    const last = this.#shown.at(-1);
    if (!last) return;
    const along = this.#along;
    const { message, text, thoughts } = last;
    extend(text, message.content);
    extend(thoughts.text, message.thoughts ?? "");
    thoughts.details.hidden = !message.thoughts;
    const thinking = message.state === "streaming" && message.content === "";
    thoughts.title.data = thinking ? "Thinking\u2026" : "Thoughts";
    for (const shown of this.#shown.slice(-3)) this.#foot(shown, shown === last);
    if (along) this.toEnd();
  }

  #foot({ message, article, foot }, last) {
    const streaming = message.state === "streaming";
    article.dataset.state = message.state ?? "";
    article.setAttribute("aria-busy", String(streaming));
    article.classList.toggle("waiting", streaming && message.content === "" && !message.thoughts);
    const note = message.note ?? "";
    const state = `${note}|${last}|${streaming}`;
    if (foot.dataset.shown === state) return;
    foot.dataset.shown = state;
    foot.replaceChildren();
    if (note) foot.append(element("span", "note", note));
    foot.append(...this.actions(message, last));
  }

  // On a wide screen the chat scrolls. On a narrow one the page scrolls, under the composer at its bottom.
  get #pageScrolls() {
    return getComputedStyle(this.scroll).overflowY !== "auto";
  }

  /** Pixels of the conversation below the visible part. */
  #below() {
    if (!this.#pageScrolls) return this.scroll.scrollHeight - this.scroll.scrollTop - this.scroll.clientHeight;
    return this.log.getBoundingClientRect().bottom - this.composer.getBoundingClientRect().top;
  }

  toEnd() {
    this.#along = true;
    if (!this.#pageScrolls) this.scroll.scrollTop = this.scroll.scrollHeight;
    else if (this.#below() > 0) scrollBy(0, this.#below());
  }
}

/** The note under a complete answer. */
export function summary({ tokens, seconds, finish }) {
  const parts = [`${tokens ?? NONE} tokens`];
  if (tokens > 1 && seconds > 0) parts.push(`${((tokens - 1) / seconds).toFixed(1)} per second`);
  if (finish === "length") parts.push("cut there");
  return parts.join(" · ");
}
