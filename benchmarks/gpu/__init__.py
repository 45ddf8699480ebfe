"""One command for a machine with a GPU: it builds, tests and measures everything, in parts.

    python -m benchmarks.gpu --part measure       what the device can do: copy, cuBLAS, SDPA, torch's own sparse paths
    python -m benchmarks.gpu --part test          the tests on the GPU, compute-sanitizer, tensors of 2^31 elements
    python -m benchmarks.gpu --part kernels       masks, masked layers, sparse layers     (performance goals G1 to G16)
    python -m benchmarks.gpu --part attention     block-sparse attention                  (G17 to G19)
    python -m benchmarks.gpu --part distill       distillation losses                     (G20 to G25)
    python -m benchmarks.gpu --part model         whole BERTs, also of finished runs      (G26 to G29)
    python -m benchmarks.gpu --part train         the main job, a step of every method    (G2, G30)
    python -m benchmarks.gpu --part all           one after the other

Parts run in the order given. Each ends within --budget seconds (540), all together within --within, and says what it
did not come to; its cells are ordered by importance. It writes benchmarks/results/<device>/<part>.json and .md after
every row, so that whatever ends it leaves what there was.

How it is measured:

- Candidates of a row take turns, 31 rounds, each beginning with another; a number is the median, with the lowest and
  the highest. Data are random, never zeros. Ratios are within one row.
- "cold": inputs rotate through so many sets that what each candidate reads of them is three times the cache; "warm":
  the same again and again; "as run": whole models and steps.
- "gpu": events around calls that were queued up while the GPU was kept busy, so that launches are hidden where the host
  is fast enough; "graph": replays of a CUDA graph of the calls, for what takes less than 60 microseconds; "host": the
  wall clock.
- Before it is timed a result is compared with float64 (float32 for whole models): it may be twice as far off as
  torch's own in the same dtype, three times for gradients; fresh memory is filled with NaN before. A wrong result is
  a red row without times. So is an error, in one line; the other cells go on, in a new process where the old one's
  device no longer answers.
- The physical limit of a row is what its launch moves and computes by the kernel's own cost function ("as launched"),
  or the least that any kernel must, over the copy's bandwidth and the large product's rate, measured by the same
  command. Targets are judged beside every row: met or not.

An op without a kernel for the GPU is a skipped cell, and its reason is said.

    python -m benchmarks.gpu --part all --rehearse

runs the code of every cell on the CPU with tiny shapes, Triton's kernels in its interpreter, and writes nothing but
where --out says: so that nothing of this fails when there is a GPU at last.
"""
