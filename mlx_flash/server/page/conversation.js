// The conversation as data: what was said, how each answer ended; kept over a reload, within bounds.

const KEY = "mlx_flash.conversation";
const MOST_MESSAGES = 200;
const MOST_CHARACTERS = 500_000;

/**
 * A message: {role: "user" | "assistant", content, state, note, tokens}; `tokens`: of the conversation up to here.
 * state of an answer: "streaming", "done", "stopped" (by the user), "partial" (the server broke off), "error" (nothing came).
 */
export class Conversation {
  messages = [];
  #timer = null;
  #left = false;

  constructor() {
    try {
      const stored = JSON.parse(localStorage.getItem(KEY) ?? "[]");
      this.messages = stored.filter((m) => ["user", "assistant"].includes(m?.role) && typeof m.content === "string");
    } catch {
      // switched off, or not ours
    }
    for (const message of this.messages) {
      if (message.state === "streaming") {
        message.state = message.content ? "partial" : "error";
        message.note = "Interrupted: the page was reloaded.";
      }
    }
    // Leaving breaks the answer's connection off: that is not to be written down as the server's doing.
    addEventListener("pagehide", () => {
      this.keep();
      this.#left = true;
    });
    addEventListener("pageshow", () => (this.#left = false));
  }

  get last() {
    return this.messages.at(-1);
  }

  /** Tokens of the conversation, as far as the server has told. */
  get tokens() {
    return this.messages.findLast((message) => message.tokens)?.tokens ?? 0;
  }

  /** What the model is given: questions with their answers, and the last question. One without an answer is left out. */
  turns() {
    const turns = [];
    this.messages.forEach(({ role, content }, i) => {
      const next = this.messages[i + 1];
      const answered = next?.role === "assistant" && next.content !== "";
      if (role === "user" && (answered || this.messages.slice(i + 1).every((m) => m.role === "assistant"))) {
        turns.push({ role, content });
        if (answered) turns.push({ role: "assistant", content: next.content });
      }
    });
    return turns;
  }

  add(message) {
    this.messages.push(message);
    this.keep();
    return message;
  }

  /** Takes the last answer back, so that it can be given again. */
  takeBack() {
    if (this.last?.role === "assistant") this.messages.pop();
    this.keep();
  }

  clear() {
    this.messages = [];
    this.keep();
  }

  /** Within a second: while an answer arrives. */
  keepSoon() {
    this.#timer ??= setTimeout(() => this.keep(), 1000);
  }

  /** Writes it down; the oldest messages are dropped from what is written beyond the bounds. */
  keep() {
    clearTimeout(this.#timer);
    this.#timer = null;
    if (this.#left) return;
    let kept = this.messages.slice(-MOST_MESSAGES);
    let characters = kept.reduce((sum, { content }) => sum + content.length, 0);
    while (kept.length > 2 && characters > MOST_CHARACTERS) {
      characters -= kept[0].content.length;
      kept = kept.slice(1);
    }
    try {
      localStorage.setItem(KEY, JSON.stringify(kept));
    } catch {
      // full or switched off: the conversation lasts as long as the page
    }
  }
}
