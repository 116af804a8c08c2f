// Talks to the API: JSON requests with the bearer key, problems as exceptions, and event streams by fetch
// (EventSource can't send a bearer key).

export class Problem extends Error {
  constructor(status, body) {
    super(body.detail || body.title || `The server answered ${status}.`);
    this.status = status;
    this.type = body.type || "";
    this.errors = body.errors || [];
  }
}

const STORE = "reel-key";
let key = sessionStorage.getItem(STORE) || localStorage.getItem(STORE) || "";

export const hasKey = () => key !== "";

export function setKey(value, keep) {
  key = value;
  for (const store of [sessionStorage, localStorage]) store.removeItem(STORE);
  if (value) (keep ? localStorage : sessionStorage).setItem(STORE, value);
}

async function send(path, { method = "GET", body, headers = {}, signal } = {}) {
  let response;
  try {
    response = await fetch(path, { method, body, signal, headers: { ...headers, Authorization: `Bearer ${key}` } });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Problem(0, { detail: "The server can’t be reached. Trying again may help." });
  }
  if (response.ok) return response;
  throw new Problem(response.status, await response.json().catch(() => ({})));
}

export async function json(path, { body, ...options } = {}) {
  const headers = { Accept: "application/json", ...options.headers };
  if (body !== undefined) headers["Content-Type"] = "application/json";
  const response = await send(path, { ...options, headers, body: body === undefined ? undefined : JSON.stringify(body) });
  return response.status === 204 ? null : response.json();
}

export async function upload(file) {
  const response = await send("/v1/uploads", { method: "POST", body: file, headers: { "Content-Type": file.type } });
  return response.json();
}

export async function submit(request) {
  // The same key for every retry of this click: a lost answer can't make two videos.
  const once = crypto.randomUUID ? crypto.randomUUID() : String(Math.random()).slice(2);
  for (let attempt = 0; ; attempt += 1) {
    try {
      return await json("/v1/jobs", { method: "POST", body: request, headers: { "Idempotency-Key": once } });
    } catch (error) {
      if (!(error instanceof Problem) || ![0, 503].includes(error.status) || attempt >= 3) throw error;
      await sleep(500 * 2 ** attempt);
    }
  }
}

export const sleep = (ms, signal) => new Promise((resolve) => {
  const timer = setTimeout(resolve, ms);
  signal?.addEventListener("abort", () => { clearTimeout(timer); resolve(); }, { once: true });
});

// Calls onEvent(type, data) for each event of a job until it ends or `signal` aborts. Reconnects with
// Last-Event-ID, so that no event is lost or seen twice. onLink(true|false) tells whether the stream is up.
export async function follow(jobId, onEvent, onLink, signal) {
  let last = "";
  let wait = 500;
  while (!signal.aborted) {
    try {
      const headers = { Accept: "text/event-stream", ...(last ? { "Last-Event-ID": last } : {}) };
      const response = await send(`/v1/jobs/${jobId}/events`, { headers, signal });
      if (response.status === 204) return;
      onLink(true);
      wait = 500;
      for await (const event of parse(response.body)) {
        if (event.id) last = event.id;
        if (event.data && onEvent(event.type, JSON.parse(event.data))) return;
      }
    } catch (error) {
      if (signal.aborted || (error instanceof Problem && [401, 403, 404].includes(error.status))) return;
    }
    onLink(false);
    await sleep(wait, signal);
    wait = Math.min(wait * 2, 8000);
  }
}

async function* parse(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let event = { type: "message", data: "", id: "" };
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const lines = (rest + value).split(/\r\n|\n|\r/);
      rest = lines.pop();
      for (const line of lines) {
        if (line === "") {
          if (event.data) yield event;
          event = { type: "message", data: "", id: "" };
          continue;
        }
        const colon = line.indexOf(":");
        if (colon === 0) continue;
        const name = colon < 0 ? line : line.slice(0, colon);
        const text = colon < 0 ? "" : line.slice(colon + 1).replace(/^ /, "");
        if (name === "event") event.type = text;
        else if (name === "id") event.id = text;
        else if (name === "data") event.data += (event.data ? "\n" : "") + text;
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
