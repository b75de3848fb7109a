// The settings of answers: stored, checked by their fields, and converted for the API.

const KEY = "mlx_flash.sampling";
const NUMBERS = [
  ...["temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"],
  ...["max_tokens", "seed", "thinking_budget"],
];
const TEXTS = ["stop_words", "thinking", "form", "schema"];
const WITHOUT_OWN = { temperature: 0.7, top_p: 0.95 }; // for a model without recommended settings
// The server's defaults for settings that the model's authors leave out.
const OPENAI = {
  ...{ temperature: 1, top_p: 1, top_k: "off", min_p: "off" },
  ...{ repetition_penalty: "off", presence_penalty: 0, frequency_penalty: 0 },
};
const SHORT = {
  ...{ top_k: "top-k", min_p: "min-p", repetition_penalty: "repetition", presence_penalty: "presence" },
  ...{ frequency_penalty: "frequency", seed: "seed", thinking_budget: "thoughts" },
};
const LONGEST_DEFAULT = 1024;

export class Settings {
  #values = {}; // name -> number or text; what is missing is the model's default
  #context = null; // tokens that the server planned for
  #recommended = {}; // settings recommended by the model's authors
  #thinks = false;

  constructor(form, summary, reset) {
    this.form = form;
    this.summary = summary;
    this.fields = [...NUMBERS, ...TEXTS].map((name) => form.elements[name]);
    try {
      const stored = JSON.parse(localStorage.getItem(KEY) ?? "{}");
      for (const name of NUMBERS) if (Number.isFinite(stored[name])) this.#values[name] = stored[name];
      for (const name of TEXTS) if (typeof stored[name] === "string") this.#values[name] = stored[name];
    } catch {
      // Storage is disabled, or holds other data.
    }
    this.#fill();
    for (const field of this.fields) field.addEventListener("input", () => this.#take());
    const { form: kind, schema } = form.elements;
    kind.addEventListener("change", () => {
      if (kind.value === "schema") schema.closest("label").scrollIntoView({ block: "nearest" });
    });
    reset.addEventListener("click", () => {
      this.#values = {};
      this.#fill();
      this.#keep();
    });
  }

  /** The settings that the model's authors recommend, from /stats. */
  set recommended(sampling) {
    this.#recommended = sampling ?? {};
    const automatic = this.#automatic();
    for (const name of Object.keys(OPENAI)) this.form.elements[name].placeholder = `auto: ${automatic[name]}`;
    this.#describe();
  }

  set context(tokens) {
    this.#context = tokens;
    this.form.elements.max_tokens.placeholder = `auto: ${this.#maxTokens()}`;
    this.#describe();
  }

  /** Whether the model has thoughts. */
  set thinks(thinks) {
    this.#thinks = Boolean(thinks);
    for (const name of ["thinking", "thinking_budget"]) this.form.elements[name].closest("label").hidden = !thinks;
    this.#describe();
  }

  /** The values for empty fields. */
  #automatic() {
    return { ...OPENAI, ...(this.#recommends() ? {} : WITHOUT_OWN), ...this.#recommended };
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
    const { max_tokens, thinking, thinking_budget, stop_words, form, schema, ...numbers } = this.#values;
    const most = this.#maxTokens();
    const asked = { ...(this.#recommends() ? {} : WITHOUT_OWN), ...numbers }; // The server adds recommended ones itself.
    if (max_tokens !== undefined || used + 1.5 * most < this.#context) asked.max_tokens = most;
    const words = (stop_words ?? "").split("\n").filter((word) => word !== "");
    if (words.length) asked.stop = words;
    if (this.#thinks && thinking) asked.chat_template_kwargs = { enable_thinking: thinking === "on" };
    if (this.#thinks && thinking_budget !== undefined) asked.thinking_budget = thinking_budget;
    if (form === "json") asked.response_format = { type: "json_object" };
    if (form === "schema") {
      const json_schema = { name: "answer", schema: JSON.parse(schema), strict: true };
      asked.response_format = { type: "json_schema", json_schema };
    }
    return asked;
  }

  #take() {
    this.#checkSchema();
    for (const field of this.fields) {
      const { name, value } = field;
      if (value === "" && !field.validity.badInput) delete this.#values[name];
      else if (TEXTS.includes(name)) this.#values[name] = value;
      else if (field.checkValidity()) this.#values[name] = field.valueAsNumber;
    }
    this.#keep();
  }

  /** Shows the schema's field where it is used, and marks it unless it is a JSON object. */
  #checkSchema() {
    const { form, schema } = this.form.elements;
    schema.closest("label").hidden = form.value !== "schema";
    let wrong = "";
    if (form.value === "schema") {
      try {
        const value = JSON.parse(schema.value);
        if (value === null || typeof value !== "object" || Array.isArray(value)) wrong = "A schema is a JSON object.";
      } catch (error) {
        wrong = schema.value.trim() ? `This is not JSON: ${error.message}` : "Enter a JSON schema.";
      }
    }
    schema.setCustomValidity(wrong);
    document.getElementById("schema-wrong").textContent = schema.value.trim() ? wrong : "";
  }

  #fill() {
    for (const field of this.fields) field.value = this.#values[field.name] ?? "";
    this.#checkSchema();
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
    const { temperature, top_p, stop_words, thinking, form } = this.#values;
    const automatic = this.#automatic();
    const parts = [
      `temperature ${temperature ?? automatic.temperature}`,
      `top-p ${top_p ?? automatic.top_p}`,
      `${this.#maxTokens()} tokens`,
    ];
    for (const [name, word] of Object.entries(SHORT)) {
      if (this.#values[name] !== undefined && (name !== "thinking_budget" || this.#thinks)) {
        parts.push(`${word} ${this.#values[name]}`);
      }
    }
    if (this.#thinks && thinking) parts.push(`thoughts ${thinking}`);
    if (stop_words) parts.push("stop words");
    if (form) parts.push(form === "json" ? "JSON" : "JSON schema");
    this.summary.textContent = parts.join(" · ");
  }
}
