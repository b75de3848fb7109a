// The images of the next message. They are scaled down here, so that little is sent.

const MOST = 16; // images of a prompt, as the server allows
const MOST_PIXELS = 1 << 20; // that the model sees of a prompt's images
const MOST_BYTES = 2 << 20; // of a file that is sent as it is
const KINDS = ["image/png", "image/jpeg", "image/webp", "image/gif", "image/bmp"];

/** The data URL of an image's file. Rejects a file that the browser cannot read as an image. */
async function dataUrl(file) {
  const bitmap = await createImageBitmap(file);
  const { width, height } = bitmap;
  const scale = Math.sqrt(Math.min(1, MOST_PIXELS / (width * height)));
  if (scale === 1 && file.size <= MOST_BYTES && KINDS.includes(file.type)) {
    bitmap.close();
    return new Promise((resolve, reject) => {
      const reader = new FileReader();
      reader.onload = () => resolve(reader.result);
      reader.onerror = () => reject(reader.error);
      reader.readAsDataURL(file);
    });
  }
  const canvas = document.createElement("canvas");
  canvas.width = Math.max(1, Math.floor(width * scale));
  canvas.height = Math.max(1, Math.floor(height * scale));
  const brush = canvas.getContext("2d");
  brush.fillStyle = "white"; // JPEG has no transparency
  brush.fillRect(0, 0, canvas.width, canvas.height);
  brush.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  bitmap.close();
  return canvas.toDataURL("image/jpeg", 0.9);
}

export class Pictures {
  #urls = [];
  #usable = false;

  /** list: shows the images. note: says what could not be used. */
  constructor({ list, note, changed }) {
    this.list = list;
    this.note = note;
    this.changed = changed;
  }

  get count() {
    return this.#urls.length;
  }

  /** Whether the model reads images. */
  set usable(usable) {
    this.#usable = Boolean(usable);
  }

  async add(files) {
    this.note.textContent = this.#usable ? "" : "This model reads no images.";
    if (!this.#usable) return;
    for (const file of files) {
      if (this.#urls.length === MOST) {
        this.note.textContent = `A message has at most ${MOST} images.`;
        break;
      }
      try {
        this.#urls.push(await dataUrl(file));
      } catch {
        this.note.textContent = `${file.name} is not an image that this browser reads.`;
      }
    }
    this.#show();
  }

  /** The images, as data URLs; there are none left after that. */
  take() {
    const taken = this.#urls;
    this.#urls = [];
    this.note.textContent = "";
    this.#show();
    return taken;
  }

  #show() {
    this.list.hidden = this.#urls.length === 0;
    this.list.replaceChildren(
      ...this.#urls.map((url, i) => {
        const [item, button] = [document.createElement("li"), document.createElement("button")];
        button.type = "button";
        button.textContent = "Remove";
        button.setAttribute("aria-label", `Remove image ${i + 1}`);
        button.addEventListener("click", () => {
          this.#urls.splice(i, 1);
          this.#show();
        });
        item.append(picture(url, i + 1), button);
        return item;
      }),
    );
    this.changed();
  }
}

export function picture(url, number) {
  const image = document.createElement("img");
  image.src = url;
  image.alt = `Image ${number}`;
  return image;
}
