// The big screen: the selected job, live while it runs, then its video.

import { follow, json } from "./client.js";
import { $, bytes, calm, fine, headline, isLive, pretty, setBar, show } from "./dom.js";

let job = null;
let stream = null; // AbortController of the open event stream
let turn = 0; // rises with each selection: an answer that comes after the next click is not shown
let said = ""; // last announcement, so that a screen reader hears changes only
let onChange = () => {};
const TITLE = document.title;

export const selected = () => job?.id || null;

export function startStage(handlers) {
  onChange = handlers.onChange;
  $("cancel").addEventListener("click", () => act(async () => { apply(await json(`/v1/jobs/${job.id}/cancel`, { method: "POST" })); }));
  $("delete").addEventListener("click", () => act(async () => {
    if (!confirm("Delete this video for good?")) return;
    const { id } = job;
    await json(`/v1/jobs/${id}`, { method: "DELETE" });
    clear();
    handlers.onDelete(id);
  }));
  $("again").addEventListener("click", () => handlers.onAgain(job));
  $("reuse").addEventListener("click", () => handlers.onReuse(job));
  const video = $("video");
  video.addEventListener("error", () => {
    if (job?.state !== "succeeded" || !video.dataset.url) return;
    // An address lives for minutes: a tab that was left open asks for a new one.
    if (Date.now() > Number(video.dataset.until)) play(job);
    // A bucket without CORS refuses the anonymous mode; plain playback still works there.
    else if (video.crossOrigin) { video.removeAttribute("crossorigin"); video.src = video.dataset.url; }
    else $("stage-error").textContent = "The video can’t be played here. Downloading it may still work.";
  });
  // The same for the file: a link that is too old gets a new address before it is followed.
  $("download").addEventListener("click", (event) => {
    if (Date.now() < Number(video.dataset.until) || !job) return;
    event.preventDefault();
    act(async () => { location.assign((await json(`/v1/jobs/${job.id}/video?download=true`)).url); });
  });
}

async function act(action) {
  $("stage-error").textContent = "";
  try { await action(); } catch (error) { $("stage-error").textContent = error.message; }
}

export function clear() {
  turn += 1;
  stream?.abort();
  job = null;
  stopVideo();
  $("screen").style.aspectRatio = "";
  document.title = TITLE;
  history.replaceState(null, "", location.pathname);
  for (const id of ["working", "ended", "caption"]) show($(id), false);
  show($("idle"), true);
}

// Show a job, given whole or by id, and follow it while it lives.
export async function select(jobOrId) {
  const mine = ++turn;
  stream?.abort();
  $("stage-error").textContent = "";
  stopVideo();
  said = "";
  job = null;
  try {
    const found = typeof jobOrId === "string" ? await json(`/v1/jobs/${encodeURIComponent(jobOrId)}`) : jobOrId;
    if (mine !== turn) return;
    apply(found);
  } catch (error) {
    if (mine !== turn) return;
    clear();
    $("announce").textContent = error.message;
    return;
  }
  history.replaceState(null, "", `#${job.id}`);
  if (isLive(job)) watch(job.id);
}

function watch(id) {
  stream = new AbortController();
  const { signal } = stream;
  follow(id, (type, data) => {
    if (signal.aborted || job?.id !== id) return true;
    if (data.version < job.version) return false; // an older event of a replayed stream
    apply({ ...job, ...data, queue_position: data.state === "queued" ? job.queue_position : null });
    if (!isLive(job)) refetch(id);
    return !isLive(job);
  }, (up) => { if (!signal.aborted && isLive(job)) $("work-fine").textContent = up ? fine(job) : "Reconnecting"; }, signal);
  placeInLine(id, signal);
}

async function refetch(id) {
  try {
    const fresh = await json(`/v1/jobs/${id}`);
    if (job?.id === id) apply(fresh);
  } catch (error) { $("stage-error").textContent = error.message; }
}

// The place in the queue changes without events of this job: ask for it while waiting.
async function placeInLine(id, signal) {
  while (!signal.aborted && job?.id === id && isLive(job)) {
    await new Promise((resolve) => { setTimeout(resolve, 3000); });
    if (!signal.aborted && job?.id === id && job.state === "queued") await refetch(id);
  }
}

function apply(next) {
  const before = job;
  job = next;
  const live = isLive(job);
  show($("idle"), false);
  show($("caption"), true);
  show($("working"), live);
  show($("ended"), !live && job.state !== "succeeded");
  const [width, height] = job.request.size.split("*").map(Number);
  $("screen").style.aspectRatio = width >= height ? `${width} / ${height}` : "1 / 1";
  $("said").textContent = job.request.prompt;
  $("facts").textContent = facts(job);
  for (const id of ["again", "reuse"]) show($(id), true);
  show($("cancel"), live);
  $("cancel").disabled = job.cancel_requested;
  show($("delete"), !live);
  show($("download"), false);
  if (live) {
    $("work-state").textContent = headline(job);
    $("work-fine").textContent = fine(job);
    setBar($("bar"), job.progress, job.state === "queued");
  } else if (job.state === "succeeded") {
    if (before?.state !== "succeeded" || before.id !== job.id) play(job);
    else show($("download"), Boolean($("download").href));
  } else {
    $("ended-title").textContent = job.error ? job.error.title : headline(job);
    $("ended-detail").textContent = job.error ? job.error.detail : "";
  }
  document.title = live ? `${job.state === "running" ? `${Math.round(job.progress * 100)} %` : headline(job)} · ${TITLE}` : `${headline(job)} · ${TITLE}`;
  announce(before);
  if (before?.state !== job.state) onChange(job);
}

function facts(item) {
  const r = item.request;
  const parts = [pretty(r.size), `${r.frame_num} frames`, `${r.sampling_steps} steps`, `seed ${r.seed}`, r.model];
  if (item.result) parts.push(bytes(item.result.bytes));
  if (item.attempts) parts.push(`${item.attempts} failed ${item.attempts === 1 ? "try" : "tries"}`);
  return parts.join(" · ");
}

async function play(item) {
  await act(async () => {
    const path = `/v1/jobs/${item.id}`;
    const [video, file, poster] = await Promise.all([json(`${path}/video`), json(`${path}/video?download=true`), json(`${path}/poster`).catch(() => null)]);
    if (job?.id !== item.id) return;
    const player = $("video");
    player.crossOrigin = "anonymous";
    player.dataset.url = video.url;
    player.dataset.until = String(Date.parse(video.expires_at) - 5000);
    if (poster) player.poster = poster.url;
    player.setAttribute("aria-label", `Video: ${item.request.prompt.slice(0, 200)}`);
    player.src = video.url;
    show(player, true);
    if (!calm()) player.play().catch(() => {}); // muted and short; a browser that refuses shows its button
    $("download").href = file.url;
    show($("download"), true);
  });
}

function stopVideo() {
  const player = $("video");
  show(player, false);
  player.pause();
  delete player.dataset.url;
  player.removeAttribute("src");
  player.removeAttribute("poster");
  player.load();
  $("download").removeAttribute("href");
}

// Every state and phase, and each quarter of the progress: enough to follow by ear, not a stream of numbers.
function announce(before) {
  const quarter = Math.floor(job.progress * 4) * 25;
  const text = job.state === "running" ? `${headline(job)}, ${quarter} percent` : headline(job);
  if (text === said) return;
  said = text;
  if (before || isLive(job)) $("announce").textContent = text;
}
