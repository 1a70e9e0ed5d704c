// The page: keeps the videos it knows, follows those that run, and joins form, view and service.

import * as api from "./api.js";
import * as form from "./form.js";
import * as view from "./view.js";

const $ = (id) => document.getElementById(id);
const PAGE = 24;
const POLL_MS = 2000;
const MOST_FOLLOWED = 3; // a browser opens six connections to one host, and the rest of the page needs some

const videos = new Map();
const previews = new Map();
const followed = new Map();
let chosen = null;
let more = null; // whether the service lists older ones; null: not known yet
let listed = []; // ids in the service's own order; older ones begin behind the last

// Within one second the service's own order counts; what it has not listed yet is newer, the last one learned first.
const place = (video) => {
  const at = listed.indexOf(video.id);
  return at < 0 ? -1 - [...videos.keys()].indexOf(video.id) : at;
};
const sorted = () => [...videos.values()].sort((a, b) => b.created_at - a.created_at || place(a) - place(b));
const actions = { use: form.use, remix: form.startRemix, remove };

function draw() {
  const all = sorted();
  if (!videos.has(chosen)) chosen = all[0]?.id ?? null;
  view.stage(videos.get(chosen), previews.get(chosen), actions);
  view.gallery(all, previews, chosen, choose);
  view.queue(all);
  $("more").hidden = !more;
}

function choose(id) {
  chosen = id;
  draw();
}

function learn(video) {
  videos.set(video.id, video);
  if (!view.active(video)) previews.delete(video.id);
}

function trouble(error) {
  if (error?.status === 401) return askKey();
  $("trouble").textContent = error?.message ?? "";
  $("trouble").hidden = !error;
  return undefined;
}

async function askKey() {
  $("key").hidden = false;
  if ($("key-box").open) return;
  $("key-text").value = "";
  $("key-box").showModal();
}

// Newest first; what the service no longer lists is gone.
async function refresh() {
  const page = await api.list(PAGE);
  const ids = page.data.map((video) => video.id);
  const oldest = page.data.at(-1)?.created_at ?? 0;
  for (const video of videos.values()) {
    if (!ids.includes(video.id) && (video.created_at > oldest || !page.has_more)) drop(video.id);
  }
  page.data.forEach(learn);
  if (more === null || !page.has_more) [more, listed] = [page.has_more, ids];
  follow();
  draw();
}

async function showOlder() {
  for (;;) {
    const last = listed.at(-1);
    try {
      const page = await api.list(PAGE, last);
      page.data.forEach(learn);
      listed.push(...page.data.map((video) => video.id));
      more = page.has_more;
      return draw();
    } catch (error) {
      if (error.status !== 404 || !last) return trouble(error);
      drop(last); // it was deleted elsewhere; the one before it marks the place, too
    }
  }
}

function drop(id) {
  followed.get(id)?.abort();
  for (const store of [videos, previews, followed]) store.delete(id);
  listed = listed.filter((each) => each !== id);
  api.forget(id);
}

// Those that run get a stream of their own, the chosen one first.
function follow() {
  const running = sorted().filter((video) => video.status === "in_progress" || (video.id === chosen && view.active(video)));
  running.sort((a, b) => (b.id === chosen) - (a.id === chosen));
  for (const video of running.slice(0, MOST_FOLLOWED)) {
    if (!followed.has(video.id) && followed.size < MOST_FOLLOWED) listen(video.id);
  }
}

async function listen(id) {
  const stop = new AbortController();
  followed.set(id, stop);
  try {
    for await (const [name, data] of api.events(id, stop.signal)) {
      if (name === "preview") previews.set(id, data.image);
      else if (name === "video" && videos.has(id)) learn(data);
      else if (name === "deleted") drop(id);
      draw();
    }
  } catch {
    // the next poll says how it stands
  } finally {
    if (followed.get(id) === stop) followed.delete(id);
  }
}

async function poll() {
  try {
    if (!document.hidden && !$("key-box").open) await refresh();
  } catch (error) {
    trouble(error);
  }
  setTimeout(poll, POLL_MS);
}

async function submit(event) {
  event?.preventDefault();
  const wrong = form.wrong();
  trouble(wrong ? { message: wrong } : null);
  if (wrong) return;
  $("go").disabled = true;
  try {
    const source = form.remixOf();
    const video = source ? await api.remix(source.id, form.body()) : await api.create(form.body());
    learn(video);
    form.leaveRemix();
    choose(video.id);
    follow();
    if (narrow.matches) $("stage").scrollIntoView({ behavior: "smooth", block: "start" });
  } catch (error) {
    trouble(error);
  } finally {
    $("go").disabled = false;
  }
}

function confirmed(video) {
  const box = $("sure-box");
  $("sure-text").textContent = video.prompt;
  box.returnValue = "cancel";
  box.showModal();
  return new Promise((resolve) => box.addEventListener("close", () => resolve(box.returnValue === "ok"), { once: true }));
}

async function remove(video) {
  if (!view.active(video) && !(await confirmed(video))) return;
  try {
    await api.remove(video.id);
  } catch (error) {
    if (error.status !== 404) return trouble(error);
  }
  const all = sorted();
  const place = all.findIndex((each) => each.id === video.id);
  drop(video.id);
  if (chosen === video.id) chosen = (all[place + 1] ?? all[place - 1])?.id ?? null;
  draw();
}

function move(by) {
  const all = sorted();
  const place = all.findIndex((video) => video.id === chosen);
  const next = all[Math.min(Math.max(place + by, 0), all.length - 1)];
  if (!next) return;
  choose(next.id);
  const card = $("gallery").querySelector(`[data-id="${next.id}"]`);
  card?.focus();
  card?.scrollIntoView({ block: "nearest" });
}

function togglePlay() {
  const player = $("stage").querySelector("video");
  if (player) player.paused ? player.play() : player.pause();
}

const KEYS = {
  "/": () => $("prompt").focus(),
  "?": () => $("help-box").showModal(),
  ArrowLeft: () => move(-1),
  ArrowRight: () => move(1),
  " ": togglePlay,
  r: () => videos.get(chosen)?.status === "completed" && form.startRemix(videos.get(chosen)),
  u: () => videos.has(chosen) && form.use(videos.get(chosen)),
  Delete: () => videos.has(chosen) && remove(videos.get(chosen)),
};

function onKey(event) {
  if (document.querySelector("dialog[open]")) return;
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) return void submit(event);
  if (event.key === "Escape") {
    form.leaveRemix();
    return void document.activeElement.blur();
  }
  const typing = event.target.closest?.("input, textarea, select, video");
  const pressing = event.key === " " && event.target.closest?.("button:not(.card), a");
  const act = KEYS[event.key.length === 1 ? event.key.toLowerCase() : event.key];
  if (typing || pressing || !act || event.ctrlKey || event.metaKey || event.altKey) return;
  event.preventDefault();
  act();
}

const narrow = matchMedia("(max-width: 800px)");
const fold = () => ($("settings").open = !narrow.matches);
narrow.addEventListener("change", fold);

const THEMES = { auto: "Auto", light: "Light", dark: "Dark" };
const dark = matchMedia("(prefers-color-scheme: dark)");

function theme(next) {
  const names = Object.keys(THEMES);
  const now = localStorage.getItem("reelrt-theme") ?? "auto";
  const name = next ? names[(names.indexOf(now) + 1) % names.length] : now;
  localStorage.setItem("reelrt-theme", name);
  document.documentElement.dataset.theme = name === "auto" ? (dark.matches ? "dark" : "light") : name;
  $("theme").textContent = THEMES[name];
  $("theme").setAttribute("aria-label", `Colours: ${name === "auto" ? "as the system has them" : name}`);
}

async function begin() {
  try {
    form.setModels(await api.models());
    await refresh();
    trouble(null);
  } catch (error) {
    trouble(error);
    if (error.status !== 401) setTimeout(begin, POLL_MS);
  }
}

$("compose").addEventListener("submit", submit);
$("compose").addEventListener("input", form.showValues);
$("dice").addEventListener("click", form.draw);
$("source-clear").addEventListener("click", form.leaveRemix);
$("theme").addEventListener("click", () => theme(true));
$("help").addEventListener("click", () => $("help-box").showModal());
$("key").addEventListener("click", askKey);
$("key-box").addEventListener("close", () => {
  if ($("key-box").returnValue === "ok") {
    api.key.set($("key-text").value.trim());
    begin();
  }
});
$("more").addEventListener("click", showOlder);
dark.addEventListener("change", () => theme(false));
document.addEventListener("keydown", onKey);

theme(false);
fold();
await begin();
setTimeout(poll, POLL_MS);
