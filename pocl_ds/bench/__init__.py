"""Reproducible benchmarks: `pocl bench NAME`."""

# Name -> module with a function `run(arguments, out)`, and one sentence for `pocl bench list`.
BENCHMARKS = {
    "rouge": ("pocl_ds.bench.rouge", "Speed of ROUGE-L against the package rouge-score."),
    "loss": (
        "pocl_ds.bench.loss",
        "Time and memory of output head and divergence against full logits and Liger.",
    ),
    "kernels": (
        "pocl_ds.bench.kernels",
        "Registers, spills and, on a GPU, time of the loss kernel; compiling needs no GPU.",
    ),
    "step": (
        "pocl_ds.bench.step",
        "Time and memory of an optimizer step against full logits, SFT, TRL and the floor.",
    ),
    "gpu": (
        "pocl_ds.bench.gpu.run",
        "Everything that matters on one GPU, in at most 8 minutes (launch/gpu.sh).",
    ),
    "teacher": (
        "pocl_ds.bench.teacher",
        "Cached against online teacher: a step, a complete run, reads from disk.",
    ),
    "records": (
        "pocl_ds.bench.records",
        "Bytes of a token and error of the gradient, with top-k and with sampled logits.",
    ),
    "balance": (
        "pocl_ds.bench.balance",
        "Load imbalance of ranks on long-tailed lengths, and a step of two ranks.",
    ),
    "rollout": (
        "pocl_ds.bench.rollout",
        "Speed of the student's responses in training, with vLLM and with transformers.",
    ),
    "estimate": (
        "pocl_ds.bench.estimate",
        "Memory and FLOPs that `pocl estimate` predicts against measured ones.",
    ),
    "long-samples": (
        "pocl_ds.bench.long_samples",
        "Memory and time of a step with one long sample, on one rank and shared by two.",
    ),
    "overhead": (
        "pocl_ds.bench.overhead",
        "Cost of scoring and ranking relative to the training of a finished run.",
    ),
    "checkpoint": (
        "pocl_ds.bench.checkpoint",
        "Time of synchronous and asynchronous saves, of loading and converting a checkpoint.",
    ),
    "data": (
        "pocl_ds.bench.data",
        "Records per second and memory of `pocl preprocess`, beside `datasets.map`.",
    ),
    "scale": (
        "pocl_ds.bench.scale",
        "Time and memory of ranking, planning and sampling for 10k to 10M samples.",
    ),
}
