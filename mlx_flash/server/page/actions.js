// What can be done with a message: step between its versions, edit a question, continue an answer, ask for another.

import { canContinue } from "./answering.js";

function button(text, className, onClick, title) {
  const made = document.createElement("button");
  made.type = "button";
  made.className = className;
  made.textContent = text;
  if (title) made.title = title;
  made.addEventListener("click", onClick);
  return made;
}

/**
 * The buttons under a message. last: whether it is the last one. versions: all messages in its place.
 * onStep(message), onEdit(message, content), onContinue(message), onRetry(message).
 */
export function actionsOf(message, { last, versions, onStep, onEdit, onContinue, onRetry }) {
  if (message.state === "streaming") return [];
  const made = versions.length > 1 ? [stepper(message, versions, onStep)] : [];
  if (message.role === "user") {
    const edit = button("Edit", "edit", () => editor(edit.closest("article"), message, onEdit), "Ask it otherwise");
    return [...made, edit];
  }
  if (last && canContinue(message)) {
    made.push(button("Continue", "continue", () => onContinue(message), "Go on where this answer ends"));
  }
  return [...made, button("Retry", "retry", () => onRetry(message), "Ask for another answer")];
}

/** "‹ 2/3 ›" */
function stepper(message, versions, onStep) {
  const group = document.createElement("span");
  group.className = "versions";
  group.setAttribute("role", "group");
  group.setAttribute("aria-label", "Versions");
  const now = versions.indexOf(message);
  const step = (by, text, label) => {
    const made = button(text, "step", () => onStep(versions[now + by]));
    made.setAttribute("aria-label", label);
    made.disabled = !versions[now + by];
    return made;
  };
  const count = document.createElement("span");
  count.textContent = `${now + 1}/${versions.length}`;
  group.append(step(-1, "‹", "Earlier version"), count, step(1, "›", "Later version"));
  return group;
}

/** Puts a field in place of a question's text. Enter sends the changed question, Escape leaves it as it was. */
function editor(article, message, onEdit) {
  const form = document.createElement("form");
  form.className = "editor";
  const field = document.createElement("textarea");
  field.value = message.content;
  field.rows = 2;
  field.setAttribute("aria-label", "Question");
  const row = document.createElement("div");
  row.className = "row";
  const close = () => {
    form.remove();
    article.classList.remove("editing");
    article.querySelector(".edit")?.focus();
  };
  const send = button("Send", "main", () => {}, "");
  send.type = "submit";
  row.append(button("Cancel", "", close), send);
  form.append(field, row);
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    const content = field.value.trim();
    if (content || message.files || message.images) onEdit(message, content);
  });
  field.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      form.requestSubmit();
    } else if (event.key === "Escape") {
      event.preventDefault();
      close();
    }
  });
  article.querySelector("form.editor")?.remove();
  article.classList.add("editing");
  article.append(form);
  field.focus();
}
