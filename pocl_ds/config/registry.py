"""Names that recipes may use. Plugins add names to these registries.

Only names and default options are here, so that a recipe can be checked without importing torch.
The comment above each registry names the module with the functions; tests compare both.
"""

from __future__ import annotations

# Losses (docs/method.md, eq. 11 to 21): name -> options with their defaults. The functions are in
# `losses/divergences.py` and `losses/cross_tokenizer.py`; `sft` has no divergence.
LOSSES: dict[str, dict[str, float | bool]] = {
    "fkl": {},
    "rkl": {},
    "jsd": {"beta": 0.5},
    "tvd": {},
    "skl": {"skew": 0.1},
    "srkl": {"skew": 0.1, "detach_mixture": False},
    "akl": {"mu": 0.5},
    "ab": {"ab_alpha": 0.2, "ab_beta": 0.7},
    "sft": {},
    "uld": {"by_position": False},
    "alm": {},
}
# Losses between different tokenizers.
CROSS_TOKENIZER_LOSSES = ("uld", "alm")
# Rules for the temperature and weight of each token (docs/method.md, eq. 29 to 31): name -> options
# with their defaults. The functions are in `losses/token_rules.py`.
TOKEN_RULES: dict[str, dict[str, float | bool]] = {
    "adakd": {"strength": 0.5, "center": 0.5, "threshold": 0.0},
    "entropy_weight": {"strength": 0.5, "center": 1.0},
    "position_decay": {"end_weight": 0.5},
}

# Values of teacher.mode that cache records (`teachers/codecs.py`), and the one loss that sampled
# records support: its gradient is linear in the teacher's probabilities.
RECORD_MODES = ("cached_topk", "cached_sampled")
SAMPLED_LOSS = "fkl"

# Policies (`rollouts/policies.py`): name -> whether the student generates responses in training.
POLICIES: dict[str, bool] = {
    "off": False,
    "gkd": True,
    "distillm": True,
    "seqkd": False,
    "mixture": True,
}
# Ranking strategies (`difficulty/rank.py`).
STRATEGIES = ["fusion", "rouge_l", "cross_entropy", "random"]
# The strategy that orders by the number of response tokens, short ones first.
LENGTH_STRATEGY = "length"
# The strategy that orders by the column of this name in `ranking.scores`.
FILE_STRATEGY = "difficulty"
# Those that order by no score of the student, and are not among STRATEGIES.
OTHER_STRATEGIES = (LENGTH_STRATEGY, FILE_STRATEGY)
# Those that need no answers of the student.
UNSCORED_STRATEGIES = ("random", LENGTH_STRATEGY)
STRATEGIES_WITHOUT_ROUGE_L = (*UNSCORED_STRATEGIES, FILE_STRATEGY)
# Difficulty metrics besides ROUGE-L and cross-entropy (`difficulty/score.py`). Each is a ranking
# strategy as well.
METRICS: list[str] = []
# Scores that the student measures when a stage begins: its cross-entropy of the reference and its
# divergence from the teacher, and the teacher's cross-entropy; in nats per loss token. The last two
# need the teacher. Further scores are `rouge_l` of the step `score`, and `place`: from 0 for the
# easiest sample to 1 for the hardest.
MEASURED_SCORES = ("cross_entropy", "kd_loss", "teacher_cross_entropy")
TEACHER_SCORES = MEASURED_SCORES[1:]
# Measures of difficulty that the current student gives (`curriculum/sample_scores.py`): name -> the
# scores that it reads; None for a plugin's, which may read any.
DIFFICULTIES: dict[str, tuple[str, ...] | None] = {
    "fusion": ("rouge_l", "cross_entropy"),
    "cross_entropy": ("cross_entropy",),
    "kd_loss": ("kd_loss",),
    "loss_ratio": ("cross_entropy", "teacher_cross_entropy"),
}
# Rules for the weights of samples (`curriculum/sample_weights.py`): name -> options with defaults,
# and name -> the scores that it reads; a plugin's, which may read any, is not in the second table.
SAMPLE_WEIGHTS: dict[str, dict[str, float]] = {
    "pass_rate": {"alpha": 1.0, "beta": 1.0},
    "band": {"easiest": 0.0, "hardest": 1.0},
    "stratified": {"share": 0.5, "hard_share": 0.5},
    "loss": {"power": 1.0},
}
SAMPLE_WEIGHT_SCORES: dict[str, tuple[str, ...]] = {
    "pass_rate": ("rouge_l",),
    "band": ("place",),
    "stratified": ("place",),
    "loss": ("kd_loss",),
}
# Known benchmarks (`evaluation/benchmarks.py`).
BENCHMARKS = ("dolly", "self_inst", "vicuna", "sni", "unni")
# Value of student.lora.target_modules for every linear layer except the output head.
ALL_LINEAR = "all-linear"
