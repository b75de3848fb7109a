// The collection of chats: the one that is open, and the list of all. It changes the store; it draws nothing.

import { Conversation, newChat, newId } from "./conversation.js";

const OPEN_KEY = "mlx_flash.chat"; // the open chat of this tab
const TAB_KEY = "mlx_flash.tab";
const OLD_KEY = "mlx_flash.conversation"; // the only chat that earlier versions kept, in localStorage
const SYSTEM_KEY = "mlx_flash.system"; // the system prompt of new chats

function kept(storage, key) {
  try {
    return globalThis[storage].getItem(key);
  } catch {
    return null; // Storage is disabled.
  }
}

function keep(storage, key, value) {
  try {
    globalThis[storage].setItem(key, value);
  } catch {
    // Storage is full or disabled: the value lasts as long as the page.
  }
}

/**
 * Events: "list" (the list has changed), "open" (another chat is open, or it has changed elsewhere), "deleted" (detail:
 * the Conversation).
 */
export class Chats extends EventTarget {
  list = []; // records of chats, newest first
  current = null; // a Conversation
  #store;
  #live = new Map(); // id -> Conversation, for those that were open: an answer may still arrive in them
  #wanted = null; // the id of the chat that was chosen last
  #tab = kept("sessionStorage", TAB_KEY) ?? newId();

  constructor(store) {
    super();
    this.#store = store;
    keep("sessionStorage", TAB_KEY, this.#tab);
    this.#begin(newChat(this.system), []);
    store.addEventListener("changed", ({ detail }) => this.#changedElsewhere(detail));
  }

  get tab() {
    return this.#tab;
  }

  /** The system prompt of new chats. */
  get system() {
    return kept("localStorage", SYSTEM_KEY) ?? "";
  }

  set system(text) {
    keep("localStorage", SYSTEM_KEY, text);
  }

  /** Reads the list, and opens the chat that this tab had open. */
  async start() {
    this.list = await this.#store.chats();
    const old = await this.#takeOver();
    const wanted = old ?? kept("sessionStorage", OPEN_KEY);
    if (this.#find(wanted)) await this.open(wanted);
    this.#tell("list");
  }

  async open(id) {
    const live = this.#live.get(id);
    const record = this.#find(id);
    this.#wanted = id;
    const messages = live || !record ? [] : await this.#read(id);
    if (this.#wanted !== id) return; // Another one was chosen meanwhile.
    if (live) this.current = live;
    else if (record) this.#begin(record, messages);
    else return;
    keep("sessionStorage", OPEN_KEY, id);
    this.#tell("open");
  }

  /** A chat's messages. Answers that were arriving when a page was left count as cut off. */
  async #read(id) {
    const messages = await this.#store.messages(id);
    for (const message of messages) {
      if (message.state !== "streaming") continue;
      message.state = message.content || message.thoughts || message.calls ? "partial" : "error";
      message.note = message.tab === this.#tab ? "Interrupted: the page was reloaded." : "Interrupted, unless another tab still writes it.";
    }
    return messages;
  }

  /** Opens an empty chat. It is listed from its first message on. */
  fresh() {
    this.#wanted = null;
    this.#begin(newChat(this.system), []);
    keep("sessionStorage", OPEN_KEY, "");
    this.#tell("open");
  }

  rename(id, title) {
    const record = this.#find(id);
    Object.assign(record, { title, named: title !== "" });
    this.#store.putChat(record);
    this.#tell("list");
  }

  /** Deletes a chat. Returns a function that brings it back. */
  async remove(id) {
    const record = this.#find(id);
    const messages = await this.#store.messages(id);
    await this.#drop(id, () => this.#store.delete(id));
    return async () => {
      delete record.deleted;
      this.#write(record, messages, true);
      await this.open(id);
    };
  }

  /** Takes a deleted chat off the page. */
  async #drop(id, deleted = () => {}) {
    const live = this.#live.get(id);
    const record = this.#find(id);
    if (record) record.deleted = true;
    this.list = this.list.filter((each) => each !== record);
    this.#live.delete(id);
    if (live) this.dispatchEvent(new CustomEvent("deleted", { detail: live }));
    await deleted();
    if (this.current.record.id === id) this.fresh();
    this.#tell("list");
  }

  /** The system prompt of the open chat. */
  setSystem(text) {
    const { record } = this.current;
    record.system = text;
    if (this.#find(record.id)) this.#store.putChat(record);
  }

  /** The ids of the chats with these words in title or text. */
  async search(words) {
    const wanted = words.trim().toLowerCase();
    const found = await this.#store.search(wanted);
    return new Set(this.list.filter(({ id, title }) => found.has(id) || title.toLowerCase().includes(wanted)).map(({ id }) => id));
  }

  /** Chats with their messages, as chat_files.js writes them. ids: null for all. */
  async whole(ids = null) {
    const records = this.list.filter(({ id }) => ids === null || ids.includes(id));
    return Promise.all(records.map(async (record) => ({ ...record, messages: await this.#store.messages(record.id) })));
  }

  /** Adds chats from a file. Messages that are here already stay as they are. Returns how many chats were new or grew. */
  async take(chats) {
    let taken = 0;
    for (const { messages, ...record } of chats) {
      const own = this.#find(record.id);
      const here = new Set(own ? (await this.#store.messages(record.id)).map(({ id }) => id) : []);
      const more = messages.filter(({ id }) => !here.has(id));
      if (own && more.length === 0) continue;
      taken += 1;
      this.#write(own ?? record, more, true);
      const live = this.#live.get(record.id);
      live?.merge(live.record, more, this.#tab);
      if (live && live === this.current) this.#tell("open");
    }
    return taken;
  }

  #find(id) {
    return this.list.find((record) => record.id === id);
  }

  #begin(record, messages) {
    this.current = new Conversation(record, messages, (...given) => this.#write(...given));
    this.#live.set(record.id, this.current);
  }

  #write(record, messages, withImages = false) {
    if (record.deleted) return;
    this.#store.putChat(record);
    for (const message of messages) this.#store.putMessage(record.id, message, withImages);
    if (this.current.record === record) keep("sessionStorage", OPEN_KEY, record.id);
    const order = this.list.map(({ id }) => id).join();
    if (!this.list.includes(record)) this.list = [...this.list.filter(({ id }) => id !== record.id), record];
    this.list.sort((one, other) => other.updated - one.updated);
    if (this.list.map(({ id }) => id).join() !== order) this.#tell("list");
  }

  async #changedElsewhere({ chat, deleted }) {
    if (deleted) return this.#drop(chat);
    const records = await this.#store.chats();
    const record = records.find(({ id }) => id === chat);
    const live = this.#live.get(chat);
    const changed = live && record && live.merge(record, await this.#store.messages(chat), this.#tab);
    // Records of chats that were open stay the same objects.
    this.list = records.map((each) => this.#live.get(each.id)?.record ?? each);
    if (changed && live === this.current) this.#tell("open");
    this.#tell("list");
  }

  /** Makes the only chat of an earlier version the first of the list. Returns its id. Two tabs may do so at once. */
  async #takeOver() {
    try {
      const old = JSON.parse(kept("localStorage", OLD_KEY) ?? "[]").filter(
        ({ role, content, thoughts }) =>
          ["user", "assistant"].includes(role) &&
          typeof content === "string" &&
          ["undefined", "string"].includes(typeof thoughts),
      );
      if (old.length === 0) return null;
      const id = "first";
      const began = Date.now() - old.length;
      const messages = old.map((message, i) => ({
        ...message,
        id: String(i),
        parent: i ? String(i - 1) : null,
        at: began + i,
        ...(message.state === "streaming" ? { state: "partial", note: "Interrupted: the page was reloaded." } : {}),
      }));
      const title = old[0].content.trim().split("\n")[0].slice(0, 60);
      const record = { ...newChat(), id, title, leaf: String(old.length - 1), created: began, updated: began + old.length };
      this.#write(record, messages);
      await this.#store.settled();
      localStorage.removeItem(OLD_KEY);
      return id;
    } catch {
      return null; // Storage is disabled, or holds other data.
    }
  }

  #tell(name) {
    this.dispatchEvent(new Event(name));
  }
}
