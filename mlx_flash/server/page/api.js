// Requests to the server: JSON, server-sent events over fetch (EventSource cannot send a key), errors as sentences.

const KEY = "mlx_flash.key";

let ownKey = null; // the key, in case sessionStorage is disabled

export function setKey(key) {
  ownKey = key;
  try {
    sessionStorage.setItem(KEY, key);
  } catch {
    // Storage is disabled: the key lasts as long as the page.
  }
}

function headers(more = {}) {
  let key = ownKey;
  try {
    key ??= sessionStorage.getItem(KEY);
  } catch {
    // Storage is disabled.
  }
  return key ? { ...more, Authorization: `Bearer ${key}` } : more;
}

/** The server answered with an error. */
export class Refused extends Error {
  constructor(status, message, code = null) {
    super(message);
    this.status = status;
    this.code = code;
  }
}

/** The server did not answer, or the connection broke. */
export class Gone extends Error {}

async function refusal(response) {
  const body = await response.json().catch(() => null);
  const message = body?.error?.message ?? body?.error ?? `The server answered ${response.status} ${response.statusText}.`;
  return new Refused(response.status, String(message), body?.error?.code ?? null);
}

async function request(path, options = {}) {
  try {
    return await fetch(path, { cache: "no-store", credentials: "omit", ...options, headers: headers(options.headers) });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Gone("The server does not answer.");
  }
}

/** GET: the body's JSON. */
export const get = (path, signal) => json(path, { signal });

/** POST of JSON: the body's JSON. */
export const post = (path, body) => json(path, posted(body));

const posted = (body) => ({
  method: "POST",
  body: JSON.stringify(body),
  headers: { "Content-Type": "application/json" },
});

async function json(path, options) {
  const response = await request(path, options);
  if (!response.ok) throw await refusal(response);
  try {
    return await response.json();
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Gone("The connection to the server broke.");
  }
}

/** GET /health: {state: "ready" | "loading" | "failed" | "gone", detail, model}. Never throws. */
export async function health() {
  try {
    const response = await request("/health", { signal: AbortSignal.timeout(5000) });
    const body = await response.json().catch(() => ({}));
    if (response.ok) return { state: "ready", model: body.model };
    if (response.status === 503) return { state: "loading" };
    return { state: "failed", detail: body.error?.message ?? body.error ?? `The server answered ${response.status}.` };
  } catch {
    return { state: "gone" };
  }
}

/**
 * Yields the events of a stream as {event, data}, with data as text. `alive` is called whenever something arrives,
 * comments included. Ends when the server closes the stream; throws Gone when the connection breaks.
 */
export async function* stream(path, { signal, body, alive = () => {} } = {}) {
  const response = await request(path, { signal, ...(body && posted(body)) });
  if (!response.ok) throw await refusal(response);
  alive();
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let event = "message";
  let data = [];
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      alive();
      const lines = (rest + value).split("\n");
      rest = lines.pop();
      for (const raw of lines) {
        const line = raw.replace(/\r$/, "");
        if (line === "") {
          if (data.length) yield { event, data: data.join("\n") };
          event = "message";
          data = [];
        } else if (line.startsWith("event:")) {
          event = line.slice(6).trim();
        } else if (line.startsWith("data:")) {
          data.push(line.slice(line[5] === " " ? 6 : 5));
        }
      }
    }
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Gone("The connection to the server broke.");
  } finally {
    reader.cancel().catch(() => {}); // tells the server if the stream was left early
  }
}

/**
 * Yields the chunks of one answer as {id, text, thoughts, calls, finish, usage}; all but `id` may be empty.
 * calls: pieces of tool calls, in OpenAI's form.
 * Throws Refused if the server reports an error, Gone if the stream ends before "[DONE]".
 */
export async function* answer(messages, sampling, signal) {
  const body = { model: "default", messages, stream: true, stream_options: { include_usage: true }, ...sampling };
  for await (const { data } of stream("/v1/chat/completions", { body, signal })) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new Refused(500, chunk.error.message ?? String(chunk.error), chunk.error.code);
    const choice = chunk.choices?.[0];
    const { content, reasoning_content: thoughts, tool_calls: calls } = choice?.delta ?? {};
    yield {
      id: chunk.id,
      text: content ?? "",
      thoughts: thoughts ?? "",
      calls: calls ?? [],
      finish: choice?.finish_reason,
      usage: chunk.usage,
    };
  }
  throw new Gone("The connection to the server broke.");
}
