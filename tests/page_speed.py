"""Measures how long the page takes to show each piece of a long answer that arrives: python tests/page_speed.py

Prints one JSON line per kind of answer. An update is four characters more of 16,000; script_ms is the page's own work.
"""

from __future__ import annotations

import json

from page_browser import chromium  # type: ignore[import-not-found]  # found beside this file
from scripted_page import LONG_ANSWER, scripted_page  # type: ignore[import-not-found]

CHARACTERS = 16_000  # about 4,000 tokens
FUNCTION = 'def f(x, y=1):\n    """A text."""\n    return [x + i * y for i in range(10)]  # a comment\n\n'
ANSWERS = {
    "everything": (LONG_ANSWER * 20)[:CHARACTERS],
    "one block of code": "```python\n" + (FUNCTION * 400)[:CHARACTERS],
}
MEASURE = """async text => {
    const { Body } = await import('/page/body.js');
    const nodes = ['div', 'div'].map(tag => document.getElementById('log').appendChild(document.createElement(tag)));
    const [warm, body] = nodes.map(node => new Body(node));
    while (!warm.complete) {
        warm.show('```python\\nx = 1\\n```\\n\\n$x$');
        await new Promise(done => setTimeout(done, 10));
    }
    const script = [], drawn = [];
    for (let size = 4; size <= text.length; size += 4) {
        const began = performance.now();
        body.show(text.slice(0, size), true);
        script.push(performance.now() - began);
        nodes[1].offsetHeight; // the layout
        drawn.push(performance.now() - began);
        if (size % 400 === 0) await new Promise(requestAnimationFrame);
    }
    nodes.forEach(node => node.remove());
    const of = (all, share) => Number(all.sort((a, b) => a - b)[Math.floor(share * (all.length - 1))].toFixed(2));
    const figures = all => ({ median: of(all, 0.5), p95: of(all, 0.95), p99: of(all, 0.99), max: of(all, 1) });
    return { updates: script.length, script_ms: figures(script), with_layout_ms: figures(drawn) };
}"""


def main() -> None:
    with scripted_page() as server, chromium() as browser:
        page = browser.new_page()
        page.goto(server.url)
        for name, words in ANSWERS.items():
            print(json.dumps({"answer": name, **page.evaluate(MEASURE, words)}))


if __name__ == "__main__":
    main()
