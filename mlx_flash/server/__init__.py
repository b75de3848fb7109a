"""The OpenAI API over one model that streams from the SSD: `python -m mlx_flash.server`.

This is not mlx-lm's own server, for these reasons:

- Its generation loop is one long private method that also batches, and it knows nothing of the memory plan.
- Its `main`, its `stream_generate` and its batches raise the wired-memory limit.
- Its queue has no bound, and its prompt caches are limited by their number, not by the plan.
- It never refuses a request for its length.
- It notices that a client has left only when it writes to it: not in the queue, and without streaming not before the
  end of the answer.

To change this, one would have to replace its handler, its generator and its cache, and follow every change of private
code. So HTTP is handled by Starlette on uvicorn, which report when a client leaves, and the loop around
`stream_generate` is in `engine.py`.
"""
