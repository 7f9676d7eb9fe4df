// What the scripts of all JavaScript clients share. It runs in node and in browsers.

export const PROMPT = "a red circle above a blue square";

export function check(condition, message) {
  if (!condition) throw new Error(message);
}

export function checkEqual(value, expected, what) {
  const [got, wanted] = [JSON.stringify(value), JSON.stringify(expected)];
  check(got === wanted, `${what} is ${got} instead of ${wanted}`);
}

// The error that `call` throws. An Error if it throws none.
export async function errorOf(call) {
  try {
    await call();
  } catch (error) {
    return error;
  }
  throw new Error("the call was accepted");
}

// Run the check of each feature, and hand `report` an object for each. Whether all passed.
export async function runChecks(checks, report) {
  let passed = true;
  for (const [feature, run] of Object.entries(checks)) {
    let problem = null;
    try {
      await run();
    } catch (error) {
      passed = false;
      problem = `${error?.name}: ${error?.message} ${/\((\S*?):\d+\)|at (\S+):\d+$/m.exec(error?.stack)?.[0] ?? ""}`;
    }
    report({ feature, problem });
  }
  return passed;
}

export function bytesOf(base64) {
  check(typeof base64 === "string", "the answer has no b64_json");
  return Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));
}

export function formatOf(bytes) {
  const start = String.fromCharCode(...bytes.subarray(0, 12));
  if (start.startsWith("\x89PNG")) return "png";
  if (start.startsWith("RIFF") && start.endsWith("WEBP")) return "webp";
  return start.startsWith("\xff\xd8\xff") ? "jpeg" : "unknown";
}

// [width, height], from the header of a PNG file.
export function sizeOf(bytes) {
  checkEqual(formatOf(bytes), "png", "the format");
  const view = new DataView(bytes.buffer, bytes.byteOffset);
  return [view.getUint32(16), view.getUint32(20)];
}

// The bytes behind a link, fetched without a key, as browsers do for <img>.
export async function bytesBehind(url) {
  check(typeof url === "string", "the answer has no url");
  const answer = await fetch(url);
  checkEqual(answer.status, 200, `the status of ${url}`);
  return new Uint8Array(await answer.arrayBuffer());
}

export function checkUsage(usage) {
  check(usage, "the answer has no usage");
  const [input, output, total] = [usage.input_tokens, usage.output_tokens, usage.total_tokens];
  check(input > 0 && output > 0 && total === input + output, `usage is ${JSON.stringify(usage)}`);
}

// Pictures are {width, height, data}, data as RGBA bytes.
export function checkOnlyLeftHalfChanged(edited, original) {
  checkEqual([edited.width, edited.height], [original.width, original.height], "the size");
  const [left, right] = [0, 1].map((half) => meanDifference(edited, original, half));
  check(right === 0, `the half that was to be kept differs by ${right.toFixed(1)} of 255`);
  check(left > 3, `the half that was to be edited differs by ${left.toFixed(1)} of 255`);
}

// Over the colours of the left (0) or the right half (1). A strip beside the border does not count.
function meanDifference(one, other, half) {
  const { width, height } = one;
  const strip = width / 8;
  const [first, last] = half === 0 ? [0, width / 2 - strip] : [width / 2 + strip, width];
  let sum = 0;
  for (let y = 0; y < height; y += 1)
    for (let x = first; x < last; x += 1)
      for (let channel = 0; channel < 3; channel += 1) {
        const place = 4 * (y * width + x) + channel;
        sum += Math.abs(one.data[place] - other.data[place]);
      }
  return sum / (3 * height * (last - first));
}

export function checkTransparent(picture) {
  const alpha = picture.data.filter((_, place) => place % 4 === 3);
  const [low, high] = [alpha.reduce((a, b) => Math.min(a, b)), alpha.reduce((a, b) => Math.max(a, b))];
  checkEqual([low, high], [0, 255], "the range of alpha");
}
