// Asks the model, and puts what arrives into a chat. Chats that are not shown go on.

import { answer, Gone, Refused } from "./api.js";
import { addChunk } from "./chunks.js";
import { summary } from "./messages.js";

/** Events: "begin", "more" and "end" (detail: the Conversation). */
export class Answering extends EventTarget {
  #running = new Map(); // Conversation -> {controller, message}
  #ids = new Set(); // the ids of the answers in /events
  #unnamed = 0; // running answers whose ids are not known yet

  /** suspect: called with the error of a request that failed. */
  constructor(suspect) {
    super();
    this.suspect = suspect;
  }

  isAnswering(conversation) {
    return this.#running.has(conversation);
  }

  /** Whether an event of /events belongs to this page's requests. An id is unknown until the first chunk arrives. */
  isOwn({ id }) {
    return this.#ids.has(id) || this.#unnamed > 0;
  }

  /** Stores the answers that are arriving. */
  keep() {
    for (const [conversation, { message }] of this.#running) conversation.keep(message);
  }

  stop(conversation) {
    this.#running.get(conversation)?.controller.abort();
  }

  /**
   * Asks for an answer to the chat's last question. into: the last answer, if it is to go on or to be tried again,
   * or null for a new one. made: fields of the answer. options: for the request.
   */
  async ask(conversation, { into, made, options }) {
    const turns = conversation.turns();
    const continued = Boolean(into && (into.content || into.thoughts));
    if (continued) {
      if (!into.content) turns.push({ role: "assistant", content: "" }); // It was cut in its thoughts.
      if (into.thoughts) turns.at(-1).reasoning_content = into.thoughts;
      options = { ...options, continue_final_message: true };
    }
    const message = into ?? conversation.add({ role: "assistant", content: "" });
    Object.assign(message, { state: "streaming", note: "", cut: false, ...made });
    conversation.keep(message);
    const controller = new AbortController();
    this.#running.set(conversation, { controller, message });
    this.#unnamed += 1;
    this.#tell("begin", conversation);
    let [first, latest, finish, usage, id] = [0, 0, null, null, null];
    const named = (given) => {
      if (id !== null) return;
      id = given;
      this.#unnamed -= 1;
      this.#ids.add(id);
    };
    try {
      for await (const chunk of answer(turns, options, controller.signal)) {
        if (chunk.id) named(chunk.id);
        finish = chunk.finish ?? finish;
        usage = chunk.usage ?? usage;
        if (!addChunk(message, chunk)) continue;
        latest = performance.now();
        first ||= latest;
        this.#tell("more", conversation);
        conversation.keep(message, true);
      }
      message.state = "done";
      message.tokens = usage?.total_tokens;
      message.cut = finish === "length";
      message.note = summary({ tokens: usage?.completion_tokens, seconds: (latest - first) / 1000, finish, continued });
    } catch (error) {
      this.#ended(message, error);
    } finally {
      this.#running.delete(conversation);
      named("");
      this.#ids.delete(id);
      conversation.keep(message);
      this.#tell("end", conversation);
    }
  }

  /** Marks an answer that failed or was stopped; the text that has arrived is kept. */
  #ended(message, error) {
    const some = message.content !== "" || Boolean(message.thoughts || message.calls);
    if (error.name === "AbortError") {
      message.state = "stopped";
      message.note = some ? "Stopped." : "Stopped before it began.";
      return;
    }
    message.state = some ? "partial" : "error";
    if (error instanceof Gone) message.note = some ? "Interrupted: the server went away." : "The server went away.";
    else if (error instanceof Refused) message.note = explained(error);
    else message.note = `The answer could not be read (${error.message}).`;
    this.suspect(error);
  }

  #tell(name, conversation) {
    this.dispatchEvent(new CustomEvent(name, { detail: conversation }));
  }
}

/** Whether a message can be continued: an answer with something that did not come to its own end. */
export function canContinue({ role, state, content, thoughts, cut }) {
  return role === "assistant" && Boolean(content || thoughts) && (cut || state === "stopped" || state === "partial");
}

function explained({ message, code }) {
  const more = code === "context_length_exceeded" ? " Start a new chat, or ask for fewer tokens." : "";
  return message.charAt(0).toUpperCase() + message.slice(1) + more;
}
