// One question and its answer, on the page.

import { render } from "./markdown.js";
import { forget, part, preview } from "./media.js";

export class Turn {
  constructor(log, question, media) {
    this.question = question;
    this.media = media;
    this.text = "";
    this.reasoning = "";
    this.finished = false;
    this.node = add(log, "article", "turn");
    if (media.length) add(this.node, "div", "shown").append(...media.map(preview));
    if (question.trim()) add(this.node, "div", "question").textContent = question;
    this.answer = add(this.node, "div", "answer");
    this.thinking = null;
    this.drawn = true;
    this.restart();
  }

  // As the API takes it.
  content() {
    if (!this.media.length) return this.question;
    const shown = this.media.map(part);
    return this.question.trim() ? [...shown, { type: "text", text: this.question }] : shown;
  }

  remove() {
    forget(this.media);
    this.node.remove();
  }

  restart() {
    this.text = this.reasoning = "";
    this.finished = false;
    this.node.querySelector(".error")?.remove();
    this.node.querySelector(".below")?.remove();
    this.thinking?.remove();
    this.thinking = null;
    this.answer.replaceChildren();
    const waiting = add(this.answer, "span", "waiting");
    waiting.setAttribute("role", "img");
    waiting.setAttribute("aria-label", "Waiting for the answer");
  }

  // Pieces of the answer; the page is drawn once per frame at most.
  push(delta, afterwards) {
    this.reasoning += delta.reasoning_content ?? "";
    this.text += delta.content ?? "";
    if (!this.drawn) return;
    this.drawn = false;
    requestAnimationFrame(() => {
      this.draw();
      afterwards();
    });
  }

  draw() {
    this.drawn = true;
    if (this.reasoning && !this.thinking) {
      this.thinking = document.createElement("details");
      this.thinking.className = "thinking";
      add(this.thinking, "summary");
      add(this.thinking, "div");
      this.node.insertBefore(this.thinking, this.answer);
    }
    if (this.thinking) {
      this.thinking.firstChild.textContent = this.text || this.finished ? "Reasoning" : "Thinking…";
      this.thinking.lastChild.textContent = this.reasoning;
    }
    if (this.text || this.finished) this.answer.replaceChildren(render(this.text));
  }

  finish(summary, again) {
    this.finished = true;
    this.draw();
    const below = add(this.node, "div", "below");
    if (this.text) button(below, "Copy").dataset.copy = "answer";
    button(below, "Answer anew").addEventListener("click", again);
    add(below, "span").textContent = summary;
  }

  fail(words, again) {
    this.finished = true;
    this.draw();
    const error = add(this.node, "div", "error");
    error.setAttribute("role", "alert");
    add(error, "p").textContent = words;
    button(error, "Try again").addEventListener("click", again);
  }
}

function add(parent, name, className = "") {
  const node = document.createElement(name);
  if (className) node.className = className;
  parent.append(node);
  return node;
}

function button(parent, words) {
  const node = add(parent, "button", "small");
  node.type = "button";
  node.textContent = words;
  return node;
}
