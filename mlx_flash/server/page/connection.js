// The connection to the server: asks /health until the server is ready, listens to /events until they end, and repeats.

import { Gone, Refused, health, stream } from "./api.js";

const FIRST_WAIT_MS = 400;
const LONGEST_WAIT_MS = 5000;
const NAMES = { state: "activity" }; // "state" is that of the connection
const SILENCE_MS = 45000; // The server sends a comment every 15 s; after three missed ones it counts as gone.

/**
 * Events: "state" (detail {state, detail}), "token", "activity" and "library" (detail: the data from /events).
 * State: "connecting", "ready", "loading", "failed", "locked" (needs another key), "gone".
 */
export class Connection extends EventTarget {
  state = "connecting";
  model = ""; // the name of the server's model, also while it is not loaded
  #wake = () => {};
  #listening = null; // the AbortController of the open stream

  async run() {
    document.addEventListener("visibilitychange", () => this.check());
    addEventListener("online", () => this.check());
    let wait = FIRST_WAIT_MS;
    for (;;) {
      if (document.hidden) await this.#sleep(null); // A hidden page must not load the server.
      const began = performance.now();
      const found = await health();
      if (found.state === "ready") {
        this.model = found.model ?? this.model;
        const locked = await this.#listen();
        if (locked) {
          this.#set("locked", locked);
          await this.#sleep(null);
          this.#set("connecting"); // so that a second refusal is reported as well
          continue;
        }
      } else {
        this.#set(found.state, found.detail);
      }
      wait = performance.now() - began > LONGEST_WAIT_MS ? FIRST_WAIT_MS : wait;
      await this.#sleep(wait * (0.8 + 0.4 * Math.random()));
      wait = this.state === "ready" ? FIRST_WAIT_MS : Math.min(1.6 * wait, LONGEST_WAIT_MS);
    }
  }

  /** Checks the state now, because it may have changed. */
  check() {
    if (document.hidden) this.#listening?.abort();
    this.#wake();
  }

  /** Checks the state after a failed request: the key may be wrong, or the server gone. */
  suspect(error) {
    if (error instanceof Gone || error.status === 401 || error.status === 503) this.#listening?.abort();
    this.#wake();
  }

  /** Listens until the stream ends. Returns the server's message if it refused the key, else null. */
  async #listen() {
    const controller = new AbortController();
    this.#listening = controller;
    let silence;
    const alive = () => {
      clearTimeout(silence);
      silence = setTimeout(() => controller.abort(), SILENCE_MS);
      this.#set("ready");
    };
    try {
      for await (const { event, data } of stream("/events", { signal: controller.signal, alive })) {
        this.dispatchEvent(new CustomEvent(NAMES[event] ?? event, { detail: JSON.parse(data) }));
      }
    } catch (error) {
      if (error instanceof Refused && error.status === 401) return error.message;
      if (error instanceof Refused && error.status !== 503) this.#set("failed", error.message);
      else if (error instanceof Gone) this.#set("gone");
      else if (error.name !== "AbortError") throw error;
    } finally {
      clearTimeout(silence);
      this.#listening = null;
    }
    return null;
  }

  #set(state, detail = "") {
    if (state === this.state && detail === this.detail) return;
    this.state = state;
    this.detail = detail;
    this.dispatchEvent(new CustomEvent("state", { detail: { state, detail } }));
  }

  /** Waits `ms` milliseconds, or until woken; null: only until woken. */
  #sleep(ms) {
    return new Promise((resolve) => {
      const timer = ms === null ? null : setTimeout(resolve, ms);
      this.#wake = () => {
        clearTimeout(timer);
        resolve();
      };
    });
  }
}
