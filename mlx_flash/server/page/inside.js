// The panel beside the chat, which shows what the engine does while it answers.

import { ReadLines, TimeBars } from "./charts.js";
import { bytes, milliseconds, NONE, percent, short } from "./format.js";
import { LayerStrips } from "./layers.js";

const OPEN_KEY = "mlx_flash.inside";
const FIGURES_MS = 250; // time between two updates of the figures; faster ones cannot be read
const PLAN = {
  process: "Process",
  resident_weights: "Resident weights",
  predictors: "Predictors",
  slots: "Slots",
  kv_cache: "KV cache",
  prompt_caches: "Prompt caches",
  workspace: "Work space",
  total: "Total",
};

const at = (id) => document.getElementById(id);

export class Inside {
  #figuresTimer = null;
  #token = null;

  constructor() {
    this.layers = new LayerStrips(at("layers"), at("layers-note"));
    this.time = new TimeBars(at("time"));
    this.reads = new ReadLines(at("reads"));
    const toggle = at("inside-toggle");
    const show = (open) => {
      toggle.setAttribute("aria-expanded", String(open));
      at("inside").dataset.open = String(open);
    };
    try {
      show(localStorage.getItem(OPEN_KEY) !== "false");
    } catch {
      show(true);
    }
    toggle.addEventListener("click", () => {
      const open = toggle.getAttribute("aria-expanded") !== "true";
      show(open);
      try {
        localStorage.setItem(OPEN_KEY, String(open));
      } catch {
        // Storage is disabled: the choice lasts as long as the page.
      }
    });
  }

  /** Shows the data of /stats. */
  stats({ model, plan, memory, resident, last, now }) {
    const { kind, layers, unit_size, units_per_layer } = model;
    const [name, whole] = unit_size > 1 ? ["blocks", `blocks of ${unit_size} ${kind}`] : [kind, kind];
    this.layers.describe(name, layers, units_per_layer, resident, `${layers} × ${units_per_layer} ${whole}`);

    const budget = memory.budget_bytes;
    at("memory-note").textContent = `${bytes(memory.current_bytes)} of ${bytes(budget)}`;
    at("memory-fill").style.width = `${Math.min(100, (100 * memory.current_bytes) / budget)}%`;
    const bar = at("memory-bar");
    bar.setAttribute("aria-valuemax", budget);
    bar.setAttribute("aria-valuenow", memory.current_bytes);
    bar.setAttribute("aria-valuetext", at("memory-note").textContent);
    const rows = Object.entries(PLAN).filter(([key]) => plan[key] > 0);
    at("plan").replaceChildren(
      ...rows.map(([key, name]) => {
        const row = document.createElement("tr");
        const head = document.createElement("th");
        head.scope = "row";
        head.textContent = name;
        const cell = document.createElement("td");
        cell.textContent = bytes(plan[key]);
        row.append(head, cell);
        return row;
      }),
    );
    if (!now) this.#tiles(last);
  }

  /** Shows an `event: state` of /events: {state, done, total}. `own`: whether it is this page's request. */
  activity({ state, done, total }, own) {
    const whose = own ? "" : ", for another client";
    const reading = state === "prompt";
    const known = reading && total > 0;
    at("doing").dataset.state = state;
    at("doing").textContent = {
      prompt: known ? `Reading the prompt${whose}: ${done} of ${total} tokens` : `Reading the prompt${whose}`,
      generating: `Speaking${whose}`,
    }[state] ?? "Idle";
    const progress = at("prompt-progress");
    progress.hidden = !known;
    if (known) progress.value = done / total;
  }

  /** Shows an `event: token` of /events. */
  token(token) {
    this.layers.show(token.layers);
    // An event may stand for several tokens: it holds their means.
    const tokens = token.id === this.#token?.id ? token.n - this.#token.n : 1;
    this.time.add(token, tokens);
    this.reads.add(token, tokens);
    this.#token = token;
    this.#figuresTimer ??= setTimeout(() => {
      this.#figuresTimer = null;
      this.#figures();
    }, FIGURES_MS);
  }

  #figures() {
    const { time, reads } = this;
    this.#tiles({
      tokens_per_second: this.#token.tokens_per_second,
      hit_rate: reads.mean("hit_rate"),
      bytes_per_token: reads.mean("bytes"),
      bytes_per_second: reads.mean("bytes_per_second"),
    });
    at("mean-wait").textContent = milliseconds(time.mean("wait_s"));
    at("mean-manage").textContent = milliseconds(time.mean("manage_s"));
    at("mean-compute").textContent = milliseconds(time.mean("compute_s"));
    at("mean-bytes").textContent = bytes(reads.mean("bytes"));
    at("mean-hits").textContent = percent(reads.mean("hit_rate"));
    const whole = time.mean("wait_s") + time.mean("manage_s") + time.mean("compute_s");
    at("time").setAttribute(
      "aria-label",
      `A token takes ${milliseconds(whole)} in the mean of the last ${time.tokens.length}: ` +
        `${at("mean-wait").textContent} waiting for reads, ${at("mean-manage").textContent} cache management, ` +
        `${at("mean-compute").textContent} compute`,
    );
    at("reads").setAttribute(
      "aria-label",
      `${at("mean-bytes").textContent} read per token, hit rate ${at("mean-hits").textContent}, ` +
        `in the mean of the last ${reads.tokens.length}`,
    );
  }

  #tiles(figures) {
    at("tile-speed").textContent = figures ? short(figures.tokens_per_second) : NONE;
    at("tile-hit").textContent = percent(figures?.hit_rate);
    at("tile-bytes").textContent = bytes(figures?.bytes_per_token);
    at("tile-rate").textContent = figures?.bytes_per_second ? `${bytes(figures.bytes_per_second)}/s` : NONE;
  }
}
