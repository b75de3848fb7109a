// Chats as files: this page's own JSON, written and read, and Markdown, written only.

import { newChat } from "./conversation.js";
import { fenced } from "./text_files.js";

const FORMAT = "mlx_flash chats";
const VERSION = 1;
const STATES = [undefined, "done", "stopped", "partial", "error"];
const MOST_BYTES = 500e6;

/** A file that cannot be imported, as a sentence. */
export class BadFile extends Error {}

/** Chats as the text of a file. Each has its record's fields and `messages`. */
export function toJson(chats) {
  const plain = ({ chat, tab, ...message }) => (message.state === "streaming" ? { ...message, state: "partial" } : message);
  const written = chats.map((chat) => ({ ...chat, messages: chat.messages.map(plain) }));
  return `${JSON.stringify({ format: FORMAT, version: VERSION, chats: written }, null, 1)}\n`;
}

/** The shown branch of a chat as Markdown. */
export function toMarkdown({ title, system }, messages) {
  const parts = [`# ${title || "Chat"}`];
  if (system) parts.push(`## System\n\n${system}`);
  for (const { role, content, files, images, thoughts, model } of messages) {
    parts.push(role === "user" ? "## You" : `## ${model ?? "Model"}`);
    if (images) parts.push(`*${images.length === 1 ? "An image" : `${images.length} images`}, not in this file*`);
    parts.push(...(files ?? []).map(fenced));
    if (thoughts) parts.push(`<details><summary>Thoughts</summary>\n\n${thoughts}\n\n</details>`);
    parts.push(content);
  }
  return `${parts.filter((part) => part !== "").join("\n\n")}\n`;
}

/** Reads chats from a file of `toJson`. Throws BadFile. */
export async function read(file) {
  const fail = (why) => {
    throw new BadFile(`${file.name}: ${why}`);
  };
  if (file.size > MOST_BYTES) fail("it has more than 500 MB.");
  let found;
  try {
    found = JSON.parse(await file.text());
  } catch (error) {
    fail(`it is not JSON (${error.message}).`);
  }
  if (found?.format !== FORMAT) fail("it holds no chats that this page has exported.");
  if (found.version !== VERSION) fail(`its version is ${found.version}; this page reads version ${VERSION}.`);
  if (!Array.isArray(found.chats)) fail("it has no list of chats.");
  return found.chats.map((chat, i) => checkedChat(chat, (why) => fail(`chat ${i + 1} ${why}`)));
}

const isText = (value) => typeof value === "string";
const isTime = (value) => Number.isFinite(value) && value >= 0;

function checkedChat(chat, fail) {
  const { id, title, named, system, leaf, created, updated, messages } = chat ?? {};
  if (!isText(id) || id === "" || !isText(title) || !isText(system)) fail("lacks its id, title or system prompt.");
  if (!isTime(created) || !isTime(updated)) fail("lacks its times.");
  if (!Array.isArray(messages) || messages.length === 0) fail("has no messages.");
  const seen = new Map(); // id -> time
  const checked = messages.map((message, i) => {
    const own = checkedMessage(message, (why) => fail(`message ${i + 1} ${why}`));
    if (seen.has(own.id)) fail(`has two messages ${own.id}.`);
    if (own.parent !== null && !seen.has(own.parent)) fail(`message ${i + 1} follows none of those before it.`);
    own.at = Math.max(own.at, (seen.get(own.parent) ?? -1) + 1); // A message is later than the one that it follows.
    seen.set(own.id, own.at);
    return own;
  });
  if (!seen.has(leaf)) fail("does not say which message is the last.");
  return { ...newChat(system), id, title, named: Boolean(named), leaf, created, updated, messages: checked };
}

function checkedMessage(message, fail) {
  const { id, parent, at, role, content, images, files, thoughts, thoughtSeconds, calls } = message ?? {};
  const { model, state, note, tokens, cut } = message ?? {};
  if (!isText(id) || id === "" || !(parent === null || isText(parent)) || !isTime(at)) fail("lacks its id, parent or time.");
  if (!["user", "assistant"].includes(role) || !isText(content)) fail("is neither a question nor an answer.");
  if (!STATES.includes(state)) fail(`has the state ${state}.`);
  if (![thoughts, model, note].every((text) => text === undefined || isText(text))) fail("has a text that is none.");
  if (tokens !== undefined && !isTime(tokens)) fail("has a wrong number of tokens.");
  const isImage = (url) => isText(url) && /^data:image\/[a-z+.-]+;base64,[\w+/=]*$/.test(url);
  if (images !== undefined && !(Array.isArray(images) && images.every(isImage))) fail("has an image that is none.");
  const isFile = (file) => isText(file?.name) && isText(file?.text);
  if (files !== undefined && !(Array.isArray(files) && files.every(isFile))) fail("has a file that is none.");
  if (thoughtSeconds !== undefined && !isTime(thoughtSeconds)) fail("has thoughts without a time.");
  const isCall = (call) => isText(call?.name) && isText(call?.arguments);
  if (calls !== undefined && !(Array.isArray(calls) && calls.every(isCall))) fail("has a tool call that is none.");
  const wasCut = cut === undefined ? cut : Boolean(cut);
  const known = { images, files, thoughts, thoughtSeconds, calls, model, state, note, tokens, cut: wasCut };
  const given = Object.fromEntries(Object.entries(known).filter(([, value]) => value !== undefined));
  return { id, parent, at, role, content, ...given };
}

/** Offers a text to the user as a file. */
export function download(name, type, text) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], { type }));
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}

/** A file's name from a title. */
export const fileName = (title) => title.replace(/[^\p{L}\p{N}]+/gu, " ").trim().slice(0, 60) || "chat";
