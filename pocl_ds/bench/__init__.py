"""Measurements that anyone can repeat: `pocl bench NAME`."""

BENCHMARKS = {
    "rouge": ("pocl_ds.bench.rouge", "ROUGE-L against the package rouge-score"),
    "scale": ("pocl_ds.bench.scale", "ranking, planning and sampling at 10k to 10M samples"),
}
