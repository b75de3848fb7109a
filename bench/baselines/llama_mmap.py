"""Generates with llama.cpp, whose weights are mapped: the page cache holds what fits into the memory cgroup.

It runs in a Python of its own, so it imports nothing of this project:
PYTHON llama_mmap.py GGUF BUDGET_BYTES TOKENS PROMPT. The last line is JSON.
"""

import json
import resource
import sys
import time

from llama_cpp import Llama


def main() -> None:
    path, tokens, prompt = sys.argv[1], int(sys.argv[3]), sys.argv[4]
    model = Llama(path, n_ctx=512, n_threads=2, use_mmap=True, verbose=False)
    given = model.tokenize(prompt.encode())
    found, times = [], []
    for token in model.generate(given, temp=0.0):
        found.append(int(token))
        times.append(time.perf_counter())
        if len(found) == tokens:
            break
    seconds = (times[-1] - times[0]) / (len(times) - 1)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"tokens": found, "token_s": seconds, "peak": peak}))


main()
