import { Turn } from "./conversation.js";
import { limits, Tray } from "./media.js";
import { complete } from "./stream.js";

const KEY = "qwen-onnx-api-key";
const find = (id) => document.getElementById(id);
const [log, empty, question, send, stop, scroller] = ["log", "empty", "question", "send", "stop", "scroller"].map(find);
const model = document.querySelector("meta[name=model]").content;

let turns = [];
let running = null;
const tray = new Tray(find("media"), showSend, (words, refused) => {
  find("refused").textContent = refused ? words : "";
  if (!refused) say(words);
});

function messages(upTo) {
  const said = turns.slice(0, turns.indexOf(upTo)).filter((turn) => turn.text);
  const system = find("system").value.trim();
  return [
    ...(system ? [{ role: "system", content: system }] : []),
    ...said.flatMap((turn) => [
      { role: "user", content: turn.content() },
      { role: "assistant", content: turn.text },
    ]),
    { role: "user", content: upTo.content() },
  ];
}

async function answer(turn) {
  // what was said after this question answered the earlier answer
  turns.splice(turns.indexOf(turn) + 1).forEach((later) => later.remove());
  turn.restart();
  const abort = new AbortController();
  running = abort;
  show();
  const begin = performance.now();
  let first = 0;
  let usage = null;
  let reason = "";
  try {
    const body = {
      model,
      messages: messages(turn),
      temperature: find("temperature").valueAsNumber,
      max_tokens: find("max-tokens").valueAsNumber,
    };
    for await (const chunk of complete(body, sessionStorage.getItem(KEY), abort.signal)) {
      usage = chunk.usage ?? usage;
      const choice = chunk.choices[0];
      if (!choice) continue;
      reason = choice.finish_reason ?? reason;
      if (choice.delta.content || choice.delta.reasoning_content) first ||= performance.now();
      const atEnd = isAtEnd();
      turn.push(choice.delta, () => atEnd && toEnd());
    }
    turn.finish(summary(usage, reason, begin, first), () => answer(turn));
    say("The answer is complete.");
  } catch (error) {
    if (error.name === "AbortError") {
      if (running === abort) turn.finish("Stopped", () => answer(turn));
      say("The answer was stopped.");
    } else {
      turn.fail(error.message, () => answer(turn));
      if (error.status === 401) askForKey();
    }
  } finally {
    if (running === abort) running = null;
    show();
    toEnd();
  }
}

function summary(usage, reason, begin, first) {
  const parts = [];
  if (usage) {
    const count = usage.completion_tokens;
    parts.push(`${count} token${count === 1 ? "" : "s"}`);
    const seconds = (performance.now() - first) / 1000;
    // what came in one burst was not timed
    if (first && count > 1 && seconds > 0.05) parts.push(`${((count - 1) / seconds).toFixed(1)} tokens/s`);
  }
  if (first) parts.push(`first after ${((first - begin) / 1000).toFixed(2)} s`);
  if (reason === "length") parts.push("cut at max tokens");
  return parts.join(" · ");
}

function ask(text) {
  if (running || tray.reading || !(text.trim() || tray.media.length)) return;
  if (!document.querySelectorAll("#settings :invalid").length) {
    const turn = new Turn(log, text, tray.take());
    turns.push(turn);
    question.value = find("refused").textContent = "";
    grow();
    toEnd();
    answer(turn);
  } else {
    openSettings(true);
    document.querySelector("#settings :invalid").reportValidity();
  }
}

function askForKey() {
  find("key-field").hidden = false;
  openSettings(true);
  find("key").focus();
}

function openSettings(open) {
  find("settings").hidden = !open;
  find("settings-toggle").setAttribute("aria-expanded", String(open));
}

function show() {
  const busy = Boolean(running);
  empty.hidden = turns.length > 0;
  send.hidden = busy;
  stop.hidden = !busy;
  showSend();
  log.setAttribute("aria-busy", String(busy));
  // later questions can be answered anew only when nothing runs
  log.querySelectorAll(".below button:not([data-copy]), .error button").forEach((node) => { node.disabled = busy; });
}

const isAtEnd = () => scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < 80;
const toEnd = () => { scroller.scrollTop = scroller.scrollHeight; };
const say = (words) => { find("status").textContent = words; };

function grow() {
  question.style.height = "auto";
  question.style.height = `${question.scrollHeight + 2}px`;
  showSend();
}

function showSend() {
  find("media").hidden = !tray.media.length;
  send.disabled = Boolean(tray.reading) || !(question.value.trim() || tray.media.length);
}

const attach = (files) => tray.add([...files], turns.flatMap((turn) => turn.media));

function offerMedia() {
  const button = find("attach");
  const many = `${limits.kind[0].toUpperCase()}${limits.kind.slice(1)}s`;
  document.body.classList.add("attaches");
  button.hidden = false;
  button.title = button.ariaLabel = `Add ${limits.kind}s`;
  button.querySelector(`[data-kind=${limits.kind}]`).removeAttribute("hidden");
  find("files").accept = Object.keys(limits.types).join();
  find("files-label").textContent = many;
  find("media").ariaLabel = `${many} for the next question`;
  find("hint").textContent += `. ${many} can be dropped or pasted.`;
  button.addEventListener("click", () => find("files").click());
  find("files").addEventListener("change", async (event) => {
    const chosen = [...event.target.files];
    // so that the same file can be chosen again
    event.target.value = "";
    await attach(chosen);
    question.focus();
  });
  const drops = (event) => event.dataTransfer?.types.includes("Files");
  const mark = (on) => document.body.classList.toggle("dropping", on);
  addEventListener("dragover", (event) => {
    if (!drops(event)) return;
    event.preventDefault();
    mark(true);
  });
  addEventListener("dragleave", (event) => { if (!event.relatedTarget) mark(false); });
  addEventListener("drop", (event) => {
    if (!drops(event)) return;
    event.preventDefault();
    mark(false);
    attach(event.dataTransfer.files);
    question.focus();
  });
  addEventListener("paste", (event) => {
    // what an office program copies has a picture of the text beside it
    if (!event.clipboardData.files.length || event.clipboardData.types.includes("text/plain")) return;
    event.preventDefault();
    attach(event.clipboardData.files);
  });
}

async function copy(node) {
  const turn = turns.find((candidate) => candidate.node.contains(node));
  const text = node.dataset.copy === "code" ? node.closest(".code").querySelector("pre").textContent : turn.text;
  try {
    await navigator.clipboard.writeText(text);
    node.textContent = "Copied";
  } catch {
    node.textContent = "Not allowed"; // browsers give the clipboard to secure pages only
  }
  setTimeout(() => { node.textContent = "Copy"; }, 1500);
}

find("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  ask(question.value);
});
question.addEventListener("keydown", (event) => {
  // Enter also confirms a word of an input method: that must not send
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  ask(question.value);
});
question.addEventListener("input", grow);
stop.addEventListener("click", () => {
  running?.abort();
  question.focus();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") running?.abort();
});
find("new").addEventListener("click", () => {
  const abort = running;
  running = null;
  abort?.abort();
  turns.forEach((turn) => turn.remove());
  turns = [];
  show();
  question.focus();
});
find("settings-toggle").addEventListener("click", () => openSettings(find("settings").hidden));
find("key").addEventListener("change", (event) => sessionStorage.setItem(KEY, event.target.value.trim()));
find("key").addEventListener("keydown", (event) => {
  if (event.key !== "Enter") return;
  sessionStorage.setItem(KEY, event.target.value.trim());
  openSettings(false);
  question.focus();
  const failed = turns.at(-1)?.node.querySelector(".error button");
  if (failed && !running) failed.click();
});
find("examples").addEventListener("click", (event) => {
  if (event.target.closest("button")) ask(event.target.textContent);
});
log.addEventListener("click", (event) => {
  const node = event.target.closest("[data-copy]");
  if (node) copy(node);
});
find("key-field").hidden = !sessionStorage.getItem(KEY);
find("key").value = sessionStorage.getItem(KEY) ?? "";
if (limits) offerMedia();
show();
