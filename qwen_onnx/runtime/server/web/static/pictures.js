// Pictures for the next question: chosen, dropped or pasted. What the server would refuse is refused here.

// null: the model reads text alone
const told = document.querySelector("meta[name=pictures]").content;
export const limits = told ? JSON.parse(told) : null;

const MEBIBYTE = 1024 * 1024;
const size = (bytes) => `${(bytes / MEBIBYTE).toFixed(1)} MiB`;

export class Tray {
  // list: where they are shown; changed: called when they are others; say: told of it in words, and whether it is a refusal
  constructor(list, changed, say) {
    Object.assign(this, { list, changed, say, pictures: [], reading: 0 });
  }

  // files in their order; earlier: pictures that the conversation holds already and that are sent again
  async add(files, earlier) {
    this.reading += 1;
    this.changed();
    try {
      for (const file of files) {
        const fault = refusal(file, [...earlier, ...this.pictures]);
        if (fault) {
          this.say(fault, true);
          break;
        }
        this.show({ name: file.name || "picture", url: await read(file), preview: URL.createObjectURL(file) });
      }
    } catch (error) {
      this.say(`It cannot be read: ${error.message}`, true);
    } finally {
      this.reading -= 1;
      this.changed();
    }
  }

  show(picture) {
    const item = document.createElement("li");
    item.append(thumbnail(picture));
    const remove = document.createElement("button");
    remove.type = "button";
    remove.className = "remove";
    remove.textContent = "×";
    remove.title = remove.ariaLabel = `Remove ${picture.name}`;
    remove.addEventListener("click", () => this.remove(picture, item));
    item.append(remove);
    this.list.append(item);
    this.pictures.push(picture);
    this.say(`${picture.name} was added.`, false);
  }

  remove(picture, item) {
    const next = (item.nextElementSibling ?? item.previousElementSibling)?.querySelector("button");
    item.remove();
    this.pictures = this.pictures.filter((other) => other !== picture);
    forget([picture]);
    this.say(`${picture.name} was removed.`, false);
    this.changed();
    (next ?? document.getElementById("question")).focus();
  }

  // hands them over and is empty
  take() {
    const taken = this.pictures;
    this.pictures = [];
    this.list.replaceChildren();
    return taken;
  }
}

// What is wrong with one more picture beside others, in words; "" is nothing.
function refusal(file, others) {
  const name = file.name || "The picture";
  if (!limits.types.includes(file.type)) return `${name} is no picture of a kind that is read: ${kinds()}.`;
  if (!file.size) return `${name} is empty.`;
  if (file.size > limits.bytes) return `${name} has ${size(file.size)}, the most is ${size(limits.bytes)}.`;
  if (others.length >= limits.most) return `A conversation may have ${limits.most} pictures.`;
  const sent = others.reduce((sum, other) => sum + other.url.length, `data:${file.type};base64,`.length);
  if (sent + Math.ceil(file.size / 3) * 4 <= limits.body) return "";
  return `${name} has ${size(file.size)}; all pictures of a conversation may have ${size(limits.body * 3 / 4)} together.`;
}

const kinds = () => limits.types.map((type) => type.replace("image/", "").toUpperCase()).join(", ");

function read(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.addEventListener("load", () => resolve(reader.result));
    reader.addEventListener("error", () => reject(reader.error));
    reader.readAsDataURL(file);
  });
}

export function thumbnail(picture) {
  const image = document.createElement("img");
  image.src = picture.preview;
  image.alt = picture.name;
  return image;
}

export function forget(pictures) {
  for (const picture of pictures) URL.revokeObjectURL(picture.preview);
}
