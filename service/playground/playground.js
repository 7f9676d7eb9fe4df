/* The playground uses only the public API: GET /v1/models, and POST to /v1/images, /v1/images/edits and /v1/meshes with
   "stream". */

import { MaskPainter } from "./mask.js";

const byId = (id) => document.getElementById(id);
const form = byId("form");
const MEASURES = { ssim: "SSIM", volume_iou: "volume IoU" };
const MAX_SEED = 2 ** 31;
const painter = new MaskPainter(byId("mask"), byId("brush"));
let models = [];

class ApiError extends Error {}

// Requests and their events

async function call(path, options = {}) {
  const key = byId("api_key").value;
  const headers = { ...options.headers, ...(key && { Authorization: `Bearer ${key}` }) };
  const url = new URL(`..${path}`, import.meta.url); // the API may be below a path
  const response = await fetch(url, { ...options, headers });
  if (response.ok) return response;
  const answer = await response.json().catch(() => null);
  throw new ApiError(answer?.error?.message ?? `${response.status} ${response.statusText}`);
}

/** The data of each server-sent event of a streaming call, parsed. */
async function* eventsOf(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    text += value;
    const blocks = text.split("\n\n");
    text = blocks.pop();
    for (const block of blocks) {
      const data = block.split("\n").filter((line) => line.startsWith("data:")).map((line) => line.slice(5).trimStart());
      if (data.length) yield JSON.parse(data.join("\n"));
    }
  }
}

/** Several images of a call have an event each; the last of them has the whole result. */
const isResult = (event) => event.type.endsWith(".completed") && event.data;

async function generate(path, body, signal, show) {
  const headers = { "Content-Type": "application/json" };
  const response = await call(path, { method: "POST", body: JSON.stringify(body), headers, signal });
  for await (const event of eventsOf(response)) {
    if (event.type === "error") throw new ApiError(event.error.message);
    show(event);
    if (isResult(event)) return;
  }
  throw new ApiError("The connection was lost before the result arrived.");
}

// The form

const canBeTransparent = (model) => Boolean(model.backgrounds?.includes("transparent"));
const chosenModel = () => models.find((model) => model.id === byId("model").value);
const numberOf = (id) => (byId(id).value === "" ? undefined : Number(byId(id).value));
const percent = (share) => `${Math.round(100 * share)} %`;

function budgetOf() {
  const kind = byId("budget").value;
  return { [kind]: kind === "preset" ? byId("preset").value : numberOf(kind) };
}

const labelOf = (budget) =>
  budget.preset ?? Object.entries(budget).map(([kind, value]) => `${kind} ${value}`).join(", ");

/** The cheapest calibrated point that satisfies a budget; undefined if the server adapts every step. */
function pointOf({ preset, quality }, curve) {
  if (preset) return curve.find((point) => point.preset === preset);
  const cheapestFirst = [...curve].sort((a, b) => a.compute_ratio - b.compute_ratio);
  if (quality !== undefined) return cheapestFirst.find((point) => point.quality >= quality);
}

function showExpectation() {
  for (const range of form.querySelectorAll("output ~ input[type=range]"))
    range.parentElement.querySelector("output").value = percent(range.value);
  const model = chosenModel();
  const point = model && pointOf(budgetOf(), model.curve);
  byId("expected").textContent = point
    ? `On average${byId("budget").value === "preset" ? "" : " at most"}: ${percent(point.compute_ratio)} of the full compute, ` +
      `${point.mean_quality.toFixed(3)} ${MEASURES[model.quality_metric] ?? model.quality_metric} to the exact result, ` +
      `${point.expected_seconds.toFixed(2)} s of computing. Nine of ten results reach ${point.quality.toFixed(3)}.`
    : "The server adapts every step to the compute or the time that is left.";
}

function showBudget() {
  for (const part of form.querySelectorAll("[data-budget]")) part.hidden = part.dataset.budget !== byId("budget").value;
  showExpectation();
}

function showModel() {
  const model = chosenModel();
  if (model.modality === "mesh") import("./vendor/model-viewer.min.js"); // large, and only meshes need it
  for (const part of form.querySelectorAll("[data-modality]")) part.hidden = part.dataset.modality !== model.modality;
  for (const part of form.querySelectorAll("[data-guidance]")) part.hidden = part.dataset.guidance !== model.guidance;
  byId("picture_label").textContent =
    model.modality === "mesh" ? "Image of one object" : model.needs_input_image ? "Picture to edit" : "Picture to edit (optional)";
  byId("input_image").multiple = model.max_input_images > 1;
  byId("transparent").parentElement.hidden = !canBeTransparent(model);
  showInput();
  byId("about").textContent = `${model.family}, licence ${model.license}`;
  const presets = model.curve.filter((point) => point.preset).map((point) => new Option(point.preset));
  byId("preset").replaceChildren(...presets);
  if (presets.some((option) => option.value === "balanced")) byId("preset").value = "balanced";
  showDefaults(model.defaults);
  showBudget();
}

const knownField = (field) => byId("more").querySelector(`:scope > label > #${CSS.escape(field)}`);

/** Shows each default in its field. A default that this page has no field for gets a plain text field. */
function showDefaults({ strength, masked_strength, ...defaults }) { // the slider of strengths shows those two
  byId("other_fields").replaceChildren();
  for (const [field, value] of Object.entries(defaults)) (knownField(field) ?? addField(field)).placeholder = textOf(value);
}

const textOf = (value) => (typeof value === "string" ? value : JSON.stringify(value));

function addField(field) {
  const label = document.createElement("label");
  const input = document.createElement("input");
  input.name = field;
  label.append(`${field} `, input);
  byId("other_fields").append(label);
  return input;
}

/** The filled fields that this page does not know. A value has the type of its default. */
function otherFields(defaults) {
  const filled = [...byId("other_fields").querySelectorAll("input")].filter((input) => input.value !== "");
  return Object.fromEntries(filled.map(({ name, value }) => [name, valueOf(name, value, defaults[name])]));
}

function valueOf(name, text, example) {
  if (typeof example === "string") return text;
  try {
    return JSON.parse(text);
  } catch {
    throw new ApiError(`${name} must look like its default, ${textOf(example)}.`);
  }
}

const pictureFiles = () => [...byId("input_image").files];

const base64Of = (file) =>
  new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(file);
  });

const noisedFields = () => ({ mask: painter.toDataURL(), strength: numberOf("strength") });

async function bodyOf(model) {
  const seed = numberOf("seed") ?? Math.floor(Math.random() * MAX_SEED);
  if (!Number.isSafeInteger(seed)) throw new ApiError("A browser can send only whole seeds up to 2^53 - 1.");
  const shared = {
    ...otherFields(model.defaults),
    model: model.id,
    seed,
    num_inference_steps: numberOf("num_inference_steps"),
    guidance_scale: numberOf("guidance_scale"),
    stream: true,
    trace: true,
    partial_images: 3,
  };
  const pictures = await Promise.all(pictureFiles().map(base64Of));
  if (model.modality === "image") {
    if (!pictures.length && model.needs_input_image) throw new ApiError("Choose a picture first.");
    return {
      ...shared,
      prompt: byId("prompt").value,
      negative_prompt: (model.guidance === "true" && byId("negative_prompt").value) || undefined,
      size: byId("size").value || undefined,
      background: canBeTransparent(model) && byId("transparent").checked ? "transparent" : undefined,
      ...(pictures.length && { image: pictures, ...(model.edits === "noised" && noisedFields()) }),
    };
  }
  if (!pictures.length) throw new ApiError("Choose an image first.");
  return {
    ...shared,
    input_image: pictures[0],
    octree_resolution: numberOf("octree_resolution"),
    target_faces: numberOf("target_faces"),
  };
}

// Results

class Run {
  constructor(model, body) {
    this.model = model;
    this.body = body;
    this.abort = new AbortController();
    this.article = byId("run").content.cloneNode(true).firstElementChild;
    this.part("h2").textContent = `${model.id}, ${labelOf(body.budget)}`;
    const shorten = (name, value) => (String(value).startsWith("data:") && value.length > 40 ? `${value.slice(0, 40)}…` : value);
    this.part("pre").textContent = `POST ${this.path}\n${JSON.stringify(body, shorten, 2)}`;
    this.part(".cancel").addEventListener("click", () => this.abort.abort());
    byId("runs").prepend(this.article);
    this.article.scrollIntoView({ block: "nearest" });
  }

  get path() {
    if (this.model.modality === "mesh") return "/v1/meshes";
    return this.body.image ? "/v1/images/edits" : "/v1/images";
  }

  part(selector) {
    return this.article.querySelector(selector);
  }

  async finish() {
    this.part(".status").textContent = "waiting";
    try {
      await generate(this.path, this.body, this.abort.signal, (event) => this.show(event));
    } catch (error) {
      this.part(".status").textContent = this.abort.signal.aborted ? "cancelled" : "failed";
      if (!this.abort.signal.aborted) this.part(".error").textContent = error.message;
    }
    this.part("progress").hidden = true;
    this.part(".cancel").hidden = true;
  }

  show(event) {
    if (event.type === "job.progress") {
      this.part("progress").value = event.step / event.num_computed_steps;
      const left = event.eta_s === undefined || event.eta_s === null ? "" : `, ${event.eta_s.toFixed(1)} s left`;
      this.part(".status").textContent =
        `computed step ${event.step} of ${event.num_computed_steps}, ${percent(event.compute_ratio)} of the full compute${left}`;
    } else if (event.type === "job.queued" && event.position !== undefined) {
      const end = event.eta_s === null ? "" : `, done in about ${Math.ceil(event.eta_s)} s`;
      this.part(".status").textContent = `waiting, ${event.position} before this one${end}`;
    } else if (event.type === "job.started") {
      this.part(".status").textContent = "running";
    } else if (isResult(event)) {
      this.showArtifact(event.data[0].b64_json, "result");
      this.showReceipt(event.receipt, event.data[0].seed);
      this.part(".status").textContent = event.id;
    } else if (event.b64_json) {
      this.showArtifact(event.b64_json, "preview");
    }
  }

  /** Shows a preview or the result. It reuses one element, so that model-viewer keeps its camera from mesh to mesh. */
  showArtifact(b64, kind) {
    const isImage = this.model.modality === "image";
    const bytes = Uint8Array.from(atob(b64), (character) => character.charCodeAt(0));
    const url = URL.createObjectURL(new Blob([bytes], { type: isImage ? "image/png" : "model/gltf-binary" }));
    const view = this.part(".artifact").firstElementChild ?? document.createElement(isImage ? "img" : "model-viewer");
    const attributes = { class: kind, alt: `${kind}: ${this.body.prompt ?? "a mesh"}`, src: url };
    const look = isImage ? {} : { "camera-controls": "", "auto-rotate": "", exposure: "0.7" };
    for (const [name, value] of Object.entries({ ...look, ...attributes })) view.setAttribute(name, value);
    if (!view.isConnected) this.part(".artifact").append(view);
    if (kind !== "result") return;
    this.part(".artifact").classList.toggle("transparent", this.body.background === "transparent");
    if (this.body.image) this.showBefore(this.body.image[0]);
    const link = document.createElement("a");
    link.href = url;
    link.download = `${this.model.id}-${this.body.seed}.${isImage ? "png" : "glb"}`;
    link.textContent = "Download";
    this.part(".links").replaceChildren(link);
  }

  /** Lays the picture that was edited over the result, as far as the slider says. */
  showBefore(picture) {
    const before = document.createElement("img");
    Object.assign(before, { className: "before", alt: "before", src: picture });
    this.part(".artifact").append(before);
    const label = this.part(".before_after");
    const slider = label.querySelector("input");
    const show = () => (before.style.clipPath = `inset(0 ${100 - slider.value}% 0 0)`);
    slider.addEventListener("input", show);
    label.hidden = false;
    show();
  }

  showReceipt(receipt, seed) {
    const { run, skipped, reused, forecast } = receipt.blocks;
    const { computed } = receipt.steps;
    const lines = {
      Compute: percent(receipt.compute_ratio),
      Exact: { true: "yes", false: "no" }[receipt.exact] ?? receipt.exact,
      Steps: `${computed} of ${computed + receipt.steps.forecast} computed`,
      Calibrated: receipt.calibrated ? "yes" : "no, the curve was measured with another size, guidance, number of steps or pictures",
      Denoising: `${receipt.seconds.denoise.toFixed(2)} s`,
      Total: `${receipt.seconds.total.toFixed(2)} s, ${receipt.seconds.queue.toFixed(2)} s of it in the queue`,
      Blocks: `${run} run, ${reused} re-used, ${skipped} skipped, ${forecast} forecast`,
      "MLP width": percent(receipt.mean_mlp_width),
      Seed: seed,
    };
    if (receipt.mesh) lines.Mesh = `${receipt.mesh.num_faces} faces, ${receipt.mesh.is_watertight ? "" : "not "}watertight`;
    if (receipt.deadline_met !== null) lines.Deadline = receipt.deadline_met ? "met" : "missed";
    const entries = Object.entries(lines).flatMap(([name, value]) => {
      const [term, description] = [document.createElement("dt"), document.createElement("dd")];
      term.textContent = name;
      description.textContent = value;
      return [term, description];
    });
    this.part("dl").replaceChildren(...entries);
    if (receipt.decisions) this.showDecisions(receipt.decisions);
  }

  /** One cell for each block and step, of the first guidance branch. */
  showDecisions(steps) {
    const canvas = this.part("canvas");
    const branch = steps[0][0].branch;
    const ofBranch = steps.map((step) => step.filter((entry) => entry.branch === branch));
    this.part("figure").hidden = false;
    const colourOf = (decision) => getComputedStyle(this.part(`i.${decision}`)).backgroundColor;
    const colours = { run: colourOf("run"), reuse: colourOf("reuse"), skip: colourOf("skip"), forecast: colourOf("forecast") };
    const [width, height] = [8, 6];
    canvas.width = ofBranch.length * width;
    canvas.height = ofBranch[0].length * height;
    const context = canvas.getContext("2d");
    ofBranch.forEach((step, column) =>
      step.forEach((entry, row) => {
        context.globalAlpha = entry.decision === "run" ? 0.35 + 0.65 * entry.mlp_width : 1;
        context.fillStyle = colours[entry.decision];
        context.fillRect(column * width, row * height, width - 1, height - 1);
      }),
    );
  }
}

async function submit(event) {
  event.preventDefault();
  byId("notice").textContent = "";
  const model = chosenModel();
  try {
    const body = await bodyOf(model);
    const budgets = [budgetOf()];
    if (byId("compare").checked && labelOf(budgets[0]) !== "exact") budgets.push({ preset: "exact" });
    // One after the other: together they would share steps, and each would take longer.
    for (const run of budgets.map((budget) => new Run(model, { ...body, budget }))) await run.finish();
  } catch (error) {
    byId("notice").textContent = error.message;
  }
}

async function loadModels() {
  try {
    models = (await (await call("/v1/models")).json()).data;
    byId("notice").textContent = "";
  } catch (error) {
    byId("notice").textContent = `${error.message} (enter an API key under More)`;
    return;
  }
  byId("model").replaceChildren(...models.map((model) => new Option(model.id)));
  showModel();
}

function takeDropped(event) {
  event.preventDefault();
  byId("drop").classList.remove("over");
  if (!event.dataTransfer.files.length) return;
  byId("input_image").files = event.dataTransfer.files;
  showInput();
}

/** Shows the first picture, and for models that take one a canvas for its mask. */
function showInput() {
  const [file] = pictureFiles();
  const isNoised = chosenModel()?.edits === "noised";
  URL.revokeObjectURL(byId("input_preview").src);
  byId("pictures").hidden = !file;
  byId("mask").hidden = !isNoised;
  for (const part of form.querySelectorAll("[data-edits]")) part.hidden = !isNoised;
  if (file) byId("input_preview").src = URL.createObjectURL(file);
}

function removeInput() {
  byId("input_image").value = "";
  showInput();
}

/** Until somebody moves the slider, it has the server's default. */
function suggestStrength() {
  const { strength, masked_strength } = chosenModel().defaults;
  if (strength !== undefined && !byId("strength").dataset.isChosen)
    byId("strength").value = painter.isPainted ? masked_strength : strength;
  showExpectation();
}

function clearMask() {
  painter.clear();
  suggestStrength();
}

form.addEventListener("submit", submit);
form.addEventListener("input", showExpectation);
byId("model").addEventListener("change", showModel);
byId("budget").addEventListener("change", showBudget);
byId("api_key").addEventListener("change", loadModels);
byId("input_image").addEventListener("change", showInput);
byId("input_preview").addEventListener("load", ({ target }) => {
  painter.reset(target.naturalWidth, target.naturalHeight);
  suggestStrength();
});
byId("mask").addEventListener("pointerup", suggestStrength);
byId("strength").addEventListener("input", ({ target }) => (target.dataset.isChosen = true));
byId("clear_mask").addEventListener("click", clearMask);
byId("remove").addEventListener("click", removeInput);
byId("drop").addEventListener("drop", takeDropped);
byId("drop").addEventListener("dragover", (event) => {
  event.preventDefault();
  byId("drop").classList.add("over");
});
byId("drop").addEventListener("dragleave", () => byId("drop").classList.remove("over"));
loadModels();
