// OpenAI's SDK in a page of another origin. The page hands each line to its function `report`.

import { bytesOf, check, checkEqual, runChecks } from "./checks.mjs";
import { openaiChecks } from "./openai_checks.mjs";

async function decode(bytes) {
  const bitmap = await createImageBitmap(new Blob([bytes]));
  const context = new OffscreenCanvas(bitmap.width, bitmap.height).getContext("2d");
  context.drawImage(bitmap, 0, 0);
  return context.getImageData(0, 0, bitmap.width, bitmap.height);
}

export async function run({ baseURL, apiKey, picture, mask }) {
  const files = { picture: new Uint8Array(picture), mask: new Uint8Array(mask) };
  const checks = openaiChecks({ baseURL, apiKey, decode, ...files, dangerouslyAllowBrowser: true });
  await runChecks({ ...checks, ...pageChecks(baseURL, apiKey) }, window.report);
}

function pageChecks(baseURL, apiKey) {
  const post = (fields, headers) =>
    fetch(`${baseURL}/images`, {
      method: "POST",
      headers: { authorization: `Bearer ${apiKey}`, "content-type": "application/json", ...headers },
      body: JSON.stringify({ prompt: "a red circle", size: "64x64", ...fields }),
    });

  return {
    async "<img>"() {
      const image = new Image();
      image.src = (await (await post({ response_format: "url" })).json()).data[0].url;
      await image.decode(); // throws unless a picture arrived
      checkEqual([image.naturalWidth, image.naturalHeight], [64, 64], "the size");
    },
    async headers() {
      const answer = await post({ response_format: "binary" });
      for (const name of ["x-job-id", "x-receipt", "x-request-id", "x-seed"])
        check(answer.headers.get(name), `the page cannot read ${name}`);
      checkEqual((await post({ size: "1x1" })).status, 422, "the status");
    },
    // The browser's EventSource sends no headers, so it needs a link that carries its own right.
    async events() {
      const job = await (await post({}, { prefer: "respond-async" })).json();
      const source = new EventSource(job.links.events);
      let opened = 0;
      let completed = null;
      source.addEventListener("image_generation.completed", ({ data }) => (completed = JSON.parse(data)));
      await new Promise((resolve, reject) => {
        source.onopen = () => {
          opened += 1;
          if (opened > 2) reject(new Error("it connects again and again"));
        };
        source.onerror = () => source.readyState === EventSource.CLOSED && resolve();
      }).finally(() => source.close());
      check(completed, "the link is refused");
      bytesOf(completed.data[0].b64_json);
      checkEqual(opened, 1, "the number of connections with events");
    },
  };
}
