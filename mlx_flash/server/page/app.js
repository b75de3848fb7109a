// Connects the parts of the page: the connection, the conversation, the settings, the panel.

import { answer, get, Gone, Refused, setKey } from "./api.js";
import { addChunk } from "./chunks.js";
import { Connection } from "./connection.js";
import { Conversation } from "./conversation.js";
import { bytes } from "./format.js";
import { Inside } from "./inside.js";
import { Messages, summary } from "./messages.js";
import { Pictures } from "./pictures.js";
import { Settings } from "./settings.js";

const DRAFT_KEY = "mlx_flash.draft";
const BUSY_STATS_MS = 1000;
const IDLE_STATS_MS = 5000;

const at = (id) => document.getElementById(id);

const connection = new Connection();
const conversation = new Conversation();
const inside = new Inside();
const settings = new Settings(at("composer"), at("settings-summary"), at("settings-reset"));
const messages = new Messages(at("log"), at("empty"), at("scroll"), at("composer"), retry);
const prompt = at("prompt");
const pictures = new Pictures({
  list: at("pictures"),
  note: at("pictures-note"),
  button: at("add-picture"),
  input: at("picture-file"),
  area: document.body,
  changed: controls,
});

let asking = null; // the AbortController of the answer that is arriving
let ownId = null; // the id of that answer in /events
let context = null; // tokens that the server planned for, prompt and answer together

// Sending messages.

function send() {
  const content = prompt.value.trim();
  if (asking || !(content || pictures.count) || connection.state !== "ready" || !settings.valid()) return;
  const images = pictures.count ? { images: pictures.take() } : {};
  messages.add(conversation.add({ role: "user", content, ...images }));
  prompt.value = "";
  draft();
  ask();
}

function retry() {
  if (asking || connection.state !== "ready" || !settings.valid()) return;
  conversation.takeBack();
  messages.show(conversation.messages);
  prompt.focus();
  ask();
}

async function ask() {
  const turns = conversation.turns();
  const sampling = settings.sampling(conversation.tokens);
  const message = conversation.add({ role: "assistant", content: "", state: "streaming" });
  const controller = new AbortController();
  asking = controller;
  messages.add(message);
  controls();
  let [first, latest, finish, usage] = [0, 0, null, null];
  try {
    for await (const chunk of answer(turns, sampling, controller.signal)) {
      ownId = chunk.id ?? ownId;
      finish = chunk.finish ?? finish;
      usage = chunk.usage ?? usage;
      if (!addChunk(message, chunk)) continue;
      latest = performance.now();
      first ||= latest;
      messages.update();
      conversation.keepSoon();
    }
    message.state = "done";
    message.tokens = usage?.total_tokens;
    message.note = summary({ tokens: usage?.completion_tokens, seconds: (latest - first) / 1000, finish });
  } catch (error) {
    ended(message, error);
  } finally {
    if (asking === controller) asking = null;
    ownId = null;
    messages.update();
    conversation.keep();
    controls();
    stats();
  }
}

/** Marks an answer that failed or was stopped; the text that has arrived is kept. */
function ended(message, error) {
  const some = message.content !== "" || Boolean(message.thoughts || message.calls);
  if (error.name === "AbortError") {
    message.state = "stopped";
    message.note = some ? "Stopped." : "Stopped before it began.";
    return;
  }
  message.state = some ? "partial" : "error";
  if (error instanceof Gone) message.note = some ? "Interrupted: the server went away." : "The server went away.";
  else if (error instanceof Refused) message.note = explained(error);
  else message.note = `The answer could not be read (${error.message}).`;
  connection.suspect(error);
}

function explained({ message, code }) {
  const more = code === "context_length_exceeded" ? " Start a new chat, or ask for fewer tokens." : "";
  return message.charAt(0).toUpperCase() + message.slice(1) + more;
}

function stop() {
  asking?.abort();
  prompt.focus();
}

function newChat() {
  asking?.abort();
  conversation.clear();
  messages.show(conversation.messages);
  controls();
  prompt.focus();
}

function controls() {
  const ready = connection.state === "ready";
  at("stop").hidden = asking === null;
  at("send").disabled = !ready || asking !== null || (prompt.value.trim() === "" && pictures.count === 0);
  at("log").classList.toggle("offline", !ready);
  const { tokens } = conversation;
  at("context").textContent = context && tokens ? `Context ${tokens} of ${context}` : "";
}

function draft() {
  try {
    localStorage.setItem(DRAFT_KEY, prompt.value);
  } catch {
    // Storage is disabled: the draft is lost with the page.
  }
  controls();
}

at("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
  prompt.focus();
});
at("stop").addEventListener("click", stop);
at("new-chat").addEventListener("click", newChat);
prompt.addEventListener("input", draft);
prompt.addEventListener("keydown", (event) => {
  // isComposing: this Enter chooses a word of an input method, so it does not send.
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  send();
});
at("example").addEventListener("click", () => {
  prompt.value = at("example").textContent;
  draft();
  prompt.focus();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && asking && !at("key-dialog").open) stop();
});

// The state of the server.

const STATES = {
  connecting: ["Connecting", ""],
  ready: ["Connected", ""],
  loading: ["Loading", "The model is loading. You can write meanwhile."],
  failed: ["Failed", "The server could not load its model: "],
  locked: ["Locked", "The server requires an API key."],
  gone: ["Disconnected", "The server does not answer. Your text is kept; the page reconnects by itself."],
};

connection.addEventListener("state", ({ detail: { state, detail } }) => {
  const [word, sentence] = STATES[state];
  at("state").textContent = word;
  at("state").dataset.state = state;
  at("banner").hidden = sentence === "";
  at("banner").dataset.state = state;
  at("banner-text").textContent = state === "failed" ? sentence + detail : sentence;
  at("banner-key").hidden = state !== "locked";
  if (state !== "ready") inside.activity({ state: "idle" });
  if (state === "locked") askKey(detail);
  if (state === "ready") stats();
  controls();
});
connection.addEventListener("activity", ({ detail }) => {
  inside.activity(detail, own(detail));
  if (detail.state === "idle") stats();
});
connection.addEventListener("token", ({ detail }) => inside.token(detail));

/** Whether an event belongs to this page's request. Its id is unknown until the first chunk arrives. */
const own = ({ id }) => asking !== null && (ownId === null || ownId === id);

let statsTimer = null;
async function stats() {
  clearTimeout(statsTimer);
  statsTimer = null;
  if (connection.state !== "ready" || document.hidden) return;
  try {
    const found = await get("/stats", AbortSignal.timeout(10000));
    if (found.model === null) { // The server loads one with the next request.
      statsTimer = setTimeout(stats, IDLE_STATS_MS);
      return;
    }
    context = found.plan.context ?? null;
    settings.context = context;
    settings.recommended = found.model.sampling;
    const { id } = found.model;
    const name = id.startsWith("/") ? id.replace(/\/+$/, "").split("/").at(-1) : id; // for a path, the folder's name
    messages.model = name;
    pictures.usable = found.model.images;
    at("model").textContent = name;
    at("model").title = found.model.path;
    at("budget").textContent = bytes(found.memory.budget_bytes);
    inside.stats(found);
    at("demo-note").hidden = id !== "demo";
    controls();
    clearTimeout(statsTimer);
    statsTimer = setTimeout(stats, found.now ? BUSY_STATS_MS : IDLE_STATS_MS);
  } catch (error) {
    connection.suspect(error);
    statsTimer = setTimeout(stats, IDLE_STATS_MS);
  }
}
document.addEventListener("visibilitychange", stats);

// The API key, if the server requires one.

let tried = false;
function askKey(reason) {
  at("key-wrong").textContent = tried ? reason : "";
  at("key").value = "";
  if (!at("key-dialog").open) at("key-dialog").showModal();
}
at("banner-key").addEventListener("click", () => askKey(""));
at("key-cancel").addEventListener("click", () => at("key-dialog").close());
at("key-form").addEventListener("submit", () => {
  tried = true;
  setKey(at("key").value);
  connection.check();
});

// Begin.

try {
  prompt.value = localStorage.getItem(DRAFT_KEY) ?? "";
} catch {
  // Storage is disabled.
}
messages.show(conversation.messages);
controls();
prompt.focus();
connection.run();
