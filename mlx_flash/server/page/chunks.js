// Puts what arrives of an answer into its message.

const began = new WeakMap(); // message -> when its first thought arrived, in ms

/**
 * Adds a chunk of `answer` (api.js) to a message: its text, its thoughts with the time that they took, its tool calls.
 * Returns whether there was anything in it.
 */
export function addChunk(message, { text, thoughts, calls }) {
  if (!text && !thoughts && calls.length === 0) return false;
  if (thoughts && !began.has(message)) began.set(message, Date.now() - 1000 * (message.thoughtSeconds ?? 0));
  if (message.content === "" && began.has(message)) {
    message.thoughtSeconds = (Date.now() - began.get(message)) / 1000;
  }
  message.content += text;
  if (thoughts) message.thoughts = (message.thoughts ?? "") + thoughts;
  for (const { index, function: piece } of calls) {
    message.calls ??= [];
    const call = (message.calls[index] ??= { name: "", arguments: "" });
    call.name += piece?.name ?? "";
    call.arguments += piece?.arguments ?? "";
  }
  return true;
}
