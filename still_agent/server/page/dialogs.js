// Questions to the user, as modal dialogs: the browser keeps the focus inside and gives it back.

import { el } from "./dom.js";

/**
 * Ask for something. Resolves to the values of `fields` by their names, or to null.
 * fields: {name, label, value, type ("text", "password", "area", "file"), required, hint}
 */
export function ask({ title, text, fields = [], action, danger = false }) {
  return new Promise((resolve) => {
    const inputs = new Map(fields.map((field) => [field.name, input(field)]));
    const form = el(
      "form", { onsubmit: submit },
      el("h2", {}, title),
      text ? el("p", {}, text) : null,
      ...fields.map((field) => el(
        "label", {}, field.label, inputs.get(field.name),
        field.hint ? el("small", {}, field.hint) : null,
      )),
      el(
        "div", { class: "actions" },
        el("button", { type: "button", class: "plain", onclick: () => dialog.close() }, "Cancel"),
        el("button", { type: "submit", class: danger ? "danger" : null }, action),
      ),
    );
    const dialog = el("dialog", { "aria-label": title, onclose: closed }, form);
    let given = null;

    function submit(event) {
      event.preventDefault();
      given = {};
      for (const [name, input] of inputs) {
        given[name] = input.type === "file" ? input.files[0] ?? null : input.value;
      }
      dialog.close();
    }
    function closed() {
      dialog.remove();
      resolve(given);
    }
    document.body.append(dialog);
    dialog.showModal();
    const first = [...inputs.values()][0];
    if (first) first.focus();
    if (first?.select && first.type !== "file") first.select();
  });
}

function input({ type = "text", value = "", required = false, name }) {
  if (type === "area") {
    const area = el("textarea", { name, rows: 6, required });
    area.value = value;
    return area;
  }
  const one = el("input", { name, type, required, autocomplete: "off", spellcheck: "false" });
  if (type !== "file") one.value = value;
  return one;
}
