// The list of chats beside the chat; a drawer on a narrow screen.

import { BadFile, download, fileName, read, toJson, toMarkdown } from "./chat_files.js";

const CLOSED_KEY = "mlx_flash.sidebar";
const SEARCH_MS = 150;
const UNDO_MS = 10_000;
const NARROW = matchMedia("(max-width: 60rem)");

const at = (id) => document.getElementById(id);

function button(text, className, onClick, label) {
  const made = document.createElement("button");
  made.type = "button";
  made.className = className;
  made.textContent = text;
  if (label) made.setAttribute("aria-label", label);
  made.addEventListener("click", onClick);
  return made;
}

function heading(text) {
  const item = document.createElement("li");
  item.className = "day";
  item.textContent = text;
  return item;
}

const ask = at("delete-dialog");
const DAY_MS = 86_400_000;

/** The day of a time, or its month, as a heading. */
function dayOf(time) {
  const midnight = new Date().setHours(0, 0, 0, 0);
  if (time >= midnight) return "Today";
  if (time >= midnight - DAY_MS) return "Yesterday";
  if (time >= midnight - 6 * DAY_MS) return "Last 7 days";
  return new Date(time).toLocaleDateString([], { month: "long", year: "numeric" });
}

export class Sidebar {
  #found = null; // the ids of the chats that a search has found; null without a search
  #undo = null;
  #timers = {};

  /** onOpen: called with a chat's id that was chosen. */
  constructor(chats, onOpen) {
    this.chats = chats;
    this.onOpen = onOpen;
    chats.addEventListener("list", () => this.#show());
    chats.addEventListener("open", () => this.#show());
    at("chats-toggle").addEventListener("click", () => this.toggle());
    at("chats-close").addEventListener("click", () => this.toggle(false));
    at("chats-shade").addEventListener("click", () => this.toggle(false));
    at("chats").addEventListener("keydown", (event) => {
      if (event.key !== "Escape" || !NARROW.matches || event.defaultPrevented) return;
      event.stopPropagation();
      this.toggle(false);
    });
    at("chats-search").addEventListener("input", () => {
      clearTimeout(this.#timers.search);
      this.#timers.search = setTimeout(() => this.#search(), SEARCH_MS);
    });
    at("chats-export").addEventListener("click", async () => {
      download("chats.json", "application/json", toJson(await this.chats.whole()));
    });
    at("chats-import").addEventListener("click", () => at("chats-file").click());
    at("chats-file").addEventListener("change", () => this.#import());
    at("export-json").addEventListener("click", () => this.#exportOpen("json"));
    at("export-markdown").addEventListener("click", () => this.#exportOpen("md"));
    at("chats-undo").addEventListener("click", async () => {
      const undo = this.#undo;
      this.#say("");
      await undo?.();
    });
    NARROW.addEventListener("change", () => this.#begin());
    this.#begin();
  }

  /** Opens or closes the list. On a wide screen the choice is kept. */
  toggle(open = at("chats").dataset.open !== "true") {
    this.#set(open);
    if (open && NARROW.matches) at("chats-search").focus();
    if (!open && at("chats").contains(document.activeElement)) at("chats-toggle").focus();
    if (NARROW.matches) return;
    try {
      localStorage.setItem(CLOSED_KEY, String(open));
    } catch {
      // Storage is disabled: the choice lasts as long as the page.
    }
  }

  #begin() {
    let open = !NARROW.matches;
    try {
      open &&= localStorage.getItem(CLOSED_KEY) !== "false";
    } catch {
      // Storage is disabled.
    }
    this.#set(open);
  }

  #set(open) {
    at("chats").dataset.open = String(open);
    at("chats").inert = !open;
    at("chats-toggle").setAttribute("aria-expanded", String(open));
    at("chats-shade").hidden = !open || !NARROW.matches;
  }

  async #search() {
    const words = at("chats-search").value;
    this.#found = words.trim() ? await this.chats.search(words) : null;
    this.#show();
  }

  #show() {
    const { list, current } = this.chats;
    const shown = list.filter(({ id }) => this.#found === null || this.#found.has(id));
    at("chats-none").hidden = shown.length > 0;
    at("chats-none").textContent = this.#found ? "No chat has these words." : "Chats appear here.";
    at("chats-export").disabled = list.length === 0;
    if (at("chats-list").querySelector("input")) return; // A title is being edited.
    let day = "";
    const rows = [];
    for (const record of shown) {
      if (day !== (day = dayOf(record.updated))) rows.push(heading(day));
      rows.push(this.#row(record, record.id === current.record.id));
    }
    at("chats-list").replaceChildren(...rows);
  }

  #row(record, isOpen) {
    const title = record.title || "Without a title";
    const item = document.createElement("li");
    item.dataset.chat = record.id;
    const choose = button(title, "chat-title", () => {
      this.onOpen(record.id);
      if (NARROW.matches) this.toggle(false);
    });
    choose.title = `${title}\n${new Date(record.updated).toLocaleString()}`;
    if (isOpen) choose.setAttribute("aria-current", "true");
    const rename = button("Rename", "small", () => this.#rename(record, item), `Rename ${title}`);
    const remove = button("Delete", "small", () => this.#remove(record, title), `Delete ${title}`);
    item.append(choose, rename, remove);
    return item;
  }

  #rename(record, item) {
    const field = document.createElement("input");
    field.value = record.title;
    field.maxLength = 200;
    field.setAttribute("aria-label", "Title of the chat");
    let ended = false;
    const end = (keep) => {
      if (ended) return; // Removing the field takes the focus from it, which would end it again.
      ended = true;
      field.remove();
      if (keep) this.chats.rename(record.id, field.value.trim() || record.title);
      this.#show();
      at("chats-list").querySelector(`[data-chat="${CSS.escape(record.id)}"] .chat-title`)?.focus();
    };
    field.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && !event.isComposing) end(true);
      if (event.key !== "Escape") return;
      event.preventDefault();
      end(false);
    });
    field.addEventListener("blur", () => end(true));
    item.replaceChildren(field);
    field.select();
  }

  async #remove(record, title) {
    at("delete-name").textContent = title;
    ask.returnValue = "";
    ask.showModal();
    await new Promise((resolve) => ask.addEventListener("close", resolve, { once: true }));
    if (ask.returnValue !== "delete") return;
    const undo = await this.chats.remove(record.id);
    this.#say("The chat is deleted.", undo);
    at("chats-undo").focus();
  }

  async #exportOpen(kind) {
    const { record, messages } = this.chats.current;
    const name = fileName(record.title);
    if (kind === "md") download(`${name}.md`, "text/markdown", toMarkdown(record, messages));
    else download(`${name}.json`, "application/json", toJson(await this.chats.whole([record.id])));
    at("chat-menu").open = false;
  }

  async #import() {
    const [file] = at("chats-file").files;
    try {
      const chats = await read(file);
      const taken = await this.chats.take(chats);
      const count = taken === 1 ? "1 chat is imported" : `${taken} chats are imported`;
      const rest = chats.length - taken;
      this.#say(rest ? `${count}; ${rest} of the file ${rest === 1 ? "was" : "were"} here already.` : `${count}.`);
    } catch (error) {
      if (!(error instanceof BadFile)) throw error;
      this.#say(error.message);
    } finally {
      at("chats-file").value = "";
    }
  }

  /** Shows a sentence under the list, for a while if it offers an undo. */
  #say(text, undo = null) {
    this.#undo = undo;
    at("chats-note").textContent = text;
    at("chats-said").hidden = text === "";
    at("chats-undo").hidden = undo === null;
    clearTimeout(this.#timers.undo);
    if (undo) this.#timers.undo = setTimeout(() => this.#say(""), UNDO_MS);
  }
}
