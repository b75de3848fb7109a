// The data of one chat: a tree of messages, and the branch of it that is shown.

import { fenced } from "./text_files.js";

const SAVE_MS = 1000; // between two records of an answer that arrives

/** A content in OpenAI's form: a text, or parts if there are images. Files stand before the text. */
function contentOf({ content, images, files }) {
  const text = [...(files ?? []).map(fenced), ...(content ? [content] : [])].join("\n\n");
  if (!images) return text;
  const urls = images.map((url) => ({ type: "image_url", image_url: { url } }));
  return text ? [...urls, { type: "text", text }] : urls;
}

/** An id that no other tab gives. */
export function newId() {
  return Array.from(crypto.getRandomValues(new Uint8Array(12)), (byte) => byte.toString(16).padStart(2, "0")).join("");
}

/** A chat without messages. */
export function newChat(system = "") {
  const now = Date.now();
  return { id: newId(), title: "", named: false, system, leaf: null, created: now, updated: now };
}

/**
 * A message: {id, parent, at, role: "user" | "assistant", content, images, files, thoughts,
 *   thoughtSeconds, calls, model, state, note, tokens, cut}.
 * parent: the id of the message that it follows; null for the first. Messages with the same parent are versions.
 * at: its time in ms; later ones of a chat have larger values.
 * images: data URLs. files: [{name, text}].
 * thoughts: what the model thought before an answer, if anything. They are not sent back with later questions.
 * thoughtSeconds: how long it thought. calls: the tools that it called, [{name, arguments}].
 * tokens: size of the conversation up to and including this message.
 * state of an answer: "streaming", "done", "stopped" (by the user), "partial" (cut off), "error" (nothing arrived).
 * cut: whether the limit of the answer ended it. tab: where it streams.
 */
export class Conversation {
  #byId = new Map();
  #timer = null;

  /** record: of the chat. messages: all of them. save: stores a chat's record and some of its messages. */
  constructor(record, messages, save) {
    this.record = record;
    this.save = save;
    for (const message of messages) this.#byId.set(message.id, message);
    if (!this.#byId.has(record.leaf)) record.leaf = messages.at(-1)?.id ?? null;
  }

  get all() {
    return [...this.#byId.values()];
  }

  /** The messages of the branch that is shown, first to last. */
  get messages() {
    const path = new Set(); // in which a damaged record cannot make a circle
    for (let each = this.last; each && !path.has(each); each = this.#byId.get(each.parent)) path.add(each);
    return [...path].reverse();
  }

  get last() {
    return this.#byId.get(this.record.leaf);
  }

  /** The last known number of tokens in the branch. */
  get tokens() {
    return this.messages.findLast((message) => message.tokens)?.tokens ?? 0;
  }

  /** The messages for the model: the system prompt, questions with their answers, and the last question. */
  turns() {
    const messages = this.messages;
    const turns = this.record.system ? [{ role: "system", content: this.record.system }] : [];
    messages.forEach((message, i) => {
      const { role } = message;
      const next = messages[i + 1];
      const answered = next?.role === "assistant" && next.content !== "";
      if (role === "user" && (answered || messages.slice(i + 1).every((m) => m.role === "assistant"))) {
        turns.push({ role, content: contentOf(message) });
        if (answered) turns.push({ role: "assistant", content: next.content });
      }
    });
    return turns;
  }

  /** Adds a message after the last one that is shown. */
  add(message) {
    const at = Math.max(Date.now(), ...this.all.map((each) => each.at + 1));
    Object.assign(message, { id: newId(), parent: this.record.leaf, at });
    this.#byId.set(message.id, message);
    this.record.leaf = message.id;
    if (!this.record.named && !this.record.title) this.record.title = titleOf(message);
    this.record.updated = at;
    this.save(this.record, [message], true);
    return message;
  }

  /** Makes the next message another version of `message`. */
  branch(message) {
    this.record.leaf = message.parent;
  }

  /** All messages that stand in the same place, oldest first. */
  versions(message) {
    return this.all.filter(({ parent }) => parent === message.parent).sort((one, other) => one.at - other.at);
  }

  /** Shows another version, and the newest messages after it. */
  show(message) {
    const latest = ({ id }) => this.all.filter(({ parent }) => parent === id).sort((a, b) => b.at - a.at)[0];
    for (let next = message; next; next = latest(next)) this.record.leaf = next.id;
    this.save(this.record, []);
  }

  /**
   * Takes in what another tab has stored; the branch is followed if it grew. Returns whether the branch has changed.
   * tab: this one, whose streaming answers are newer than what is stored of them.
   */
  merge(record, messages, tab) {
    const before = this.record.leaf;
    const shown = JSON.stringify([this.record.system, this.messages]);
    for (const message of messages) {
      const own = this.#byId.get(message.id);
      if (!(own?.state === "streaming" && own.tab === tab)) this.#byId.set(message.id, message);
    }
    Object.assign(this.record, record);
    if (before && !this.messages.some(({ id }) => id === before)) this.record.leaf = before;
    return JSON.stringify([this.record.system, this.messages]) !== shown;
  }

  /** Stores a message; `soon`: within a second, for use while an answer arrives. */
  keep(message, soon = false) {
    if (soon) {
      this.#timer ??= setTimeout(() => this.keep(message), SAVE_MS);
      return;
    }
    clearTimeout(this.#timer);
    this.#timer = null;
    this.save(this.record, [message]);
  }
}

/** The title of a chat that begins with this question. */
function titleOf({ content, files, images }) {
  const line = content.trim().split("\n")[0].replace(/\s+/g, " ").replace(/^[#>*\s]+/, "");
  if (line) return line.length > 60 ? `${line.slice(0, 59).trimEnd()}…` : line;
  return files?.[0]?.name ?? (images ? "An image" : "");
}
