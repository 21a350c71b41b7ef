// The page: one chat is shown, any number of them may be answering.

import { ApiError, health, models } from "./api.js";
import { answer } from "./answer.js";
import { $, grow, h, isSend, say } from "./dom.js";
import { messageView } from "./message.js";
import { readSettings, settingsDialog } from "./settings.js";
import { sidebarView } from "./sidebar.js";
import { add, chatId, choose, loadChats, newChat, parse, path, recall, remember, removeChat, saveChat, versions } from "./store.js";

const EXAMPLES = ["Who are you?", "What is 12 + 30?", "How does a prefix cache help?"];
const SAVE_EVERY = 1000; // ms, while an answer streams
const PHONE = matchMedia("(max-width: 760px)");

const chats = loadChats();
const runs = new Map(); // chat id -> {controller, index}
const views = new Map(); // index of a message of the chat shown -> its view
let chat = null; // the chat shown; it is in chats from its first message on
let key = recall("key") ?? "";
let leaving = false; // the page is being closed
let follow = true; // the reader is at the end of the conversation

const scroller = $("#scroller");
const question = $("#question");

const sidebar = sidebarView({
  chats: () => chats.values(),
  current: () => chat,
  running: (other) => runs.has(other.id),
  open: (other) => go(other.id),
  rename(other, title) {
    other.title = title;
    save(other);
    if (other === chat) showTitle();
  },
  remove,
});

const openSettings = settingsDialog((settings, entered) => {
  chat.settings = settings;
  remember("settings", JSON.stringify(settings));
  if (chats.has(chat.id)) save(chat);
  if (entered === key) return;
  key = entered;
  remember("key", key);
  connect();
});

// --- chats

function show(next) {
  chat = next;
  follow = true;
  showMessages();
  showTitle();
  sidebar.update();
  if (!PHONE.matches) question.focus();
}

function showTitle() {
  document.title = chat.title ? `${chat.title} - Refrain` : "Refrain";
  $("#title").textContent = chat.title || "New chat";
}

/** The chat that the address names, or a new one. */
function showAddressed() {
  show(chats.get(location.hash.slice(1)) ?? newChat(readSettings(recall("settings"))));
}

function go(id) {
  closeSidebar();
  if (location.hash.slice(1) === id) showAddressed();
  else location.hash = id;
}

function save(saved) {
  if (!saveChat(saved)) toast("The browser's storage is full: this chat is not kept. Delete some others.");
}

function remove(removed) {
  runs.get(removed.id)?.controller.abort();
  chats.delete(removed.id);
  removeChat(removed.id);
  if (removed === chat) go("");
  else sidebar.update();
  toast(`Deleted “${removed.title}”.`, "Undo", () => {
    chats.set(removed.id, removed);
    save(removed);
    go(removed.id);
  });
}

// --- messages

function showMessages() {
  const before = new Map(views);
  const shown = path(chat);
  views.clear();
  for (const index of shown) {
    const { length } = versions(chat, index);
    const old = before.get(index);
    // What has not changed stays as the reader has left it, with its thoughts unfolded.
    views.set(index, old?.node === chat.nodes[index] && old.length === length ? old : view(index));
  }
  $("#messages").replaceChildren(...[...views.values()].map(({ element }) => element));
  $("#welcome").hidden = shown.length > 0;
  showRunning();
  stayAtEnd();
}

function view(index) {
  const all = versions(chat, index);
  const at = all.indexOf(index);
  const node = chat.nodes[index];
  const shown = messageView(node, [at + 1, all.length], {
    edit: (text) => ask(text, node.parent),
    again: () => again(index),
    running: () => runs.get(chat.id)?.index === index,
    show(step) {
      if (runs.has(chat.id)) return;
      choose(chat, all[at + step]);
      save(chat);
      showMessages();
    },
  });
  return { ...shown, node, length: all.length };
}

function showRunning() {
  const running = runs.has(chat.id);
  $("#send").hidden = running;
  $("#stop").hidden = !running;
}

// --- asking

function ask(text, parent) {
  if (runs.has(chat.id)) return;
  chats.set(chat.id, chat);
  chat.title ||= [...text.split("\n")[0]].slice(0, 60).join("");
  run(add(chat, parent, { role: "user", content: text }));
}

/** Another answer to the same question; one that has no words gives way to it. */
function again(index) {
  if (runs.has(chat.id)) return;
  const { parent, content, role } = chat.nodes[index];
  if (content) return run(parent);
  chat.nodes[index] = { role, content, parent };
  run(parent, index);
}

async function run(parent, index = add(chat, parent, { role: "assistant" })) {
  const asked = chat;
  const controller = new AbortController();
  let saved = performance.now();
  let frame = 0;
  let cost = 0; // of the last update on the screen, in ms

  const draw = () => {
    frame = 0;
    if (chat !== asked) return;
    const start = performance.now();
    views.get(index)?.update();
    stayAtEnd();
    cost = performance.now() - start;
  };
  // A long block costs more to draw: it is drawn less often, so that the page stays quick.
  const changed = () => {
    if (!frame) frame = setTimeout(() => requestAnimationFrame(draw), 3 * cost);
    if (performance.now() - saved < SAVE_EVERY) return;
    saved = performance.now();
    save(asked);
  };

  runs.set(asked.id, { controller, index });
  follow = true;
  save(asked);
  history.replaceState(null, "", `#${asked.id}`);
  showMessages();
  showTitle();
  sidebar.update();

  await answer(asked, index, { model: $("#model").value, key, signal: controller.signal, changed });

  if (leaving) return;
  runs.delete(asked.id);
  clearTimeout(frame);
  if (chats.has(asked.id)) save(asked);
  sidebar.update();
  if (chat !== asked) return;
  views.get(index)?.update();
  showRunning();
  stayAtEnd();
  const { error } = asked.nodes[index];
  say(error ? error.message : "The answer is complete.");
  if (error?.status === 401) openSettings(chat.settings, key, error.message);
}

const stop = () => runs.get(chat.id)?.controller.abort();

$("#composer").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = question.value.trim();
  if (!text || runs.has(chat.id)) return;
  question.value = "";
  grow(question);
  ask(text, chat.leaf);
});
$("#stop").addEventListener("click", () => {
  stop();
  question.focus();
});
question.addEventListener("input", () => grow(question));
question.addEventListener("keydown", (event) => {
  if (!isSend(event)) return;
  event.preventDefault();
  $("#composer").requestSubmit();
});
for (const text of EXAMPLES) {
  $("#examples").append(h("li", {}, h("button", { type: "button", onclick: () => ask(text, -1) }, text)));
}

// --- the end of the conversation

function stayAtEnd() {
  if (follow) scroller.scrollTop = scroller.scrollHeight;
}

scroller.addEventListener("scroll", () => {
  follow = scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < 40;
  $("#bottom").hidden = follow;
});
// What is drawn at the end moves it away; only the reader's hand says that the page is not to go along.
new ResizeObserver(stayAtEnd).observe($("#messages"));
$("#bottom").addEventListener("click", () => {
  follow = true;
  stayAtEnd();
  question.focus();
});

// --- the frame: sidebar, theme, keys, toasts

const sidebarOpen = () => $("#menu").getAttribute("aria-expanded") === "true";

function setSidebar(open) {
  $("#menu").setAttribute("aria-expanded", open);
  $("#sidebar").inert = !open;
  $("#chat").inert = open && PHONE.matches;
}

/** On a phone it covers the conversation. */
function closeSidebar() {
  if (PHONE.matches && sidebarOpen()) {
    setSidebar(false);
    $("#menu").focus();
  }
}

$("#menu").addEventListener("click", () => {
  setSidebar(!sidebarOpen());
  if (PHONE.matches && sidebarOpen()) $("#new").focus();
});
$("#shade").addEventListener("click", closeSidebar);
$("#new").addEventListener("click", () => go(""));
PHONE.addEventListener("change", () => setSidebar(!PHONE.matches));

$("#settings-open").addEventListener("click", () => openSettings(chat.settings, key));
$("#theme").addEventListener("click", () => {
  const root = document.documentElement;
  const system = matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
  const next = (root.dataset.theme ?? system) === "dark" ? "light" : "dark";
  // back to what the system says is no choice: the page goes along with the system again
  if (next === system) delete root.dataset.theme;
  else root.dataset.theme = next;
  remember("theme", root.dataset.theme);
});
$("#model").addEventListener("change", () => remember("model", $("#model").value));

addEventListener("keydown", (event) => {
  if (document.querySelector("dialog[open]") || event.isComposing) return;
  if ((event.ctrlKey || event.metaKey) && event.key.toLowerCase() === "k") {
    event.preventDefault();
    go("");
    question.focus();
  } else if (event.key === "Escape") {
    if (PHONE.matches && sidebarOpen()) closeSidebar();
    else stop();
  }
});

let toastEnd = 0;

function toast(text, action, act) {
  const element = $("#toast");
  const close = () => (element.hidden = true);
  const button = action && h("button", { type: "button", onclick: () => (close(), act()) }, action);
  element.replaceChildren(text, ...(button ? [button] : []));
  element.hidden = false;
  clearTimeout(toastEnd);
  toastEnd = setTimeout(close, 8000);
}

// --- the server

async function connect() {
  const banner = $("#banner");
  for (;;) {
    const state = await health();
    banner.hidden = state === "ok";
    if (state === "ok") break;
    banner.textContent = state;
    await new Promise((resolve) => setTimeout(resolve, 1500));
  }
  try {
    showModels(await models(key));
  } catch (error) {
    if (error.status === 401) return openSettings(chat.settings, key, error.message);
    banner.textContent = error instanceof ApiError ? error.message : "The server's list of models makes no sense.";
    banner.hidden = false;
  }
}

function showModels(list) {
  const select = $("#model");
  select.replaceChildren(...list.map(({ id }) => h("option", { value: id }, id)));
  const chosen = recall("model");
  if (list.some(({ id }) => id === chosen)) select.value = chosen;
}

addEventListener("hashchange", showAddressed);
// What another tab has written; an answer that this one is writing goes first.
addEventListener("storage", (event) => {
  const id = chatId(event.key);
  if (!id || runs.has(id)) return;
  const changed = event.newValue && parse(event.newValue);
  if (changed) chats.set(id, changed);
  else chats.delete(id);
  if (chat.id === id && changed) {
    chat = changed;
    showMessages();
  }
  sidebar.update();
});
// A reload cuts the answers off: what there is of them is kept, and the cut is no error of theirs.
addEventListener("pagehide", () => {
  leaving = true;
  for (const id of runs.keys()) if (chats.has(id)) saveChat(chats.get(id));
});
// Back from the browser's cache of pages: its answers were cut off, and other tabs went on.
addEventListener("pageshow", (event) => event.persisted && location.reload());

setSidebar(!PHONE.matches);
showAddressed();
connect();
