// The files of the next message: chosen, dropped onto the page, or pasted. Images go to pictures.js, texts stay here.

import { read, tokensOf, Unusable } from "./text_files.js";

const MOST = 20; // files of a message

export class Attachments {
  #files = [];

  /** list: shows the files. note: says what could not be used. button, input: choose files. area: files are dropped there. */
  constructor({ list, note, button, input, area, pictures, changed }) {
    Object.assign(this, { list, note, pictures, changed });
    this.context = null; // tokens that the server planned for
    button.addEventListener("click", () => input.click());
    input.addEventListener("change", async () => {
      await this.add([...input.files]);
      input.value = "";
    });
    area.addEventListener("dragover", (event) => this.#offers(event) && event.preventDefault());
    area.addEventListener("drop", (event) => {
      if (!this.#offers(event)) return;
      event.preventDefault(); // The browser would leave the page for the file.
      this.add([...event.dataTransfer.files]);
    });
    area.addEventListener("paste", (event) => {
      const files = [...(event.clipboardData?.files ?? [])];
      if (files.length === 0) return;
      event.preventDefault();
      this.add(files);
    });
  }

  get count() {
    return this.#files.length + this.pictures.count;
  }

  async add(files) {
    const images = files.filter(({ type }) => type.startsWith("image/") && type !== "image/svg+xml");
    this.note.textContent = "";
    if (images.length) await this.pictures.add(images);
    for (const file of files.filter((each) => !images.includes(each))) {
      if (this.#files.length === MOST) {
        this.note.textContent = `A message has at most ${MOST} files.`;
        break;
      }
      try {
        this.#files.push(await read(file, this.context));
      } catch (error) {
        this.note.textContent = error instanceof Unusable ? error.message : `${file.name} cannot be read.`;
      }
    }
    this.#show();
  }

  /** What a message takes along: {images, files}, each only if there are any. Nothing is left after that. */
  take() {
    const taken = {
      ...(this.pictures.count ? { images: this.pictures.take() } : {}),
      ...(this.#files.length ? { files: this.#files } : {}),
    };
    this.#files = [];
    this.note.textContent = "";
    this.#show();
    return taken;
  }

  #offers(event) {
    return [...(event.dataTransfer?.types ?? [])].includes("Files");
  }

  #show() {
    this.list.hidden = this.#files.length === 0;
    this.list.replaceChildren(
      ...this.#files.map((file, i) => {
        const [item, remove] = [document.createElement("li"), document.createElement("button")];
        remove.type = "button";
        remove.textContent = "Remove";
        remove.setAttribute("aria-label", `Remove ${file.name}`);
        remove.addEventListener("click", () => {
          this.#files.splice(i, 1);
          this.#show();
        });
        item.append(`${file.name}, about ${tokensOf(file)} tokens `, remove);
        return item;
      }),
    );
    this.changed();
  }
}

/** The files of a message that was sent, each as a fold. */
export function folded(files) {
  return (files ?? []).map(({ name, text }) => {
    const [details, summary, body] = ["details", "summary", "pre"].map((tag) => document.createElement(tag));
    details.className = "file";
    summary.textContent = name;
    body.textContent = text;
    details.append(summary, body);
    return details;
  });
}
