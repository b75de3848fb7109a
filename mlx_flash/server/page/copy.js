// Copying a text, with a button that says so.

const SAID_MS = 1500;

async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    return copyBySelection(text); // Browsers give the clipboard only to https and to this machine.
  }
}

function copyBySelection(text) {
  const field = document.createElement("textarea");
  const focused = document.activeElement;
  field.value = text;
  field.className = "unseen";
  document.body.append(field);
  field.select();
  const copied = document.execCommand("copy");
  field.remove();
  focused?.focus();
  return copied;
}

/** Copies a text. The button says for a moment whether that worked. */
export async function copyWith(button, text) {
  const [word, copied] = ["Copy", await copy(text)];
  button.textContent = copied ? "Copied" : "Not copied";
  button.dataset.copied = String(copied);
  setTimeout(() => {
    button.textContent = word;
    delete button.dataset.copied;
  }, SAID_MS);
}
