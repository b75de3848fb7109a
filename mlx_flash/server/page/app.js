// Connects the parts of the page: the connection, the chats, the settings, the panel.

import { actionsOf } from "./actions.js";
import { Answering } from "./answering.js";
import { get, setKey } from "./api.js";
import { Attachments } from "./attachments.js";
import { Chats } from "./chats.js";
import { Connection } from "./connection.js";
import { bytes } from "./format.js";
import { Inside } from "./inside.js";
import { Library } from "./library.js";
import { Messages } from "./messages.js";
import { Pictures } from "./pictures.js";
import { Settings } from "./settings.js";
import { Sidebar } from "./sidebar.js";
import { Store } from "./store.js";

const DRAFT_KEY = "mlx_flash.draft";
const BUSY_STATS_MS = 1000;
const IDLE_STATS_MS = 5000;

const at = (id) => document.getElementById(id);

const connection = new Connection();
const suspect = (error) => connection.suspect(error);
const store = new Store();
const chats = new Chats(store);
const answering = new Answering(suspect);
const inside = new Inside();
const library = new Library(suspect);
const settings = new Settings(at("composer"), at("settings-summary"), at("settings-reset"));
const messages = new Messages(at("log"), at("empty"), at("scroll"), at("composer"), actions);
const prompt = at("prompt");
const pictures = new Pictures({ list: at("pictures"), note: at("attach-note"), changed: controls });
const attachments = new Attachments({
  list: at("files"),
  note: at("attach-note"),
  button: at("attach"),
  input: at("attach-file"),
  area: document.body,
  pictures,
  changed: controls,
});
new Sidebar(chats, openChat);

let context = null; // tokens that the server planned for, prompt and answer together
let model = ""; // the name of the server's model

// Sending messages.

const mayAsk = () => !answering.isAnswering(chats.current) && connection.state === "ready" && settings.valid();

function send() {
  const content = prompt.value.trim();
  if (!(content || attachments.count) || !mayAsk()) return;
  messages.add(chats.current.add({ role: "user", content, ...attachments.take() }));
  prompt.value = "";
  draft();
  ask();
}

/** Asks for an answer, or for the rest of one: `into`. */
function ask(into = null) {
  const conversation = chats.current;
  const options = settings.sampling(conversation.tokens);
  answering.ask(conversation, { into, made: { model, tab: chats.tab }, options });
}

/** The buttons under a message. */
function actions(message, last) {
  const conversation = chats.current;
  return actionsOf(message, {
    last,
    versions: conversation.versions(message),
    onStep(version) {
      if (answering.isAnswering(conversation)) return;
      conversation.show(version);
      const place = conversation.messages.indexOf(version);
      messages.show(conversation.messages);
      const article = at("log").children[place];
      article.scrollIntoView({ block: "nearest" });
      (article.querySelector(".step:enabled") ?? prompt).focus();
      controls();
    },
    onEdit(_, content) {
      if (!mayAsk()) return;
      const { images, files } = message;
      conversation.branch(message);
      conversation.add({ role: "user", content, ...(images && { images }), ...(files && { files }) });
      messages.show(conversation.messages);
      prompt.focus();
      ask();
    },
    onContinue() {
      if (mayAsk()) ask(message);
      prompt.focus();
    },
    onRetry() {
      if (!mayAsk()) return;
      // After an answer of which nothing arrived, another try is not another version.
      const nothing = last && !message.content && !message.thoughts && !message.calls;
      if (!nothing) conversation.branch(message);
      prompt.focus();
      ask(nothing ? message : null);
    },
  });
}

answering.addEventListener("begin", ({ detail }) => {
  if (detail !== chats.current) return;
  messages.show(detail.messages);
  controls();
});
answering.addEventListener("more", ({ detail }) => detail === chats.current && messages.update());
answering.addEventListener("end", ({ detail }) => {
  if (detail === chats.current) messages.update();
  controls();
  stats();
});

function stop() {
  answering.stop(chats.current);
  prompt.focus();
}

function controls() {
  const ready = connection.state === "ready";
  const busy = answering.isAnswering(chats.current);
  at("stop").hidden = !busy;
  at("send").disabled = !ready || busy || (prompt.value.trim() === "" && attachments.count === 0);
  at("log").classList.toggle("offline", !ready || busy);
  const { tokens, record } = chats.current;
  document.title = record.title ? `${record.title} – mlx_flash` : "mlx_flash";
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
  if (event.key === "Escape" && !event.defaultPrevented && !document.querySelector("dialog[open]")) stop();
});

// Chats.

async function openChat(id) {
  if (id !== chats.current.record.id) await chats.open(id);
  prompt.focus();
}

at("new-chat").addEventListener("click", () => {
  chats.fresh();
  prompt.focus();
});
chats.addEventListener("open", () => {
  at("attach-note").textContent = "";
  messages.show(chats.current.messages);
  showSystem();
  controls();
});
chats.addEventListener("list", controls);
chats.addEventListener("deleted", ({ detail }) => answering.stop(detail));
store.addEventListener("leave", () => answering.keep());
store.addEventListener("trouble", ({ detail }) => {
  at("store-note").textContent = detail;
  at("store-note").hidden = detail === "";
});

// The system prompt.

function showSystem() {
  const { system } = chats.current.record;
  at("system").value = system;
  at("system-default").disabled = system === chats.system;
  at("system-note").textContent = "";
  at("system-default").textContent = system || !chats.system ? "Use it for new chats" : "Use none for new chats";
}
at("system").addEventListener("input", () => {
  chats.setSystem(at("system").value);
  showSystem();
});
at("system-default").addEventListener("click", () => {
  chats.system = chats.current.record.system;
  showSystem();
  at("system-note").textContent = chats.system ? "New chats begin with it." : "New chats begin without one.";
});

// The state of the server.

const LIBRARY_WORDS = { loading: "Loading", unloaded: "Asleep", failed: "Failed" };
const STATES = {
  connecting: ["Connecting", ""],
  ready: ["Connected", ""],
  loading: ["Loading", "The model is loading. You can write meanwhile."],
  failed: ["Failed", "The server could not load its model: "],
  locked: ["Locked", "The server requires an API key."],
  gone: ["Disconnected", "The server does not answer. Your text is kept; the page reconnects by itself."],
};

connection.addEventListener("state", ({ detail: { state, detail } }) => {
  banner();
  if (state !== "ready") inside.activity({ state: "idle" });
  if (state === "locked") askKey(detail);
  if (state === "ready") stats();
  controls();
});
connection.addEventListener("activity", ({ detail }) => {
  inside.activity(detail, answering.isOwn(detail));
  if (detail.state === "idle") stats();
});
connection.addEventListener("token", ({ detail }) => inside.token(detail));
connection.addEventListener("library", ({ detail }) => library.event(detail));
library.addEventListener("change", () => {
  banner();
  if (library.state !== "loading") stats();
});

function banner() {
  const { state, detail } = connection;
  const [word, sentence] = STATES[state];
  const told = state === "failed" ? sentence + detail : sentence;
  const ofLibrary = state === "ready" ? library.sentence : "";
  at("state").textContent = ofLibrary ? LIBRARY_WORDS[library.state] : word;
  at("state").dataset.state = ofLibrary && library.state !== "unloaded" ? library.state : state;
  at("banner-text").textContent = ofLibrary || told;
  at("banner").hidden = !(ofLibrary || told);
  at("banner").dataset.state = ofLibrary ? library.state : state;
  at("banner-key").hidden = state !== "locked";
}

let statsTimer = null;
async function stats() {
  clearTimeout(statsTimer);
  statsTimer = null;
  if (connection.state !== "ready" || document.hidden) return;
  try {
    const found = await get("/stats", AbortSignal.timeout(10000));
    library.stats(found);
    if (found.model) loaded(found);
    else named(model || connection.model);
    controls();
    clearTimeout(statsTimer);
    statsTimer = setTimeout(stats, found.now ? BUSY_STATS_MS : IDLE_STATS_MS);
  } catch (error) {
    connection.suspect(error);
    statsTimer = setTimeout(stats, IDLE_STATS_MS);
  }
}
document.addEventListener("visibilitychange", stats);

/** Shows what /stats says of a loaded model. */
function loaded(found) {
  context = found.plan.context ?? null;
  attachments.context = context;
  settings.context = context;
  settings.recommended = found.model.sampling;
  settings.thinks = found.model.thinks;
  pictures.usable = found.model.images;
  named(found.model.id);
  at("model").title = found.model.path;
  at("budget").textContent = bytes(found.memory.budget_bytes);
  inside.stats(found);
}

function named(id) {
  model = id.startsWith("/") ? id.replace(/\/+$/, "").split("/").at(-1) : id; // for a path, the folder's name
  messages.model = model;
  at("model").textContent = model || "–";
  at("demo-note").hidden = id !== "demo";
}

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
controls();
showSystem();
prompt.focus();
await store.open();
await chats.start();
connection.run();
