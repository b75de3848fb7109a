// Charts of the last 60 tokens: where their time went, and how much they read.

import { Drawing, roundUp } from "./canvas.js";
import { bytes, milliseconds, plain } from "./format.js";

const TOKENS = 60;
const TOP = 16; // room for the axis' label above the top line
const LEAST_S = 0.001; // minimum range of an axis
const LEAST_BYTES = 1e5;
// A bar longer than this many times the 95th percentile is cut off with a notch: it would flatten all others.
const OUTLIER = 2;
const PARTS = [
  ["wait_s", "reading"],
  ["manage_s", "management"],
  ["compute_s", "compute"],
];

/** A sliding window of tokens, newest last. */
class Window extends Drawing {
  tokens = [];

  /** Adds `count` tokens; `token` holds their means. */
  add(token, count) {
    this.tokens = [...this.tokens, ...Array(Math.min(count, TOKENS)).fill(token)].slice(-TOKENS);
    this.redraw();
  }

  mean(key) {
    const values = this.tokens.map((token) => token[key]).filter((value) => value !== null && value !== undefined);
    return values.length ? values.reduce((sum, value) => sum + value, 0) / values.length : NaN;
  }

  /** Draws lines at the bottom, the middle and the top, and labels the top. */
  frame(context, width, height, colours, left, right = "") {
    context.strokeStyle = colours.grid;
    context.lineWidth = 1;
    for (const y of [TOP, (TOP + height) / 2, height]) {
      context.beginPath();
      context.moveTo(0, Math.round(y) - 0.5);
      context.lineTo(width, Math.round(y) - 0.5);
      context.stroke();
    }
    context.fillStyle = colours.quiet;
    context.textBaseline = "alphabetic";
    context.textAlign = "left";
    context.fillText(left, 0, TOP - 5);
    context.textAlign = "right";
    context.fillText(right, width, TOP - 5);
  }
}

export class TimeBars extends Window {
  draw(context, width, height, colours) {
    const whole = (token) => PARTS.reduce((sum, [key]) => sum + token[key], 0);
    const times = this.tokens.map(whole).sort((a, b) => a - b);
    const usual = times[Math.floor(0.95 * (times.length - 1))] ?? 0;
    const longest = times.at(-1) ?? 0;
    const top = roundUp(Math.max(LEAST_S, longest > OUTLIER * usual ? usual * 1.2 : longest));
    this.frame(context, width, height, colours, this.tokens.length ? plain(milliseconds(top)) : "");
    const scale = (height - TOP - 1) / top;
    const start = TOKENS - this.tokens.length;
    this.tokens.forEach((token, i) => {
      const left = Math.round(((start + i) * width) / TOKENS);
      const wide = Math.max(1, Math.round(((start + i + 1) * width) / TOKENS) - left - 1);
      let y = height - 1;
      for (const [key, colour] of PARTS) {
        const high = Math.min(token[key] * scale, y - TOP);
        context.fillStyle = colours[colour];
        context.fillRect(left, y - high, wide, high);
        y -= high;
      }
      if (whole(token) > top) context.clearRect(left, TOP + 5, wide, 2);
    });
  }
}

export class ReadLines extends Window {
  draw(context, width, height, colours) {
    const top = roundUp(Math.max(LEAST_BYTES, ...this.tokens.map((token) => token.bytes)));
    const some = this.tokens.length > 0;
    this.frame(context, width, height, colours, some ? plain(bytes(top)) : "", some ? "100 %" : "");
    const start = TOKENS - this.tokens.length;
    const x = (i) => ((start + i + 0.5) * width) / TOKENS;
    const y = (share) => height - 1 - share * (height - TOP - 2);
    const read = this.tokens.map((token, i) => [x(i), y(token.bytes / top)]);
    if (some) {
      context.beginPath();
      context.moveTo(read[0][0], height - 1);
      for (const point of read) context.lineTo(...point);
      context.lineTo(read.at(-1)[0], height - 1);
      context.globalAlpha = 0.16;
      context.fillStyle = colours.reading;
      context.fill();
      context.globalAlpha = 1;
    }
    this.#line(context, read, colours.reading, []);
    // A token that needed no units has no hit rate; the line has a gap there.
    const rate = this.tokens.map(({ hit_rate }, i) => (hit_rate === null ? null : [x(i), y(hit_rate)]));
    this.#line(context, rate, colours.good, [4, 3]);
  }

  #line(context, points, colour, dash) {
    context.strokeStyle = colour;
    context.lineWidth = 1.75;
    context.lineJoin = "round";
    context.setLineDash(dash);
    context.beginPath();
    let broken = true;
    for (const point of points) {
      if (point && broken) context.moveTo(...point);
      else if (point) context.lineTo(...point);
      broken = !point;
    }
    context.stroke();
    context.setLineDash([]);
  }
}
