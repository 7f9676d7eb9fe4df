// fetch for a mesh, and Khronos' validator for the file.

import validator from "gltf-validator";

import { checkEqual } from "./checks.mjs";
import { apiKey, baseURL, picture, run } from "./target.mjs";

async function mesh(fields) {
  const form = new FormData();
  form.append("input_image", new Blob([picture], { type: "image/png" }), "picture.png");
  for (const [name, value] of Object.entries({ octree_resolution: 32, ...fields })) form.append(name, value);
  const answer = await fetch(`${baseURL}/meshes`, {
    method: "POST",
    headers: { authorization: `Bearer ${apiKey}` },
    body: form,
  });
  checkEqual(answer.status, 200, `the status (${answer.headers.get("x-request-id")})`);
  return answer;
}

async function checkValid(answer) {
  const report = await validator.validateBytes(new Uint8Array(await answer.arrayBuffer()), { format: "glb" });
  const { numErrors, numWarnings } = report.issues;
  checkEqual([numErrors, numWarnings], [0, 0], `errors and warnings (${JSON.stringify(report.issues.messages)})`);
  checkEqual(report.info.totalTriangleCount > 0, true, "whether there are triangles");
}

await run({
  async binary() {
    await checkValid(await mesh({ response_format: "binary" }));
  },
  async url() {
    const { data } = await (await mesh({ response_format: "url" })).json();
    await checkValid(await fetch(data[0].url));
  },
});
