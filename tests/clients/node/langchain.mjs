// LangChain's DallEAPIWrapper for JavaScript. It always sends a model, a style, a quality and a response_format.

import { DallEAPIWrapper } from "@langchain/openai";

import { PROMPT, bytesBehind, bytesOf, checkEqual, errorOf, sizeOf } from "./checks.mjs";
import { apiKey, baseURL, run } from "./target.mjs";

// Its default size is 1024x1024, which is too large for the tiny models.
const invoke = (fields) => new DallEAPIWrapper({ baseUrl: baseURL, apiKey, size: "256x256", ...fields }).invoke(PROMPT);

await run({
  async "model names"() {
    for (const model of ["dall-e-2", "dall-e-3", "gpt-image-1"])
      checkEqual(sizeOf(await bytesBehind(await invoke({ model, size: "64x64" }))), [64, 64], "the size");
  },
  async url() {
    checkEqual(sizeOf(await bytesBehind(await invoke())), [256, 256], "the size");
  },
  async b64_json() {
    const picture = await invoke({ responseFormat: "b64_json", size: "64x64" });
    checkEqual(sizeOf(bytesOf(picture)), [64, 64], "the size");
  },
  async n() {
    const pictures = await invoke({ n: 2, size: "64x64" }); // two calls
    for (const { image_url } of pictures) checkEqual(sizeOf(await bytesBehind(image_url)), [64, 64], "the size");
    checkEqual(pictures.length, 2, "the number of pictures");
  },
  async quality() {
    checkEqual(sizeOf(await bytesBehind(await invoke({ quality: "hd", size: "64x64" }))), [64, 64], "the size");
  },
  async "ignored fields"() {
    await invoke({ style: "natural", user: "user-1", size: "64x64" });
  },
  async errors() {
    const error = await errorOf(() => invoke({ apiKey: "sk-wrong" }));
    checkEqual([error.status, error.code], [401, "invalid_api_key"], "the error");
  },
});
