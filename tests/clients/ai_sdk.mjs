// The AI SDK: node ai_sdk.mjs URL. Prints what each case gave, or its error.
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateObject, generateText, stepCountIs, streamObject, streamText, tool } from "ai";
import { z } from "zod";

globalThis.AI_SDK_LOG_WARNINGS = false;
const baseURL = `${process.argv[2]}/v1`;
const sent = []; // the bodies of the requests to the openai provider
const fetch = (url, options) => {
  sent.push(JSON.parse(options.body));
  return globalThis.fetch(url, options);
};
const openai = createOpenAI({ baseURL, apiKey: "none", fetch });
const compatible = createOpenAICompatible({ name: "mlx_flash", baseURL, includeUsage: true });
const structured = createOpenAICompatible({ name: "mlx_flash", baseURL, supportsStructuredOutputs: true });
const models = { compatible: compatible("demo"), chat: openai.chat("demo"), responses: openai("demo") };

const tools = {
  get_weather: tool({
    description: "Tells the weather.",
    inputSchema: z.object({ city: z.string() }),
    execute: async () => "22 degrees",
  }),
};
const schema = z.object({ city: z.enum(["Paris", "Rome"]), degrees: z.number().int() });
const prompt = "How is it in Paris?";
const asked = "Say it as JSON.";

const cases = {};
for (const [name, model] of Object.entries(models)) {
  cases[`text, ${name}`] = async () => {
    const { text, reasoningText, usage } = await generateText({ model, prompt: "Hello?", maxRetries: 0 });
    return { text, reasoningText, counted: usage.outputTokens > 0 };
  };
  cases[`stream, ${name}`] = async () => {
    const result = streamText({ model, prompt: "Hello?", maxRetries: 0 });
    let text = "";
    for await (const part of result.textStream) text += part;
    return { text, reasoningText: await result.reasoningText, counted: (await result.usage).outputTokens > 0 };
  };
  cases[`loop, ${name}`] = async () => {
    const { text, steps } = await generateText({ model, prompt, tools, stopWhen: stepCountIs(3), maxRetries: 0 });
    return { text, steps: steps.map((step) => step.finishReason) };
  };
  cases[`streamed loop, ${name}`] = async () => {
    const result = streamText({ model, prompt, tools, stopWhen: stepCountIs(3), maxRetries: 0 });
    await result.consumeStream();
    return { text: await result.text, steps: (await result.steps).map((step) => step.finishReason) };
  };
  cases[`forced call, ${name}`] = async () => {
    const toolChoice = { type: "tool", toolName: "get_weather" };
    const { toolCalls } = await generateText({ model, prompt: "As you like.", tools, toolChoice, maxRetries: 0 });
    return toolCalls.map((call) => [call.toolName, call.input]);
  };
}
for (const [name, model] of Object.entries({ ...models, structured: structured("demo") })) {
  cases[`object, ${name}`] = async () => (await generateObject({ model, schema, prompt: asked, maxRetries: 0 })).object;
  cases[`streamed object, ${name}`] = async () => {
    const result = streamObject({ model, schema, prompt: asked, maxRetries: 0 });
    for await (const part of result.partialObjectStream) void part;
    return await result.object;
  };
}

const found = {};
for (const [name, run] of Object.entries(cases)) {
  try {
    found[name] = await run();
  } catch (error) {
    found[name] = { error: String(error) };
  }
}
found.references = sent.filter((body) => JSON.stringify(body).includes('"item_reference"')).length;
console.log(JSON.stringify(found));
