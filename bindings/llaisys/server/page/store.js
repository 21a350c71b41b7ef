// Chats, kept in this browser. A chat is a tree of messages in an array: an edited question and a regenerated answer
// are siblings of the first one, and nothing is lost. localStorage, and not IndexedDB: its writes are done when they
// return, so that an answer survives a reload in its middle.
//
//   chat    {id, title, updated, settings, nodes, leaf}   leaf: index of the last message shown, -1 for none
//   node    {role, content, parent, ...}                  parent: an earlier index, -1 for a first message
//           answers also have reasoning, stats, finish, error (see answer.js)

const CHAT = "refrain.chat.";

/** A small value by name: theme, key, model, defaults of the settings. */
export function recall(name) {
  try {
    return localStorage.getItem(`refrain.${name}`);
  } catch {
    return null;
  }
}

export function remember(name, value) {
  try {
    if (value) localStorage.setItem(`refrain.${name}`, value);
    else localStorage.removeItem(`refrain.${name}`);
  } catch {
    // Storage is forbidden or full: it holds until the page is closed.
  }
}

/** All chats, by id. What is not a chat is left alone. */
export function loadChats() {
  const chats = new Map();
  try {
    for (const key of Object.keys(localStorage)) {
      const chat = key.startsWith(CHAT) && parse(localStorage.getItem(key));
      if (chat) chats.set(chat.id, chat);
    }
  } catch {
    // Storage is forbidden: chats last until the page is closed.
  }
  return chats;
}

/** The id in a storage event's key, if it is a chat's. */
export const chatId = (key) => (key?.startsWith(CHAT) ? key.slice(CHAT.length) : null);

export function parse(text) {
  try {
    const chat = JSON.parse(text);
    const sound = (node, i) => typeof node.content === "string" && node.parent >= -1 && node.parent < i;
    return typeof chat.id === "string" && chat.settings.sampling && chat.nodes.every(sound) && chat.leaf < chat.nodes.length ? chat : null;
  } catch {
    return null;
  }
}

/** False if the browser did not keep it. */
export function saveChat(chat) {
  try {
    localStorage.setItem(CHAT + chat.id, JSON.stringify(chat));
    return true;
  } catch {
    return false;
  }
}

export const removeChat = (id) => remember(`chat.${id}`, null);

export function newChat(settings) {
  // not crypto.randomUUID: it is for secure origins only
  const id = Date.now().toString(36) + Math.random().toString(36).slice(2, 8);
  return { id, title: "", updated: Date.now(), settings, nodes: [], leaf: -1 };
}

/** Adds a message below parent, shows it, and returns its index. */
export function add(chat, parent, node) {
  chat.nodes.push({ content: "", ...node, parent });
  chat.leaf = chat.nodes.length - 1;
  chat.updated = Date.now();
  return chat.leaf;
}

/** Indices of the messages from the first one to index. */
export function path(chat, index = chat.leaf) {
  const indices = [];
  for (; index >= 0; index = chat.nodes[index].parent) indices.unshift(index);
  return indices;
}

/** Indices of the versions of a message, itself among them. */
export function versions(chat, index) {
  const { parent } = chat.nodes[index];
  return [...chat.nodes.keys()].filter((i) => chat.nodes[i].parent === parent);
}

/** Shows a version of a message, and what was last said below it. */
export function choose(chat, index) {
  const below = new Set([index]);
  chat.leaf = index;
  chat.nodes.forEach((node, i) => {
    if (!below.has(node.parent)) return;
    below.add(i);
    chat.leaf = i;
  });
}

/** Whether all words of the query occur in the chat. */
export function matches(chat, query) {
  const text = [chat.title, ...chat.nodes.map((node) => node.content)].join("\n").toLowerCase();
  return query.toLowerCase().split(/\s+/).every((word) => text.includes(word));
}
