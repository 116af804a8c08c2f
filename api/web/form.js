// The composer: fields of the chosen model, ready-made shapes, errors at the field, the request as a curl command.

import { Problem, json, upload } from "./client.js";
import { $, make, pretty, show } from "./dom.js";
import { drawLoras, fillLoras, loraInputs, readLoras } from "./loras.js";
import { defaultsOf, describe, drawQuality, quality } from "./quality.js";

const FIELDS = ["prompt", "image", "quality", "loras", "model", "size", "frame_num", "sampling_steps", "seed", "guide_scale", "shift", "sample_solver", "priority", "negative_prompt"];
const INPUTS = { guide_scale: ["guide_low", "guide_high"] };
let models = [];
let picture = null; // {file, id, url}

const model = () => models.find((card) => card.id === $("model").value) || models[0];
// The inputs of a field as errors name it, which may be a part of one: loras.0.strength.
const inputs = (name) => {
  const field = name.split(".")[0];
  return field === "loras" ? loraInputs(name) : (INPUTS[field] || [field]).map($).filter(Boolean);
};

export async function loadModels() {
  models = (await json("/v1/models")).data;
  const chosen = $("model").value;
  $("model").replaceChildren(...models.map((card) => make("option", { value: card.id, text: card.live ? card.id : `${card.id} (no node now)` })));
  if (models.some((card) => card.id === chosen)) $("model").value = chosen;
  $("submit").disabled = models.length === 0;
  if (models.length && !chosen) applyModel();
  return models.length;
}

function applyModel() {
  const card = model();
  if (!card) return;
  $("size").replaceChildren(...card.sizes.map((size) => make("option", { value: size, text: pretty(size) })));
  $("sample_solver").replaceChildren(...card.sample_solvers.map((name) => make("option", { text: name })));
  show($("solver-field"), card.sample_solvers.length > 1);
  show($("image-field"), card.task !== "t2v");
  $("frame_num").max = card.max_frame_num;
  $("sampling_steps").max = card.max_sampling_steps;
  drawQuality(card);
  drawLoras(card, refresh);
  applyDefaults(card);
}

function applyDefaults(card) {
  const d = defaultsOf(card);
  drawShapes(card);
  Object.assign($("size"), { value: d.size });
  Object.assign($("frame_num"), { value: d.frame_num });
  Object.assign($("sampling_steps"), { value: d.sampling_steps });
  Object.assign($("guide_low"), { value: d.guide_scale[0] });
  Object.assign($("guide_high"), { value: d.guide_scale[1] });
  Object.assign($("shift"), { value: d.shift });
  Object.assign($("sample_solver"), { value: d.sample_solver });
  last = d;
  refresh();
}

// Another preset has other defaults: they replace those of the last one, and nothing that was chosen by hand.
let last = {};

function applyQuality() {
  const card = model();
  const [before, now] = [{ ...card.defaults, ...last }, defaultsOf(card)];
  for (const name of ["sampling_steps", "shift"]) if (Number($(name).value) === before[name]) $(name).value = now[name];
  ["guide_low", "guide_high"].forEach((name, index) => { if (Number($(name).value) === before.guide_scale[index]) $(name).value = now.guide_scale[index]; });
  last = now;
  drawShapes(card);
  describe(card);
  refresh();
}

const area = (size) => size.split("*").reduce((a, b) => a * Number(b), 1);
const odd = (frames) => 4 * Math.max(1, Math.round((frames - 1) / 4)) + 1;

// A shape names three fields; everything else stays at its default.
function shapes(card) {
  const d = defaultsOf(card);
  const wide = ([w, h]) => Number(w) >= Number(h);
  const same = card.sizes.filter((size) => wide(size.split("*")) === wide(d.size.split("*")));
  const small = [...same].sort((a, b) => area(a) - area(b))[0] || d.size;
  const quick = { size: small, frame_num: Math.min(d.frame_num, odd(d.frame_num / 2)), sampling_steps: Math.max(1, Math.round(d.sampling_steps / 2)) };
  const normal = { size: d.size, frame_num: d.frame_num, sampling_steps: d.sampling_steps };
  const long = { ...normal, frame_num: card.max_frame_num };
  return [["Quick look", quick], ["Standard", normal], ["Longest", long]];
}

function drawShapes(card) {
  const legend = make("legend", { text: "Size and length" });
  $("shapes").replaceChildren(legend, ...shapes(card).map(([name, values], index) => {
    const radio = make("input", { type: "radio", name: "shape", value: String(index) });
    radio.addEventListener("change", () => { for (const [field, value] of Object.entries(values)) $(field).value = value; refresh(); });
    const note = `${pretty(values.size)}, ${(values.frame_num / card.fps).toFixed(1)} s`;
    return make("label", { class: "shape" }, radio, make("span", {}, make("b", { text: name }), make("small", { text: note })));
  }));
}

// The demo model knows shapes that move; the large ones know the world.
const IDEAS = {
  demo: ["A red circle bounces on a dark background", "A small yellow star spins in front of a large blue square", "A striped green triangle glides slowly to the left at night",
    "A purple heart grows while an orange ring drifts to the right", "A dotted white ball moves up past a cross, the camera pans left"],
  world: ["A red fox trots through fresh snow at dawn. Soft light, slow pan, breath in the cold air.", "A paper boat drifts down a rain-filled gutter. Macro, warm evening light.",
    "An old lighthouse in a storm, waves breaking over the rocks. Slow dolly in.", "Ink blooms in clear water against a white studio wall. Slow motion.",
    "A tram crosses a foggy bridge at night, neon reflected in the wet street.", "Hot air balloons rise over a valley of poppies at sunrise. Wide shot."],
};
let idea = Math.floor(Math.random() * 60);

function giveIdea() {
  const list = IDEAS[/demo|tiny/.test(model()?.id || "") ? "demo" : "world"];
  idea += 1;
  $("prompt").value = list[idea % list.length];
  refresh();
}

const number = (id) => ($(id).value.trim() === "" ? undefined : Number($(id).value));

// The request's body, exactly as it will be sent. Fields at the model's default are left out.
export function readRequest() {
  const card = model();
  const d = card ? defaultsOf(card) : {};
  const body = { prompt: $("prompt").value };
  const put = (name, value, standard) => { if (value !== undefined && value !== "" && value !== standard) body[name] = value; };
  if (models.length > 1 || !card) put("model", $("model").value);
  put("quality", quality(), "lossless");
  put("size", $("size").value, d.size);
  put("frame_num", number("frame_num"), d.frame_num);
  put("sampling_steps", number("sampling_steps"), d.sampling_steps);
  const guide = [number("guide_low"), number("guide_high")];
  if (d.guide_scale && (guide[0] !== d.guide_scale[0] || guide[1] !== d.guide_scale[1])) {
    body.guide_scale = [guide[0] ?? null, guide[1] ?? null];
  }
  put("shift", number("shift"), d.shift);
  put("sample_solver", $("sample_solver").value, d.sample_solver);
  const seed = $("seed").value.trim();
  if (seed !== "") body.seed = /^-?\d+$/.test(seed) && Number.isSafeInteger(Number(seed)) ? Number(seed) : seed;
  put("negative_prompt", $("negative_prompt").value);
  put("priority", $("priority").value, "normal");
  const loras = readLoras();
  if (loras.length) body.loras = loras;
  if (picture && card && card.task !== "t2v") body.image = picture.id || "UPLOAD_ID";
  return body;
}

// A whole number that JavaScript would round is refused here: another seed than the one asked for helps nobody.
function checkSeed({ seed }) {
  if (typeof seed !== "string" || !/^\d+$/.test(seed)) return;
  const expected = `0 to ${Number.MAX_SAFE_INTEGER} on this page; the API itself takes up to 2^63-1`;
  throw new Problem(422, { errors: [{ field: "seed", got: seed, expected }] });
}

// Whatever an upload's errors name (file, body, Content-Type), the image's field is where they can be mended.
function atImage(error) {
  if (!(error instanceof Problem)) return error;
  const errors = [401, 403].includes(error.status) ? [] : error.errors.map((item) => ({ ...item, field: "image" }));
  return new Problem(error.status, { detail: error.message, type: error.type, errors });
}

export async function readyRequest() {
  checkSeed(readRequest());
  if (picture && !picture.id) {
    try { picture.id = (await upload(picture.file)).id; } catch (error) { throw atImage(error); }
    drawCurl();
  }
  return readRequest();
}

// Fill the form from a job's resolved request.
export function fillFrom(request, seed = request.seed) {
  $("prompt").value = request.prompt;
  if (models.some((card) => card.id === request.model)) { $("model").value = request.model; applyModel(); }
  const card = model();
  if (card) { drawQuality(card, request.quality || "lossless"); last = defaultsOf(card); drawShapes(card); fillLoras(request.loras); }
  for (const name of ["size", "frame_num", "sampling_steps", "shift", "sample_solver", "negative_prompt"]) $(name).value = request[name];
  [$("guide_low").value, $("guide_high").value] = request.guide_scale;
  $("seed").value = seed ?? "";
  // A job without a picture clears the one that was chosen; its own is kept, with its preview.
  if (!request.image) setPicture(null);
  else if (picture?.id !== request.image) setPicture({ id: request.image });
  refresh();
}

function setPicture(value) {
  if (picture?.url) URL.revokeObjectURL(picture.url);
  picture = value;
  show($("image-preview"), Boolean(value?.url));
  show($("image-clear"), Boolean(value));
  if (value?.url) { $("image-preview").src = value.url; $("image-preview").alt = "The chosen first image"; }
  else $("image").value = "";
  drawCurl();
}

export function clearErrors() {
  for (const field of [...FIELDS, "form"]) {
    const slot = $(`${field}-error`);
    if (slot) slot.textContent = "";
    for (const input of inputs(field)) input.removeAttribute("aria-invalid");
  }
}

// Each error at its field; what has no field, above the button. The first wrong field takes the focus.
export function showErrors(problem) {
  const loose = [];
  let first = null;
  for (const item of problem.errors) {
    const field = FIELDS.find((name) => item.field === name || item.field.startsWith(`${name}.`));
    if (!field) { loose.push(`${item.field}: ${item.expected}`); continue; }
    const slot = $(`${field}-error`);
    const words = field === "prompt" ? `Expected ${item.expected}.` : `Got ${item.got}. Expected ${item.expected}.`;
    slot.textContent = [slot.textContent, words].filter(Boolean).join(" ");
    const wrong = inputs(item.field);
    for (const input of wrong) input.setAttribute("aria-invalid", "true");
    if (field === "quality") show($("quality-field"), true);
    else if (field !== "prompt" && field !== "image") $("details").open = true;
    first ??= wrong[0];
  }
  if (!problem.errors.length) loose.push(problem.message);
  $("form-error").textContent = loose.join(" ");
  (first || $("form-error")).focus();
}

function drawCurl() {
  const quote = (text) => `'${text.replaceAll("'", "'\\''")}'`;
  const lines = [`curl ${location.origin}/v1/jobs \\`, "  -H \"Authorization: Bearer $REEL_API_KEY\" \\", "  -H 'Content-Type: application/json' \\", `  -d ${quote(JSON.stringify(readRequest()))}`];
  $("curl").textContent = lines.join("\n");
}

export function refresh() {
  $("prompt-count").textContent = `${[...$("prompt").value].length} / 2000`; // characters, as the API counts
  drawCurl();
  const card = model(); // none until the models are known
  if (!card) return;
  const frames = Number($("frame_num").value);
  $("frame-note").textContent = `${frames} · ${(frames / card.fps).toFixed(1)} s at ${card.fps} fps`;
  $("steps-note").textContent = $("sampling_steps").value;
  $("digest").textContent = `${pretty($("size").value)}, ${frames} frames, ${$("sampling_steps").value} steps`;
  const values = shapes(card);
  for (const radio of $("shapes").querySelectorAll("input")) {
    const [, shape] = values[Number(radio.value)];
    radio.checked = Object.entries(shape).every(([field, value]) => String($(field).value) === String(value));
  }
}

export function startForm(onSubmit) {
  $("form").addEventListener("submit", (event) => { event.preventDefault(); onSubmit(); });
  $("form").addEventListener("input", (event) => { if (event.target.name !== "shape") refresh(); });
  $("form").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); onSubmit(); }
  });
  $("model").addEventListener("change", applyModel);
  $("quality").addEventListener("change", applyQuality);
  $("idea").addEventListener("click", giveIdea);
  const take = (file) => { if (file) setPicture({ file, url: URL.createObjectURL(file) }); };
  $("image").addEventListener("change", () => take($("image").files[0]));
  $("image-clear").addEventListener("click", () => setPicture(null));
  const drop = $("image-drop");
  drop.addEventListener("dragover", (event) => { event.preventDefault(); drop.classList.add("over"); });
  drop.addEventListener("dragleave", () => drop.classList.remove("over"));
  drop.addEventListener("drop", (event) => { event.preventDefault(); drop.classList.remove("over"); take(event.dataTransfer.files[0]); });
  $("curl-copy").addEventListener("click", async () => {
    const button = $("curl-copy");
    try { await navigator.clipboard.writeText($("curl").textContent); button.textContent = "Copied"; }
    catch { getSelection().selectAllChildren($("curl")); button.textContent = "Selected: copy it with the keyboard"; }
    setTimeout(() => { button.textContent = "Copy"; }, 2500);
  });
}
