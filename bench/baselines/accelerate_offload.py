"""Generates with transformers, with the weights that do not fit offloaded to the disk by accelerate.

It runs in a Python of its own, so it imports nothing of this project:
PYTHON accelerate_offload.py CHECKPOINT BUDGET_BYTES TOKENS PROMPT. The last line is JSON.
"""

import json
import resource
import sys
import tempfile
import time

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

OTHER_BYTES = 250 << 20  # left for buffers of layers on their way and for activations


def main() -> None:
    folder, budget, tokens, prompt = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    room = max(budget - used - OTHER_BYTES, 1 << 20)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with tempfile.TemporaryDirectory() as offloaded:
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype="auto", device_map="auto", max_memory={"cpu": room}, offload_folder=offloaded
        )
        if tokenizer.chat_template:
            given = tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
        else:
            given = tokenizer(prompt, return_tensors="pt")
        times: list[float] = []

        class Noting(torch.nn.Module):
            def put(self, _: object) -> None:
                times.append(time.perf_counter())

            def end(self) -> None:
                pass

        with torch.inference_mode():
            done = model.generate(
                **given, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, streamer=Noting()
            )
    seconds = (times[-1] - times[1]) / (len(times) - 2)  # the first entry is the prompt itself
    found = done[0, given["input_ids"].shape[1] :].tolist()
    on_disk = sum(place == "disk" for place in getattr(model, "hf_device_map", {}).values())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"tokens": found, "token_s": seconds, "peak": peak, "modules_on_disk": on_disk}))


main()
