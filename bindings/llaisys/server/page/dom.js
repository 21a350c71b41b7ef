// Small helpers over the DOM. Text goes in as text nodes: nothing here parses HTML.

export const $ = (selector) => document.querySelector(selector);

/** An element with attributes, listeners (functions named onclick and the like) and children. */
export function h(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") element.addEventListener(name.slice(2), value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value != null) element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child != null));
  return element;
}

/** One of the symbols in index.html. */
export function icon(name) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const use = document.createElementNS("http://www.w3.org/2000/svg", "use");
  use.setAttribute("href", `#i-${name}`);
  svg.setAttribute("aria-hidden", "true");
  svg.append(use);
  return svg;
}

export const iconButton = (name, label, onclick) =>
  h("button", { type: "button", class: "icon", "aria-label": label, title: label, onclick }, icon(name));

/** A button that copies text() and says so with a tick. */
export function copyButton(label, text) {
  const button = iconButton("copy", label, async () => {
    const copied = await copy(text());
    button.replaceChildren(icon(copied ? "done" : "copy"));
    say(copied ? "Copied" : "The browser does not allow copying");
    setTimeout(() => button.replaceChildren(icon("copy")), 1500);
  });
  return button;
}

async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    // The clipboard is for secure origins only; a server in the local network has none.
    const area = h("textarea", { class: "unseen", readonly: true });
    const focused = document.activeElement;
    area.value = text;
    document.body.append(area);
    area.select();
    const copied = document.execCommand("copy");
    area.remove();
    focused?.focus();
    return copied;
  }
}

/** Tells users of screen readers what others see. */
export function say(text) {
  $("#status").textContent = text;
}

/** Makes a textarea as high as its text; CSS sets the limit. */
export function grow(area) {
  area.style.height = "auto";
  area.style.height = `${area.scrollHeight + area.offsetHeight - area.clientHeight}px`;
}

/** Enter that is meant: not the one that ends the input of a Chinese word, which Safari tells by its code alone. */
export const isEnter = (event) => event.key === "Enter" && !event.isComposing && event.keyCode !== 229;

const TOUCH = matchMedia("(pointer: coarse)");

/** Enter that sends. On a touch screen, which has no Shift+Enter, it starts a line, and the button sends. */
export const isSend = (event) => isEnter(event) && !event.shiftKey && !TOUCH.matches;
