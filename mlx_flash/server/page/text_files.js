// Text files as a part of a question: read, checked, and written as a fenced block.

const MOST_BYTES = 1 << 20; // as much as a request may have
const BYTES_PER_TOKEN = 4; // a usual value for English and code
const PLAIN = new Set(["txt", "text", "log"]);

/** A file that cannot be used, as a sentence. */
export class Unusable extends Error {}

/** Reads a file: {name, text}. context: tokens that the server planned for, or null. Throws Unusable. */
export async function read(file, context) {
  const name = file.name || "text.txt";
  const tokens = Math.ceil(file.size / BYTES_PER_TOKEN);
  if (file.size > MOST_BYTES) throw new Unusable(`${name} has ${megabytes(file.size)}; a file may have 1 MB.`);
  const bytes = new Uint8Array(await file.arrayBuffer());
  let text;
  try {
    text = new TextDecoder("utf-8", { fatal: true }).decode(bytes);
  } catch {
    throw new Unusable(`${name} is neither UTF-8 text nor an image.`);
  }
  if (text.includes("\0")) throw new Unusable(`${name} is neither UTF-8 text nor an image.`);
  if (text.trim() === "") throw new Unusable(`${name} is empty.`);
  if (context && tokens >= context) {
    throw new Unusable(`${name} has about ${tokens} tokens; the context holds ${context}. Attach a part of it.`);
  }
  return { name, text: text.replace(/\r\n?/g, "\n") };
}

/** About how many tokens a file has. */
export const tokensOf = ({ text }) => Math.ceil(text.length / BYTES_PER_TOKEN);

/** The file as a part of a question. The fence is longer than any in the file. */
export function fenced({ name, text }) {
  const longest = Math.max(2, ...[...text.matchAll(/^ {0,3}(`{3,})/gm)].map(([, ticks]) => ticks.length));
  const fence = "`".repeat(longest + 1);
  const ending = /\.(\w+)$/.exec(name)?.[1].toLowerCase() ?? "";
  return `${name}:\n${fence}${PLAIN.has(ending) ? "" : ending}\n${text.replace(/\n$/, "")}\n${fence}`;
}

const megabytes = (size) => `${(size / 1e6).toFixed(1)} MB`;
