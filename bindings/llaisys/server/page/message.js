// One message of the conversation, on the screen.

import { copyButton, grow, h, icon, iconButton, isSend } from "./dom.js";
import { MarkdownView } from "./markdown.js";

/**
 * The view of a node: {element, update()}. actions: {edit(text), again(), show(step), running()}, and
 * version: [number, count] of its siblings.
 */
export function messageView(node, version, actions) {
  return node.role === "user" ? questionView(node, version, actions) : answerView(node, version, actions);
}

function versionSwitch([number, count], show) {
  if (count < 2) return null;
  const back = iconButton("back", "Earlier version", () => show(-1));
  const forth = iconButton("forth", "Later version", () => show(1));
  back.disabled = number === 1;
  forth.disabled = number === count;
  return h("span", { class: "versions" }, back, h("span", { "aria-label": `Version ${number} of ${count}` }, `${number}/${count}`), forth);
}

function questionView(node, version, actions) {
  const text = h("div", { class: "text" }, node.content);
  const tools = h("div", { class: "tools" },
    versionSwitch(version, actions.show),
    copyButton("Copy question", () => node.content),
    iconButton("edit", "Edit question", edit));
  const element = h("li", { class: "user" }, h("h2", { class: "unseen" }, "You"), text, tools);

  function edit() {
    const area = h("textarea", { "aria-label": "Edit your question", rows: 1, oninput: () => grow(area) });
    const close = () => {
      editor.replaceWith(text, tools);
      tools.lastChild.focus();
    };
    const send = () => area.value.trim() && actions.edit(area.value.trim());
    const editor = h("div", { class: "editor" }, area, h("div", { class: "row" },
      h("button", { type: "button", onclick: close }, "Cancel"),
      h("button", { type: "button", class: "primary", onclick: send }, "Send")));
    editor.addEventListener("keydown", (event) => {
      if (event.key === "Escape") {
        event.stopPropagation();
        close();
      } else if (event.target === area && isSend(event)) {
        event.preventDefault();
        send();
      }
    });
    area.value = node.content;
    tools.remove();
    text.replaceWith(editor);
    grow(area);
    area.focus();
  }
  return { element, update() {} };
}

function answerView(node, version, actions) {
  const summary = h("summary");
  const thoughts = h("div", { class: "markdown" });
  const think = h("details", { class: "think", hidden: true }, summary, thoughts);
  const body = h("div", { class: "markdown" });
  const wait = h("div", { class: "wait", role: "img", "aria-label": "Waiting for the first word" });
  const note = h("div", { class: "note", hidden: true });
  const stats = h("span", { class: "stats", title: STATS });
  const again = iconButton("again", "Regenerate", actions.again);
  const tools = h("div", { class: "tools" },
    versionSwitch(version, actions.show),
    copyButton("Copy answer", () => node.content),
    again,
    stats);
  const element = h("li", { class: "assistant" }, h("h2", { class: "unseen" }, "Refrain"), think, body, wait, note, tools);
  const views = { thoughts: new MarkdownView(thoughts), body: new MarkdownView(body) };

  function update() {
    const running = actions.running();
    element.setAttribute("aria-busy", running);
    think.hidden = !node.reasoning;
    if (node.reasoning) {
      views.thoughts.show(node.reasoning);
      // a short thought may come in one piece with the answer
      const time = node.stats?.thought >= 1 ? ` for ${duration(node.stats.thought)}` : "";
      summary.textContent = (running && !node.content ? "Thinking" : "Thought") + time;
    }
    views.body.show(node.content);
    wait.hidden = !running || Boolean(node.content || node.reasoning);
    again.hidden = running;
    stats.textContent = statsText(node.stats);
    if (!running) showNote();
  }

  function showNote() {
    const words = noteText(node);
    note.hidden = !words;
    note.classList.toggle("error", Boolean(node.error));
    const retry = h("button", { type: "button", onclick: actions.again }, icon("again"), "Try again");
    note.replaceChildren(h("span", { role: node.error ? "alert" : null }, words), ...(node.finish === "length" ? [] : [retry]));
  }

  update();
  return { element, update };
}

const STATS = "Tokens of the answer, their rate, the time to the first one, and how much of the prompt was in the cache";

function noteText(node) {
  switch (node.finish) {
    case undefined:
      return "The page was closed before the answer ended.";
    case "error":
      return node.error.message;
    case "stopped":
      return "Stopped.";
    case "length":
      return "Cut off at the most tokens that the settings or the context allow.";
    case "stop":
      return node.content || node.reasoning ? "" : "The answer is empty.";
    default:
      return `Ended: ${node.finish}.`;
  }
}

const duration = (ms) => (ms < 1000 ? `${Math.round(ms)} ms` : `${(ms / 1000).toFixed(1)} s`);

function statsText(stats) {
  if (!stats) return "";
  const { ttft, rate, prompt, cached, completion } = stats;
  return [
    completion && `${completion} tokens`,
    rate && `${rate < 100 ? rate.toFixed(1) : Math.round(rate)} tokens/s`,
    ttft && `TTFT ${duration(ttft)}`,
    cached != null && prompt && `${cached} of ${prompt} cached`,
  ].filter(Boolean).join(" · ");
}
