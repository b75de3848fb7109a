// A bundled library that is loaded when it is first needed. "lazy" is dispatched on the document when one arrives.

export class Lazy {
  #load;
  #asked = false;
  #module = null;

  /** load: imports the module. */
  constructor(load) {
    this.#load = load;
  }

  /** The module, or null. If it is null, the module is asked for. */
  get() {
    if (!this.#asked) {
      this.#asked = true;
      this.#load().then(
        (module) => {
          this.#module = module;
          document.dispatchEvent(new Event("lazy"));
        },
        () => {}, // The server went away. The text stays as the model wrote it.
      );
    }
    return this.#module;
  }
}
