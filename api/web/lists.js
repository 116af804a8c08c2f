// The lists below: jobs in progress, finished videos, and nodes for those who may see them.

import { json } from "./client.js";
import { $, calm, duration, fine, gib, headline, make, pretty, setBar, show } from "./dom.js";
import { selected } from "./stage.js";

const posters = new Map(); // job id -> {url, until}
let cards = [];
let cursor = null;

export async function refreshQueue(onSelect) {
  const pages = await Promise.all(["running", "queued"].map((state) => json(`/v1/jobs?state=${state}&limit=20`)));
  const jobs = pages.flatMap((page) => page.data);
  show($("queue"), jobs.length > 0);
  sync($("queue-list"), jobs, queueItem, (item, job) => {
    item.querySelector(".text").textContent = job.request.prompt;
    item.querySelector(".status").textContent = `${headline(job)}${fine(job) ? `, ${fine(job)}` : ""}`;
    setBar(item.querySelector(".bar"), job.progress, job.state === "queued");
  }, onSelect);
  return jobs.length;
}

function queueItem() {
  return make("button", { type: "button", class: "queue-item" }, make("span", { class: "text" }), make("span", { class: "status" }),
    make("span", { class: "bar", "aria-hidden": "true" }, make("span")));
}

// One <li><button> a job, kept across refreshes so that focus and scrolling stay where they are.
function sync(list, jobs, create, update, onSelect) {
  const old = new Map([...list.children].map((li) => [li.dataset.job, li]));
  const items = jobs.map((job) => {
    let li = old.get(job.id);
    if (!li) {
      const button = create(job);
      button.addEventListener("click", () => onSelect(job.id));
      li = make("li", {}, button);
      li.dataset.job = job.id;
    }
    const button = li.firstElementChild;
    if (job.id === selected()) button.setAttribute("aria-current", "true");
    else button.removeAttribute("aria-current");
    update(button, job);
    return li;
  });
  // Only what differs is touched: an item that is taken out, even to be put back, loses the focus.
  const focused = document.activeElement;
  const kept = new Set(items);
  for (const li of [...list.children]) if (!kept.has(li)) li.remove();
  items.forEach((li, index) => { if (list.children[index] !== li) list.insertBefore(li, list.children[index] ?? null); });
  if (focused !== document.activeElement && list.contains(focused)) focused.focus({ preventScroll: true }); // it has moved
}

// A refresh asks for as many as are shown (a page holds 100 at most), so that what was deleted goes.
export async function refreshGallery(onSelect, older = false) {
  const limit = older ? 12 : Math.min(100, Math.max(12, cards.length));
  const page = await json(`/v1/jobs?state=succeeded&limit=${limit}${older && cursor ? `&cursor=${encodeURIComponent(cursor)}` : ""}`);
  const known = new Set(page.data.map((job) => job.id));
  const last = page.data.at(-1)?.id ?? "";
  const rest = cards.filter((job) => !known.has(job.id) && (older || (page.next_cursor !== null && job.id < last))); // ids sort by time
  if (older || rest.length === 0) cursor = page.next_cursor;
  cards = older ? [...rest, ...page.data] : [...page.data, ...rest];
  show($("gallery-empty"), cards.length === 0);
  show($("more"), cursor !== null);
  draw(onSelect);
}

export function draw(onSelect) {
  sync($("cards"), cards, card, (item, job) => {
    item.querySelector(".text").textContent = job.request.prompt;
    const seconds = job.result ? `${(job.result.frames / job.result.fps).toFixed(1)} s, ` : "";
    item.querySelector(".status").textContent = `${seconds}${pretty(job.request.size)}`;
  }, onSelect);
}

export function dropCard(id, onSelect) {
  cards = cards.filter((job) => job.id !== id);
  show($("gallery-empty"), cards.length === 0);
  draw(onSelect);
}

function card(job) {
  const thumb = make("span", { class: "thumb" });
  poster(job, thumb);
  const button = make("button", { type: "button", class: "card" }, thumb, make("span", { class: "words" }, make("span", { class: "text" }), make("span", { class: "status" })));
  preview(job, button, thumb);
  return button;
}

// A card that the pointer rests on, or that has the focus, plays its video in place of its still.
function preview(job, button, thumb) {
  let timer = null;
  const start = () => { timer = setTimeout(async () => {
    const { url } = await json(`/v1/jobs/${job.id}/video`).catch(() => ({}));
    if (!url || timer === null) return;
    const video = make("video", { src: url, muted: true, loop: true, playsInline: true, autoplay: true, tabIndex: -1, "aria-hidden": "true" });
    thumb.append(video);
  }, 350); };
  const stop = () => { clearTimeout(timer); timer = null; thumb.querySelector("video")?.remove(); };
  if (calm()) return;
  button.addEventListener("pointerenter", (event) => { if (event.pointerType === "mouse") { stop(); start(); } });
  button.addEventListener("focus", () => { if (button.matches(":focus-visible")) { stop(); start(); } });
  for (const type of ["pointerleave", "blur"]) button.addEventListener(type, stop);
}

async function poster(job, thumb) {
  try {
    let known = posters.get(job.id);
    if (!known || known.until < Date.now()) {
      const { url, expires_at: end } = await json(`/v1/jobs/${job.id}/poster`);
      known = { url, until: Date.parse(end) - 60_000 };
      posters.set(job.id, known);
    }
    thumb.replaceChildren(make("img", { src: known.url, alt: "", loading: "lazy", decoding: "async" }));
  } catch { thumb.textContent = "no preview"; }
}

export async function refreshNodes(onSelect) {
  const { data } = await json("/v1/nodes");
  show($("nodes"), true);
  show($("nodes-empty"), data.length === 0);
  const focused = document.activeElement?.dataset?.node; // a refresh must not take the focus away
  $("node-list").replaceChildren(...data.map((node) => nodeItem(node, onSelect)));
  if (focused) $("node-list").querySelector(`[data-node="${CSS.escape(focused)}"]`)?.focus();
}

function nodeItem(node, onSelect) {
  const silent = (Date.now() - Date.parse(node.seen_at)) / 1000;
  const state = node.live ? (node.draining ? `${node.state}, draining` : node.state) : `silent for ${duration(silent)}`;
  const labels = Object.entries(node.labels).map(([name, value]) => `${name} ${value}`);
  const ranks = `${node.ranks} ${node.ranks === 1 ? "rank" : "ranks"}${node.layout ? ` (${node.layout})` : ""}`;
  const item = make("li", { class: "node" },
    make("p", { class: "name" }, make("b", { text: node.id }), make("span", { class: "status", text: state })),
    make("p", { class: "more", text: [node.model, ranks, node.device, ...labels].filter(Boolean).join(" · ") }));
  item.dataset.live = String(node.live);
  const meters = make("div", { class: "meters" });
  if (node.memory_total) meters.append(meter("Memory", node.memory_used / node.memory_total, `${gib(node.memory_used)} of ${gib(node.memory_total)} GiB`));
  if (node.step_seconds) meters.append(fact("A step took", node.step_seconds < 10 ? `${node.step_seconds.toFixed(2)} s` : duration(node.step_seconds)));
  if (node.job_id) meters.append(jobMeter(node, onSelect));
  else if (node.live && !node.publishing_job_id) meters.append(fact("Job", "none"));
  if (node.publishing_job_id) meters.append(fact("Saving", node.publishing_job_id));
  item.append(meters);
  return item;
}

function fact(name, value) {
  return make("div", { class: "meter" }, make("span", { class: "meter-name", text: name }), make("span", { class: "meter-value", text: value }));
}

function meter(name, share, value) {
  const bar = make("span", { class: "bar", "aria-hidden": "true" }, make("span"));
  setBar(bar, Math.min(1, share), false);
  const box = fact(name, value);
  box.append(bar);
  return box;
}

function jobMeter(node, onSelect) {
  const box = meter("Job", node.progress ?? 0, "");
  const button = make("button", { type: "button", class: "link", text: `${Math.round((node.progress ?? 0) * 100)} %, show it`, "aria-label": `Show the job on ${node.id}` });
  button.dataset.node = node.id;
  button.addEventListener("click", () => onSelect(node.job_id));
  box.querySelector(".meter-value").append(button);
  return box;
}
