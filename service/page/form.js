// What is asked for: the form, its limits, and what it remembers. Sends nothing.

const $ = (id) => document.getElementById(id);
const STORED = "reelrt-form";
const FIELDS = ["prompt", "negative", "steps", "guidance", "seed", "frames", "width", "height", "solver"];

const FIXED = ["steps-field", "seeds", "shape"]; // a remix has its source's

let models = [];
let source = null;

const model = () => models.find((each) => each.id === $("model").value) ?? models[0];

// From the smallest change to the largest: the later a remix begins, the less it changes.
const points = () => [...(model()?.limits.remix_points ?? [0.5])].sort((a, b) => b - a);
const remixFrom = () => points()[$("strength").value] ?? 0.5;

export const remixOf = () => source;

export function setModels(found) {
  models = found;
  $("model").replaceChildren(...models.map((each) => new Option(each.id, each.id)));
  $("model-field").hidden = models.length < 2;
  applyLimits();
  restore();
  showValues();
}

function applyLimits() {
  const limits = model()?.limits;
  if (!limits) return;
  const bounds = { steps: limits.num_inference_steps, frames: limits.num_frames, width: limits.width, height: limits.height };
  for (const [name, range] of Object.entries(bounds)) {
    Object.assign($(name), { min: range.minimum, max: range.maximum, value: range.default });
  }
  Object.assign($("strength"), { max: points().length - 1, value: Math.floor(points().length / 2) });
  $("width").step = $("height").step = limits.size_multiple;
  $("guidance").value = limits.guidance_scale;
  $("solver").replaceChildren(...limits.solvers.map((name) => new Option(name, name, false, name === limits.solver)));
}

function restore() {
  let stored = {};
  try {
    stored = JSON.parse(localStorage.getItem(STORED)) ?? {};
  } catch {
    // nothing worth keeping
  }
  for (const name of FIELDS) {
    if (!(name in stored) || name === "seed") continue;
    const before = $(name).value;
    $(name).value = stored[name];
    if (!$(name).checkValidity() || $(name).value !== stored[name]) $(name).value = before;
  }
}

export function showValues() {
  $("steps-value").value = $("steps").value;
  $("guidance-value").value = $("guidance").value === "1" ? "none" : Number($("guidance").value).toFixed(1);
  $("strength-value").value = `${Math.round((1 - remixFrom()) * 100)} %`;
  localStorage.setItem(STORED, JSON.stringify(Object.fromEntries(FIELDS.map((name) => [name, $(name).value]))));
}

export function draw() {
  $("seed").value = String(crypto.getRandomValues(new Uint32Array(1))[0]);
}

// Back to the settings of a video that was made.
export function use(video) {
  leaveRemix();
  $("model").value = video.model;
  const values = {
    prompt: video.prompt,
    negative: video.negative_prompt,
    steps: video.num_inference_steps,
    guidance: video.guidance_scale,
    seed: video.seed,
    frames: video.num_frames,
    width: video.width,
    height: video.height,
    solver: video.solver,
  };
  for (const [name, value] of Object.entries(values)) $(name).value = String(value);
  showValues();
  $("prompt").focus();
}

export function startRemix(video) {
  use(video);
  source = video;
  $("source-name").textContent = video.prompt;
  for (const id of ["source", "strength-field"]) $(id).hidden = false;
  for (const id of FIXED) $(id).hidden = true;
  $("model-field").hidden = true;
  $("go-text").textContent = "Make remix";
  $("prompt").select();
}

export function leaveRemix() {
  if (!source) return;
  source = null;
  for (const id of ["source", "strength-field"]) $(id).hidden = true;
  for (const id of FIXED) $(id).hidden = false;
  $("model-field").hidden = models.length < 2;
  $("seed").value = "";
  $("go-text").textContent = "Make video";
}

// What is wrong with the form as it stands, in words; empty when nothing is.
export function wrong() {
  if (!$("prompt").value.trim()) return "Say what the video shall show.";
  for (const [id, name] of [["width", "Width"], ["height", "Height"], ["frames", "Frames"]]) {
    if (!source && !$(id).checkValidity()) {
      const { min, max, step } = $(id);
      return `${name}: ${min} to ${max}${step > 1 ? ` in steps of ${step}` : ""}.`;
    }
  }
  return /^[0-9]*$/.test($("seed").value.trim()) ? "" : "The seed is a whole number.";
}

// The body of the request.
export function body() {
  const asked = {
    prompt: $("prompt").value.trim(),
    negative_prompt: $("negative").value.trim(),
    guidance_scale: Number($("guidance").value),
  };
  if (source) return { ...asked, remix_from: remixFrom() };
  if ($("seed").value.trim()) asked.seed = Number($("seed").value);
  return {
    ...asked,
    model: model().id,
    num_inference_steps: Number($("steps").value),
    width: Number($("width").value),
    height: Number($("height").value),
    num_frames: Number($("frames").value),
    solver: $("solver").value,
  };
}
