// OpenAI's client for JavaScript against a server: node openai.mjs URL. Prints what each case gave, or its error.
import OpenAI from "openai";
import { zodResponseFormat, zodTextFormat } from "openai/helpers/zod";
import { z } from "zod";

const client = new OpenAI({ baseURL: `${process.argv[2]}/v1`, apiKey: "none", maxRetries: 0 });
const model = "demo";
const messages = [{ role: "user", content: "How is it in Paris?" }];
const parameters = {
  type: "object",
  properties: { city: { type: "string" } },
  required: ["city"],
  additionalProperties: false,
};
const weather = { name: "get_weather", description: "Tells the weather.", parameters };
const tools = [{ type: "function", function: weather }];
const flat = [{ type: "function", ...weather, strict: true }];
const Weather = z.object({ city: z.enum(["Paris", "Rome"]), degrees: z.number().int() });
const asked = [{ role: "user", content: "Say it as JSON." }];

const cases = {
  models: async () => (await client.models.list()).data.map((each) => each.id),

  chat: async () => (await client.chat.completions.create({ model, messages })).choices[0],

  stream: async () => {
    const options = { include_usage: true };
    const stream = await client.chat.completions.create({ model, messages, stream: true, stream_options: options });
    const found = { text: "", thoughts: "" };
    for await (const chunk of stream) {
      found.text += chunk.choices[0]?.delta.content ?? "";
      found.thoughts += chunk.choices[0]?.delta.reasoning_content ?? "";
      if (chunk.usage) found.usage = chunk.usage;
    }
    return found;
  },

  streamed_call: async () => {
    const stream = client.chat.completions.stream({ model, messages, tools });
    const events = new Set();
    stream.on("tool_calls.function.arguments.done", (call) => events.add(call.name));
    const { choices } = await stream.finalChatCompletion();
    return { events: [...events], choice: choices[0] };
  },

  tool_loop: async () => {
    const cities = [];
    const get_weather = ({ city }) => {
      cities.push(city);
      return "22 degrees";
    };
    const callable = { type: "function", function: { ...weather, function: get_weather, parse: JSON.parse } };
    const runner = client.chat.completions.runTools({ model, messages, tools: [callable] });
    return { text: await runner.finalContent(), cities, calls: (await runner.finalFunctionToolCall())?.name };
  },

  forced_call: async () => {
    const tool_choice = { type: "function", function: { name: "get_weather" } };
    const free = [{ role: "user", content: "As you like." }];
    return (await client.chat.completions.create({ model, messages: free, tools, tool_choice })).choices[0];
  },

  parsed: async () => {
    const response_format = zodResponseFormat(Weather, "weather");
    return (await client.chat.completions.parse({ model, messages: asked, response_format })).choices[0].message.parsed;
  },

  response: async () => {
    const response = await client.responses.create({ model, input: messages, tools: flat });
    return { status: response.status, text: response.output_text, output: response.output };
  },

  response_loop: async () => {
    const first = await client.responses.create({ model, input: messages, tools: flat, store: false });
    const call = first.output.find((item) => item.type === "function_call");
    const result = { type: "function_call_output", call_id: call.call_id, output: "22 degrees" };
    const input = [...messages, ...first.output, result];
    return (await client.responses.create({ model, input, tools: flat, store: false })).output_text;
  },

  response_stream: async () => {
    const stream = client.responses.stream({ model, input: messages, tools: flat });
    const kinds = new Set();
    for await (const event of stream) kinds.add(event.type);
    const response = await stream.finalResponse();
    return { kinds: [...kinds], text: response.output_text, types: response.output.map((item) => item.type) };
  },

  response_parsed: async () => {
    const text = { format: zodTextFormat(Weather, "weather") };
    return (await client.responses.parse({ model, input: asked, text })).output_parsed;
  },

  refused: async () => {
    try {
      await client.chat.completions.create({ model, messages, n: 100 });
    } catch (error) {
      return { status: error.status, param: error.param, right: error instanceof OpenAI.BadRequestError };
    }
  },
};

const found = {};
for (const [name, run] of Object.entries(cases)) {
  try {
    found[name] = await run();
  } catch (error) {
    found[name] = { error: String(error) };
  }
}
console.log(JSON.stringify(found));
