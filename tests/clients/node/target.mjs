// The server that node's scripts call, and the input of edits.

import { readFile } from "node:fs/promises";

import { PNG } from "pngjs";

import { runChecks } from "./checks.mjs";

globalThis.File ??= (await import("node:buffer")).File; // node 18 has it, but not as a global

export const baseURL = process.env.CLIENTS_BASE_URL;
export const apiKey = process.env.CLIENTS_API_KEY;
export const picture = await readFile(`${process.env.CLIENTS_PICTURES}/picture.png`);
export const mask = await readFile(`${process.env.CLIENTS_PICTURES}/mask.png`); // its left half is to be edited

export const decode = async (bytes) => PNG.sync.read(Buffer.from(bytes));

// Run the checks of a client and print a JSON line for each.
export async function run(checks) {
  process.exitCode = (await runChecks(checks, (line) => console.log(JSON.stringify(line)))) ? 0 : 1;
}
