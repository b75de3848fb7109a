// What a model thought before its answer, in a fold.

import { Body } from "./body.js";
import { element } from "./patch.js";

/** "Thought for 12 s" */
function title({ state, content, thoughtSeconds: seconds }) {
  if (state === "streaming" && content === "") return "Thinking\u2026";
  if (!Number.isFinite(seconds)) return "Thoughts";
  const whole = Math.max(1, Math.round(seconds));
  return `Thought for ${whole < 60 ? "" : `${Math.floor(whole / 60)} min `}${whole % 60} s`;
}

/** The fold of a message's thoughts. They are drawn only while it is open. */
export class Thoughts {
  node = element("details", "thoughts");
  #summary = element("summary");
  #message;
  #body;

  constructor(message) {
    this.#message = message;
    const inner = element("div", "thought-text markdown");
    this.#body = new Body(inner);
    this.node.append(this.#summary, inner);
    this.node.addEventListener("toggle", () => this.show());
    this.show();
  }

  get complete() {
    return !this.node.open || this.#body.complete;
  }

  show() {
    const message = this.#message;
    this.node.hidden = !message.thoughts;
    const wanted = title(message);
    if (this.#summary.textContent !== wanted) this.#summary.textContent = wanted;
    const thinking = message.state === "streaming" && message.content === "";
    this.node.classList.toggle("thinking", thinking);
    if (this.node.open && message.thoughts) this.#body.show(message.thoughts, thinking);
  }
}
