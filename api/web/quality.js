// The quality preset of a video: what the model offers, what it takes, and what it changes of the defaults.

import { $, duration, make, show } from "./dom.js";

const STANDARD = "lossless";

const listed = (card) => card.presets || [];
const chosen = (card) => listed(card).find((preset) => preset.name === $("quality").value);

// The value of each field that a request leaves out, under the chosen preset.
export const defaultsOf = (card) => ({ ...card.defaults, ...chosen(card)?.defaults });

export const quality = () => $("quality").value || STANDARD;

// A refused preset stays in the list, to say why it can't be asked for.
export function drawQuality(card, wanted = quality()) {
  $("quality").replaceChildren(...listed(card).map((preset) => {
    const seconds = preset.expected_seconds === null ? "" : `, about ${duration(preset.expected_seconds)}`;
    const text = `${preset.name}${preset.offered ? seconds : " (not offered)"}`;
    return make("option", { value: preset.name, text, title: preset.offered ? preset.summary : preset.reason, disabled: !preset.offered });
  }));
  const offered = listed(card).filter((preset) => preset.offered).map((preset) => preset.name);
  $("quality").value = [wanted, STANDARD, offered[0]].find((name) => offered.includes(name)) ?? STANDARD;
  show($("quality-field"), listed(card).length > 1);
  describe(card);
}

export function describe(card) {
  const preset = chosen(card);
  const seconds = preset?.expected_seconds ?? null;
  $("quality-help").textContent = preset ? preset.summary + (seconds === null ? "" : `; about ${duration(seconds)} of computing`) : "";
}
