"""Measurements that anyone can repeat: `pocl bench NAME`."""

BENCHMARKS = {
    "rouge": ("pocl_ds.bench.rouge", "ROUGE-L against the package rouge-score"),
    "loss": (
        "pocl_ds.bench.loss",
        "head and divergence: time and memory against full logits and Liger",
    ),
    "step": ("pocl_ds.bench.step", "a training step against full logits, SFT, TRL, and the floor"),
    "teacher": (
        "pocl_ds.bench.teacher",
        "what it saves to ask the teacher once: a step, a whole run, reads",
    ),
    "rollout": (
        "pocl_ds.bench.rollout",
        "how fast the student writes while it learns, with vLLM and transformers",
    ),
    "size": (
        "pocl_ds.bench.estimate",
        "pocl estimate against measured memory, and FLOPs against torch's counter",
    ),
    "overhead": (
        "pocl_ds.bench.overhead",
        "what scoring and ranking cost beside the training, in a finished run",
    ),
    "checkpoint": (
        "pocl_ds.bench.checkpoint",
        "saving, at once and in the background, loading and converting",
    ),
    "scale": ("pocl_ds.bench.scale", "ranking, planning and sampling at 10k to 10M samples"),
}
