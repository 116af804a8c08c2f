// The lists below: jobs in progress, finished videos, and nodes for those who may see them.

import { json } from "./client.js";
import { $, duration, fine, headline, make, pretty, setBar, show } from "./dom.js";
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
  const same = items.length === list.children.length && items.every((li, index) => li === list.children[index]);
  if (!same) list.replaceChildren(...items);
}

export async function refreshGallery(onSelect, older = false) {
  const page = await json(`/v1/jobs?state=succeeded&limit=12${older && cursor ? `&cursor=${encodeURIComponent(cursor)}` : ""}`);
  const known = new Set(page.data.map((job) => job.id));
  const rest = cards.filter((job) => !known.has(job.id));
  if (older || cards.length <= 12) cursor = page.next_cursor;
  cards = older ? [...rest, ...page.data] : [...page.data, ...(cards.length > 12 ? rest : [])];
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
  return make("button", { type: "button", class: "card" }, thumb, make("span", { class: "words" }, make("span", { class: "text" }), make("span", { class: "status" })));
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

export async function refreshNodes() {
  const { data } = await json("/v1/nodes");
  show($("nodes"), true);
  show($("nodes-empty"), data.length === 0);
  $("node-list").replaceChildren(...data.map((node) => {
    const item = make("li", { class: "node" }, make("span", { class: "name", text: node.id }),
      make("span", { class: "status", text: node.draining ? `${node.state}, draining` : node.state }), make("span", { class: "more", text: nodeFacts(node) }));
    item.dataset.live = String(node.live);
    return item;
  }));
}

function nodeFacts(node) {
  const parts = [node.model, `${node.ranks} ${node.ranks === 1 ? "rank" : "ranks"}${node.layout ? ` (${node.layout})` : ""}`, node.device];
  if (node.job_id) parts.push(`on ${node.job_id}`);
  if (node.publishing_job_id) parts.push(`saving ${node.publishing_job_id}`);
  for (const [name, value] of Object.entries(node.labels)) parts.push(`${name} ${value}`);
  const silent = (Date.now() - Date.parse(node.seen_at)) / 1000;
  if (!node.live) parts.push(`silent for ${duration(silent)}`);
  return parts.filter(Boolean).join(" · ");
}
