// The conversation on the screen. A user's text is shown as it is, a model's as Markdown. Neither is ever read as HTML.

import { folded } from "./attachments.js";
import { Body } from "./body.js";
import { showCalls } from "./calls.js";
import { copyWith } from "./copy.js";
import { NONE } from "./format.js";
import { element } from "./patch.js";
import { picture } from "./pictures.js";
import { Thoughts } from "./thoughts.js";

const NEAR_PX = 48; // Within this distance from the end, the view follows new text.
const SLICE_MS = 8; // of a frame, for a long conversation that is opened

export class Messages {
  #shown = []; // {message, article, foot}, and for an answer {body, thoughts, calls, complete}
  #waiting = []; // those whose Markdown is not drawn yet
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
    log.addEventListener("click", ({ target }) => {
      const button = target.closest(".copy-code");
      if (button) copyWith(button, button.closest(".code").querySelector("code").textContent);
    });
    document.addEventListener("lazy", () => {
      this.#waiting = this.#shown.filter(({ body, complete }) => body && !complete);
      this.#drawSome();
    });
  }

  set model(name) {
    this.#model = name;
    for (const name of this.log.querySelectorAll(".assistant > .who.unknown")) name.textContent = this.#model;
  }

  show(messages) {
    this.#shown = [];
    this.log.replaceChildren();
    for (const message of messages) this.#append(message);
    this.#waiting = this.#shown.filter(({ body }) => body);
    this.#drawSome();
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
    const seen = element("div", "pictures");
    seen.append(...(message.images ?? []).map((url, i) => picture(url, i + 1)));
    seen.append(...folded(message.files));
    seen.hidden = !seen.hasChildNodes();
    const foot = element("p", "foot");
    const shown = { message, article, foot };
    if (message.role === "user") article.append(seen, element("div", "text plain", message.content), foot);
    else {
      const text = element("div", "text markdown");
      shown.body = new Body(text);
      shown.body.plain(message.content);
      shown.thoughts = new Thoughts(message);
      shown.calls = element("div", "calls");
      article.append(seen, shown.thoughts.node, text, shown.calls, foot);
    }
    this.log.append(article);
    this.#foot(shown, false);
    this.#shown.push(shown);
  }

  #finish() {
    this.empty.hidden = this.#shown.length > 0;
    const last = this.#shown.at(-1);
    if (!last) return;
    const along = this.#along;
    this.#draw(last);
    for (const shown of this.#shown.slice(-3)) this.#foot(shown, shown === last);
    if (along) this.toEnd();
  }

  #draw(shown) {
    const { message, body, thoughts, calls } = shown;
    if (!body) return;
    thoughts.show();
    body.show(message.content, message.state === "streaming");
    const coloured = showCalls(calls, message.calls);
    shown.complete = coloured && body.complete && thoughts.complete;
  }

  /** Draws the messages that wait for it, the last one first: some now, the others in the next frames. */
  #drawSome() {
    const along = this.#along;
    const end = performance.now() + SLICE_MS;
    while (this.#waiting.length > 0 && performance.now() < end) this.#draw(this.#waiting.pop());
    if (along) this.toEnd();
    if (this.#waiting.length > 0) setTimeout(() => this.#drawSome());
  }

  #foot({ message, article, foot }, last) {
    const streaming = message.state === "streaming";
    article.dataset.state = message.state ?? "";
    article.setAttribute("aria-busy", String(streaming));
    article.classList.toggle("waiting", streaming && message.content === "" && !message.thoughts && !message.calls);
    const note = message.note ?? "";
    const copied = message.role === "assistant" && !streaming && message.content !== "";
    const state = `${note}|${copied}|${last}|${streaming}`;
    if (foot.dataset.shown === state) return;
    foot.dataset.shown = state;
    foot.replaceChildren();
    if (note) foot.append(element("span", "note", note));
    if (copied) {
      const button = element("button", "copy", "Copy");
      button.type = "button";
      button.title = "Copy this answer as Markdown";
      button.addEventListener("click", () => copyWith(button, message.content));
      foot.append(button);
    }
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

/** The note under a complete answer. continued: whether the figures are those of its last part alone. */
export function summary({ tokens, seconds, finish, continued }) {
  const parts = [`${tokens ?? NONE} ${continued ? "more tokens" : "tokens"}`];
  if (tokens > 1 && seconds > 0) parts.push(`${((tokens - 1) / seconds).toFixed(1)} per second`);
  if (finish === "length") parts.push("cut there");
  return parts.join(" · ");
}
