// Pictures or sounds for the next question: chosen, dropped or pasted. What the server would refuse is refused here.

// null: the model reads text alone
const told = document.querySelector("meta[name=media]").content;
export const limits = told ? JSON.parse(told) : null;

const MEBIBYTE = 1024 * 1024;
const size = (bytes) => `${(bytes / MEBIBYTE).toFixed(1)} MiB`;
const seconds = (length) => `${length.toFixed(1)} s`;

export class Tray {
  // list: where they are shown; changed: called when they are others; say: told of it in words, and whether it is a refusal
  constructor(list, changed, say) {
    Object.assign(this, { list, changed, say, media: [], reading: 0 });
  }

  // files in their order; earlier: what the conversation holds already and is sent again
  async add(files, earlier) {
    this.reading += 1;
    this.changed();
    try {
      for (const file of files) {
        const fault = refusal(file, [...earlier, ...this.media]);
        if (fault) {
          this.say(fault, true);
          break;
        }
        const medium = { name: file.name || limits.kind, type: file.type, url: await read(file) };
        medium.preview = URL.createObjectURL(file);
        if (limits.kind === "sound") medium.seconds = await lengthOf(medium.preview);
        if (medium.seconds > limits.seconds) {
          forget([medium]);
          this.say(`${medium.name} lasts ${seconds(medium.seconds)}, the model hears ${limits.seconds} s.`, true);
          break;
        }
        this.show(medium);
      }
    } catch (error) {
      this.say(`It cannot be read: ${error.message}`, true);
    } finally {
      this.reading -= 1;
      this.changed();
    }
  }

  show(medium) {
    const item = document.createElement("li");
    item.append(preview(medium));
    const remove = document.createElement("button");
    remove.type = "button";
    remove.className = "remove";
    remove.textContent = "×";
    remove.title = remove.ariaLabel = `Remove ${medium.name}`;
    remove.addEventListener("click", () => this.remove(medium, item));
    item.append(remove);
    this.list.append(item);
    this.media.push(medium);
    this.say(`${medium.name} was added.`, false);
  }

  remove(medium, item) {
    const next = (item.nextElementSibling ?? item.previousElementSibling)?.querySelector("button");
    item.remove();
    this.media = this.media.filter((other) => other !== medium);
    forget([medium]);
    this.say(`${medium.name} was removed.`, false);
    this.changed();
    (next ?? document.getElementById("question")).focus();
  }

  // hands them over and is empty
  take() {
    const taken = this.media;
    this.media = [];
    this.list.replaceChildren();
    return taken;
  }
}

// What is wrong with one more file beside others, in words; "" is nothing.
function refusal(file, others) {
  const name = file.name || `The ${limits.kind}`;
  if (!Object.hasOwn(limits.types, file.type)) return `${name} is no ${limits.kind} of a kind that is read: ${kinds()}.`;
  if (!file.size) return `${name} is empty.`;
  if (file.size > limits.bytes) return `${name} has ${size(file.size)}, the most is ${size(limits.bytes)}.`;
  if (others.length >= limits.most) return `A conversation may have ${limits.most} ${limits.kind}s.`;
  const sent = others.reduce((sum, other) => sum + other.url.length, `data:${file.type};base64,`.length);
  if (sent + Math.ceil(file.size / 3) * 4 <= limits.body) return "";
  return `${name} has ${size(file.size)}; all ${limits.kind}s of a conversation may have ${size(limits.body * 3 / 4)} together.`;
}

const kinds = () => [...new Set(Object.values(limits.types))].map((name) => name.toUpperCase()).join(", ");

function read(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.addEventListener("load", () => resolve(reader.result));
    reader.addEventListener("error", () => reject(reader.error));
    reader.readAsDataURL(file);
  });
}

// Of a sound in seconds; null when this browser cannot tell, which does not mean that the server cannot.
function lengthOf(url) {
  return new Promise((resolve) => {
    // some load nothing before the user plays it
    setTimeout(resolve, 3000, null);
    const probe = new Audio();
    probe.addEventListener("loadedmetadata", () => resolve(Number.isFinite(probe.duration) ? probe.duration : null));
    probe.addEventListener("error", () => resolve(null));
    probe.preload = "metadata";
    probe.src = url;
  });
}

// As the page shows it: a picture, or a player with the sound's name and length.
export function preview(medium) {
  if (limits.kind === "picture") {
    const image = document.createElement("img");
    image.src = medium.preview;
    image.alt = medium.name;
    return image;
  }
  const figure = document.createElement("figure");
  const caption = document.createElement("figcaption");
  const name = document.createElement("span");
  name.textContent = name.title = medium.name;
  caption.append(name);
  if (medium.seconds !== null) caption.append(` · ${seconds(medium.seconds)}`);
  const player = document.createElement("audio");
  player.controls = true;
  player.preload = "metadata";
  player.src = medium.preview;
  player.ariaLabel = medium.name;
  figure.append(caption, player);
  return figure;
}

// As the API takes it, in a message.
export function part(medium) {
  if (limits.kind === "picture") return { type: "image_url", image_url: { url: medium.url } };
  const data = medium.url.slice(medium.url.indexOf(",") + 1);
  return { type: "input_audio", input_audio: { data, format: limits.types[medium.type] } };
}

export function forget(media) {
  for (const medium of media) URL.revokeObjectURL(medium.preview);
}
