// The data of the conversation: its messages, and how each answer ended. It survives a reload, up to a maximum size.

const KEY = "mlx_flash.conversation";
const MOST_MESSAGES = 200;
const MOST_CHARACTERS = 500_000;

/** A content in OpenAI's form: a text, or parts if there are images. */
const contentOf = ({ content, images }) =>
  images
    ? [
        ...images.map((url) => ({ type: "image_url", image_url: { url } })),
        ...(content ? [{ type: "text", text: content }] : []),
      ]
    : content;

/**
 * A message: {role: "user" | "assistant", content, images, lost, thoughts, thoughtSeconds, calls, state, note, tokens}.
 * images: data URLs. They last as long as the page; lost: how many there were before a reload.
 * thoughts: what the model thought before an answer, if anything. They are never sent back.
 * thoughtSeconds: how long it thought. calls: the tools that it called, [{name, arguments}].
 * tokens: size of the conversation up to and including this message.
 * state of an answer: "streaming", "done", "stopped" (by the user), "partial" (cut off), "error" (nothing arrived).
 */
export class Conversation {
  messages = [];
  #timer = null;
  #left = false;

  constructor() {
    try {
      const stored = JSON.parse(localStorage.getItem(KEY) ?? "[]");
      this.messages = stored.filter(
        (m) =>
          ["user", "assistant"].includes(m?.role) &&
          typeof m.content === "string" &&
          ["undefined", "string"].includes(typeof m.thoughts),
      );
    } catch {
      // Storage is disabled, or holds other data.
    }
    for (const message of this.messages) {
      if (message.state === "streaming") {
        message.state = message.content || message.thoughts || message.calls ? "partial" : "error";
        message.note = "Interrupted: the page was reloaded.";
      }
    }
    // Leaving the page breaks the connection of a running answer. That must not be stored as the server's fault.
    addEventListener("pagehide", () => {
      this.keep();
      this.#left = true;
    });
    addEventListener("pageshow", () => (this.#left = false));
  }

  get last() {
    return this.messages.at(-1);
  }

  /** The last known number of tokens in the conversation. */
  get tokens() {
    return this.messages.findLast((message) => message.tokens)?.tokens ?? 0;
  }

  /** The messages for the model: questions with their answers, and the last question. Unanswered ones are left out. */
  turns() {
    const turns = [];
    this.messages.forEach((message, i) => {
      const { role } = message;
      const next = this.messages[i + 1];
      const answered = next?.role === "assistant" && next.content !== "";
      if (role === "user" && (answered || this.messages.slice(i + 1).every((m) => m.role === "assistant"))) {
        turns.push({ role, content: contentOf(message) });
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

  /** Removes the last answer, so that it can be generated again. */
  takeBack() {
    if (this.last?.role === "assistant") this.messages.pop();
    this.keep();
  }

  clear() {
    this.messages = [];
    this.keep();
  }

  /** Stores the conversation within a second; for use while an answer arrives. */
  keepSoon() {
    this.#timer ??= setTimeout(() => this.keep(), 1000);
  }

  /** Stores the conversation. Above the maximum size, the oldest messages are not stored. */
  keep() {
    clearTimeout(this.#timer);
    this.#timer = null;
    if (this.#left) return;
    let kept = this.messages.slice(-MOST_MESSAGES);
    const size = ({ content, thoughts }) => content.length + (thoughts?.length ?? 0);
    let characters = kept.reduce((sum, message) => sum + size(message), 0);
    while (kept.length > 2 && characters > MOST_CHARACTERS) {
      characters -= size(kept[0]);
      kept = kept.slice(1);
    }
    try {
      const textOnly = ({ images, ...rest }) => (images ? { ...rest, lost: images.length } : rest);
      localStorage.setItem(KEY, JSON.stringify(kept.map(textOnly)));
    } catch {
      // Storage is full or disabled: the conversation lasts as long as the page.
    }
  }
}
