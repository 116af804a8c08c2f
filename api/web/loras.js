// The LoRAs of a video: one row each, with its strength and the expert that it is for.

import { $, make, show } from "./dom.js";

const EXPERTS = [["both", "both"], ["high", "high noise"], ["low", "low noise"]];
let names = []; // that the model has
let counted = 0;

const rows = () => [...$("loras").children];
const part = (row, name) => row.querySelector(`[name="${name}"]`);

// Rows of LoRAs that the chosen model doesn't have go.
export function drawLoras(card, changed) {
  names = card.loras || [];
  show($("loras-field"), names.length > 0);
  for (const row of rows()) if (!names.includes(part(row, "lora").value)) row.remove();
  $("lora-add").onclick = () => { part(addRow({}), "lora").focus(); changed(); };
  $("loras").onclick = (event) => {
    const row = event.target.closest("[data-remove]")?.parentElement;
    if (!row) return;
    row.remove();
    $("lora-add").focus(); // the focus would fall to the page's top
    changed();
  };
}

function addRow({ name = names[0], strength = 1, expert = "both" }) {
  counted += 1;
  const described = { "aria-describedby": "loras-error" };
  const row = make("div", { class: "lora", role: "group", "aria-label": `LoRA ${counted}` },
    make("select", { name: "lora", "aria-label": "LoRA", ...described }, ...names.map((each) => make("option", { text: each }))),
    make("input", { type: "number", name: "strength", min: "-10", max: "10", step: "0.1", value: String(strength), "aria-label": "Strength", ...described }),
    make("select", { name: "expert", "aria-label": "Expert", ...described }, ...EXPERTS.map(([value, text]) => make("option", { value, text }))),
    make("button", { type: "button", class: "quiet small", "data-remove": "", text: "Remove" }));
  part(row, "lora").value = name;
  part(row, "expert").value = expert;
  $("loras").append(row);
  return row;
}

export function fillLoras(loras) {
  $("loras").replaceChildren();
  for (const lora of loras || []) if (names.includes(lora.name)) addRow(lora);
}

// As the request wants them; what is at its default is left out.
export function readLoras() {
  return rows().map((row) => {
    const [strength, expert] = [part(row, "strength").value.trim(), part(row, "expert").value];
    return {
      name: part(row, "lora").value,
      ...(strength !== "1" && { strength: strength === "" ? null : Number(strength) }),
      ...(expert !== "both" && { expert }),
    };
  });
}

// What an error at `loras`, `loras.1` or `loras.1.strength` is about.
export function loraInputs(field) {
  const [, place, name] = field.split(".");
  const row = rows()[Number(place)];
  if (!row) return [...$("loras").querySelectorAll("select, input")];
  const one = part(row, name === "name" ? "lora" : name);
  return one ? [one] : [...row.querySelectorAll("select, input")];
}
