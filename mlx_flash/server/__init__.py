"""The OpenAI API over one model that streams from the SSD: `python -m mlx_flash.server`.

Why not mlx-lm's own server: it was read first. Its generation loop is one long private method that also batches, which
knows nothing of the memory plan; its `main`, its `stream_generate` and its batches raise the wired-memory limit; its
queue has no bound, and its prompt caches are bounded by their number, not by the plan; a request is never refused for
its length; and a client that goes away is noticed when something is written to it, so not in the queue, and without
streaming not before the end. To change these would be to replace its handler, its generator and its cache by name, and
to follow every change of private code. So HTTP is Starlette on uvicorn, which say when a client leaves, and the loop
around `stream_generate` is `engine.py`.
"""
