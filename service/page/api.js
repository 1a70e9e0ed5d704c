// The service's HTTP routes, and its stream of events. Knows nothing of the page.

const STORED_KEY = "reelrt-key";
const blobs = new Map();

export class Trouble extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

export const key = {
  get: () => sessionStorage.getItem(STORED_KEY) ?? "",
  set: (value) => sessionStorage.setItem(STORED_KEY, value),
};

async function request(path, options = {}) {
  const headers = { ...options.headers };
  if (key.get()) headers.Authorization = `Bearer ${key.get()}`;
  let answer;
  try {
    answer = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Trouble(0, "The service does not answer.");
  }
  if (answer.ok) return answer;
  let message = `The service answered ${answer.status}.`;
  try {
    message = (await answer.json()).error.message;
  } catch {
    // not in the service's own form: something stands between
  }
  throw new Trouble(answer.status, message);
}

const json = async (path, options) => (await request(path, options)).json();
const send = (path, body) =>
  json(path, {
    method: "POST",
    headers: { "Content-Type": "application/json", "Idempotency-Key": newKey() },
    body: JSON.stringify(body),
  });

// crypto.randomUUID would need https; a name on the local network has none.
function newKey() {
  return [...crypto.getRandomValues(new Uint8Array(16))].map((byte) => byte.toString(16).padStart(2, "0")).join("");
}

export const models = async () => (await json("/v1/models")).data;
export const create = (body) => send("/v1/videos", body);
export const remix = (id, body) => send(`/v1/videos/${id}/remix`, body);
export const get = (id) => json(`/v1/videos/${id}`);
export const remove = (id) => json(`/v1/videos/${id}`, { method: "DELETE" });
export const list = (limit, after) =>
  json(`/v1/videos?limit=${limit}&order=desc${after ? `&after=${encodeURIComponent(after)}` : ""}`);

// Where a file of a video is: with a key, a copy in this tab, as no <video> sends one along.
export async function file(id, variant = "video") {
  const path = `/v1/videos/${id}/content?variant=${variant}`;
  if (!key.get()) return path;
  if (!blobs.has(path)) {
    const bytes = await (await request(path)).blob();
    blobs.set(path, URL.createObjectURL(bytes));
  }
  return blobs.get(path);
}

export function forget(id) {
  for (const [path, url] of blobs) {
    if (path.includes(id)) {
      URL.revokeObjectURL(url);
      blobs.delete(path);
    }
  }
}

// Events of a video as [name, data] until it is done; fetch instead of EventSource, which sends no key.
export async function* events(id, signal) {
  const answer = await request(`/v1/videos/${id}/events`, { signal });
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    text += value;
    const parts = text.split("\n\n");
    text = parts.pop();
    for (const part of parts) {
      const fields = Object.fromEntries(
        part
          .split("\n")
          .filter((line) => line && !line.startsWith(":"))
          .map((line) => [line.slice(0, line.indexOf(":")), line.slice(line.indexOf(":") + 1).trimStart()]),
      );
      if (fields.data) yield [fields.event ?? "message", JSON.parse(fields.data)];
    }
  }
}
