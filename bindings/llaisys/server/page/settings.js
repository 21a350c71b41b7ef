// The settings dialog.

import { $ } from "./dom.js";

const NUMBERS = ["temperature", "top_p", "top_k", "max_tokens", "seed"];

/** Settings as they were remembered, or none. */
export function readSettings(text) {
  try {
    const { system, think, sampling } = JSON.parse(text);
    return { system: String(system ?? ""), think: String(think ?? ""), sampling: { ...sampling } };
  } catch {
    return { system: "", think: "", sampling: {} };
  }
}

/** Returns open(settings, key, problem), which shows the dialog; save(settings, key) gets what was entered. */
export function settingsDialog(save) {
  const dialog = $("#settings");
  const form = dialog.querySelector("form");
  const fields = form.elements;
  const error = form.querySelector(".error");
  const tell = (words) => {
    error.textContent = words;
    error.hidden = !words;
  };

  form.querySelector("[value=cancel]").addEventListener("click", () => dialog.close());
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    const bad = NUMBERS.map((name) => fields[name]).find((field) => !field.validity.valid);
    if (bad) {
      tell(bad.validationMessage);
      return bad.focus();
    }
    const sampling = {};
    for (const name of NUMBERS) if (fields[name].value !== "") sampling[name] = fields[name].valueAsNumber;
    dialog.close();
    save({ system: fields.system.value.trim(), think: fields.think.value, sampling }, fields.key.value.trim());
  });

  return (settings, key, problem = "") => {
    if (dialog.open) return;
    fields.system.value = settings.system;
    fields.think.value = settings.think;
    for (const name of NUMBERS) fields[name].value = settings.sampling[name] ?? "";
    fields.key.value = key;
    tell(problem);
    dialog.showModal();
    if (problem) fields.key.focus();
  };
}
