// Changes of the document that keep what has not changed: its nodes, and with them the user's selection and scrolling.

/** A new element. */
export function element(tag, className, text) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

/** Changes a text node to `wanted`. Appending keeps the user's selection in the earlier text. */
export function extend(node, wanted) {
  if (node.data === wanted) return;
  if (wanted.startsWith(node.data)) node.appendData(wanted.slice(node.data.length));
  else node.data = wanted;
}

/**
 * Makes `old` like `made`, with as few changes as the order of the children allows. Takes nodes out of `made`.
 * What is not HTML (a formula) is replaced as a whole.
 */
export function patch(old, made) {
  for (const { name } of [...old.attributes]) if (!made.hasAttribute(name)) old.removeAttribute(name);
  for (const { name, value } of made.attributes) if (old.getAttribute(name) !== value) old.setAttribute(name, value);
  let before = old.firstChild;
  let wanted = made.firstChild;
  while (wanted) {
    const next = wanted.nextSibling;
    if (!before) old.append(wanted);
    else {
      if (before.nodeType === Node.TEXT_NODE && wanted.nodeType === Node.TEXT_NODE) extend(before, wanted.data);
      else if (before instanceof HTMLElement && before.nodeName === wanted.nodeName) patch(before, wanted);
      else if (!before.isEqualNode(wanted)) {
        before.replaceWith(wanted);
        before = wanted;
      }
      before = before.nextSibling;
    }
    wanted = next;
  }
  while (before) {
    const next = before.nextSibling;
    before.remove();
    before = next;
  }
}
