// A small part of Markdown as DOM nodes. All text goes through textContent: a model cannot write HTML.

const FENCE = /^ {0,3}(`{3,}|~{3,})\s*([\w+#.-]*).*$/;
const ITEM = /^\s*(?:([-*+])|(\d{1,9})[.)])\s+(.*)$/;
const HEADING = /^#{1,6}\s+(.*?)\s*#*$/;
// code, bold, link with http or https
const INLINE = /(`+)(.+?)\1(?!`)|\*\*(?=\S)(.+?)\*\*|\[([^\]\n]+)\]\((https?:\/\/[^\s)]+)\)/;

export function render(text) {
  const fragment = document.createDocumentFragment();
  const lines = text.split("\n");
  for (let at = 0; at < lines.length;) {
    const fence = FENCE.exec(lines[at]);
    if (fence) {
      const end = closing(lines, at + 1, fence[1]);
      fragment.append(code(lines.slice(at + 1, end).join("\n"), fence[2]));
      at = end + 1;
    } else if (HEADING.test(lines[at])) {
      fragment.append(block("h3", HEADING.exec(lines[at])[1]));
      at += 1;
    } else if (ITEM.test(lines[at])) {
      at = list(fragment, lines, at);
    } else if (lines[at].trim() === "") {
      at += 1;
    } else {
      let end = at + 1;
      while (end < lines.length && lines[end].trim() && ![FENCE, HEADING, ITEM].some((kind) => kind.test(lines[end]))) end += 1;
      fragment.append(block("p", lines.slice(at, end).join("\n")));
      at = end;
    }
  }
  return fragment;
}

function closing(lines, from, fence) {
  for (let at = from; at < lines.length; at += 1) {
    const line = lines[at].trim();
    if (line.startsWith(fence) && line.replaceAll(fence[0], "") === "") return at;
  }
  return lines.length; // the rest of it is still to come
}

function list(parent, lines, at) {
  const first = ITEM.exec(lines[at]);
  const node = document.createElement(first[1] ? "ul" : "ol");
  if (first[2]) node.start = Number(first[2]);
  while (at < lines.length) {
    const item = ITEM.exec(lines[at]);
    if (!item || Boolean(item[1]) !== Boolean(first[1])) break;
    let words = item[3];
    at += 1;
    while (at < lines.length && /^\s+\S/.test(lines[at]) && !ITEM.test(lines[at])) words += `\n${lines[at++].trim()}`;
    node.append(block("li", words));
    // a blank line between two items belongs to the list
    if (at + 1 < lines.length && !lines[at].trim() && ITEM.test(lines[at + 1])) at += 1;
  }
  parent.append(node);
  return at;
}

function block(name, text) {
  const node = document.createElement(name);
  inline(node, text);
  return node;
}

function inline(node, text) {
  for (;;) {
    const match = INLINE.exec(text);
    if (!match) break;
    lined(node, text.slice(0, match.index));
    if (match[2] !== undefined) element(node, "code").textContent = match[2];
    else if (match[3] !== undefined) inline(element(node, "strong"), match[3]);
    else {
      const link = element(node, "a");
      link.href = match[5];
      link.rel = "noopener noreferrer";
      link.target = "_blank";
      link.textContent = match[4];
    }
    text = text.slice(match.index + match[0].length);
  }
  lined(node, text);
}

function lined(node, text) {
  text.split("\n").forEach((line, index) => {
    if (index) element(node, "br");
    if (line) node.append(line);
  });
}

function element(parent, name) {
  const node = document.createElement(name);
  parent.append(node);
  return node;
}

function code(text, language) {
  const box = document.createElement("div");
  box.className = "code";
  const bar = element(box, "div");
  bar.className = "bar";
  element(bar, "span").textContent = language || "code";
  const copy = element(bar, "button");
  copy.type = "button";
  copy.className = "small";
  copy.dataset.copy = "code";
  copy.textContent = "Copy";
  const pre = element(box, "pre");
  pre.tabIndex = 0;
  element(pre, "code").textContent = text;
  return box;
}
