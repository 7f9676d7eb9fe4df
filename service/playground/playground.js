/* The playground uses only the public API: GET /v1/models, and POST /v1/images and /v1/meshes with "stream". */

const byId = (id) => document.getElementById(id);
const form = byId("form");
const MEASURES = { ssim: "SSIM", volume_iou: "volume IoU" };
const MAX_SEED = 2 ** 31;
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
  for (const range of form.querySelectorAll("input[type=range]"))
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
  byId("about").textContent = `${model.family}, licence ${model.license}`;
  const presets = model.curve.filter((point) => point.preset).map((point) => new Option(point.preset));
  byId("preset").replaceChildren(...presets);
  if (presets.some((option) => option.value === "balanced")) byId("preset").value = "balanced";
  showDefaults(model.defaults);
  showBudget();
}

const knownField = (field) => byId("more").querySelector(`:scope > label > #${CSS.escape(field)}`);

/** Shows each default in its field. A default that this page has no field for gets a plain text field. */
function showDefaults(defaults) {
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

const base64Of = (file) =>
  new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(file);
  });

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
  if (model.modality === "image")
    return {
      ...shared,
      prompt: byId("prompt").value,
      negative_prompt: (model.guidance === "true" && byId("negative_prompt").value) || undefined,
      size: byId("size").value || undefined,
    };
  const [file] = byId("input_image").files;
  if (!file) throw new ApiError("Choose an image first.");
  return {
    ...shared,
    input_image: await base64Of(file),
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
    const shown = body.input_image ? { ...body, input_image: `${body.input_image.slice(0, 40)}…` } : body;
    this.part("pre").textContent = `POST ${this.path}\n${JSON.stringify(shown, null, 2)}`;
    this.part(".cancel").addEventListener("click", () => this.abort.abort());
    byId("runs").prepend(this.article);
    this.article.scrollIntoView({ block: "nearest" });
  }

  get path() {
    return this.model.modality === "image" ? "/v1/images" : "/v1/meshes";
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
    const link = document.createElement("a");
    link.href = url;
    link.download = `${this.model.id}-${this.body.seed}.${isImage ? "png" : "glb"}`;
    link.textContent = "Download";
    this.part(".links").replaceChildren(link);
  }

  showReceipt(receipt, seed) {
    const { run, skipped, reused, forecast } = receipt.blocks;
    const { computed } = receipt.steps;
    const lines = {
      Compute: percent(receipt.compute_ratio),
      Steps: `${computed} of ${computed + receipt.steps.forecast} computed`,
      Calibrated: receipt.calibrated ? "yes" : "no, the curve was measured with the model's defaults",
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

function showInput() {
  const [file] = byId("input_image").files;
  URL.revokeObjectURL(byId("input_preview").src);
  byId("input_preview").hidden = !file;
  if (file) byId("input_preview").src = URL.createObjectURL(file);
}

form.addEventListener("submit", submit);
form.addEventListener("input", showExpectation);
byId("model").addEventListener("change", showModel);
byId("budget").addEventListener("change", showBudget);
byId("api_key").addEventListener("change", loadModels);
byId("input_image").addEventListener("change", showInput);
byId("drop").addEventListener("drop", takeDropped);
byId("drop").addEventListener("dragover", (event) => {
  event.preventDefault();
  byId("drop").classList.add("over");
});
byId("drop").addEventListener("dragleave", () => byId("drop").classList.remove("over"));
loadModels();
