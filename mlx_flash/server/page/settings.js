// The sampling settings: stored, checked by their fields, and converted for the API.

const KEY = "mlx_flash.sampling";
const DEFAULTS = { temperature: null, top_p: null, max_tokens: null, seed: null }; // null: see #automatic
const WITHOUT_OWN = { temperature: 0.7, top_p: 0.95 }; // for a model without recommended settings
const OPENAI = { temperature: 1, top_p: 1 }; // the server's defaults for settings that the model's authors leave out
const LONGEST_DEFAULT = 1024;

export class Settings {
  #values = { ...DEFAULTS };
  #context = null; // tokens that the server planned for
  #recommended = {}; // settings recommended by the model's authors

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
      // Storage is disabled, or holds other data.
    }
    this.#fill();
    for (const field of this.fields) field.addEventListener("input", () => this.#take());
    reset.addEventListener("click", () => {
      this.#values = { ...DEFAULTS };
      this.#fill();
      this.#keep();
    });
  }

  /** The settings that the model's authors recommend, from /stats. */
  set recommended(sampling) {
    this.#recommended = sampling ?? {};
    for (const [name, value] of Object.entries(this.#automatic())) {
      this.form.elements[name].placeholder = `auto: ${value}`;
    }
    this.#describe();
  }

  set context(tokens) {
    this.#context = tokens;
    this.form.elements.max_tokens.placeholder = `auto: ${this.#maxTokens()}`;
    this.#describe();
  }

  /** The values for empty fields. */
  #automatic() {
    const { temperature, top_p } = { ...(this.#recommends() ? OPENAI : WITHOUT_OWN), ...this.#recommended };
    return { temperature, top_p };
  }

  #recommends() {
    return Object.keys(this.#recommended).length > 0;
  }

  /** The user's limit of an answer; by default a quarter of the planned context, at most LONGEST_DEFAULT. */
  #maxTokens() {
    const quarter = this.#context ? Math.floor(this.#context / 4) : LONGEST_DEFAULT;
    return this.#values.max_tokens ?? Math.max(1, Math.min(LONGEST_DEFAULT, quarter));
  }

  /** Whether all values are valid; if not, shows the wrong field. */
  valid() {
    const wrong = this.fields.find((field) => !field.checkValidity());
    if (!wrong) return true;
    wrong.closest("details").open = true;
    wrong.reportValidity();
    return false;
  }

  /** The settings for a request in a conversation of `used` tokens. A default limit that might not fit is left out. */
  sampling(used) {
    const most = this.#maxTokens();
    const fits = this.#values.max_tokens !== null || used + 1.5 * most < this.#context;
    const asked = {
      ...(this.#recommends() ? {} : WITHOUT_OWN), // The server adds recommended settings itself.
      ...Object.fromEntries(Object.entries(this.#values).filter(([, value]) => value !== null)),
    };
    delete asked.max_tokens;
    return { ...asked, ...(fits ? { max_tokens: most } : {}) };
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
      // Storage is disabled: the settings last as long as the page.
    }
    this.#describe();
  }

  #describe() {
    const { temperature, top_p, seed } = this.#values;
    const automatic = this.#automatic();
    const parts = [
      `temperature ${temperature ?? automatic.temperature}`,
      `top-p ${top_p ?? automatic.top_p}`,
      `${this.#maxTokens()} tokens`,
    ];
    if (seed !== null) parts.push(`seed ${seed}`);
    this.summary.textContent = parts.join(" · ");
  }
}
