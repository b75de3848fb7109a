// Sampling settings: kept, checked by the fields themselves, and as the API wants them.

const KEY = "mlx_flash.sampling";
const DEFAULTS = { temperature: 0.7, top_p: 0.95, max_tokens: null, seed: null };
const LONGEST_DEFAULT = 1024;

export class Settings {
  #values = { ...DEFAULTS };
  #context = null; // tokens the server planned for

  constructor(form, summary, reset) {
    this.form = form;
    this.summary = summary;
    this.fields = Object.keys(DEFAULTS).map((name) => form.elements[name]);
    try {
      const stored = JSON.parse(localStorage.getItem(KEY) ?? "{}");
      for (const name of Object.keys(DEFAULTS)) {
        if (stored[name] === null || Number.isFinite(stored[name])) this.#values[name] = stored[name];
      }
    } catch {
      // switched off, or not ours
    }
    this.#fill();
    for (const field of this.fields) field.addEventListener("input", () => this.#take());
    reset.addEventListener("click", () => {
      this.#values = { ...DEFAULTS };
      this.#fill();
      this.#keep();
    });
  }

  set context(tokens) {
    this.#context = tokens;
    this.form.elements.max_tokens.placeholder = `auto: ${this.#maxTokens()}`;
    this.#describe();
  }

  /** A quarter of the planned context bounds an answer that nobody bounded. */
  #maxTokens() {
    const quarter = this.#context ? Math.floor(this.#context / 4) : LONGEST_DEFAULT;
    return this.#values.max_tokens ?? Math.max(1, Math.min(LONGEST_DEFAULT, quarter));
  }

  /** False, and the wrong field is shown, where a value is out of its range. */
  valid() {
    const wrong = this.fields.find((field) => !field.checkValidity());
    if (!wrong) return true;
    wrong.closest("details").open = true;
    wrong.reportValidity();
    return false;
  }

  /** For the request, in a conversation of `used` tokens. Where our own bound might not fit, the server takes what is left. */
  sampling(used) {
    const { temperature, top_p, max_tokens, seed } = this.#values;
    const most = this.#maxTokens();
    const fits = max_tokens !== null || used + 1.5 * most < this.#context;
    return { temperature, top_p, ...(fits ? { max_tokens: most } : {}), ...(seed === null ? {} : { seed }) };
  }

  #take() {
    for (const field of this.fields) {
      if (field.checkValidity()) this.#values[field.name] = field.value === "" ? null : field.valueAsNumber;
    }
    this.#keep();
  }

  #fill() {
    for (const field of this.fields) field.value = this.#values[field.name] ?? "";
    this.#describe();
  }

  #keep() {
    try {
      localStorage.setItem(KEY, JSON.stringify(this.#values));
    } catch {
      // then for this visit only
    }
    this.#describe();
  }

  #describe() {
    const { temperature, top_p, seed } = this.#values;
    const parts = [`temperature ${temperature}`, `top-p ${top_p}`, `${this.#maxTokens()} tokens`];
    if (seed !== null) parts.push(`seed ${seed}`);
    this.summary.textContent = parts.join(" · ");
  }
}
