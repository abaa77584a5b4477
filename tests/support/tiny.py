"""A tiny real Llama, a few random tokens to memorise, and a child Python that finds this checkout."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

import hf_shampoo4
from tests.support import LONGEST_CHILD, end

ROOT = Path(__file__).resolve().parents[2]

hf_shampoo4.register()


def llama(**config: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=256, max_position_embeddings=64, **{**sizes, **config}))


CHAT_TEMPLATE = """\
{%- for message in messages %}{{ '<|im_start|>' + message.role + '\\n' }}
{%- if message.role == 'assistant' %}{% generation %}{{ message.content + '<|im_end|>' }}{% endgeneration %}
{%- else %}{{ message.content + '<|im_end|>' }}{% endif %}{{ '\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""


def chat_model(folder: Path) -> Path:
    """A folder with a tiny Llama, its byte-level tokenizer and a chat template, as on the hub."""
    from transformers import PreTrainedTokenizerFast

    from hf_shampoo4.training.data import train_bpe

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=train_bpe([], 257), eos_token="<|endoftext|>")
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(
        vocab_size=len(tokenizer), max_position_embeddings=64, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id, bos_token_id=None, **sizes,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def conversations(path: Path, count: int = 24) -> Path:
    """JSONL of question and answer."""
    lines = [
        {"messages": [{"role": "user", "content": f"{i}+1?"}, {"role": "assistant", "content": f"{i + 1}."}]}
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


class Tokens(Dataset):
    """`count` random sequences, the same in every run."""

    def __init__(self, count: int = 8, length: int = 16) -> None:
        self.tokens = torch.randint(256, (count, length), generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.tokens[index], "labels": self.tokens[index]}


def arguments(folder: Path, **changes: Any) -> TrainingArguments:
    given: dict[str, Any] = {
        "output_dir": str(folder), "use_cpu": True, "report_to": "none", "disable_tqdm": True, "save_strategy": "no",
        "max_steps": 6, "per_device_train_batch_size": 4, "logging_steps": 1, "learning_rate": 1e-2,
        "optim": "shampoo4bit", "optim_args": "algorithm=shampoo,stats_every=2,roots_every=2",
    }  # fmt: skip
    return TrainingArguments(**{**given, **changes})


def often(optim: str) -> str:
    """`--optim_args` that refresh often; for shampoo4bit those of the papers' Shampoo, which has roots."""
    if optim == "adamw4bit":
        return ""  # has nothing to refresh
    return "algorithm=shampoo,stats_every=2,roots_every=2" if optim == "shampoo4bit" else "stats_every=2"


def python(*words: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a fresh Python in which this checkout can be imported.

    Raises:
        TimeoutError: it took longer than LONGEST_CHILD; says where each of its processes was.
    """
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    told = {**os.environ, "PYTHONPATH": path, "PYTHONFAULTHANDLER": "1", **environment}
    child = subprocess.Popen(
        [sys.executable, *map(str, words)], env=told, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    try:
        out, err = child.communicate(timeout=LONGEST_CHILD)
    except subprocess.TimeoutExpired:
        end(child.pid)
        raise TimeoutError(f"over {LONGEST_CHILD} seconds:\n{child.communicate()[1][-20000:]}") from None
    return subprocess.CompletedProcess(child.args, child.returncode, out, err)
