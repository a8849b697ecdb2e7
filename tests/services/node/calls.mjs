// Calls of the official client; prints what it received as one JSON object.
// Arguments: the base URL.
import OpenAI from "openai";

const client = new OpenAI({ baseURL: process.argv[2], apiKey: "none", maxRetries: 0, timeout: 60000 });
const messages = [{ role: "user", content: "the fox" }];
const greedy = { model: "", max_tokens: 24, temperature: 0, ignore_eos: true };
const seeded = { model: "", max_tokens: 24, seed: 7, ignore_eos: true, verification: "coupled" };
const prompt = "the quick";
const found = {};

async function refusal(call) {
  try {
    await call;
    return null;
  } catch (error) {
    return { name: error.constructor.name, status: error.status, param: error.param };
  }
}

async function streamed(stream, text) {
  const chunks = [];
  for await (const chunk of stream) chunks.push(chunk);
  const last = chunks[chunks.length - 1];
  const parts = chunks.flatMap((chunk) => chunk.choices).map(text);
  return { text: parts.join(""), usage: last.usage, speculation: last.metrics.speculative_decoding };
}

found.models = (await client.models.list()).data.map((model) => model.id);
for (const [name, fields] of Object.entries({ greedy, seeded })) {
  found[name] = {};
  for (const gamma of [0, 4]) {
    const whole = await client.completions.create({ ...fields, prompt, gamma });
    const stream = await client.completions.create({
      ...fields, prompt, gamma, stream: true, stream_options: { include_usage: true },
    });
    const chat = await client.chat.completions.create({ ...fields, messages, gamma });
    const chatStream = await client.chat.completions.create({
      ...fields, messages, gamma, stream: true, stream_options: { include_usage: true },
    });
    found[name][gamma] = {
      whole: whole.choices[0].text,
      stream: await streamed(stream, (choice) => choice.text),
      chat: chat.choices[0].message.content,
      chatStream: await streamed(chatStream, (choice) => choice.delta.content ?? ""),
    };
  }
}

const several = await client.chat.completions.create({
  ...seeded, messages, n: 3, logprobs: true, top_logprobs: 2,
});
found.several = several.choices.map((choice) => ({
  index: choice.index,
  numTokens: choice.logprobs.content.length,
  numTop: choice.logprobs.content[0].top_logprobs.length,
}));
found.biased = (await client.completions.create({
  ...greedy, prompt: [116, 104, 101], logit_bias: { 97: 100 },
})).choices[0].text;
found.stopped = (await client.completions.create({
  ...greedy, prompt: [116, 104, 101], logit_bias: { 97: 100 }, stop: [found.biased.slice(0, 3)],
})).choices[0];

found.refusals = [
  await refusal(client.completions.create({ ...greedy, prompt, temprature: 1 })),
  await refusal(client.chat.completions.create({ ...greedy, messages: [] })),
  await refusal(client.completions.create({ ...greedy, prompt, model: "other" })),
];

const endless = await client.completions.create({ ...greedy, prompt, max_tokens: 400, stream: true });
for await (const _ of endless) break; // the client closes the connection
const stopped = await client.chat.completions.create({ ...greedy, messages, max_tokens: 400, stream: true });
for await (const _ of stopped) {
  stopped.controller.abort();
  break;
}
console.log(JSON.stringify(found));
