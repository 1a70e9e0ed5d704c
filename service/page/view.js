// What is shown: the stage with one video, and the cards of all. Draws what it is told, and asks nobody.

import * as api from "./api.js";

const $ = (id) => document.getElementById(id);
const TINY = 160;

function make(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value !== null && value !== false) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child !== null));
  return node;
}

export const active = (video) => video.status === "queued" || video.status === "in_progress";

function stateText(video) {
  if (video.status === "queued") {
    return video.queue_position ? `Waits: ${video.queue_position} before it` : "Next in the queue";
  }
  if (video.status === "in_progress") return video.progress >= 100 ? "Writing the file" : `${video.progress} %`;
  if (video.status === "failed") return video.error?.message ?? "Failed.";
  return video.inference_time_s === null ? "" : `Made in ${video.inference_time_s.toFixed(1)} s`;
}

// Widths are set from here: the content policy lets no style stand in the page.
function bar(video) {
  const inner = make("i");
  inner.style.width = `${video.progress}%`;
  const attributes = { class: "bar", role: "progressbar", "aria-label": "Progress", "aria-valuemin": 0, "aria-valuemax": 100, "aria-valuenow": video.progress };
  return make("div", attributes, inner);
}

function later(node, promise) {
  promise.then((url) => (node.src = url)).catch(() => node.remove());
  return node;
}

function screen(video, preview) {
  const name = video.width <= TINY ? "screen tiny" : "screen";
  if (video.status === "completed") {
    const player = make("video", { controls: true, loop: true, playsinline: true, "aria-label": video.prompt });
    player.muted = true;
    player.autoplay = !matchMedia("(prefers-reduced-motion: reduce)").matches;
    return make("div", { class: name }, later(player, api.file(video.id)));
  }
  const words = video.status === "failed" ? "No video" : video.status === "queued" ? "Waiting" : "Starting";
  const picture = preview && active(video) ? make("img", { src: preview, alt: "Preview" }) : make("p", { class: "wait" }, words);
  return make("div", { class: name }, picture, active(video) ? bar(video) : null);
}

function facts(video, actions) {
  const rows = [
    ["Size", `${video.size}, ${video.num_frames} frames`],
    ["Steps", `${video.num_inference_steps}, ${video.solver}`],
    ["Guidance", video.guidance_scale],
    ["Seed", video.seed],
    ...(video.negative_prompt ? [["Without", video.negative_prompt]] : []),
  ];
  const list = rows.flatMap(([name, value]) => [make("dt", {}, name), make("dd", {}, String(value))]);
  const button = (text, act, label) => make("button", { type: "button", class: "quiet", "aria-label": label ?? null, onclick: () => act(video) }, text);
  const menu = make("menu", {}, button("Use again", actions.use));
  if (video.status === "completed") {
    const link = make("a", { download: `${video.id}.mp4` }, "Download");
    api.file(video.id).then((url) => (link.href = url)).catch(() => link.remove());
    menu.prepend(button("Remix", actions.remix), link);
  }
  menu.append(button(active(video) ? "Cancel" : "Delete", actions.remove));
  const state = make("p", { class: video.status === "failed" ? "state bad" : "state" }, stateText(video));
  return make("div", { class: "facts" }, make("p", { class: "says" }, video.prompt), state, make("dl", {}, ...list), menu);
}

// Draw the stage anew, but for a job that only went on: then bar, words and picture alone.
export function stage(video, preview, actions) {
  const box = $("stage");
  box.hidden = !video;
  if (!video) return box.replaceChildren();
  const same = box.dataset.id === video.id && box.dataset.status === video.status;
  if (same && active(video)) {
    box.querySelector(".bar").replaceWith(bar(video));
    box.querySelector(".state").textContent = stateText(video);
    const picture = box.querySelector(".screen img");
    if (preview && picture) picture.src = preview;
    else if (preview) box.querySelector(".wait").replaceWith(make("img", { src: preview, alt: "Preview" }));
    return undefined;
  }
  if (same) return undefined;
  Object.assign(box.dataset, { id: video.id, status: video.status });
  return box.replaceChildren(screen(video, preview), facts(video, actions));
}

function picture(video, preview) {
  const frame = make("span", { class: video.width <= TINY ? "frame tiny" : "frame" });
  if (video.status === "completed") frame.append(later(make("img", { alt: "", loading: "lazy" }), api.file(video.id, "thumbnail")));
  else if (video.status === "failed") frame.append(make("span", { class: "failed" }, "Failed"));
  else if (preview) frame.append(make("img", { src: preview, alt: "" }), bar(video));
  else frame.append(video.status === "queued" ? "Waits" : "Runs", bar(video));
  return frame;
}

// A finished video moves while the pointer is on its card.
function play(card, video) {
  if (video.status !== "completed" || matchMedia("(prefers-reduced-motion: reduce)").matches) return;
  const frame = card.querySelector(".frame");
  const player = make("video", { loop: true, playsinline: true, autoplay: true, "aria-hidden": "true" });
  player.muted = true;
  frame.append(later(player, api.file(video.id)));
  card.addEventListener("pointerleave", () => player.remove(), { once: true });
}

function card(video, preview, chosen, choose) {
  const attributes = {
    type: "button",
    class: "card",
    role: "listitem",
    "data-id": video.id,
    "aria-current": chosen ? "true" : null,
    tabindex: chosen ? 0 : -1,
    title: video.prompt,
    onclick: () => choose(video.id),
  };
  const node = make("button", attributes, picture(video, preview), make("span", { class: "says" }, video.prompt));
  node.addEventListener("pointerenter", () => play(node, video));
  return node;
}

// Cards that did not change stay as they are, so that focus and moving pictures do.
export function gallery(videos, previews, chosen, choose) {
  const box = $("gallery");
  const known = new Map([...box.children].map((node) => [node.dataset.id, node]));
  const focused = box.contains(document.activeElement) ? document.activeElement.dataset.id : null;
  const nodes = videos.map((video) => {
    const preview = active(video) ? previews.get(video.id) : undefined;
    const now = JSON.stringify([video.status, video.progress, preview?.length, chosen === video.id]);
    const before = known.get(video.id);
    if (before?.dataset.now === now) return before;
    const node = card(video, preview, chosen === video.id, choose);
    node.dataset.now = now;
    return node;
  });
  if (nodes.length && !nodes.some((node) => node.tabIndex === 0)) nodes[0].tabIndex = 0;
  if (nodes.length !== box.children.length || nodes.some((node, index) => node !== box.children[index])) {
    box.replaceChildren(...nodes);
  }
  if (focused) box.querySelector(`[data-id="${focused}"]`)?.focus({ preventScroll: true });
  $("empty").hidden = videos.length > 0;
}

export function queue(videos) {
  const running = videos.filter((video) => video.status === "in_progress").length;
  const waiting = videos.filter((video) => video.status === "queued").length;
  const parts = [running && `${running} running`, waiting && `${waiting} waiting`].filter(Boolean);
  const text = parts.join(", ");
  if ($("queue").textContent !== text) $("queue").textContent = text;
}
