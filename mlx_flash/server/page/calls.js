// The tools that a model called.

import { codeBlock } from "./code.js";
import { element, patch } from "./patch.js";

/**
 * Shows calls in a node: [{name, arguments}], where the arguments are a JSON text that may still grow.
 * Returns false while their colours are on their way.
 */
export function showCalls(node, calls = []) {
  const made = element("div", node.className);
  let all = true;
  for (const { name, arguments: text } of calls) {
    const { node: block, complete } = codeBlock(readable(text), "json");
    all &&= complete;
    block.classList.add("call");
    block.querySelector(".language").replaceChildren("Tool call ", element("strong", "", name));
    block.querySelector("pre").setAttribute("aria-label", `Arguments of ${name}`);
    made.append(block);
  }
  patch(node, made);
  return all;
}

function readable(text) {
  try {
    return JSON.stringify(JSON.parse(text), null, 2);
  } catch {
    return text; // It has not arrived whole.
  }
}
