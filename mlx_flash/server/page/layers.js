// A strip per layer, with its units in the order of their ids, in up to 64 cells. The background of a cell shows how
// many of its units are resident. Its upper half lights up if some were used from a slot, its lower half if some were
// read.

import { Drawing } from "./canvas.js";
import { percent } from "./format.js";

const TALLEST = 26; // CSS pixels per layer
const SHORTEST = 5;
const HIGHEST = 300;
const MARGIN = 26; // for the layers' numbers
const LABEL_EVERY = 14; // height of a number in pixels
const CALM_MS = 500; // time between two drawings for users who prefer less motion

const calm = matchMedia("(prefers-reduced-motion: reduce)");

/** A byte's share -> opacity, so that one unit in twenty can be seen. */
const strength = (share) => 0.3 + 0.7 * Math.sqrt(share / 255);

const decode = (text) => Uint8Array.from(atob(text), (character) => character.charCodeAt(0));

export class LayerStrips extends Drawing {
  #layers = []; // per layer [resident, hit, read], each a Uint8Array of one byte per cell
  #units = 0;
  #name = "units";
  #whole = ""; // description of the layers
  #share = 0; // share of the units that are resident
  #drawn = 0;
  #pointed = null; // {layer, cell}

  constructor(canvas, readout) {
    super(canvas);
    this.readout = readout;
    canvas.addEventListener("pointermove", (event) => this.#point(event));
    canvas.addEventListener("pointerleave", () => {
      this.#pointed = null;
      this.#read();
    });
  }

  /** `name`: of the units. `resident`: resident units of each layer; drawn evenly until an event names them. */
  describe(name, layers, units, { units: resident, share }, whole) {
    // Another server at the same address, or one that was restarted.
    const other = this.#layers.length !== layers || this.#units !== units || share === 0;
    this.#name = name;
    this.#units = units;
    this.#whole = whole;
    this.#share = share;
    this.#read();
    if (other) {
      const cells = Math.min(units, 64);
      const none = new Uint8Array(cells);
      this.#layers = Array.from({ length: layers }, (_, i) => [
        new Uint8Array(cells).fill(Math.round((255 * resident[i]) / units)),
        none,
        none,
      ]);
    }
    this.canvas.style.height = `${this.#rowHeight * layers}px`;
    this.redraw();
  }

  /** `layers`: per layer three base64 strings, as /events sends them; empty if the engine was not watched yet. */
  show(layers) {
    if (!layers.length) return;
    this.#layers = layers.map((strings) => strings.map(decode));
    const now = performance.now();
    if (calm.matches && now - this.#drawn < CALM_MS) return;
    this.#drawn = now;
    const shares = this.#layers.map(([resident]) => resident.reduce((sum, share) => sum + share, 0) / resident.length);
    this.#share = shares.reduce((sum, share) => sum + share, 0) / shares.length / 255;
    this.#read();
    this.redraw();
  }

  get #rowHeight() {
    return Math.max(SHORTEST, Math.min(TALLEST, Math.floor(HIGHEST / Math.max(1, this.#layers.length))));
  }

  draw(context, width, _, colours) {
    const row = this.#rowHeight;
    const gap = row > 12 ? 4 : row > 8 ? 2 : 1;
    const high = row - gap;
    const half = Math.ceil(high / 2);
    const every = Math.ceil(LABEL_EVERY / row);
    context.textAlign = "right";
    context.textBaseline = "middle";
    this.#layers.forEach(([resident, hit, read], layer) => {
      const top = layer * row;
      if (layer % every === 0) {
        context.fillStyle = colours.quiet;
        context.fillText(String(layer), MARGIN - 8, Math.max(LABEL_EVERY / 2, top + high / 2 + 0.5));
      }
      const cells = resident.length;
      for (let i = 0; i < cells; i++) {
        const left = Math.round(MARGIN + (i * (width - MARGIN)) / cells);
        const right = Math.round(MARGIN + ((i + 1) * (width - MARGIN)) / cells);
        const wide = Math.max(1, right - left - (right - left > 3 ? 1 : 0));
        const mark = (colour, share, y, height) => {
          context.globalAlpha = share;
          context.fillStyle = colour;
          context.fillRect(left, y, wide, height);
        };
        mark(colours.empty, 1, top, high);
        if (resident[i]) mark(colours.resident, 0.15 + (0.85 * resident[i]) / 255, top, high);
        if (hit[i]) mark(colours.good, strength(hit[i]), top, half);
        if (read[i]) mark(colours.reading, strength(read[i]), top + half, high - half);
      }
      context.globalAlpha = 1;
    });
  }

  #point(event) {
    const cells = this.#layers[0]?.length ? this.#layers[0][0].length : 0;
    const cell = Math.floor(((event.offsetX - MARGIN) / (this.canvas.clientWidth - MARGIN)) * cells);
    const layer = Math.floor(event.offsetY / this.#rowHeight);
    this.#pointed = cell >= 0 && cell < cells && layer >= 0 && layer < this.#layers.length ? { layer, cell } : null;
    this.#read();
  }

  #read() {
    if (!this.#pointed) {
      this.readout.textContent = `${this.#whole}, ${percent(this.#share)} resident`;
      return;
    }
    const { layer, cell } = this.#pointed;
    const [resident, hit, read] = this.#layers[layer];
    const first = Math.ceil((cell * this.#units) / resident.length);
    const last = Math.ceil(((cell + 1) * this.#units) / resident.length) - 1;
    const share = (value) => `${Math.round((100 * value) / 255)} %`;
    const which = first === last ? `${this.#name.replace(/s$/, "")} ${first}` : `${this.#name} ${first}–${last}`;
    const [held, used, came] = [resident, hit, read].map((values) => share(values[cell]));
    this.readout.textContent = `${layer}, ${which}: ${held} resident, ${used} hit, ${came} read`;
  }
}
