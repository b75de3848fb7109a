// Is the server there? Asks /health until it is, then listens at /events until that ends, then asks again.

import { Gone, Refused, health, stream } from "./api.js";

const FIRST_WAIT_MS = 400;
const LONGEST_WAIT_MS = 5000;
const SILENCE_MS = 45000; // the server sends a comment every 15 s: after three of them missed, nobody is there

/**
 * Events: "state" (detail {state, detail}), "token" and "activity" (detail: what /events sent).
 * State: "connecting", "ready", "loading", "failed", "locked" (wants another key), "gone".
 */
export class Connection extends EventTarget {
  state = "connecting";
  #wake = () => {};
  #listening = null; // the AbortController of the open stream

  async run() {
    document.addEventListener("visibilitychange", () => this.check());
    addEventListener("online", () => this.check());
    let wait = FIRST_WAIT_MS;
    for (;;) {
      if (document.hidden) await this.#sleep(null); // a hidden page costs the server nothing
      const began = performance.now();
      const found = await health();
      if (found.state === "ready") {
        const locked = await this.#listen();
        if (locked) {
          this.#set("locked", locked);
          await this.#sleep(null);
          this.#set("connecting"); // so that a second refusal is told of, too
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

  /** Something suggests that the state has changed, or may change: look now. */
  check() {
    if (document.hidden) this.#listening?.abort();
    this.#wake();
  }

  /** A request was refused for its key, or found nobody. */
  suspect(error) {
    if (error instanceof Gone || error.status === 401 || error.status === 503) this.#listening?.abort();
    this.#wake();
  }

  /** Until the stream ends. Returns what the server says of the key, if that is why. */
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
        this.dispatchEvent(new CustomEvent(event === "token" ? "token" : "activity", { detail: JSON.parse(data) }));
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

  /** `ms`: null waits until woken. */
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
