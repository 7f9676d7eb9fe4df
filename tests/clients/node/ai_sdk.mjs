// Vercel's AI SDK. Its first argument is the provider: openai-compatible or openai.

import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { APICallError, generateImage } from "ai";

import { PROMPT, check, checkEqual, checkOnlyLeftHalfChanged, checkTransparent, errorOf, formatOf, sizeOf } from "./checks.mjs";
import { apiKey, baseURL, decode, mask, picture, run } from "./target.mjs";

const name = process.argv[2];
const create = {
  openai: () => createOpenAI({ baseURL, apiKey }),
  "openai-compatible": () => createOpenAICompatible({ name: "elastic", baseURL, apiKey }),
}[name];
const provider = create();
const options = (fields) => ({ [name === "openai" ? "openai" : "elastic"]: { quality: "low", ...fields } });

const generate = ({ model = "gpt-image-1", fields, ...settings } = {}) =>
  generateImage({
    model: provider.imageModel(model),
    prompt: PROMPT,
    size: "64x64",
    maxRetries: 0,
    providerOptions: options(fields),
    ...settings,
  });

await run({
  async "model names"() {
    for (const model of ["dall-e-2", "dall-e-3", "gpt-image-1", "gpt-image-1-mini", "gpt-image-1.5", "tiny-flux"])
      checkEqual(sizeOf((await generate({ model })).image.uint8Array), [64, 64], model);
  },
  async n() {
    checkEqual((await generate({ n: 2 })).images.length, 2, "the number of pictures");
    const ten = await generate({ n: 10 });
    checkEqual([ten.images.length, ten.responses.length], [10, 1], "pictures and calls");
  },
  async size() {
    checkEqual(sizeOf((await generate({ size: "96x64" })).image.uint8Array), [96, 64], "the size");
    checkEqual(sizeOf((await generate({ size: undefined })).image.uint8Array), [128, 128], "the size");
  },
  async quality() {
    for (const quality of ["low", "medium", "high", "auto"])
      checkEqual((await generate({ fields: { quality } })).images.length, 1, quality);
  },
  async b64_json() {
    const { image, warnings } = await generate();
    checkEqual([image.mediaType, warnings], ["image/png", []], "the picture");
  },
  async format() {
    const fields = name === "openai" ? { outputFormat: "webp" } : { output_format: "webp", output_compression: 50 };
    checkEqual(formatOf((await generate({ fields })).image.uint8Array), "webp", "the format");
  },
  async "ignored fields"() {
    await generate({ fields: { user: "user-1", style: "vivid" }, model: "dall-e-3" });
  },
  ...(name === "openai-compatible" && {
    async "own fields"() {
      const [one, other] = [await generate({ fields: { seed: 5 } }), await generate({ fields: { seed: 5 } })];
      checkEqual(one.image.base64, other.image.base64, "the second picture");
    },
  }),
  ...(name === "openai" && {
    async usage() {
      const { inputTokens, outputTokens, totalTokens } = (await generate()).usage;
      check(inputTokens > 0 && outputTokens > 0, `usage is ${inputTokens} and ${outputTokens}`);
      checkEqual(totalTokens, inputTokens + outputTokens, "totalTokens");
    },
  }),
  async edit() {
    const { image } = await generate({ prompt: { text: "a blue square", images: [picture] }, size: undefined });
    checkEqual(sizeOf(image.uint8Array), [128, 128], "the size");
    const two = await generate({ prompt: { text: "a blue square", images: [picture] }, n: 2 });
    checkEqual(two.images.map((one) => sizeOf(one.uint8Array)), [[64, 64], [64, 64]], "the sizes");
  },
  async mask() {
    const { image } = await generate({ prompt: { text: "a blue square", images: [picture], mask }, size: undefined });
    checkOnlyLeftHalfChanged(await decode(image.uint8Array), await decode(picture));
  },
  async transparent() {
    const { image } = await generate({ fields: { background: "transparent" }, size: "128x128" });
    checkTransparent(await decode(image.uint8Array));
  },
  async errors() {
    const error = await errorOf(() => generate({ size: "65x64" }));
    check(APICallError.isInstance(error), `${error} is no APICallError`);
    checkEqual([error.statusCode, error.data.error.code], [422, "invalid_parameter"], "the error");
    check(!error.isRetryable, "a wrong size would be sent again");
    check(error.message.includes("65"), `the message is ${error.message}`);
  },
});
