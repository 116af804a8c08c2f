// The page's start and its slow heartbeat. No framework, no build step, nothing from other hosts.

import { Problem, hasKey, json, setKey, submit } from "./client.js";
import { $, show } from "./dom.js";
import { clearErrors, fillFrom, loadModels, readyRequest, showErrors, startForm } from "./form.js";
import { draw, dropCard, refreshGallery, refreshNodes, refreshQueue } from "./lists.js";
import { clear, select, selected, startStage } from "./stage.js";

const NOTE = "reel-note";
let admin = false;
let beat = 0;
let timer = null;
let busy = false;

async function readiness() {
  const [state, text] = await fetch("/readyz").then(async (response) => {
    const { ready, missing } = await response.json();
    if (ready) return ["ok", "Ready"];
    return missing.every((name) => name === "node") ? ["wait", "Waiting for a node"] : ["bad", `Not ready: ${missing.join(", ")}`];
  }).catch(() => ["bad", "Can’t reach the server"]);
  $("ready").dataset.state = state;
  if ($("ready-text").textContent !== text) $("ready-text").textContent = text;
}

async function open() {
  const who = await json("/v1/key");
  admin = who.scopes.includes("admin");
  const high = who.scopes.includes("priority_high");
  $("priority").replaceChildren(...["normal", "low", ...(high ? ["high"] : [])].map((name) => new Option(name)));
  $("key-name").textContent = who.name || "";
  show($("gate"), false);
  show($("main"), true);
  show($("key-open"), true);
  show($("nodes"), admin);
  await loadModels();
  const wanted = /^#(job_[a-z0-9]+)$/.exec(location.hash);
  if (wanted) select(wanted[1]);
  tick();
}

function gate(message = "") {
  clearTimeout(timer);
  show($("main"), false);
  show($("gate"), true);
  show($("key-open"), false);
  $("key-name").textContent = "";
  $("key-error").textContent = message;
  $("key").value = "";
  $("key").focus();
}

// Nothing of one key's may be seen under the next: the page starts anew, with only the reason kept.
function leave(message = "") {
  clearTimeout(timer);
  setKey("", false);
  clear();
  $("form").reset(); // some browsers fill a reloaded form in again
  if (message) sessionStorage.setItem(NOTE, message);
  location.reload();
}

// Lists refresh every 3 s while the page is seen; the selected job has its own event stream.
async function tick() {
  clearTimeout(timer);
  if (!hasKey()) return;
  if (!document.hidden) {
    const slow = beat % 5 === 0;
    const work = [refreshQueue(pick)];
    if (slow) work.push(readiness(), refreshGallery(pick));
    if (slow && $("model").options.length === 0) work.push(loadModels());
    if (admin) work.push(refreshNodes(pick));
    const failed = (await Promise.allSettled(work)).find((item) => item.status === "rejected");
    if (failed?.reason instanceof Problem && failed.reason.status === 401) { leave("The key is no longer valid."); return; }
    if (failed) readiness();
    beat += 1;
  }
  timer = setTimeout(tick, 3000);
}

async function pick(id) {
  await select(id);
  draw(pick);
  if (matchMedia("(max-width: 860px)").matches) $("stage").scrollIntoView({ block: "start" });
}

async function send() {
  if (busy) return;
  busy = true;
  clearErrors();
  $("submit").disabled = true;
  try {
    const job = await submit(await readyRequest());
    await pick(job.id);
    refreshQueue(pick).catch(() => {});
  } catch (error) {
    showErrors(error instanceof Problem ? error : new Problem(0, { detail: `Something went wrong on this page (${error.name}).` }));
  } finally {
    busy = false;
    $("submit").disabled = false;
  }
}

function start() {
  startForm(send);
  startStage({
    onChange: (job) => {
      if (job.state === "succeeded") refreshGallery(pick).catch(() => {});
      refreshQueue(pick).catch(() => {});
    },
    onDelete: (id) => dropCard(id, pick),
    onAgain: (job) => { fillFrom(job.request, null); send(); },
    onReuse: (job) => { fillFrom(job.request); $("prompt").focus(); },
  });
  $("more").addEventListener("click", () => refreshGallery(pick, true).catch(() => {}));
  $("key-open").addEventListener("click", () => leave());
  $("key-form").addEventListener("submit", async (event) => {
    event.preventDefault();
    setKey($("key").value.trim(), $("key-keep").checked);
    try { await open(); } catch (error) { setKey("", false); gate(error.message); }
  });
  document.addEventListener("visibilitychange", () => { if (!document.hidden) { beat = 0; tick(); } });
  addEventListener("hashchange", () => { const wanted = /^#(job_[a-z0-9]+)$/.exec(location.hash); if (wanted && wanted[1] !== selected() && hasKey()) select(wanted[1]); });
  readiness();
  if (hasKey()) open().catch((error) => gate(error.status === 401 ? "" : error.message));
  else gate(sessionStorage.getItem(NOTE) || "");
  sessionStorage.removeItem(NOTE);
}

start();
