// OpenAI's own SDK for JavaScript, in node and in browsers.

import OpenAI, { toFile } from "openai";

import {
  PROMPT,
  bytesBehind,
  bytesOf,
  check,
  checkEqual,
  checkOnlyLeftHalfChanged,
  checkTransparent,
  checkUsage,
  errorOf,
  formatOf,
  sizeOf,
} from "./checks.mjs";

// `picture` and `mask` are bytes of PNG files; `decode` gives the pixels of one.
export function openaiChecks({ baseURL, apiKey, picture, mask, decode, ...options }) {
  const client = new OpenAI({ baseURL, apiKey, maxRetries: 0, ...options });
  const generate = (fields) =>
    client.images.generate({ model: "gpt-image-1", prompt: PROMPT, size: "64x64", quality: "low", ...fields });
  const edit = async (fields) =>
    client.images.edit({
      model: "gpt-image-1",
      prompt: "a blue square",
      quality: "low",
      image: await toFile(picture, "picture.png", { type: "image/png" }),
      ...fields,
    });

  async function checkStream(stream, name) {
    const events = [];
    for await (const event of stream) if (event.type.startsWith(name)) events.push(event);
    checkEqual(
      events.map(({ type, partial_image_index }) => [type, partial_image_index]),
      [
        [`${name}.partial_image`, 0],
        [`${name}.partial_image`, 1],
        [`${name}.completed`, undefined],
      ],
      "the events",
    );
    checkEqual(sizeOf(bytesOf(events[2].b64_json)), [64, 64], "the size");
    for (const event of events) {
      const [width, height] = sizeOf(bytesOf(event.b64_json)); // a preview may be smaller
      checkEqual(width, height, "the width");
      checkEqual(
        [event.size, event.quality, event.output_format, event.background],
        ["64x64", "low", "png", "opaque"],
        "an event",
      );
      check(event.created_at > 0, "an event has no created_at");
    }
    checkUsage(events[2].usage);
  }

  return {
    async models() {
      const ids = [];
      for await (const model of client.models.list()) ids.push(model.id);
      check(ids.includes("tiny-flux"), `the models are ${ids}`);
      checkEqual((await client.models.retrieve("tiny-flux")).id, "tiny-flux", "the model");
    },
    async "model names"() {
      for (const model of ["dall-e-2", "dall-e-3", "gpt-image-1", "gpt-image-1.5", "gpt-image-2.6"])
        checkEqual((await generate({ model })).data.length, 1, model);
    },
    async n() {
      checkEqual(new Set((await generate({ n: 2 })).data.map((item) => item.seed)).size, 2, "the number of seeds");
      checkEqual((await generate({ n: 10 })).data.length, 10, "the number of pictures");
    },
    async size() {
      checkEqual(sizeOf(bytesOf((await generate({ size: "96x64" })).data[0].b64_json)), [96, 64], "the size");
      checkEqual(sizeOf(bytesOf((await generate({ size: "auto" })).data[0].b64_json)), [128, 128], "the size");
    },
    async quality() {
      for (const quality of ["low", "medium", "high", "xhigh", "max", "auto", "standard", "hd"]) {
        const { receipt } = await generate({ quality });
        checkEqual(receipt.compute_ratio === 1, ["xhigh", "max", "hd"].includes(quality), `the exactness of ${quality}`);
      }
    },
    async b64_json() {
      const answer = await generate({ response_format: "b64_json" });
      checkEqual(sizeOf(bytesOf(answer.data[0].b64_json)), [64, 64], "the size");
    },
    async url() {
      for (const { url } of (await generate({ response_format: "url", n: 2 })).data)
        checkEqual(sizeOf(await bytesBehind(url)), [64, 64], "the size");
    },
    async format() {
      for (const output_format of ["png", "webp", "jpeg"]) {
        const answer = await generate({ output_format });
        checkEqual(formatOf(bytesOf(answer.data[0].b64_json)), output_format, "the format");
      }
      const lengths = [];
      for (const output_compression of [10, 90]) {
        const answer = await generate({ output_format: "jpeg", output_compression, seed: 1 });
        lengths.push(answer.data[0].b64_json.length);
      }
      check(lengths[0] < lengths[1], `the lengths are ${lengths}`);
    },
    async "ignored fields"() {
      await generate({ style: "vivid", user: "user-1", moderation: "low", background: "opaque" });
    },
    async "own fields"() {
      const fields = { quality: undefined, seed: 5, budget: { preset: "draft" } };
      const [one, other] = [await generate(fields), await generate(fields)];
      checkEqual(one.data[0].seed, 5, "the seed");
      check(one.data[0].b64_json === other.data[0].b64_json, "one seed made two pictures");
    },
    async binary() {
      const answer = await generate({ response_format: "binary" }).asResponse();
      checkEqual(sizeOf(new Uint8Array(await answer.arrayBuffer())), [64, 64], "the size");
    },
    async stream() {
      await checkStream(await generate({ stream: true, partial_images: 2 }), "image_generation");
      const pictures = new Set();
      for await (const event of await generate({ stream: true, n: 2 }))
        if (event.type === "image_generation.completed") pictures.add(event.b64_json);
      checkEqual(pictures.size, 2, "the number of pictures");
    },
    async usage() {
      checkUsage((await generate()).usage);
    },
    async edit() {
      const answer = await edit();
      checkEqual(sizeOf(bytesOf(answer.data[0].b64_json)), [128, 128], "the size");
      checkUsage(answer.usage);
      const images = [await toFile(picture, "picture.png", { type: "image/png" })];
      const two = await edit({ image: images, n: 2, size: "64x64", input_fidelity: "high" });
      for (const { b64_json } of two.data) checkEqual(sizeOf(bytesOf(b64_json)), [64, 64], "the size");
      checkEqual(two.data.length, 2, "the number of pictures");
    },
    async mask() {
      const answer = await edit({ mask: await toFile(mask, "mask.png", { type: "image/png" }) });
      checkOnlyLeftHalfChanged(await decode(bytesOf(answer.data[0].b64_json)), await decode(picture));
    },
    async "edit stream"() {
      await checkStream(await edit({ stream: true, partial_images: 2, size: "64x64" }), "image_edit");
    },
    async transparent() {
      const answer = await generate({ background: "transparent", size: "128x128" });
      checkTransparent(await decode(bytesOf(answer.data[0].b64_json)));
    },
    async errors() {
      const wrong = new OpenAI({ baseURL, apiKey: "sk-wrong", maxRetries: 0, ...options });
      for (const [expected, code, call] of [
        [OpenAI.AuthenticationError, "invalid_api_key", () => wrong.models.list()],
        [OpenAI.AuthenticationError, "invalid_api_key", () => wrong.images.generate({ prompt: PROMPT })],
        [OpenAI.UnprocessableEntityError, "invalid_parameter", () => generate({ size: "65x64" })],
        [OpenAI.NotFoundError, "model_not_found", () => generate({ model: "no-such-model" })],
      ]) {
        const error = await errorOf(call);
        check(error instanceof expected, `${error} instead of ${expected.name}`);
        checkEqual(error.code, code, "the code");
        check(error.requestID, "the answer has no x-request-id");
      }
    },
  };
}
