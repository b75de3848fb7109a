// The base of the drawings: sharp pixels, the theme's colours, and a new frame only after a change.

const NAMES = ["text", "quiet", "grid", "empty", "resident", "reading", "management", "compute", "good"];

/** The current colours of style.css. */
function colours() {
  const style = getComputedStyle(document.documentElement);
  return Object.fromEntries(NAMES.map((name) => [name, style.getPropertyValue(`--${name}`).trim()]));
}

/** Draws on request, at most once per frame, and when its size or the theme changes. */
export class Drawing {
  #frame = null;
  #colours = null;

  constructor(canvas) {
    this.canvas = canvas;
    this.context = canvas.getContext("2d");
    new ResizeObserver(() => this.redraw()).observe(canvas);
    document.addEventListener("themechange", () => {
      this.#colours = null;
      this.redraw();
    });
  }

  redraw() {
    this.#frame ??= requestAnimationFrame(() => {
      this.#frame = null;
      const { canvas, context } = this;
      const scale = devicePixelRatio || 1;
      const [width, height] = [canvas.clientWidth, canvas.clientHeight];
      if (!width || !height) return; // collapsed
      const [wide, high] = [Math.round(width * scale), Math.round(height * scale)];
      if (canvas.width !== wide || canvas.height !== high) [canvas.width, canvas.height] = [wide, high];
      context.setTransform(scale, 0, 0, scale, 0, 0);
      context.clearRect(0, 0, width, height);
      context.font = `11px ${getComputedStyle(canvas).fontFamily}`;
      this.#colours ??= colours();
      this.draw(context, width, height, this.#colours);
    });
  }
}

/** The next round number that is at least `value`: the top of an axis. */
export function roundUp(value) {
  if (!(value > 0)) return 1;
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 1.5, 2, 3, 5, 7.5, 10].find((step) => step * power >= value * 0.9999) * power;
}
