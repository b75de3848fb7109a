// Keeps chats in the browser. Each chat, each message and each message's images are a record of their own in IndexedDB,
// so that two tabs add to the same chat without overwriting each other.

const DATABASE = "mlx_flash";
const KINDS = ["chats", "messages", "images"]; // keys: [chat], [chat, message], [chat, message]
const LEAVING = "mlx_flash.leaving"; // records that were not yet written when a page was left
const BROKEN = "This browser keeps no chats for this page. They last until the tab is closed: export what you need.";
const FULL = "The browser's storage for this page is full. New messages last until the tab is closed: delete or export chats.";

const asPromise = (request) =>
  new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
const keyOf = (kind, record) => (kind === "chats" ? [record.id] : [record.chat, record.id]);
const within = (chat) => IDBKeyRange.bound([chat], [chat, []]); // all keys that begin with the chat's id
const sameChat = (chat) => IDBKeyRange.only([chat]);

/**
 * Events:
 *   "changed" (detail {chat, deleted}): another tab wrote or deleted this chat
 *   "trouble" (detail: a sentence, or "" once there is none)
 *   "leave": the page is left; the last moment to put something
 * Records that cannot be written stay in memory, and reading finds them there.
 */
export class Store extends EventTarget {
  #database = null;
  #waiting = new Map(); // key as JSON -> {kind, record}: not yet written
  #writing = new Map(); // the same, while a transaction writes them
  #scheduled = false;
  #channel = "BroadcastChannel" in globalThis ? new BroadcastChannel(DATABASE) : null;
  #trouble = "";
  #left = false; // Leaving the page breaks running answers. That must not be stored as the server's fault.

  /** Opens the database. Without one, chats last as long as the page. */
  async open() {
    if (this.#channel) {
      this.#channel.onmessage = ({ data }) => this.dispatchEvent(new CustomEvent("changed", { detail: data }));
    }
    addEventListener("pagehide", () => this.#leave());
    addEventListener("pageshow", ({ persisted }) => {
      this.#left = false;
      if (persisted) this.#forgetLeft();
    });
    try {
      const request = indexedDB.open(DATABASE, 1);
      request.onupgradeneeded = () => {
        for (const kind of KINDS) request.result.createObjectStore(kind);
      };
      this.#database = await asPromise(request);
      this.#database.onversionchange = () => this.#database.close();
    } catch {
      this.#say(BROKEN);
    }
    this.#takeUpLeft();
  }

  /** The records of all chats: {id, title, named, system, leaf, created, updated}. Newest first. */
  async chats() {
    const found = await this.#all("chats", null);
    return found.sort((one, other) => other.updated - one.updated);
  }

  /** The messages of a chat with their images, oldest first. */
  async messages(chat) {
    const [messages, images] = await Promise.all([this.#all("messages", chat), this.#all("images", chat)]);
    const urls = new Map(images.map((record) => [record.id, record.urls]));
    for (const message of messages) if (urls.has(message.id)) message.images = urls.get(message.id);
    return messages.sort((one, other) => one.at - other.at);
  }

  /** The ids of the chats with a message that contains `words`, which are in lower case. */
  async search(words) {
    const found = new Set();
    for (const { chat, content, files } of await this.#all("messages", null)) {
      const texts = [content, ...(files ?? []).map((file) => file.text)];
      if (!found.has(chat) && texts.some((text) => text.toLowerCase().includes(words))) found.add(chat);
    }
    return found;
  }

  putChat(record) {
    this.#put("chats", { ...record });
  }

  /** Stores a message, and its images if they are new. */
  putMessage(chat, { images, ...message }, withImages = false) {
    this.#put("messages", { ...message, chat });
    if (withImages && images) this.#put("images", { chat, id: message.id, urls: images });
  }

  async delete(chat) {
    for (const waiting of [this.#waiting, this.#writing]) {
      for (const [key, { record }] of waiting) if ((record.chat ?? record.id) === chat) waiting.delete(key);
    }
    try {
      const transaction = this.#database?.transaction(KINDS, "readwrite");
      for (const kind of KINDS) transaction?.objectStore(kind).delete(kind === "chats" ? sameChat(chat) : within(chat));
      await (transaction && this.#done(transaction));
      this.#tell(chat, true);
    } catch {
      this.#say(BROKEN);
    }
  }

  /** Resolves once everything so far is written, or cannot be. */
  async settled() {
    while (this.#scheduled || this.#writing.size) await new Promise((resolve) => setTimeout(resolve, 5));
  }

  async #all(kind, chat) {
    const found = new Map();
    if (this.#database) {
      try {
        const range = chat === null ? undefined : kind === "chats" ? sameChat(chat) : within(chat);
        const records = await asPromise(this.#database.transaction(kind).objectStore(kind).getAll(range));
        for (const record of records) found.set(JSON.stringify(keyOf(kind, record)), record);
      } catch {
        this.#say(BROKEN);
      }
    }
    for (const { kind: own, record } of [...this.#writing.values(), ...this.#waiting.values()]) {
      if (own !== kind || (chat !== null && record.chat !== chat)) continue;
      found.set(JSON.stringify(keyOf(kind, record)), structuredClone(record));
    }
    return [...found.values()];
  }

  #put(kind, record) {
    if (this.#left) return;
    this.#waiting.set(JSON.stringify([kind, keyOf(kind, record)]), { kind, record });
    if (!this.#database || this.#scheduled) return;
    this.#scheduled = true;
    queueMicrotask(() => this.#write());
  }

  async #write() {
    this.#scheduled = false;
    const batch = this.#waiting;
    this.#waiting = new Map();
    for (const [key, entry] of batch) this.#writing.set(key, entry);
    // Images are written apart: where they do not fit, the text still may.
    const parts = [["chats", "messages"], ["images"]].map((kinds) =>
      [...batch].filter(([, { kind }]) => kinds.includes(kind)),
    );
    let trouble = "";
    for (const part of parts.filter((each) => each.length)) {
      try {
        const transaction = this.#database.transaction(KINDS, "readwrite");
        for (const [, { kind, record }] of part) transaction.objectStore(kind).put(record, keyOf(kind, record));
        transaction.commit?.();
        await this.#done(transaction);
        for (const chat of new Set(part.map(([, { record }]) => record.chat ?? record.id))) this.#tell(chat, false);
      } catch (error) {
        trouble = error?.name === "QuotaExceededError" ? FULL : BROKEN;
        // They are tried again with the next record.
        for (const [key, entry] of part) {
          if (this.#writing.get(key) === entry && !this.#waiting.has(key)) this.#waiting.set(key, entry);
        }
      }
      for (const [key, entry] of part) if (this.#writing.get(key) === entry) this.#writing.delete(key);
    }
    this.#say(trouble);
  }

  #done(transaction) {
    return new Promise((resolve, reject) => {
      transaction.oncomplete = resolve;
      transaction.onabort = transaction.onerror = () => reject(transaction.error);
    });
  }

  #tell(chat, deleted) {
    this.#channel?.postMessage({ chat, deleted });
  }

  #say(trouble) {
    if (trouble === this.#trouble) return;
    this.#trouble = trouble;
    this.dispatchEvent(new CustomEvent("trouble", { detail: trouble }));
  }

  // A browser may drop a transaction of a page that is left. localStorage is written at once.

  #leave() {
    this.dispatchEvent(new Event("leave"));
    this.#left = true; // in the same task, before anything can run that the broken connections have caused
    const left = [...this.#writing.values(), ...this.#waiting.values()].filter(({ kind }) => kind !== "images");
    if (!this.#database || left.length === 0) return;
    try {
      const others = JSON.parse(localStorage.getItem(LEAVING) ?? "[]");
      localStorage.setItem(LEAVING, JSON.stringify([...others, ...left]));
    } catch {
      // Storage is full or disabled.
    }
  }

  #takeUpLeft() {
    if (!this.#database) return;
    try {
      for (const { kind, record } of JSON.parse(localStorage.getItem(LEAVING) ?? "[]")) this.#put(kind, record);
    } catch {
      // Storage is disabled, or holds other data.
    }
    if (this.#waiting.size) this.settled().then(() => this.#forgetLeft());
  }

  #forgetLeft() {
    try {
      localStorage.removeItem(LEAVING);
    } catch {
      // Storage is disabled.
    }
  }
}
