// The page: reads the form, runs a request with drafts and again without, shows both.

import { drawOrigins, drawPositions, drawRounds, drawTimes } from "./charts.js";
import { ApiError, Client } from "./client.js";
import { byId, element, number, seconds, throttled } from "./dom.js";
import { DRAFT_FIGURES, PLAIN_FIGURES, Panel } from "./panel.js";
import { Replicas } from "./replicas.js";
import { Run, numEqual } from "./run.js";

const ANNOUNCE_MS = 5000;
// Inputs by the names of the request's fields.
const INPUTS = {
  prompt: "prompt", messages: "prompt", model: "model", temperature: "temperature", seed: "seed",
  max_tokens: "max-tokens", gamma: "gamma", verification: "verification", draft_source: "draft-source",
};

const client = new Client();
const replicas = new Replicas(client);
const drafted = new Panel("With drafts", "Each token is marked by its origin.", DRAFT_FIGURES);
const plain = new Panel("Without drafts", "The same request with γ 0, for comparison.", PLAIN_FIGURES);
const runs = { drafted: null, plain: null };
const turns = []; // of the conversation, as messages
let stopping = null; // AbortController of the running request

const mode = () => document.querySelector("input[name=mode]:checked").value;
const value = (id) => byId(id).value.trim();

/** A number field. Undefined: empty, the server's default. Raises ApiError if it is not a number. */
function numberOf(field) {
  const text = value(INPUTS[field]);
  if (text === "") return undefined;
  const parsed = Number(text);
  if (Number.isFinite(parsed) && (!Number.isInteger(parsed) || Number.isSafeInteger(parsed))) return parsed;
  throw new ApiError(0, { message: `${field}: ${text} is not a number that this page can send`, param: field });
}

/** The request of the form. The seed is chosen here if it is empty, so that both runs share it. */
function requestOf(kind) {
  const prompt = byId("prompt").value;
  const input = kind === "chat" ? { messages: [...turns, { role: "user", content: prompt }] } : { prompt };
  return {
    ...input,
    model: value("model") || undefined,
    temperature: numberOf("temperature"),
    seed: numberOf("seed") ?? Math.floor(Math.random() * 2 ** 32),
    max_tokens: numberOf("max_tokens"),
    gamma: numberOf("gamma"),
    verification: value("verification"),
    draft_source: value("draft-source"),
    logprobs: kind === "chat" ? true : 0,
    stream: true,
    token_details: true,
  };
}

function draw() {
  drafted.update();
  plain.update();
  drawOrigins(runs.drafted);
  drawPositions(runs.drafted);
  drawTimes(runs.drafted, runs.plain);
  drawRounds(runs.drafted);
}

// Seldom enough not to delay the tokens, whose arrival is timed.
const drawSoon = throttled(draw, 120);

async function generate(kind, body, panel, name) {
  const run = (runs[name] = new Run());
  run.status = "waiting";
  panel.begin(run);
  try {
    for await (const { choices } of client.stream(kind, body, stopping.signal)) {
      if (!choices.length) continue;
      run.status = "generating";
      panel.add(run.add(choices[0]));
      drawSoon();
    }
  } catch (error) {
    run.status = error.name === "AbortError" ? "stopped" : "failed";
    throw error;
  } finally {
    draw();
  }
  return run;
}

async function submit() {
  if (stopping) return;
  const kind = mode();
  showError(null);
  runs.drafted = runs.plain = null;
  stopping = new AbortController();
  setRunning(true);
  const announcing = setInterval(announceProgress, ANNOUNCE_MS);
  try {
    const body = requestOf(kind);
    showTurns(kind);
    byId("verdict").textContent = `Seed ${body.seed}. Running with drafts …`;
    const run = await generate(kind, body, drafted, "drafted");
    if (byId("compare").checked) {
      byId("verdict").textContent = `Seed ${body.seed}. Running without drafts …`;
      await generate(kind, { ...body, gamma: 0 }, plain, "plain");
    } else {
      plain.begin(null);
    }
    if (kind === "chat") keepTurn(run);
    showVerdict(body);
    announce(`Finished, ${run.tokens.length} tokens. ${byId("verdict").textContent}`);
  } catch (error) {
    if (error.name === "AbortError") {
      byId("verdict").textContent = "Stopped.";
      announce("Stopped.");
    } else {
      byId("verdict").textContent = "Failed.";
      showError(error);
    }
  } finally {
    clearInterval(announcing);
    stopping = null;
    setRunning(false);
    draw();
    replicas.refresh();
  }
}

/** What the second run shows about the first. */
function comparison(body) {
  const [one, other] = [runs.drafted, runs.plain];
  const equal = numEqual(one, other);
  if (equal === one.tokens.length && equal === other.tokens.length) return `the same ${equal} tokens`;
  const isExact = body.temperature === 0 || body.verification === "coupled";
  return isExact ? `outputs differ from token ${equal + 1} on` : "two samples of the same distribution";
}

/** Result of the runs in one line. */
function showVerdict(body) {
  const [one, other] = [runs.drafted, runs.plain];
  const verdict = byId("verdict");
  if (!other) {
    verdict.replaceChildren(`${seconds(one.totalS)} with drafts · seed ${body.seed}`);
    return;
  }
  const speedUp = one.tokens.length / one.totalS / (other.tokens.length / other.totalS);
  verdict.replaceChildren(
    element("strong", {}, `${number(speedUp, 2)}×`),
    ` as fast with drafts: ${seconds(one.totalS)} instead of ${seconds(other.totalS)} · `,
    `${comparison(body)} · seed ${body.seed}`,
  );
}

function keepTurn(run) {
  turns.push({ role: "user", content: byId("prompt").value });
  turns.push({ role: "assistant", content: run.text });
  byId("prompt").value = "";
  byId("new-chat").hidden = false;
}

function showTurns(kind) {
  const list = byId("turns");
  list.hidden = kind !== "chat" || !turns.length;
  list.replaceChildren(...turns.map(({ role, content }) =>
    element("li", { class: role }, element("b", {}, role), element("p", {}, content))));
}

function setRunning(isRunning) {
  byId("generate").setAttribute("aria-disabled", String(isRunning));
  byId("stop").disabled = !isRunning;
  byId("runs").setAttribute("aria-busy", String(isRunning));
}

function showError(error) {
  const box = byId("error");
  for (const marked of document.querySelectorAll("[aria-invalid]")) {
    marked.removeAttribute("aria-invalid");
    marked.removeAttribute("aria-errormessage");
  }
  box.hidden = error === null;
  box.textContent = error?.message ?? "";
  if (error === null) return;
  if (!(error instanceof ApiError)) console.error(error);
  const id = error.status === 401 ? "api-key" : INPUTS[error.param?.split(".")[0]];
  if (id === undefined) return;
  byId(id).setAttribute("aria-invalid", "true");
  byId(id).setAttribute("aria-errormessage", "error");
  byId(id).focus();
}

function announce(text) {
  byId("announcement").textContent = text;
}

function announceProgress() {
  const [run, name] = runs.plain ? [runs.plain, "without"] : [runs.drafted, "with"];
  if (run) announce(`${run.tokens.length} tokens ${name} drafts so far.`);
}

/** Models and version; again when the API key has changed. */
async function connect() {
  client.apiKey = value("api-key");
  showError(null);
  replicas.refresh();
  try {
    const models = (await client.get("v1/models")).data;
    byId("model").replaceChildren(...models.map((model) => element("option", { value: model.id },
      model.id.split("/").filter(Boolean).slice(-2).join("/"))));
    const { version } = await client.get("version");
    byId("served").textContent = `context ${models[0].max_model_len} tokens · version ${version}`;
  } catch (error) {
    showError(error);
  }
}

byId("runs").append(drafted.element, plain.element);
byId("request").addEventListener("submit", (event) => {
  event.preventDefault();
  submit();
});
byId("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) submit();
});
byId("stop").addEventListener("click", () => stopping?.abort());
document.addEventListener("keydown", (event) => event.key === "Escape" && stopping?.abort());
byId("new-chat").addEventListener("click", () => {
  turns.length = 0;
  byId("new-chat").hidden = true;
  showTurns("chat");
  byId("prompt").focus();
});
for (const input of document.querySelectorAll("input[name=mode]")) {
  input.addEventListener("change", () => {
    byId("prompt-name").textContent = mode() === "chat" ? "Message" : "Prompt";
    byId("new-chat").hidden = mode() !== "chat" || !turns.length;
    showTurns(mode());
  });
}
byId("api-key").addEventListener("change", connect);
draw();
connect();
