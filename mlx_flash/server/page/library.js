// The choice of a model and its memory budget, and the progress of loading it.

import { get, post, Refused } from "./api.js";
import { bytes } from "./format.js";

const SOURCES = { hub: "Hugging Face cache", cache: "cache folder", demo: "packaged", folder: "folder" };

const at = (id) => document.getElementById(id);

function element(tag, className, text) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  made.textContent = text;
  return made;
}

/** Events: "change": the server's model is loading, loaded, unloaded or failed. */
export class Library extends EventTarget {
  state = "ready"; // "ready", "loading", "unloaded", "failed"
  loading = null; // {name, stage, done, total}
  #found = null; // the answer of GET /library

  /** suspect: called with the error of a request that failed. */
  constructor(suspect) {
    super();
    this.suspect = suspect;
    at("library-open").addEventListener("click", () => this.#open());
    at("library-close").addEventListener("click", () => at("library").close());
    at("library-unload").addEventListener("click", () => this.#post("/library/unload"));
  }

  /** Takes the server's state from /stats. */
  stats({ state, library }) {
    this.#set(state ?? "ready", library?.loading ?? null);
  }

  /** Takes an `event: library` of /events. */
  event({ state, name, stage, done, total }) {
    this.#set(state, state === "loading" ? { name, stage, done, total } : null);
    if (state !== "loading" && at("library").open) this.#read(); // The list may have changed as well.
  }

  /** What a user should know of the state, or "". */
  get sentence() {
    if (this.state === "loading") return `Loading ${this.loading?.name ?? "the model"}${progressOf(this.loading)}`;
    if (this.state === "unloaded") return "The model is asleep. Your next message wakes it.";
    if (this.state === "failed") return `The model could not be loaded. ${capital(this.#found?.failure ?? "")}`.trim();
    return "";
  }

  #set(state, loading) {
    const changed = state !== this.state || JSON.stringify(loading) !== JSON.stringify(this.loading);
    this.state = state;
    this.loading = loading;
    if (!changed) return;
    if (state === "failed") this.#read();
    this.#showState();
    this.dispatchEvent(new Event("change"));
  }

  #open() {
    at("library-wrong").textContent = "";
    at("library").showModal();
    this.#read();
  }

  async #read() {
    try {
      this.#take(await get("/library"));
    } catch (error) {
      this.#say(error);
    }
  }

  async #post(path, body = {}) {
    at("library-wrong").textContent = "";
    try {
      this.#take(await post(path, body));
    } catch (error) {
      this.#say(error);
    }
  }

  #say(error) {
    at("library-wrong").textContent = error instanceof Refused ? error.message : "The server does not answer.";
    this.suspect(error);
  }

  #take(found) {
    const failed = found.failure !== this.#found?.failure;
    const listed = JSON.stringify(found.models) !== JSON.stringify(this.#found?.models);
    this.#found = found;
    this.#set(found.state, found.loading);
    if (failed) this.dispatchEvent(new Event("change"));
    at("library-memory").placeholder = found.budget_bytes ? `now ${gigabytes(found.budget_bytes)}` : "auto";
    at("library-budgets").replaceChildren(
      ...found.budgets.map(({ bytes: size, text }) => {
        const choice = element("option", "", text);
        choice.value = gigabytes(size);
        return choice;
      }),
    );
    if (listed) at("library-list").replaceChildren(...found.models.map((model) => this.#row(model)));
    this.#showState();
  }

  #row(model) {
    const { name, source, size_bytes, loaded, runs, reason, smallest_bytes, everything_bytes, images } = model;
    const item = element("li", "", "");
    const about = [bytes(size_bytes), SOURCES[source] ?? source];
    if (images) about.push("reads images");
    if (runs && smallest_bytes) about.push(`from ${bytes(smallest_bytes)} of memory`);
    if (runs && everything_bytes) about.push(`all in memory with ${bytes(everything_bytes)}`);
    const text = element("div", "", "");
    text.append(element("strong", "", name), element("p", "quiet figures", about.join(" · ")));
    if (!runs && reason) text.append(element("p", "", capital(reason)));
    item.append(text);
    if (loaded) item.setAttribute("aria-current", "true");
    if (runs || smallest_bytes) {
      // A model that only needs more memory can be loaded with the budget in the field.
      const load = element("button", "", loaded ? "Reload" : "Load");
      load.type = "button";
      load.setAttribute("aria-label", `${load.textContent} ${name}`);
      load.addEventListener("click", () => this.#load(name));
      item.append(load);
    }
    return item;
  }

  #load(name) {
    const memory = at("library-memory");
    if (!memory.reportValidity()) return;
    this.#post("/library/load", { name, ...(memory.value ? { memory: `${memory.value}GB` } : {}) });
  }

  #showState() {
    const loaded = this.#found?.models.find((model) => model.loaded);
    const idle = loaded && this.#found.state === this.state ? `${loaded.name} is loaded with ${bytes(this.#found.budget_bytes)}.` : "";
    at("library-state").textContent = this.sentence || idle;
    at("library-unload").hidden = this.state !== "ready" || !loaded;
    for (const button of at("library-list").querySelectorAll("button")) button.disabled = this.state === "loading";
    const { done, total } = this.loading ?? {};
    for (const progress of [at("library-progress"), at("banner-progress")]) {
      progress.hidden = this.state !== "loading" || !total;
      if (total) progress.value = done / total;
    }
  }
}

function progressOf(loading) {
  if (!loading) return "";
  const { stage, done, total } = loading;
  return `${stage ? `: ${stage}` : ""}${total ? `, ${Math.floor((100 * done) / total)} %` : ""}`;
}

const capital = (sentence) => sentence.charAt(0).toUpperCase() + sentence.slice(1);

/** Bytes as the number of GB for a field. */
const gigabytes = (size) => String(Math.round(size / 1e7) / 100);
