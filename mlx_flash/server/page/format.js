// Formats numbers for people. MB is 1e6 bytes and GB 1e9, as everywhere in this project.

export const NONE = "–";

/** About three digits: 0.0421 -> "0.042", 4.213 -> "4.21", 42.13 -> "42.1", 4213 -> "4213". */
export function short(value) {
  if (value === null || value === undefined || !Number.isFinite(value)) return NONE;
  if (value === 0) return "0";
  const size = Math.abs(value);
  return value.toFixed(size >= 100 ? 0 : size >= 10 ? 1 : size >= 1 ? 2 : 3);
}

export function bytes(value) {
  if (value === null || value === undefined || !Number.isFinite(value)) return NONE;
  if (value >= 1e9) return `${short(value / 1e9)} GB`;
  if (value >= 1e5 || value === 0) return `${short(value / 1e6)} MB`;
  return value >= 1e3 ? `${short(value / 1e3)} kB` : `${Math.round(value)} B`;
}

export function percent(share) {
  if (share === null || share === undefined || !Number.isFinite(share)) return NONE;
  return plain(`${(100 * share).toFixed(1)} %`);
}

export function milliseconds(seconds) {
  return Number.isFinite(seconds) ? `${short(1e3 * seconds)} ms` : NONE;
}

/** A number without trailing zeros: "0.200 MB" -> "0.2 MB". */
export function plain(text) {
  return text.replace(/\.(\d*?)0+ /, (_, digits) => (digits ? `.${digits} ` : " "));
}
