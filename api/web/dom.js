// Small helpers. Text only ever enters the page through textContent.

export const $ = (id) => document.getElementById(id);

export function make(tag, props = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (name === "class") element.className = value;
    else if (name === "text") element.textContent = value;
    else if (name === "on") for (const [type, handler] of Object.entries(value)) element.addEventListener(type, handler);
    else if (name in element && name !== "list") element[name] = value;
    else element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

export function show(element, visible) {
  element.hidden = !visible;
}

export function setBar(bar, progress, waiting) {
  const percent = Math.round(progress * 100);
  bar.classList.toggle("waiting", waiting);
  if (waiting) bar.removeAttribute("aria-valuenow");
  else bar.setAttribute("aria-valuenow", String(percent));
  bar.firstElementChild.style.setProperty("--done", String(percent));
}

export function duration(seconds) {
  const whole = Math.max(0, Math.round(seconds));
  if (whole < 60) return `${whole} s`;
  if (whole < 3600) return `${Math.floor(whole / 60)} min ${whole % 60 ? `${whole % 60} s` : ""}`.trim();
  return `${Math.floor(whole / 3600)} h ${Math.floor((whole % 3600) / 60)} min`;
}

export const pretty = (size) => size.replace("*", " × ");

export const STATES = {
  queued: "Waiting",
  running: "Working",
  succeeded: "Finished",
  failed: "Failed",
  canceled: "Canceled",
  expired: "Expired",
};

const PHASES = {
  encoding: "Reading the prompt",
  denoising: "Denoising",
  decoding: "Decoding frames",
  publishing: "Saving",
};

export function bytes(count) {
  const units = ["B", "kB", "MB", "GB", "TB"];
  const power = count > 0 ? Math.min(units.length - 1, Math.floor(Math.log10(count) / 3)) : 0;
  const value = count / 1000 ** power;
  return `${value >= 100 || power === 0 ? Math.round(value) : value.toFixed(1)} ${units[power]}`;
}

// Memory as GPUs are sold and reported: an "80 GB" card has 79.6 GiB.
export const gib = (count) => (count / 2 ** 30).toFixed(count < 100 * 2 ** 30 ? 1 : 0);

export const calm = () => matchMedia("(prefers-reduced-motion: reduce)").matches;

export const isLive = (job) => job.state === "queued" || job.state === "running";

export function headline(job) {
  if (job.cancel_requested && isLive(job)) return "Canceling";
  if (job.state === "running") return PHASES[job.phase] || "Starting";
  return STATES[job.state];
}

export function fine(job) {
  if (job.state === "queued") {
    const where = job.queue_position;
    const again = job.attempts ? ` · try ${job.attempts + 1}` : "";
    const wait = job.estimated_start_at ? (Date.parse(job.estimated_start_at) - Date.now()) / 1000 : 0;
    const soon = wait > 2 ? ` · starts in about ${duration(wait)}` : "";
    if (where === null || where === undefined) return `in the queue${again}`;
    return (where === 0 ? "next in line" : `${where} ahead`) + soon + again;
  }
  if (job.state !== "running") return "";
  const parts = [`${Math.round(job.progress * 100)} %`];
  if (job.phase === "denoising" && job.step) parts.push(`step ${job.step} of ${job.request.sampling_steps}`);
  if (job.eta_seconds !== null && job.eta_seconds >= 1) parts.push(`about ${duration(job.eta_seconds)} left`);
  return parts.join(" · ");
}
