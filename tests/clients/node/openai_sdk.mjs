import { openaiChecks } from "./openai_checks.mjs";
import * as target from "./target.mjs";

await target.run(openaiChecks(target));
