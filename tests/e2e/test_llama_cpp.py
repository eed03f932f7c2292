"""The quickstart's student, converted by llama.cpp's own script, is the same model.

The variable LLAMA_CPP names a folder with convert_hf_to_gguf.py, conversion/ and gguf-py/, as the
repository of llama.cpp and the source archive of the package llama-cpp-python have them.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from command_line import pocl
from transformers import AutoModelForCausalLM, AutoTokenizer

TEXTS = ("Grace likes beans. Who likes beans?", "x = 12 + 3;  print(x)\n\n", "Ünïcödé – 你好 🙂")
MESSAGES = [{"role": "user", "content": TEXTS[0]}]


@pytest.mark.weekly
@pytest.mark.skipif("LLAMA_CPP" not in os.environ, reason="LLAMA_CPP names no llama.cpp")
def test_a_converted_student_has_the_same_logits(tmp_path: Path) -> None:
    run, fields = tmp_path / "run", ("curriculum.epochs_per_stage=1", "evaluate.models=student")
    pocl("run", "quickstart", "--run-dir", str(run), *fields, "--until", "export")
    script = Path(os.environ["LLAMA_CPP"], "convert_hf_to_gguf.py")
    command = [sys.executable, str(script), str(run / "export")]
    command += ["--outfile", str(tmp_path / "student.gguf"), "--outtype", "f32"]
    subprocess.run(command, check=True, capture_output=True)

    exported, converted = str(run / "export"), {"gguf_file": "student.gguf"}
    tokenizer = AutoTokenizer.from_pretrained(exported)
    other_tokenizer = AutoTokenizer.from_pretrained(tmp_path, **converted)
    model = AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32).eval()
    other = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, **converted).eval()
    for text in TEXTS:
        ids = tokenizer(text, return_tensors="pt").input_ids
        assert other_tokenizer(text).input_ids == ids[0].tolist()
        with torch.no_grad():
            assert torch.equal(model(ids).logits, other(ids).logits)
    prompts = [
        own.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
        for own in (tokenizer, other_tokenizer)
    ]
    assert prompts[0] == prompts[1] and other_tokenizer.eos_token == tokenizer.eos_token
