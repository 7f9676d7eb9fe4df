// eventsource-client, which connects again whenever a stream ends. Only the answer 204 stops it.

import { createEventSource } from "eventsource-client";

import { PROMPT, check, checkEqual } from "./checks.mjs";
import { apiKey, baseURL, run } from "./target.mjs";

const headers = { authorization: `Bearer ${apiKey}` };

async function startJob() {
  const answer = await fetch(`${baseURL}/images`, {
    method: "POST",
    headers: { ...headers, "content-type": "application/json", prefer: "respond-async" },
    body: JSON.stringify({ prompt: PROMPT, size: "64x64", partial_images: 1 }),
  });
  checkEqual(answer.status, 202, "the status");
  return (await answer.json()).links.events;
}

// The names of a job's events until the client stops by itself, and how often it connected.
async function follow(url) {
  const names = [];
  let connections = 0;
  const source = createEventSource({
    url,
    headers,
    fetch: (...call) => {
      connections += 1;
      if (connections > 3) source.close(); // it would go on for ever
      return fetch(...call);
    },
  });
  for await (const { event } of source) names.push(event);
  return { names, connections };
}

await run({
  async events() {
    const url = await startJob();
    for (const when of ["while it runs", "after its end"]) {
      const { names, connections } = await follow(url);
      checkEqual([names.at(0), names.at(-1)], ["job.queued", "image_generation.completed"], `events ${when}`);
      check(names.includes("image_generation.partial_image"), `the events ${when} are ${names}`);
      checkEqual(connections, 2, `the number of connections ${when}`);
    }
  },
});
