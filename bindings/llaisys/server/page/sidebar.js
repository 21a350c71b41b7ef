// The list of chats: search, rename, delete.

import { $, h, iconButton, isEnter } from "./dom.js";
import { matches } from "./store.js";

/** actions: {chats(), current(), running(chat), open(chat), rename(chat, title), remove(chat)} */
export function sidebarView(actions) {
  const list = $("#chats");
  const search = $("#search");
  search.addEventListener("input", update);

  function update() {
    const query = search.value.trim();
    const shown = [...actions.chats()].filter((chat) => matches(chat, query)).sort((a, b) => b.updated - a.updated);
    list.replaceChildren(...shown.map(row));
    if (query && !shown.length) list.append(h("li", { class: "hint" }, "No chat has these words."));
  }

  function row(chat) {
    const open = h("button", {
      type: "button", class: "open", title: chat.title, "aria-current": actions.current() === chat && "page",
      onclick: () => actions.open(chat),
    }, chat.title);
    const item = h("li", { class: actions.running(chat) ? "running" : null },
      open,
      iconButton("edit", `Rename ${chat.title}`, () => rename(chat, open)),
      iconButton("delete", `Delete ${chat.title}`, () => actions.remove(chat)));
    return item;
  }

  function rename(chat, open) {
    const input = h("input", { "aria-label": "Title of the chat", maxlength: 200, class: "open" });
    let kept = true;
    input.value = chat.title;
    input.addEventListener("keydown", (event) => {
      if (event.key === "Escape") kept = false;
      if (event.key !== "Escape" && !isEnter(event)) return;
      event.stopPropagation();
      input.blur();
      // the row is new: the focus goes back to its like
      list.querySelector("[aria-current]")?.focus();
    });
    input.addEventListener("blur", () => {
      const title = input.value.trim();
      if (kept && title) actions.rename(chat, title);
      update();
    });
    open.replaceWith(input);
    input.select();
  }

  return { update };
}
