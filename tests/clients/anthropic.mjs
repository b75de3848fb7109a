// Anthropic's client for JavaScript: node anthropic.mjs URL. Prints what each case gave, or its error.
import Anthropic from "@anthropic-ai/sdk";

const client = new Anthropic({ baseURL: process.argv[2], apiKey: "none", maxRetries: 0 });
const model = "claude-any";
const max_tokens = 500;
const messages = [{ role: "user", content: "How is it in Paris?" }];
const input_schema = { type: "object", properties: { city: { type: "string" } }, required: ["city"] };
const weather = { name: "get_weather", description: "Tells the weather.", input_schema };
const tools = [weather];
const schema = {
  type: "object",
  properties: { city: { enum: ["Paris", "Rome"] }, degrees: { type: "integer" } },
  required: ["city", "degrees"],
  additionalProperties: false,
};

const cases = {
  message: async () => (await client.messages.create({ model, max_tokens, messages })).content,

  stream: async () => {
    const stream = client.messages.stream({ model, max_tokens, messages, tools });
    let text = "";
    stream.on("text", (part) => (text += part));
    const message = await stream.finalMessage();
    return { text, types: message.content.map((block) => block.type), reason: message.stop_reason };
  },

  loop: async () => {
    const cities = [];
    const run = ({ city }) => {
      cities.push(city);
      return "22 degrees";
    };
    const callable = { ...weather, run, parse: (input) => input };
    const message = await client.beta.messages.toolRunner({ model, max_tokens, messages, tools: [callable] });
    return { text: message.content.at(-1).text, cities };
  },

  forced_call: async () => {
    const tool_choice = { type: "tool", name: "get_weather" };
    const asked = [{ role: "user", content: "As you like." }];
    const { content } = await client.messages.create({ model, max_tokens, messages: asked, tools, tool_choice });
    return content.filter((block) => block.type === "tool_use").map((block) => [block.name, block.input]);
  },

  schema: async () => {
    const output_config = { format: { type: "json_schema", schema } };
    const asked = [{ role: "user", content: "Say it as JSON." }];
    const { content } = await client.messages.create({ model, max_tokens, messages: asked, output_config });
    return JSON.parse(content.at(-1).text);
  },

  count: async () => (await client.messages.countTokens({ model, messages, tools })).input_tokens > 100,

  models: async () => (await client.models.list()).data.map((each) => each.id),

  refused: async () => {
    try {
      await client.messages.create({ model, max_tokens, messages: [{ role: "user", content: 3 }] });
    } catch (error) {
      return { status: error.status, type: error.error?.error?.type };
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
